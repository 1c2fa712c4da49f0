#include "branch_rows.h"

extern "C" __global__ __aicore__ void lopa_needed_rows(GM_ADDR tokens, GM_ADDR length,
                                                       GM_ADDR branches, GM_ADDR cache_len,
                                                       GM_ADDR commit_len, GM_ADDR prompt_len,
                                                       GM_ADDR done, GM_ADDR index, GM_ADDR rows,
                                                       GM_ADDR count, GM_ADDR workspace,
                                                       GM_ADDR tiling) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
  REGISTER_TILING_DEFAULT(lopa::RowsTiling);
  GET_TILING_DATA(data, tiling);
  AscendC::TPipe pipe;
  lopa::NeededRows op;
  op.Init(&pipe, data, {tokens, length, branches, cache_len, commit_len, prompt_len, done}, index,
          rows, count, AscendC::GetUserWorkspace(workspace));
  op.Process();
}
