// What the kernels of a round have in common: the numbers of a sequence, and which are sound.
#pragma once

#include <climits>
#include <cstdint>

#include "branch/score_list.cuh"

namespace lopa {
namespace step {

using branch::kBatch;
using branch::kInf;
using branch::kWholeWarp;
using branch::lane_index;
using branch::warp_count;
using branch::warp_index;

// The numbers of a sequence that its rows depend on.
struct Numbers {
  int K, W;
  int branches, cache_len, commit_len, prompt_len;

  // well_formed of sequence.h: what does not depend on a branch, ...
  __device__ __forceinline__ bool sound() const {
    return branches >= 1 && branches <= K && cache_len >= 0 && commit_len >= 0 && prompt_len >= 0 &&
           cache_len <= INT_MAX - W;
  }

  // ... and what does, but for the masks that a committed column must not hold. Of a sequence that
  // is sound.
  __device__ __forceinline__ bool sound(int length) const {
    return length >= 0 && length <= W && commit_len <= length &&
           int64_t{cache_len} + length >= prompt_len;
  }

  // The first column of a generated block.
  __device__ __forceinline__ int first_generated() const { return max(prompt_len - cache_len, 0); }
};

}  // namespace step
}  // namespace lopa
