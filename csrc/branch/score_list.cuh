// Confidence of a branch on the GPU, by one warp: Eq. 2 of LoPA (arXiv 2512.16229) and its
// variants. round.h has the rules; every sum has a fixed order.
#pragma once

#include <cuda_runtime.h>

#include <climits>
#include <cstdint>

#include "branch/params.h"
#include "branch/workspace.h"
#include "lopa/cuda.cuh"

namespace lopa {
namespace branch {

constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr float kInf = __builtin_inff();
// Columns that a lane loads before it uses the first, so that their latencies overlap.
constexpr int kBatch = 4;

__device__ __forceinline__ int lane_index() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp_index() { return threadIdx.x / 32; }
__device__ __forceinline__ int warp_count() { return blockDim.x / 32; }

// The memory of a workspace, as a CTA sees it. With kInShared there is none but shared memory,
// which the compiler then addresses as such.
template <bool kInShared>
struct Memory {
  char* shared;
  char* global;

  template <typename T>
  __device__ __forceinline__ T* at(const Place& place) const {
    if constexpr (kInShared) return reinterpret_cast<T*>(shared + static_cast<int>(place.offset));
    return reinterpret_cast<T*>((place.shared ? shared : global) + place.offset);
  }
};

// NaN ranks below every number.
__device__ __forceinline__ float rankable(float score) { return isnan(score) ? -kInf : score; }

// An unsigned integer in the order of the scores; zeros of both signs are equal, and no score has
// the key 0.
__device__ __forceinline__ uint32_t rank_key(float score) {
  const uint32_t bits = __float_as_uint(score == 0.0f ? 0.0f : rankable(score));
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float from_rank_key(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kWholeWarp, x, step);
  return x;
}

// By a warp: the mean of the m lowest of `count` scores, m < count. `lowest` is the lowest's key.
__device__ __noinline__ inline double lowest_mean(const float* scores, int count, int m,
                                                  uint32_t lowest) {
  __syncwarp();
  uint32_t highest = 0;
#pragma unroll 1
  for (int i = lane_index(); i < count; i += 32) highest = max(highest, rank_key(scores[i]));
  highest = __reduce_max_sync(kWholeWarp, highest);
  // The m-th lowest key, bit by bit from the first in which the keys differ.
  uint32_t key = lowest;
  if (lowest != highest) {
    int bit = 31 - __clz(lowest ^ highest);
    key &= ~((2u << bit) - 1u);
#pragma unroll 1
    for (; bit >= 0; --bit) {
      const uint32_t candidate = key | 1u << bit;
      int below = 0;
#pragma unroll 1
      for (int i = lane_index(); i < count; i += 32) below += rank_key(scores[i]) < candidate;
      if (__reduce_add_sync(kWholeWarp, below) < m) key = candidate;
    }
  }
  double sum = 0.0;
  int below = 0;
#pragma unroll 1
  for (int i = lane_index(); i < count; i += 32) {
    if (rank_key(scores[i]) < key) {
      sum += static_cast<double>(scores[i]);
      ++below;
    }
  }
  const int equal = m - __reduce_add_sync(kWholeWarp, below);
  sum = warp_sum(sum) + static_cast<double>(equal) * static_cast<double>(from_rank_key(key));
  return sum / static_cast<double>(m);
}

// By a warp: the lowest mean of `group` neighbours among `count` scores. The sums of the sliding
// window are a scan of its changes.
__device__ __noinline__ inline double lowest_group(const float* scores, int count, int group) {
  __syncwarp();
  const int lane = lane_index();
  double before = 0.0, least = static_cast<double>(kInf);
#pragma unroll 1
  for (int base = 0; base < count; base += 32) {
    const int i = base + lane;
    double sum = 0.0;
    if (i < count) {
      sum = static_cast<double>(scores[i]);
      if (i >= group) sum -= static_cast<double>(scores[i - group]);
    }
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const double left = __shfl_up_sync(kWholeWarp, sum, step);
      if (lane >= step) sum += left;
    }
    sum += before;
    // fmin passes over the NaN that an infinite score leaves behind, as the CPU does.
    if (i < count && i >= group - 1) least = fmin(least, sum);
    before = __shfl_sync(kWholeWarp, sum, 31);
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    least = fmin(least, __shfl_xor_sync(kWholeWarp, least, step));
  }
  return least / static_cast<double>(group);
}

// Does F need more than sums and minima of the scores?
constexpr bool keeps_scores(const ReductionConfig& config) {
  return config.reduction == Reduction::kBottom || config.reduction == Reduction::kGroup;
}

// Scores of the open columns of one branch, met by a warp in window order. With kKeeps it keeps
// them all, which costs the others nothing.
template <bool kKeeps>
class ScoreList {
 public:
  // `kept`: with kKeeps, memory for a float a column.
  __device__ explicit ScoreList(float* kept) : kept_(kept) {}

  // The next 32 columns, one a lane.
  __device__ __forceinline__ void add(bool open, float score) {
    score = open ? rankable(score) : kInf;
    total_ += open ? static_cast<double>(score) : 0.0;
    lowest_ = fminf(lowest_, score);
    if constexpr (kKeeps) {
      const unsigned lanes = __ballot_sync(kWholeWarp, open);
      if (open) kept_[count_ + __popc(lanes & ((1u << lane_index()) - 1u))] = score;
      count_ += __popc(lanes);
    } else {
      count_ += open;
    }
  }

  // F; every lane gets it.
  __device__ __forceinline__ double reduce(const ReductionConfig& config) const {
    const int count = kKeeps ? count_ : __reduce_add_sync(kWholeWarp, count_);
    if (count == 0) return 1.0;
    const uint32_t lowest_key = __reduce_min_sync(kWholeWarp, rank_key(lowest_));
    const float lowest = from_rank_key(lowest_key);
    // A -inf lies in some group and in every bottom share, and would turn sums into NaN.
    if (lowest == -kInf || config.reduction == Reduction::kMin) return static_cast<double>(lowest);
    if constexpr (kKeeps) {
      if (config.reduction == Reduction::kBottom) {
        const double share = floor(__dmul_rn(static_cast<double>(count), config.fraction));
        const int m = max(static_cast<int>(share), 1);
        if (m < count) return lowest_mean(kept_, count, m, lowest_key);
      } else if (config.reduction == Reduction::kGroup && count >= config.group) {
        return lowest_group(kept_, count, static_cast<int>(config.group));
      }
    }
    return warp_sum(total_) / static_cast<double>(count);
  }

 private:
  float* kept_;
  double total_ = 0.0;
  float lowest_ = kInf;
  int count_ = 0;  // with kKeeps of the warp, or else of the lane
};

// C = alpha * creation + (1 - alpha) * F; a term of weight 0 is left out, infinite or not. Products
// are rounded before the sum, as on the CPU.
__device__ __forceinline__ float blend(float creation, double reduced, double alpha) {
  if (alpha <= 0.0) return static_cast<float>(reduced);
  if (alpha >= 1.0) return creation;
  return static_cast<float>(__dadd_rn(__dmul_rn(alpha, static_cast<double>(creation)),
                                      __dmul_rn(__dsub_rn(1.0, alpha), reduced)));
}

}  // namespace branch
}  // namespace lopa
