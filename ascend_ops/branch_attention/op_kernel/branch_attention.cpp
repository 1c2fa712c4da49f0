#include "branch_attention.h"

extern "C" __global__ __aicore__ void branch_attention(GM_ADDR q, GM_ADDR kCache, GM_ADDR vCache,
                                                       GM_ADDR kWindow, GM_ADDR vWindow,
                                                       GM_ADDR cacheLen, GM_ADDR length,
                                                       GM_ADDR promptLen, GM_ADDR out, GM_ADDR lse,
                                                       GM_ADDR workspace, GM_ADDR tiling) {
  REGISTER_TILING_DEFAULT(BranchAttentionTiling);
  GET_TILING_DATA(tilingData, tiling);
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_MIX_AIC_1_2);
  AscendC::TPipe pipe;
  branch_attention::BranchAttention<DTYPE_Q> op;
  op.Run(q, kCache, vCache, kWindow, vWindow, cacheLen, length, promptLen, out, lse,
         AscendC::GetUserWorkspace(workspace), &tilingData, &pipe);
}
