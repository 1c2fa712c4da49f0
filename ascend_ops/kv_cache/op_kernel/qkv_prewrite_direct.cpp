#include "kv_prewrite.h"

// What is written in place is named twice: as an input, and as the output of the same name.
extern "C" __global__ __aicore__ void lopa_qkv_prewrite_direct(
    GM_ADDR q, GM_ADDR k_window, GM_ADDR v_window, GM_ADDR k_cache, GM_ADDR v_cache, GM_ADDR qkv,
    GM_ADDR cos_sin, GM_ADDR cache_len, GM_ADDR commit_len, GM_ADDR status, GM_ADDR q_norm,
    GM_ADDR k_norm, GM_ADDR q_out, GM_ADDR k_window_out, GM_ADDR v_window_out, GM_ADDR k_cache_out,
    GM_ADDR v_cache_out, GM_ADDR status_out, GM_ADDR workspace, GM_ADDR tiling) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
  REGISTER_TILING_DEFAULT(lopa::KvPrewriteTiling);
  GET_TILING_DATA(data, tiling);
  AscendC::TPipe pipe;
  lopa::KvPrewriteOperands operands{};
  operands.q = q_out;
  operands.kWindow = k_window_out;
  operands.vWindow = v_window_out;
  operands.kCache = k_cache_out;
  operands.vCache = v_cache_out;
  operands.qkv = qkv;
  operands.cosSin = cos_sin;
  operands.cacheLen = cache_len;
  operands.commitLen = commit_len;
  operands.status = status_out;
  operands.qNorm = q_norm;
  operands.kNorm = k_norm;
  lopa::KvPrewrite<DTYPE_K_WINDOW, true, true> op;
  op.Init(&pipe, data, operands);
  op.Process();
}
