// What a branch_attention launch needs, torch-free: shared by every backend's kernels.
#pragma once

#include <cstdint>

#include "lopa/float_types.h"

namespace lopa {

// Strides count elements; the head dimension itself has unit stride.
struct BranchAttentionParams {
  const void* q;         // [batch, branches, window, q_heads, head_dim]
  const void* k_cache;   // [batch, capacity, kv_heads, head_dim], or with a block_table
                         // [pages, page_size, kv_heads, head_dim]
  const void* v_cache;   // the same
  const void* k_window;  // [batch, branches, window, kv_heads, head_dim]
  const void* v_window;  // the same
  void* out;             // like q
  float* lse;            // [batch, branches, q_heads, window], contiguous, or null

  int64_t q_stride[4];
  int64_t k_cache_stride[3];
  int64_t v_cache_stride[3];
  int64_t k_window_stride[4];
  int64_t v_window_stride[4];
  int64_t out_stride[4];

  const int32_t* cache_len;    // [batch]
  const int32_t* length;       // [batch, branches]
  const int32_t* prompt_len;   // [batch]; null for the full mask
  const int32_t* block_table;  // [batch, table_width]: the page of every page_size positions of a
                               // sequence's prefix; null where the caches are not paged

  int64_t batch;
  int64_t branches;
  int64_t window;
  int64_t capacity;
  int64_t q_heads;
  int64_t kv_heads;
  int64_t head_dim;
  int64_t block_size;   // 0 for the full mask
  int64_t table_width;  // this and the next two are 0 without a block_table
  int64_t pages;
  int64_t page_size;  // a power of two
  float scale;
  FloatType type;
};

}  // namespace lopa
