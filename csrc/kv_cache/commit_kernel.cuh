// Commit-Winner-Cache of all layers on the GPU. Shapes alone fix the grid: lengths, winners and
// faults are read on the device, by every warp for itself.
#pragma once

#include <cstdint>

#include "kv_cache/kernel_base.cuh"
#include "kv_cache/params.h"
#include "lopa/cuda.cuh"
#include "lopa/divisor.h"
#include "lopa/status.h"

namespace lopa {
namespace kv_cache {

constexpr int kCommitThreads = 256;
// Vectors that a thread has in flight, and blocks of a multiprocessor: all are resident.
constexpr int kCommitInFlight = 8;
constexpr int kCommitBlocks = 4;

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
__global__ void __launch_bounds__(kCommitThreads, Copy::kBlocks)
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

}  // namespace kv_cache
}  // namespace lopa
