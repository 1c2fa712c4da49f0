#include "branch_parts.h"

extern "C" __global__ __aicore__ void lopa_branch_confidence(GM_ADDR score, GM_ADDR open,
                                                             GM_ADDR creation, GM_ADDR branches,
                                                             GM_ADDR length, GM_ADDR confidence,
                                                             GM_ADDR workspace, GM_ADDR tiling) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
  REGISTER_TILING_DEFAULT(lopa::BranchConfidenceTiling);
  GET_TILING_DATA(data, tiling);
  AscendC::TPipe pipe;
  lopa::BranchConfidence op;
  op.Init(&pipe, data, score, open, creation, branches, length, confidence);
  op.Process();
}
