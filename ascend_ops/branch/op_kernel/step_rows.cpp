#include "branch_rows.h"

extern "C" __global__ __aicore__ void lopa_step_rows(GM_ADDR tokens, GM_ADDR length,
                                                     GM_ADDR branches, GM_ADDR cache_len,
                                                     GM_ADDR commit_len, GM_ADDR prompt_len,
                                                     GM_ADDR done, GM_ADDR given_rows,
                                                     GM_ADDR wanted, GM_ADDR workspace,
                                                     GM_ADDR tiling) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
  REGISTER_TILING_DEFAULT(lopa::RowsTiling);
  GET_TILING_DATA(data, tiling);
  AscendC::TPipe pipe;
  lopa::StepRows op;
  op.Init(&pipe, data, {tokens, length, branches, cache_len, commit_len, prompt_len, done},
          given_rows, wanted);
  op.Process();
}
