#include "branch_attention.h"

extern "C" __global__ __aicore__ void lopa_branch_attention(
    GM_ADDR q, GM_ADDR k_cache, GM_ADDR v_cache, GM_ADDR k_window, GM_ADDR v_window,
    GM_ADDR cache_len, GM_ADDR length, GM_ADDR prompt_len, GM_ADDR block_table, GM_ADDR out,
    GM_ADDR lse, GM_ADDR workspace, GM_ADDR tiling) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_MIX_AIC_1_2);
  REGISTER_TILING_DEFAULT(BranchAttentionTiling);
  GET_TILING_DATA(data, tiling);
  AscendC::TPipe pipe;
  branch_attention::BranchAttention<DTYPE_Q> op;
  op.Run(q, k_cache, v_cache, k_window, v_window, cache_len, length, prompt_len, block_table, out,
         lse, AscendC::GetUserWorkspace(workspace), &data, &pipe);
}
