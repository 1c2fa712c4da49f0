#include "branch_parts.h"

extern "C" __global__ __aicore__ void lopa_select_positions(GM_ADDR token, GM_ADDR prob,
                                                            GM_ADDR score, GM_ADDR tokens,
                                                            GM_ADDR length, GM_ADDR cache_len,
                                                            GM_ADDR prompt_len, GM_ADDR fill,
                                                            GM_ADDR columns, GM_ADDR filled,
                                                            GM_ADDR workspace, GM_ADDR tiling) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
  REGISTER_TILING_DEFAULT(lopa::SelectPositionsTiling);
  GET_TILING_DATA(data, tiling);
  AscendC::TPipe pipe;
  lopa::SelectPositions op;
  op.Init(&pipe, data,
          {token, prob, score, tokens, length, cache_len, prompt_len, fill, columns, filled});
  op.Process();
}
