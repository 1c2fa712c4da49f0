// branch_attention: attention of all branches over the shared prefix and each over its own window.
//
// One cube core and two vector cores share a job (branch_attention_job.h). For each step of up to
// 256 keys the cube core forms S = Q K^T, the vector cores P = exp(scale S - maximum) and the cube
// core P V; all three pass through workspace in two slots, so that the cube core is one step ahead.
// Keys and values are read once for all rows of a tile, whatever branches and query heads those
// are.
#pragma once

#include "branch_attention_cube.h"
#include "branch_attention_job.h"
#include "branch_attention_vector.h"
#include "kernel_operator.h"

namespace branch_attention {

template <typename T>
class BranchAttention {
 public:
  __aicore__ inline void Run(GM_ADDR q, GM_ADDR kCache, GM_ADDR vCache, GM_ADDR kWindow,
                             GM_ADDR vWindow, GM_ADDR cacheLen, GM_ADDR length, GM_ADDR promptLen,
                             GM_ADDR blockTable, GM_ADDR out, GM_ADDR lse, GM_ADDR workspace,
                             const BranchAttentionTiling* tiling, AscendC::TPipe* pipe) {
    Schedule schedule;
    schedule.Init(cacheLen, length, promptLen, blockTable, tiling);
    if ASCEND_IS_AIC {
      CubeSide<T> cube;
      cube.Init(q, kCache, vCache, kWindow, vWindow, workspace, &schedule, tiling, pipe);
      cube.Process();
    }
    if ASCEND_IS_AIV {
      VectorSide<T> vector;
      vector.Init(out, lse, workspace, &schedule, tiling, pipe);
      vector.Process();
    }
  }
};

}  // namespace branch_attention
