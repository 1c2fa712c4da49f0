#include "branch_parts.h"

extern "C" __global__ __aicore__ void lopa_spawn_branches(GM_ADDR tokens, GM_ADDR eos,
                                                          GM_ADDR token, GM_ADDR score,
                                                          GM_ADDR columns, GM_ADDR out_tokens,
                                                          GM_ADDR out_creation, GM_ADDR out_eos,
                                                          GM_ADDR out_branches, GM_ADDR workspace,
                                                          GM_ADDR tiling) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
  REGISTER_TILING_DEFAULT(lopa::SpawnBranchesTiling);
  GET_TILING_DATA(data, tiling);
  AscendC::TPipe pipe;
  lopa::SpawnBranches op;
  op.Init(&pipe, data,
          {tokens, eos, token, score, columns, out_tokens, out_creation, out_eos, out_branches});
  op.Process();
}
