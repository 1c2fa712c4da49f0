// The KV cache on the GPU: Commit-Winner-Cache of all layers, Pre-Write of one.
//
// Each has a grid that shapes alone fix. Lengths, winners and faults are read on the device, by
// every warp or thread block for itself.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kv_cache/params.h"
#include "kv_cache/rotate_kernel.cuh"
#include "lopa/cuda.cuh"
#include "lopa/divisor.h"
#include "lopa/status.h"

namespace lopa {
namespace kv_cache {

constexpr int kThreads = 256;
// A commit's vectors that a thread has in flight, and blocks of a multiprocessor: all are resident.
constexpr int kCommitInFlight = 8;
constexpr int kCommitBlocks = 4;

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

// A unit is a row of all columns, keys or values, of one layer. What a sequence commits of it is a
// run of vectors, column by column, which warps copy in chunks: `at_once` units at a time, with
// `parts` warps each.
struct CommitArgs {
  CommitSide side[2];  // keys, values
  uint32_t units;      // layers * 2 * rows
  uint32_t parts;
  Divisor at_once;
  Divisor rows;    // of a column
  Divisor pieces;  // vectors of a row; 0 of them where there is nothing to copy
  uint32_t batch;
  int32_t branches;
  int32_t window;
  uint32_t capacity;
  const int32_t* winner;
  const int32_t* cache_len;
  const int32_t* commit_len;
  StatusView status;
};

// What one sequence commits, as the caller says, ...
struct Lengths {
  int32_t winner;
  int32_t cache_len;
  int32_t commit_len;
};

// ... of the sequence whose commits this lane of a warp knows; sequences beyond the last have none.
__device__ __forceinline__ Lengths read_lengths(const CommitArgs& a, uint32_t b) {
  if (b >= a.batch) return {};
  return {a.winner[b], a.cache_len[b], a.commit_len[b]};
}

__device__ __forceinline__ int32_t commit_fault(const CommitArgs& a, const Lengths& lengths) {
  const uint32_t end = static_cast<uint32_t>(lengths.cache_len) + lengths.commit_len;
  // No branches: the loads wait for this.
  const bool bad =
      (lengths.cache_len < 0) | (lengths.commit_len < 0) | (lengths.commit_len > a.window);
  const bool nobody = (lengths.commit_len > 0) &
                      (static_cast<uint32_t>(lengths.winner) >= static_cast<uint32_t>(a.branches));
  return bad ? kBadState : end > a.capacity ? kCacheFull : nobody ? kBadState : 0;
}

// The lane whose sequence has chunk `chunk` of the list, where lane l's sequence ends before chunk
// `end` of lane l: the number of sequences that end at or before it. Whole warps call it.
__device__ __forceinline__ uint32_t find_lane(uint32_t end, uint32_t chunk) {
  uint32_t lane = 0;
#pragma unroll
  for (uint32_t d = 16; d >= 1; d /= 2) {
    if (__shfl_sync(kWholeWarp, end, lane + d - 1) <= chunk) lane += d;
  }
  return lane;
}

// A unit's place on both ends, and its distances in bytes.
struct CommitUnit {
  const char* window;
  char* cache;
  int64_t branch_stride;  // in the window
  int64_t column_stride;  // in the cache
  const CommitSide* side;
};

__device__ __forceinline__ CommitUnit commit_unit(const CommitArgs& a, uint32_t unit) {
  const uint32_t pair = divide(unit, a.rows);
  const uint32_t row = unit - pair * a.rows.value;
  const uint32_t layer = pair / 2;
  const CommitSide& side = a.side[pair % 2];
  return {side.window + layer * side.window_stride[0] + row * side.window_stride[4],
          side.cache + layer * side.cache_stride[0] + row * side.cache_stride[3],
          side.window_stride[2], side.cache_stride[2], &side};
}

// A window's vectors are read once, and its next reader finds others there: they need not stay in
// L2.
template <typename Vector>
__device__ __forceinline__ Vector load_once(const char* source) {
  return __ldcs(reinterpret_cast<const Vector*>(source));
}

// Of an address that the compiler does not know to be global memory.
template <typename Vector>
__device__ __forceinline__ void store_global(char* target, const Vector& data) {
  __builtin_assume(__isGlobal(target));
  *reinterpret_cast<Vector*>(target) = data;
}

// Copies a warp's chunks through its registers. With kContiguous a column follows the other without
// a gap, on both ends.
template <typename V, bool kContiguous>
struct RegisterCopy {
  using Vector = V;
  static constexpr uint32_t kChunk = 32 * kCommitInFlight;
  // Registers for the vectors in flight, and without contiguity for their addresses.
  static constexpr int kBlocks = kContiguous ? kCommitBlocks : 2;

