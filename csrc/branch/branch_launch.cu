// Grids and memory of the kernels of the branch room.
#include <algorithm>

#include "branch/branch_kernel.cuh"
#include "branch/branch_launch.h"
#include "lopa/cuda.h"

namespace lopa {
namespace branch {
namespace {

constexpr int64_t kWarps = kThreads / 32;
constexpr size_t kOrdinarySharedBytes = 48 * 1024;

template <auto kernel>
void allow_workspace(size_t bytes) {
  if (bytes > kOrdinarySharedBytes) allow_shared_memory<kernel>(Workspace::kSharedBytes);
}

}  // namespace

Plan<Place> plan_confidence(const ConfidenceView& view, const ReductionConfig& config) {
  const int64_t wanted = (view.B * view.K + kWarps - 1) / kWarps;
  Workspace workspace;
  Place kept{0, true};
  if (keeps_scores(config)) kept = workspace.add(kWarps * view.W * sizeof(float));
  // Fewer CTAs where each has a list in global memory.
  const int64_t most = multiprocessors() * int64_t{workspace.global_bytes() > 0 ? 1 : 8};
  const int64_t ctas = std::min(wanted, most);
  return {ctas, kept, workspace.shared_bytes(), workspace.global_bytes()};
}

void launch_confidence(const ConfidenceView& view, const ReductionConfig& config,
                       const Plan<Place>& plan, void* memory, cudaStream_t stream) {
  if (plan.ctas == 0) return;
  auto run = [&]<bool kKeeps>() {
    allow_workspace<confidence_kernel<kKeeps>>(plan.shared_bytes);
    launch("branch_confidence", confidence_kernel<kKeeps>, dim3(static_cast<unsigned>(plan.ctas)),
           dim3(kThreads), plan.shared_bytes, stream, true, view, config, plan.places,
           static_cast<char*>(memory), plan.global_bytes);
  };
  if (keeps_scores(config)) {
    run.operator()<true>();
  } else {
    run.operator()<false>();
  }
}

Plan<SelectPlaces> plan_select(const SelectView& view) {
  Workspace workspace;
  const SelectPlaces places =
      SelectPlaces::add_to(workspace, view.W, std::min(view.lookahead, view.W));
  return {view.B, places, workspace.shared_bytes(), workspace.global_bytes()};
}

void launch_select(const SelectView& view, const SelectConfig& config,
                   const Plan<SelectPlaces>& plan, void* memory, cudaStream_t stream) {
  if (plan.ctas == 0) return;
  auto run = [&]<bool kInShared>() {
    allow_workspace<select_kernel<kInShared>>(plan.shared_bytes);
    launch("select_positions", select_kernel<kInShared>, dim3(static_cast<unsigned>(plan.ctas)),
           dim3(kThreads), plan.shared_bytes, stream, true, view, config, plan.places,
           static_cast<char*>(memory), plan.global_bytes);
  };
  if (plan.global_bytes == 0) {
    run.operator()<true>();
  } else {
    run.operator()<false>();
  }
}

void launch_spawn(const SpawnView& view, cudaStream_t stream) {
  if (view.B == 0) return;
  const int64_t most = std::max<int64_t>(1, 8 * multiprocessors() / view.B);
  const int64_t parts = std::clamp<int64_t>((view.K + kWarps - 1) / kWarps, 1, most);
  launch("spawn_branches", spawn_kernel, dim3(static_cast<unsigned>(view.B * parts)),
         dim3(kThreads), 0, stream, true, view, static_cast<int>(parts));
}

}  // namespace branch
}  // namespace lopa
