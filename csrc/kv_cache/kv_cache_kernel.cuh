// The KV cache on the GPU: Commit-Winner-Cache of all layers, Pre-Write of one.
//
// Both walk a list of columns, each of some rows of some vectors, with a grid that shapes alone
// fix. Lengths, winners and faults are read on the device, by every thread block for itself.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kv_cache/params.h"
#include "lopa/cuda.cuh"
#include "lopa/status.h"

namespace lopa {
namespace kv_cache {

constexpr int kThreads = 256;
constexpr unsigned kWholeWarp = 0xffffffffu;

// The status word of each sequence; null where the caller gave none.
struct StatusView {
  int32_t* data;
  int64_t stride;
};

__device__ __forceinline__ void report(const StatusView& status, int64_t b, int32_t fault) {
  if (status.data != nullptr && fault != 0) status.data[b * status.stride] |= fault;
}

// A vector's place: its column, the row there, the piece of that row.
struct Place {
  uint32_t column;
  uint32_t row;
  uint32_t piece;
};

// A number from 1 to 2^31 - 1 that threads divide by: with s = ceil(log2 value), `multiplier` is
// 2^(31 + s) / value, rounded up, and `shift` 31 + s; exact for dividends below 2^31 (Granlund and
// Montgomery, Division by Invariant Integers using Multiplication, PLDI 1994).
struct Divisor {
  uint32_t value;
  uint32_t multiplier;
  uint32_t shift;
};

__device__ __forceinline__ uint32_t divide(uint32_t x, const Divisor& by) {
  return static_cast<uint32_t>((static_cast<uint64_t>(x) * by.multiplier) >> by.shift);
}

// How threads walk the vectors of a list of columns: thread i of n begins with vector i, and `step`
// is n vectors.
struct Walk {
  Divisor rows;    // of a column
  Divisor pieces;  // of a row
  Place step;
};

__device__ __forceinline__ Place first_place(const Walk& walk) {
  uint32_t vector = blockIdx.x * kThreads + threadIdx.x;
  uint32_t row = divide(vector, walk.pieces);
  uint32_t column = divide(row, walk.rows);
  return {column, row - column * walk.rows.value, vector - row * walk.pieces.value};
}

__device__ __forceinline__ void advance(Place& at, const Walk& walk) {
  at.piece += walk.step.piece;
  uint32_t carry = at.piece >= walk.pieces.value;
  at.piece -= carry ? walk.pieces.value : 0;
  at.row += walk.step.row + carry;
  carry = at.row >= walk.rows.value;
  at.row -= carry ? walk.rows.value : 0;
  at.column += walk.step.column + carry;
}

// Keys or values, on both ends of a commit. Strides count bytes.
struct CommitSide {
  const char* window;
  char* cache;
  int64_t window_stride[5];  // of layers, batch, branches, window, rows
  int64_t cache_stride[4];   // of layers, batch, capacity, rows
};

struct CommitArgs {
  CommitSide side[2];  // keys, values
  Walk walk;
  int64_t units;  // 2 * layers; 0 where there is nothing to copy
  int64_t batch;
  int64_t branches;
  int64_t window;
  int64_t capacity;
  const int32_t* winner;
  const int32_t* cache_len;
  const int32_t* commit_len;
  StatusView status;
  uint32_t group;  // sequences in one list of columns: 1 or 32
};

// What one sequence commits: no columns where there is a fault.
struct Commit {
  int32_t winner;
  int32_t cache_len;
  uint32_t columns;
  int32_t fault;
};

__device__ __forceinline__ Commit read_commit(const CommitArgs& a, int64_t b) {
  int32_t winner = a.winner[b];
  int32_t cache_len = a.cache_len[b];
  int32_t commit_len = a.commit_len[b];
  Commit commit{winner, cache_len, static_cast<uint32_t>(commit_len), 0};
  if (cache_len < 0 || commit_len < 0 || commit_len > a.window) {
    commit.fault = kBadState;
  } else if (static_cast<int64_t>(cache_len) + commit_len > a.capacity) {
    commit.fault = kCacheFull;
  } else if (commit_len > 0 && (winner < 0 || winner >= a.branches)) {
    commit.fault = kBadState;
  }
  if (commit.fault != 0) commit.columns = 0;
  return commit;
}

// The lane whose sequence has column `column` of the list, where lane l's sequence ends before
// column `end` of lane l: the number of sequences that end at or before it. Whole warps call it.
__device__ __forceinline__ uint32_t find_lane(uint32_t end, uint32_t column) {
  uint32_t lane = 0;
#pragma unroll
  for (uint32_t d = 16; d >= 1; d /= 2) {
    if (__shfl_sync(kWholeWarp, end, lane + d - 1) <= column) lane += d;
  }
  return lane;
}

// grid (parts, units): the blocks of a unit, keys or values of one layer, share the committed
// columns of all sequences, which are one list, 32 sequences at a time. So the work of a block
// depends on no length but their sum. Each lane of a warp holds one sequence of the list; a list of
// one sequence needs no search.
template <typename Vector>
__global__ void __launch_bounds__(kThreads, 4)
    kv_commit_kernel(const __grid_constant__ CommitArgs a) {
  constexpr int kInFlight = 4;
  release_successor();
  const uint32_t lane = threadIdx.x % 32;
  const bool searched = a.group > 1;
  const bool reports = blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x < a.group;
  const Place start = first_place(a.walk);
  wait_for_predecessor();
  for (int64_t first = 0; first < a.batch; first += a.group) {
    const int64_t b = searched ? first + lane : first;
    Commit commit{};
    if (b < a.batch) commit = read_commit(a, b);
    if (reports) report(a.status, b, commit.fault);
    uint32_t end = commit.columns;
    uint32_t columns = end;
    if (searched) {
#pragma unroll
      for (uint32_t d = 1; d < 32; d *= 2) {
        uint32_t before = __shfl_up_sync(kWholeWarp, end, d);
        if (lane >= d) end += before;
      }
      columns = __shfl_sync(kWholeWarp, end, 31);
    }
    const int64_t begin = end - commit.columns;

    for (int64_t unit = blockIdx.y; unit < a.units; unit += gridDim.y) {
      const CommitSide& side = a.side[unit % 2];
      const int64_t layer = unit / 2;
      // Where this lane's sequence would have the list's column 0.
      const int64_t from = layer * side.window_stride[0] + b * side.window_stride[1] +
                           commit.winner * side.window_stride[2] - begin * side.window_stride[3];
      const int64_t to = layer * side.cache_stride[0] + b * side.cache_stride[1] +
                         (commit.cache_len - begin) * side.cache_stride[2];
      Place at = start;
      while (__any_sync(kWholeWarp, at.column < columns)) {
        Vector data[kInFlight];
        char* target[kInFlight];
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
          int64_t source_base = from;
          int64_t target_base = to;
          if (searched) {
            uint32_t owner = find_lane(end, at.column);
            source_base = __shfl_sync(kWholeWarp, from, owner);
            target_base = __shfl_sync(kWholeWarp, to, owner);
          }
          target[i] = nullptr;
          if (at.column < columns) {
            int64_t piece = at.piece * static_cast<int64_t>(sizeof(Vector));
            const char* source = side.window + source_base + at.column * side.window_stride[3] +
                                 at.row * side.window_stride[4] + piece;
            target[i] = side.cache + target_base + at.column * side.cache_stride[2] +
                        at.row * side.cache_stride[3] + piece;
            data[i] = __ldcg(reinterpret_cast<const Vector*>(source));
          }
          advance(at, a.walk);
        }
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
          if (target[i] != nullptr) *reinterpret_cast<Vector*>(target[i]) = data[i];
        }
      }
    }
  }
}

