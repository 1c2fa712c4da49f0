#include "branch_step.h"

extern "C" __global__ __aicore__ void lopa_branch_step(
    GM_ADDR token, GM_ADDR prob, GM_ADDR score, GM_ADDR unusable, GM_ADDR tokens, GM_ADDR length,
    GM_ADDR creation, GM_ADDR eos, GM_ADDR branches, GM_ADDR cache_len, GM_ADDR commit_len,
    GM_ADDR prompt_len, GM_ADDR carry_token, GM_ADDR carry_prob, GM_ADDR carry_score, GM_ADDR done,
    GM_ADDR next_tokens, GM_ADDR next_length, GM_ADDR next_creation, GM_ADDR next_eos,
    GM_ADDR next_branches, GM_ADDR next_cache_len, GM_ADDR next_commit_len, GM_ADDR next_prompt_len,
    GM_ADDR next_carry_token, GM_ADDR next_carry_prob, GM_ADDR next_carry_score, GM_ADDR next_done,
    GM_ADDR winner, GM_ADDR filled, GM_ADDR confidence, GM_ADDR committed, GM_ADDR status,
    GM_ADDR workspace, GM_ADDR tiling) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
  REGISTER_TILING_DEFAULT(lopa::BranchStepTiling);
  GET_TILING_DATA(data, tiling);
  AscendC::TPipe pipe;
  const lopa::BranchStepInputs inputs{
      token,
      prob,
      score,
      unusable,
      {tokens, length, creation, eos, branches, cache_len, commit_len, prompt_len, carry_token,
       carry_prob, carry_score, done}};
  const lopa::BranchStepOutputs outputs{
      {next_tokens, next_length, next_creation, next_eos, next_branches, next_cache_len,
       next_commit_len, next_prompt_len, next_carry_token, next_carry_prob, next_carry_score,
       next_done},
      winner,
      filled,
      confidence,
      committed,
      status};
  lopa::BranchStep op;
  op.Init(&pipe, data, inputs, outputs);
  op.Process();
}
