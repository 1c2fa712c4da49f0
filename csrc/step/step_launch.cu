// Grids, memory and instantiations of the kernels of a round.
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "confidence/merge_policies.h"
#include "lopa/cuda.h"
#include "step/rows_kernel.cuh"
#include "step/step_kernel.cuh"
#include "step/step_launch.h"

namespace lopa {
namespace step {
namespace {

constexpr size_t kOrdinarySharedBytes = 48 * 1024;
// CTAs of a cluster that every chip with clusters can hold.
constexpr int64_t kClusterCtas = 8;
// Fewer tokens than this are counted sooner by one CTA than a cluster meets.
constexpr int64_t kLonelyTokens = 8192;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int round_threads(const BatchView& state, const RoundConfig& config, bool from_logits) {
  if (from_logits) return confidence::kMergeThreads;
  const bool small = std::max(state.K, config.branches) <= 8 && state.W <= 512;
  return small ? kMostRoundThreads / 2 : kMostRoundThreads;
}

// Do all sequences' tokens and statistics consist of whole vectors of 16 bytes?
bool can_stage(const RoundArgs& args) {
  const ColumnStats& stats = args.stats;
  const uintptr_t addresses =
      reinterpret_cast<uintptr_t>(args.state.tokens) | reinterpret_cast<uintptr_t>(stats.token) |
      reinterpret_cast<uintptr_t>(stats.prob) | reinterpret_cast<uintptr_t>(stats.score);
  return addresses % 16 == 0 && args.state.K * args.state.W % 4 == 0;
}

}  // namespace

RoundPlan plan_round(const BatchView& state, const RoundConfig& config, bool from_logits) {
  const int64_t K = state.K, W = state.W, slots = K * W;
  const int threads = round_threads(state, config, from_logits);
  branch::Workspace workspace;
  RoundPlaces places{};
  places.branches = workspace.add(3 * K * 4);
  places.select =
      branch::SelectPlaces::add_to(workspace, W, std::min<int64_t>(config.branches - 1, W));
  places.values = workspace.add(ceil_div(W, 32) * 32 * sizeof(int64_t));
  if (branch::keeps_scores(config.reduce)) {
    places.scores = workspace.add(std::min<int64_t>(threads / 32, K) * W * sizeof(float));
  }
  const bool staged = !from_logits && slots < branch::Workspace::kSharedBytes &&
                      workspace.fits(slots * 24 + 4 * 16);
  if (staged) {
    places.tokens = workspace.add(slots * 8);
    places.token = workspace.add(slots * 8);
    places.prob = workspace.add(slots * 4);
    places.score = workspace.add(slots * 4);
  }
  return {places, staged, threads, workspace.shared_bytes(), workspace.global_bytes()};
}

void launch_rows(RowsArgs args, cudaStream_t stream) {
  const BatchView& state = args.state;
  const int64_t K = std::max<int64_t>(state.K, 1);
  args.sequences = static_cast<int>(std::max<int64_t>(1, kBranchesAtOnce / K));
  int64_t ctas = 1;
  if (compute_capability() >= 90 && state.B * K * state.W > kLonelyTokens) {
    ctas = std::min(kClusterCtas, state.B);
  }
  const int64_t share = ceil_div(state.B, ctas);
  args.sequences =
      static_cast<int>(std::clamp<int64_t>(args.sequences, 1, std::max<int64_t>(share, 1)));
  const int64_t branches = args.sequences * K;
  const int64_t warps = std::clamp<int64_t>(branches, 4, kRowsThreads / 32);

  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(ctas));
  config.blockDim = dim3(static_cast<unsigned>(warps * 32));
  config.dynamicSmemBytes = RowCounts::bytes(args.sequences, K);
  config.stream = stream;
  cudaLaunchAttribute attributes[2] = {};
  if (compute_capability() >= 90) {
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim = {static_cast<unsigned>(ctas), 1, 1};
    config.attrs = attributes;
    config.numAttrs = ctas > 1 ? 2 : 1;
  }
  if (config.dynamicSmemBytes > kOrdinarySharedBytes) {
    allow_shared_memory<rows_kernel>(branch::Workspace::kSharedBytes);
  }
  check_cuda(cudaLaunchKernelEx(&config, rows_kernel, args), "rows of a round");
}

void launch_round(const RoundArgs& args, const RoundPlan& plan, cudaStream_t stream) {
  auto run = [&]<bool kInShared, bool kStaged>() {
    constexpr auto kernel = round_kernel<kInShared, kStaged>;
    if (plan.shared_bytes > kOrdinarySharedBytes) {
      allow_shared_memory<kernel>(branch::Workspace::kSharedBytes);
    }
    launch("round", kernel, dim3(static_cast<unsigned>(args.state.B)), dim3(plan.threads),
           plan.shared_bytes, stream, true, args);
  };
  if (plan.memory_of_sequence > 0) {
    run.operator()<false, false>();
  } else if (args.staged && can_stage(args)) {
    run.operator()<true, true>();
  } else {
    run.operator()<true, false>();
  }
}

void launch_finish(FinishArgs args, const RoundPlan& plan, cudaStream_t stream) {
  const BatchView& state = args.round.state;
  auto run = [&]<typename Merge, bool kInShared>() {
    constexpr auto kernel = finish_kernel<Merge, kInShared>;
    const size_t shared = std::max(plan.shared_bytes, Merge::kSharedBytes);
    if (shared > kOrdinarySharedBytes) {
      allow_shared_memory<kernel>(
          std::max<size_t>(branch::Workspace::kSharedBytes, Merge::kSharedBytes));
    }
    // A part merges some rows, and a sequence waits for all its parts: as many as there are rows
    // for, in a few waves of CTAs. A policy without shared memory merges a row with a warp.
    constexpr int64_t kRows = Merge::kSharedBytes == 0 ? 8 : 4;
    const int64_t most = std::max<int64_t>(1, int64_t{4} * multiprocessors() / state.B);
    args.parts = static_cast<int>(std::clamp<int64_t>(ceil_div(state.K * state.W, kRows), 1, most));
    launch("merge and round", kernel, dim3(static_cast<unsigned>(state.B * args.parts)),
           dim3(Merge::kThreads), shared, stream, args.vocabulary.logits.rows > 0, args);
  };
  confidence::with_merge<confidence::kMergeThreads>(args.vocabulary, [&]<typename Merge>() {
    // Merges that take longer than a round have it in one version, to keep the library small.
    if constexpr (std::is_same_v<Merge, confidence::GreedyMerge>) {
      if (plan.memory_of_sequence == 0) return run.template operator()<Merge, true>();
    }
    run.template operator()<Merge, false>();
  });
}

}  // namespace step
}  // namespace lopa
