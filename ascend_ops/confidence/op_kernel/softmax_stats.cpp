#include "confidence.h"

extern "C" __global__ __aicore__ void lopa_softmax_stats(GM_ADDR logits, GM_ADDR rows, GM_ADDR seed,
                                                         GM_ADDR step, GM_ADDR token, GM_ADDR prob,
                                                         GM_ADDR margin, GM_ADDR neg_entropy,
                                                         GM_ADDR lse, GM_ADDR workspace,
                                                         GM_ADDR tiling) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
  REGISTER_TILING_DEFAULT(lopa::ConfidenceTiling);
  GET_TILING_DATA(data, tiling);
  AscendC::TPipe pipe;
  lopa::Confidence<DTYPE_LOGITS> op;
  const lopa::ConfidenceOutputs outputs{token, prob, nullptr, nullptr, margin, neg_entropy, lse};
  op.Init(&pipe, data, {logits, rows, seed, step}, outputs, AscendC::GetUserWorkspace(workspace));
  op.Process();
}
