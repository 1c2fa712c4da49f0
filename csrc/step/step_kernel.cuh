// The kernels of a round: from ready statistics, and behind the merge of the vocabulary pass.
#pragma once

#include "step/round_kernel.cuh"

namespace lopa {
namespace step {

constexpr int kMostRoundThreads = 512;

// A CTA a sequence.
template <bool kInShared, bool kStaged>
__global__ void __launch_bounds__(kMostRoundThreads, 1)
    round_kernel(const __grid_constant__ RoundArgs args) {
  extern __shared__ __align__(128) char shared[];
  release_successor();
  wait_for_predecessor();
  run_round<false, kInShared, kStaged>(args, blockIdx.x, false, shared);
}

// `parts` CTAs a sequence. `Merge` is a policy of the vocabulary pass (merge_policies.h).
template <typename Merge, bool kInShared>
__global__ void __launch_bounds__(Merge::kThreads)
    finish_kernel(const __grid_constant__ FinishArgs args) {
  extern __shared__ __align__(128) char shared[];
  __shared__ bool is_last;
  release_successor();
  // The policy waits for the pass; the rows kernel had ended before the pass let this one start.
  const int64_t b = blockIdx.x / args.parts;
  const int64_t begin = args.offsets[b], end = args.offsets[b + 1];
  Merge::merge_rows(args.vocabulary, args.stats, begin, end, blockIdx.x % args.parts, args.parts,
                    shared);
  if (args.parts > 1) {
    // What this CTA wrote is visible to the one that sees its arrival.
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) is_last = atomicAdd(&args.arrivals[b], 1) == args.parts - 1;
    __syncthreads();
    if (!is_last) return;
    __threadfence();
  } else {
    __syncthreads();
  }
  run_round<true, kInShared, false>(args.round, b, end > begin, shared);
}

}  // namespace step
}  // namespace lopa
