// Pre-Write of one layer on the GPU. Shapes alone fix the grid: lengths and faults are read on the
// device, by every thread for itself.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kv_cache/kernel_base.cuh"
#include "kv_cache/params.h"
#include "kv_cache/rotate_kernel.cuh"
#include "lopa/cuda.cuh"
#include "lopa/divisor.h"
#include "lopa/status.h"

namespace lopa {
namespace kv_cache {

constexpr int kPrewriteThreads = 128;

// A column's rows in groups of kRows of one kind: those of queries, of keys, of values.
struct PrewriteArgs {
  KvWriteParams params;
  Divisor lanes;   // threads of a group: those of its rows
  Divisor groups;  // of a column
  uint32_t q_groups;
  uint32_t kv_groups;
  uint32_t columns;  // the window; 0 where there is nothing to write
  uint32_t slots;    // of all sequences
  Divisor branches;  // slots of a sequence, at least 1: slot 0 reports
  StatusView status;
};

// With norms a row's threads are a power of two; those past its pieces have none.
struct NormedPrewriteArgs : PrewriteArgs {
  KvNorms norms;
  uint32_t pieces;
};

__device__ __forceinline__ int32_t prewrite_fault(const KvWriteParams& p, int32_t cache_len,
                                                  int32_t commit_len) {
  if (cache_len < 0 || commit_len < 0 || commit_len > p.sizes.window) return kBadState;
  if (p.cos_sin != nullptr && cache_len + p.sizes.window > p.max_position) return kBadState;
  if (p.commit_len == nullptr) return 0;
  return static_cast<int64_t>(cache_len) + commit_len > p.sizes.capacity ? kCacheFull : 0;
}

template <typename T>
__device__ __forceinline__ T* row_of(const KvRowsView& view, int64_t b, int64_t k, int64_t column,
                                     int64_t head) {
  return static_cast<T*>(view.data) + b * view.stride[0] + k * view.stride[1] +
         column * view.stride[2] + head * view.stride[3];
}

template <typename T>
__device__ __forceinline__ T* row_of(const KvWindowView& view, int64_t layer, int64_t b, int64_t k,
                                     int64_t column, int64_t head) {
  return static_cast<T*>(view.data) + layer * view.stride[0] + b * view.stride[1] +
         k * view.stride[2] + column * view.stride[3] + head * view.stride[4];
}

template <typename T>
__device__ __forceinline__ T* row_of(const KvCacheView& view, int64_t layer, int64_t b,
                                     int64_t position, int64_t head) {
  return static_cast<T*>(view.data) + layer * view.stride[0] + b * view.stride[1] +
         position * view.stride[2] + head * view.stride[3];
}

// The rows of a thread: `count` neighbouring heads of a column.
struct RowGroup {
  bool is_query;
  bool is_value;
  int64_t head;
  int count;
};

template <int kRows>
__device__ __forceinline__ RowGroup row_group(const PrewriteArgs& a, uint32_t group) {
  const KvSizes& s = a.params.sizes;
  RowGroup rows{group < a.q_groups, false, 0, 0};
  if (!rows.is_query) {
    group -= a.q_groups;
    rows.is_value = group >= a.kv_groups;
    if (rows.is_value) group -= a.kv_groups;
  }
  rows.head = static_cast<int64_t>(group) * kRows;
  const int64_t left = (rows.is_query ? s.q_heads : s.kv_heads) - rows.head;
  rows.count = static_cast<int>(smaller<int64_t>(left, kRows));
  return rows;
}

// grid (parts, sequences and branch slots): the blocks of a branch share its window. A thread takes
// N elements of each of its rows, and with kRotate the N of the row's other half, too: those of a
// column have the same angles and weights. With norms, whole warps exchange sums, and some threads
// may have no rows.
//
// The rows are on their way before the lengths are looked at, which are on theirs.
template <typename T, int N, int kRows, bool kRotate, typename Args>
__global__ void __launch_bounds__(kPrewriteThreads)
    kv_prewrite_kernel(const __grid_constant__ Args a) {
  constexpr bool kNorms = std::is_same_v<Args, NormedPrewriteArgs>;
  const KvWriteParams& p = a.params;
  release_successor();
  const uint32_t vector = blockIdx.x * kPrewriteThreads + threadIdx.x;
  const uint32_t group = divide(vector, a.lanes);
  const uint32_t piece = vector - group * a.lanes.value;
  const uint32_t column = divide(group, a.groups);
  RowGroup rows = row_group<kRows>(a, group - column * a.groups.value);
  if (column >= a.columns) rows.count = 0;
  if constexpr (kNorms) {
    if (piece >= a.pieces) rows.count = 0;
  }
  const bool turns = kRotate && !rows.is_value && rows.count > 0;
  const int64_t offset = static_cast<int64_t>(piece) * N;
  const int64_t half = p.sizes.head_dim / 2;
  wait_for_predecessor();
  for (uint32_t slot = blockIdx.y; slot < a.slots; slot += gridDim.y) {
    const uint32_t b = divide(slot, a.branches);
    const uint32_t k = slot - b * a.branches.value;
    const int32_t cache_len = p.cache_len != nullptr ? p.cache_len[b] : 0;
    const int32_t commit_len = p.commit_len != nullptr ? p.commit_len[b] : 0;

    Pack<T, N> low[kRows] = {};
    Pack<T, N> high[kRows] = {};
    const KvRowsView& from = rows.is_query ? p.q : rows.is_value ? p.v : p.k;
    const T* source = row_of<T>(from, b, k, column, rows.head) + offset;
    const int64_t next = from.stride[3];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (i >= rows.count) continue;
      low[i] = load_pack<T, N>(source + i * next);
      if constexpr (kRotate) high[i] = load_pack<T, N>(source + i * next + half);
    }
    NormWeights<T, N> weights;
    if constexpr (kNorms) {
      const void* weight = rows.is_query ? a.norms.q : a.norms.k;
      if (turns) weights.load(static_cast<const T*>(weight) + offset, half);
    }
    const int32_t fault = prewrite_fault(p, cache_len, commit_len);
    if (vector == 0 && k == 0) report(a.status, b, fault);

    // Rows in memory of [heads, head_dim]. Inlined, so that the packs stay in registers.
    auto store_rows = [&](T* target, int64_t stride) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (i >= rows.count) continue;
        store_pack<T, N>(target + i * stride + offset, low[i]);
        if constexpr (kRotate) store_pack<T, N>(target + i * stride + offset + half, high[i]);
      }
    };
    if (fault == kBadState) {
      if (!rows.is_query) continue;
#pragma unroll
      for (int i = 0; i < kRows; ++i) low[i] = high[i] = Pack<T, N>{};
      store_rows(row_of<T>(p.q_out, b, k, column, rows.head), p.q_out.stride[3]);
      continue;
    }
    Angles<N> angles;
    if (turns) angles.load(p.cos_sin + (cache_len + column) * p.cos_sin_stride + offset, half);
    if constexpr (kNorms) {
      float scale[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) scale[i] = sum_squares(low[i], high[i]);
      const float head_dim = static_cast<float>(p.sizes.head_dim);
      const uint32_t lanes = a.lanes.value;
      if (kRows == 1 && lanes > 32) {
        const T* row = source - offset;
        scale[0] = long_norm_scale(lanes, head_dim, a.norms.eps, [&](uint32_t at) {
          if (column >= a.columns || at >= a.pieces) return 0.0f;
          const T* place = row + static_cast<int64_t>(at) * N;
          return sum_squares(load_pack<T, N>(place), load_pack<T, N>(place + half));
        });
      } else {
        norm_scales(scale, lanes, head_dim, a.norms.eps);
      }
      if (turns) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          normed_rotate(low[i], high[i], scale[i], weights, angles);
        }
      }
    } else if constexpr (kRotate) {
      if (turns) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) rotate(low[i], high[i], angles);
      }
    }
    if (rows.is_query) {
      store_rows(row_of<T>(p.q_out, b, k, column, rows.head), p.q_out.stride[3]);
      continue;
    }
    const KvWindowView& window = rows.is_value ? p.v_window : p.k_window;
    store_rows(row_of<T>(window, p.layer, b, k, column, rows.head), window.stride[4]);
    if (fault != 0 || k > 0 || static_cast<int64_t>(column) >= commit_len) continue;
    const KvCacheView& cache = rows.is_value ? p.v_cache : p.k_cache;
    store_rows(row_of<T>(cache, p.layer, b, cache_len + column, rows.head), cache.stride[3]);
  }
}

}  // namespace kv_cache
}  // namespace lopa
