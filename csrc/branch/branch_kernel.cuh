// The kernels of branch_confidence, select_positions and spawn_branches.
#pragma once

#include "branch/selection.cuh"

namespace lopa {
namespace branch {

constexpr int kThreads = 256;

// A warp a branch. kKeeps is keeps_scores(config).
template <bool kKeeps>
__global__ void __launch_bounds__(kThreads)
    confidence_kernel(const __grid_constant__ ConfidenceView view,
                      const __grid_constant__ ReductionConfig config, const Place kept,
                      char* memory, int64_t memory_of_cta) {
  extern __shared__ __align__(16) char shared[];
  release_successor();
  wait_for_predecessor();
  const int lane = lane_index();
  float* scores = nullptr;
  if constexpr (kKeeps) {
    scores = Memory<false>{shared, memory + blockIdx.x * memory_of_cta}.at<float>(kept) +
             warp_index() * view.W;
  }
  const int64_t step = static_cast<int64_t>(gridDim.x) * warp_count();
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * warp_count() + warp_index();
       i < view.B * view.K; i += step) {
    const float creation = view.creation[i];
    if (view.branches != nullptr && i % view.K >= view.branches[i / view.K]) {
      if (lane == 0) view.confidence[i] = -kInf;
      continue;
    }
    const int columns = static_cast<int>(
        view.length != nullptr ? smaller<int64_t>(view.length[i], view.W) : view.W);
    const float* score = view.score + i * view.W;
    const bool* open = view.open + i * view.W;
    ScoreList<kKeeps> list(scores);
    for (int base = lane; base - lane < columns; base += 32 * kBatch) {
      bool is_open[kBatch];
      float value[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int c = base + 32 * j;
        is_open[j] = c < columns && open[c];
        value[j] = c < columns ? score[c] : 0.0f;
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) list.add(is_open[j], value[j]);
    }
    const double reduced = list.reduce(config);
    // The next branch overwrites the list.
    __syncwarp();
    if (lane == 0) {
      view.confidence[i] = columns <= 0 ? 1.0f : blend(rankable(creation), reduced, config.alpha);
    }
  }
}

// A CTA a sequence.
template <bool kInShared>
__global__ void __launch_bounds__(kThreads)
    select_kernel(const __grid_constant__ SelectView view,
                  const __grid_constant__ SelectConfig config,
                  const __grid_constant__ SelectPlaces places, char* memory,
                  int64_t memory_of_cta) {
  extern __shared__ __align__(16) char shared[];
  release_successor();
  wait_for_predecessor();
  const int64_t b = blockIdx.x;
  const int W = static_cast<int>(view.W);
  const SelectSpace space(Memory<kInShared>{shared, memory + b * memory_of_cta}, places, W);
  // No length outside [0, W] is read through.
  int length = view.length[b];
  if (length < 0 || length > W) length = 0;
  const Blocks blocks(view.cache_len[b], view.prompt_len[b], length, Division(config.block_size));
  const int64_t at = b * view.W;
  const Columns columns{view.tokens + at,
                        {view.stats.token + at, view.stats.prob + at, view.stats.score + at},
                        0,
                        {}};
  const int lookahead = static_cast<int>(smaller(view.lookahead, view.W));
  const Selected selected =
      select_columns(columns, blocks, lookahead, 0, config, -1, space, nullptr);
  for (int c = threadIdx.x; c < W; c += blockDim.x) {
    view.fill[at + c] = c < length && (space.fill[c / 32] >> (c % 32) & 1u);
  }
  for (int64_t i = threadIdx.x; i < view.lookahead; i += blockDim.x) {
    view.columns[b * view.lookahead + i] =
        i < lookahead && i < selected.rest ? space.lookahead[i] : -1;
  }
  if (threadIdx.x == 0) view.filled[b] = selected.filled;
}

// `parts` CTAs a sequence, a warp a branch.
__global__ void __launch_bounds__(kThreads)
    spawn_kernel(const __grid_constant__ SpawnView view, int parts) {
  release_successor();
  wait_for_predecessor();
  const int lane = lane_index();
  const int64_t b = blockIdx.x / parts, lookahead = view.K - 1;
  const int32_t* columns = view.columns + b * lookahead;
  const bool eos = view.eos[b];
  // The first entry that is no column ends the ranking: live slots are contiguous.
  int64_t live = view.K;
  for (int64_t base = 0; base < lookahead && live == view.K; base += 32) {
    const int64_t i = base + lane;
    const bool ends = i < lookahead && !(columns[i] >= 0 && columns[i] < view.W);
    const unsigned lanes = __ballot_sync(kWholeWarp, ends);
    if (lanes != 0) live = base + __ffs(lanes);
  }
  for (int64_t k = blockIdx.x % parts * warp_count() + warp_index(); k < view.K;
       k += static_cast<int64_t>(parts) * warp_count()) {
    int64_t column = -1, token = 0;
    float creation = k == 0 ? 1.0f : 0.0f;
    bool branch_eos = k == 0 && eos;
    if (k > 0 && k < live) {
      column = columns[k - 1];
      token = view.token[b * view.W + column];
      creation = view.score[b * view.W + column];
      branch_eos = eos || (view.eos_id >= 0 && token == view.eos_id);
    }
    const int64_t slot = b * view.K + k;
    for (int64_t c = lane; c < view.W; c += 32) {
      view.out_tokens[slot * view.W + c] = c == column ? token : view.tokens[b * view.W + c];
    }
    if (lane == 0) {
      view.out_creation[slot] = creation;
      view.out_eos[slot] = branch_eos;
    }
  }
  if (blockIdx.x % parts == 0 && threadIdx.x == 0) {
    view.out_branches[b] = static_cast<int32_t>(live);
  }
}

}  // namespace branch
}  // namespace lopa
