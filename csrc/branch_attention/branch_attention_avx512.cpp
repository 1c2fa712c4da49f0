#include "branch_attention/tile_kernel.h"

namespace lopa {

void branch_attention_task_avx512(const BranchAttentionParams& params,
                                  const AttentionSegment* segments, const AttentionTask& task,
                                  float* scratch) {
  run_task_of_type(params, segments, task, scratch);
}

}  // namespace lopa