template <int kBytes>
struct VectorOf;
template <>
struct VectorOf<16> {
  using Type = uint4;
};
template <>
struct VectorOf<8> {
  using Type = uint2;
};
template <>
struct VectorOf<4> {
  using Type = uint32_t;
};
template <>
struct VectorOf<2> {
  using Type = uint16_t;
};

template <typename T, int N>
union Pack {
  using Vector = typename VectorOf<N * sizeof(T)>::Type;
  Vector vector;
  T element[N];
};

template <typename T, int N>
__device__ __forceinline__ Pack<T, N> load_pack(const T* source) {
  Pack<T, N> pack;
  pack.vector = __ldcg(reinterpret_cast<const typename Pack<T, N>::Vector*>(source));
  return pack;
}

template <typename T, int N>
__device__ __forceinline__ void store_pack(T* target, const Pack<T, N>& pack) {
  *reinterpret_cast<typename Pack<T, N>::Vector*>(target) = pack.vector;
}

// N floats that neighbouring threads read again.
template <int N>
__device__ __forceinline__ void load_floats(const float* source, float* out) {
  constexpr int kStep = N < 4 ? N : 4;
  using Part = Pack<float, kStep>;
#pragma unroll
  for (int i = 0; i < N; i += kStep) {
    Part part;
    part.vector = *reinterpret_cast<const typename Part::Vector*>(source + i);
#pragma unroll
    for (int j = 0; j < kStep; ++j) out[i + j] = part.element[j];
  }
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(BFloat16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}
__device__ __forceinline__ float to_float(Half x) { return __half2float(__ushort_as_half(x.bits)); }

__device__ __forceinline__ void from_float(float x, float* out) { *out = x; }
__device__ __forceinline__ void from_float(float x, BFloat16* out) {
  out->bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
__device__ __forceinline__ void from_float(float x, Half* out) {
  out->bits = __half_as_ushort(__float2half_rn(x));
}

// Rotary embedding of N pairs, element d with element d + half. Products and sums round one by one,
// as on the CPU: the same bits.
template <typename T, int N>
__device__ __forceinline__ void rotate(Pack<T, N>& low, Pack<T, N>& high, const float* cos_sin,
                                       int64_t half) {
  float cosine[N];
  float sine[N];
  load_floats<N>(cos_sin, cosine);
  load_floats<N>(cos_sin + half, sine);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    float a = to_float(low.element[i]);
    float b = to_float(high.element[i]);
    from_float(__fsub_rn(__fmul_rn(a, cosine[i]), __fmul_rn(b, sine[i])), &low.element[i]);
    from_float(__fadd_rn(__fmul_rn(b, cosine[i]), __fmul_rn(a, sine[i])), &high.element[i]);
  }
}

struct PrewriteArgs {
  KvPrewriteParams params;
  Walk walk;         // rows: heads of queries, keys, values
  uint32_t columns;  // the window; 0 where there is nothing to write
  uint32_t slots;    // of all sequences
  Divisor branches;  // slots of a sequence, at least 1: slot 0 reports
  StatusView status;
};

__device__ __forceinline__ int32_t prewrite_fault(const KvPrewriteParams& p, int32_t cache_len,
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

// grid (parts, sequences and branch slots): the blocks of a branch share its window. A thread takes
// N elements of a row, and with kRotate the N of the row's other half, too.
template <typename T, int N, bool kRotate>
__global__ void __launch_bounds__(kThreads)
    kv_prewrite_kernel(const __grid_constant__ PrewriteArgs a) {
  const KvPrewriteParams& p = a.params;
  const KvSizes& s = p.sizes;
  release_successor();
  const Place start = first_place(a.walk);
  const int64_t half = s.head_dim / 2;
  wait_for_predecessor();
  for (uint32_t slot = blockIdx.y; slot < a.slots; slot += gridDim.y) {
    const uint32_t b = divide(slot, a.branches);
    const uint32_t k = slot - b * a.branches.value;
    const int32_t cache_len = p.cache_len != nullptr ? p.cache_len[b] : 0;
    const int32_t commit_len = p.commit_len != nullptr ? p.commit_len[b] : 0;
    const int32_t fault = prewrite_fault(p, cache_len, commit_len);
    if (blockIdx.x == 0 && threadIdx.x == 0 && k == 0) report(a.status, b, fault);
    const int64_t cached = fault == 0 && k == 0 ? commit_len : 0;

    for (Place at = start; at.column < a.columns; advance(at, a.walk)) {
      const int64_t column = at.column;
      const int64_t offset = static_cast<int64_t>(at.piece) * N;
      int64_t head = at.row;
      const bool is_query = head < s.q_heads;
      if (fault == kBadState) {
        if (!is_query) continue;
        T* row = row_of<T>(p.q_out, b, k, column, head) + offset;
        Pack<T, N> zero{};
        store_pack<T, N>(row, zero);
        if constexpr (kRotate) store_pack<T, N>(row + half, zero);
        continue;
      }
      const T* source;
      T* target;
      T* cache = nullptr;
      bool turns = kRotate;
      if (is_query) {
        source = row_of<T>(p.q, b, k, column, head);
        target = row_of<T>(p.q_out, b, k, column, head);
      } else {
        head -= s.q_heads;
        const bool is_value = head >= s.kv_heads;
        if (is_value) head -= s.kv_heads;
        turns = kRotate && !is_value;
        source = row_of<T>(is_value ? p.v : p.k, b, k, column, head);
        target = row_of<T>(is_value ? p.v_window : p.k_window, p.layer, b, k, column, head);
        if (column < cached) {
          cache = row_of<T>(is_value ? p.v_cache : p.k_cache, p.layer, b, cache_len + column, head);
        }
      }
      Pack<T, N> low = load_pack<T, N>(source + offset);
      if constexpr (kRotate) {
        Pack<T, N> high = load_pack<T, N>(source + half + offset);
        if (turns) {
          rotate<T, N>(low, high, p.cos_sin + (cache_len + column) * p.cos_sin_stride + offset,
                       half);
        }
        store_pack<T, N>(target + half + offset, high);
        if (cache != nullptr) store_pack<T, N>(cache + half + offset, high);
      }
      store_pack<T, N>(target + offset, low);
      if (cache != nullptr) store_pack<T, N>(cache + offset, low);
    }
  }
}

}  // namespace kv_cache
}  // namespace lopa
