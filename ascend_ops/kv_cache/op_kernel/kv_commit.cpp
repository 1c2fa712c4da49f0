#include "kv_commit.h"

extern "C" __global__ __aicore__ void lopa_kv_commit(
    GM_ADDR k_cache, GM_ADDR v_cache, GM_ADDR k_window, GM_ADDR v_window, GM_ADDR winner,
    GM_ADDR cache_len, GM_ADDR commit_len, GM_ADDR status, GM_ADDR k_cache_out, GM_ADDR v_cache_out,
    GM_ADDR status_out, GM_ADDR workspace, GM_ADDR tiling) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
  REGISTER_TILING_DEFAULT(lopa::KvCommitTiling);
  GET_TILING_DATA(data, tiling);
  AscendC::TPipe pipe;
  lopa::KvCommit op;
  // What is written in place is named twice: as an input, and as the output of the same name.
  op.Init(&pipe, data, k_cache_out, v_cache_out, k_window, v_window, winner, cache_len, commit_len,
          status_out);
  op.Process();
}
