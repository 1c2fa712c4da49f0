// branch_confidence, select_positions and spawn_branches on the GPU; torch-free.
#pragma once

#include <cuda_runtime.h>

#include "branch/params.h"
#include "branch/workspace.h"

namespace lopa {
namespace branch {

// Grid and memory of a call. The caller gives `ctas` times `global_bytes` of global memory.
template <typename Places>
struct Plan {
  int64_t ctas;
  Places places;
  size_t shared_bytes;
  int64_t global_bytes;

  int64_t memory_bytes() const { return ctas * global_bytes; }
};

Plan<Place> plan_confidence(const ConfidenceView& view, const ReductionConfig& config);
void launch_confidence(const ConfidenceView& view, const ReductionConfig& config,
                       const Plan<Place>& plan, void* memory, cudaStream_t stream);

Plan<SelectPlaces> plan_select(const SelectView& view);
void launch_select(const SelectView& view, const SelectConfig& config,
                   const Plan<SelectPlaces>& plan, void* memory, cudaStream_t stream);

void launch_spawn(const SpawnView& view, cudaStream_t stream);

}  // namespace branch
}  // namespace lopa
