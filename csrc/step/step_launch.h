// A round on the GPU; torch-free.
#pragma once

#include <cuda_runtime.h>

#include "step/round_args.h"

namespace lopa {
namespace step {

// Threads and memory of a round. The caller gives `memory_of_sequence` bytes of global memory for
// each sequence.
struct RoundPlan {
  RoundPlaces places;
  bool staged;
  int threads;
  size_t shared_bytes;
  int64_t memory_of_sequence;
};

// The plan of branch_step's kernel, or of lopa_step's last one (`from_logits`).
RoundPlan plan_round(const BatchView& state, const RoundConfig& config, bool from_logits);

// Rows that a round needs: a list for the vocabulary pass, or the results of needed_rows.
// `args.sequences` is set here.
void launch_rows(RowsArgs args, cudaStream_t stream);

void launch_round(const RoundArgs& args, const RoundPlan& plan, cudaStream_t stream);

// `args.parts` is set here.
void launch_finish(FinishArgs args, const RoundPlan& plan, cudaStream_t stream);

}  // namespace step
}  // namespace lopa
