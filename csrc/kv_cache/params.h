// What the KV-cache operators need, torch-free: shared by every backend's kernels.
#pragma once

#include <cstdint>

#include "lopa/float_types.h"

namespace lopa {

// Strides count elements; the head dimension itself has unit stride.
struct KvCacheView {
  void* data;         // [layers, batch, capacity, kv_heads, head_dim]
  int64_t stride[4];  // of layers, batch, capacity, kv_heads
};

struct KvWindowView {
  void* data;         // [layers, batch, branches, window, kv_heads, head_dim]
  int64_t stride[5];  // of layers, batch, branches, window, kv_heads
};

// Rows of one projection: [batch, branches, window, heads, head_dim].
struct KvRowsView {
  void* data;
  int64_t stride[4];
};

struct KvSizes {
  int64_t layers;
  int64_t batch;
  int64_t branches;
  int64_t window;
  int64_t capacity;  // 0 where there is no cache
  int64_t kv_heads;
  int64_t q_heads;  // 0 where there are no queries
  int64_t head_dim;
  FloatType type;
};

// RMSNorm (arXiv 1910.07467) over the head dimension, ahead of the rotation: weights [head_dim] of
// the type of the rows; null: none.
struct KvNorms {
  const void* q;
  const void* k;
  float eps;
};

// A Pre-Write without norms.
struct KvWriteParams {
  KvSizes sizes;
  KvRowsView k;
  KvRowsView v;
  KvRowsView q;      // packed with k and v; null without queries
  KvRowsView q_out;  // rotated queries
  KvWindowView k_window;
  KvWindowView v_window;
  KvCacheView k_cache;  // null unless the write goes to the cache too
  KvCacheView v_cache;
  int64_t layer;
  const float* cos_sin;  // [max_position, head_dim]: cosines, then sines; null: no rotation
  int64_t cos_sin_stride;
  int64_t max_position;
  const int32_t* cache_len;   // [batch]; null without rotation and cache
  const int32_t* commit_len;  // [batch]; null unless the write goes to the cache too
};

struct KvPrewriteParams : KvWriteParams {
  KvNorms norms;
};

struct KvCommitParams {
  KvSizes sizes;
  KvCacheView k_cache;
  KvCacheView v_cache;
  KvWindowView k_window;
  KvWindowView v_window;
  const int32_t* winner;      // [batch]
  const int32_t* cache_len;   // [batch]
  const int32_t* commit_len;  // [batch]
};

}  // namespace lopa