  // Vectors [begin, end) of a run, at most kChunk of them; column 0 of the run is at `source` and
  // at `target`.
  __device__ __forceinline__ static void copy(const CommitArgs& a, const CommitSide& side,
                                              const char* source, char* target, uint32_t begin,
                                              uint32_t end) {
    const uint32_t first = begin + threadIdx.x % 32;
    Vector data[kCommitInFlight];
    if constexpr (kContiguous) {
      const int64_t offset = static_cast<int64_t>(first) * sizeof(Vector);
      source += offset;
      target += offset;
      // All else is constants: no registers for eight addresses.
      asm volatile("" : "+l"(source), "+l"(target));
#pragma unroll
      for (uint32_t i = 0; i < kCommitInFlight; ++i) {
        if (first + 32 * i < end) data[i] = load_once<Vector>(source + 32 * i * sizeof(Vector));
      }
#pragma unroll
      for (uint32_t i = 0; i < kCommitInFlight; ++i) {
        if (first + 32 * i < end) {
          store_global(target + 32 * i * sizeof(Vector), data[i]);
        }
      }
    } else {
      char* place[kCommitInFlight];
#pragma unroll
      for (uint32_t i = 0; i < kCommitInFlight; ++i) {
        const uint32_t vector = first + 32 * i;
        if (vector >= end) continue;
        const uint32_t column = divide(vector, a.pieces);
        const int64_t piece = (vector - column * a.pieces.value) * sizeof(Vector);
        data[i] = load_once<Vector>(source + column * side.window_stride[3] + piece);
        place[i] = target + column * side.cache_stride[2] + piece;
      }
#pragma unroll
      for (uint32_t i = 0; i < kCommitInFlight; ++i) {
        if (first + 32 * i < end) store_global(place[i], data[i]);
      }
    }
  }
};

// A warp takes chunks of a unit. With kGrouped those of all sequences are one list, 32 sequences at
// a time, of which each lane knows one: the work of a warp depends on no length but their sum.
// Without, there is one sequence. Successive units and parts go to different blocks.
//
// The first lengths are on their way while it is found out which unit is whose.
template <typename Copy, bool kGrouped>
__global__ void __launch_bounds__(kThreads, Copy::kBlocks)
    kv_commit_kernel(const __grid_constant__ CommitArgs a) {
  constexpr uint32_t kChunk = Copy::kChunk;
  constexpr uint32_t kGroup = kGrouped ? 32 : 1;
  release_successor();
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t warp = threadIdx.x / 32 * gridDim.x + blockIdx.x;
  const uint32_t part = divide(warp, a.at_once);
  if (part >= a.parts) return;
  const bool reports = warp == 0 && lane < kGroup;
  uint32_t unit = warp - part * a.at_once.value;
  wait_for_predecessor();
  Lengths lengths = read_lengths(a, kGrouped ? lane : 0);
#pragma unroll 1
  do {
    CommitUnit at = commit_unit(a, unit);
    // Before the wait for the lengths, behind which the compiler would move it.
    asm volatile(""
                 : "+l"(at.window), "+l"(at.cache), "+l"(at.branch_stride), "+l"(at.column_stride));
    __syncwarp();
    uint32_t first = 0;
#pragma unroll 1
    do {
      const uint32_t b = kGrouped ? first + lane : 0;
      const int32_t fault = commit_fault(a, lengths);
      const uint32_t vectors = fault == 0 ? lengths.commit_len * a.pieces.value : 0;
      const uint32_t own = (vectors + kChunk - 1) / kChunk;
      uint32_t end = own;
      uint32_t chunks = end;
      if constexpr (kGrouped) {
#pragma unroll
        for (uint32_t d = 1; d < 32; d *= 2) {
          const uint32_t before = __shfl_up_sync(kWholeWarp, end, d);
          if (lane >= d) end += before;
        }
        chunks = __shfl_sync(kWholeWarp, end, 31);
      }
      const char* source = at.window + static_cast<uint32_t>(lengths.winner) * at.branch_stride;
      char* target = at.cache + static_cast<uint32_t>(lengths.cache_len) * at.column_stride;
      if constexpr (kGrouped) {
        source += b * at.side->window_stride[1];
        target += b * at.side->cache_stride[1];
      }
#pragma unroll 1
      for (uint32_t chunk = part; chunk < chunks; chunk += a.parts) {
        uint32_t begin = chunk * kChunk;
        uint32_t last = vectors;
        const char* from = source;
        char* to = target;
        if constexpr (kGrouped) {
          const uint32_t owner = find_lane(end, chunk);
          auto of_owner = [&](auto value) { return __shfl_sync(kWholeWarp, value, owner); };
          begin -= of_owner(end - own) * kChunk;
          last = of_owner(vectors);
          from =
              reinterpret_cast<const char*>(of_owner(reinterpret_cast<unsigned long long>(source)));
          to = reinterpret_cast<char*>(of_owner(reinterpret_cast<unsigned long long>(target)));
        }
        Copy::copy(a, *at.side, from, to, begin, smaller(begin + kChunk, last));
      }
      if (reports && b < a.batch) report(a.status, b, fault);
      first += kGroup;
      if (kGrouped && a.batch > kGroup) {
        lengths = read_lengths(a, first < a.batch ? b + kGroup : lane);
      }
    } while (kGrouped && first < a.batch);
    unit += a.at_once.value;
  } while (unit < a.units);
}

struct PrewriteArgs {
  KvWriteParams params;
  Walk walk;         // rows: heads of queries, keys, values
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

// Whether a thread goes on, of which `inside` is true while it has something to do: with norms as
// long as any of its warp has.
template <bool kNorms>
__device__ __forceinline__ bool has_turn(bool inside) {
  if constexpr (kNorms) return __any_sync(kWholeWarp, inside);
  return inside;
}

// grid (parts, sequences and branch slots): the blocks of a branch share its window. A thread takes
// N elements of a row, and with kRotate the N of the row's other half, too. With norms, whole warps
// take their turns, in which some threads may have nothing.
template <typename T, int N, bool kRotate, typename Args>
__global__ void __launch_bounds__(kThreads) kv_prewrite_kernel(const __grid_constant__ Args a) {
  constexpr bool kNorms = std::is_same_v<Args, NormedPrewriteArgs>;
  const KvWriteParams& p = a.params;
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

    for (Place at = start; has_turn<kNorms>(at.column < a.columns); advance(at, a.walk)) {
      bool has_piece = true;
      if constexpr (kNorms) has_piece = at.column < a.columns && at.piece < a.pieces;
      const int64_t column = at.column;
      const int64_t offset = static_cast<int64_t>(at.piece) * N;
      int64_t head = at.row;
      const bool is_query = head < s.q_heads;
      if (fault == kBadState) {
        if (!is_query || !has_piece) continue;
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
      if constexpr (kNorms) {
        Pack<T, N> low{};
        Pack<T, N> high{};
        if (has_piece) {
          low = load_pack<T, N>(source + offset);
          high = load_pack<T, N>(source + half + offset);
        }
        const float scale =
            norm_scale(sum_squares(low, high), a.walk.pieces.value, static_cast<float>(s.head_dim),
                       a.norms.eps, [&](uint32_t piece) {
                         if (piece >= a.pieces) return 0.0f;
                         const T* place = source + static_cast<int64_t>(piece) * N;
                         return sum_squares(load_pack<T, N>(place), load_pack<T, N>(place + half));
                       });
        if (!has_piece) continue;
        if (turns) {
          const T* weight = static_cast<const T*>(is_query ? a.norms.q : a.norms.k);
          normed_rotate<T, N>(low, high, scale, weight + offset,
                              p.cos_sin + (cache_len + column) * p.cos_sin_stride + offset, half);
        }
        store_pack<T, N>(target + half + offset, high);
        store_pack<T, N>(target + offset, low);
        if (cache == nullptr) continue;
        store_pack<T, N>(cache + half + offset, high);
        store_pack<T, N>(cache + offset, low);
        continue;
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
