// branch_confidence, select_positions and spawn_branches on NPUs.
#include "aclnn.h"
#include "branch/branch_args.h"

namespace lopa {
namespace {

class Npu : public NpuCall {
 public:
  using NpuCall::NpuCall;

  void confidence(const char*, const ConfidenceView& v, const ReductionConfig& c) const {
    if (v.B * v.K == 0) return;
    const char* reductions[] = {"mean", "bottom", "group", "min"};
    launch("aclnnLopaBranchConfidence", Operand::dense(v.score, {v.B, v.K, v.W}),
           Operand::dense(v.open, {v.B, v.K, v.W}), Operand::dense(v.creation, {v.B, v.K}),
           Operand::dense(v.branches, {v.B}), Operand::dense(v.length, {v.B, v.K}),
           reductions[static_cast<int32_t>(c.reduction)], bits_of(c.fraction), c.group,
           bits_of(c.alpha), Operand::dense(v.confidence, {v.B, v.K}));
  }

  void select(const char*, const SelectView& v, const SelectConfig& c) const {
    if (v.B == 0) return;
    launch("aclnnLopaSelectPositions", Operand::dense(v.stats.token, {v.B, v.W}),
           Operand::dense(v.stats.prob, {v.B, v.W}), Operand::dense(v.stats.score, {v.B, v.W}),
           Operand::dense(v.tokens, {v.B, v.W}), Operand::dense(v.length, {v.B}),
           Operand::dense(v.cache_len, {v.B}), Operand::dense(v.prompt_len, {v.B}), v.lookahead,
           static_cast<double>(c.tau_conf), c.act_count, c.block_size, c.mask_id,
           c.accept == Accept::kProb ? "prob" : "score",
           c.fallback == Fallback::kBlock ? "block" : "window", Operand::dense(v.fill, {v.B, v.W}),
           Operand::dense(v.columns, {v.B, v.lookahead}), Operand::dense(v.filled, {v.B}));
  }

  void spawn(const char*, const SpawnView& v) const {
    if (v.B == 0) return;
    launch("aclnnLopaSpawnBranches", Operand::dense(v.tokens, {v.B, v.W}),
           Operand::dense(v.eos, {v.B}), Operand::dense(v.token, {v.B, v.W}),
           Operand::dense(v.score, {v.B, v.W}), Operand::dense(v.columns, {v.B, v.K - 1}), v.eos_id,
           Operand::dense(v.out_tokens, {v.B, v.K, v.W}),
           Operand::dense(v.out_creation, {v.B, v.K}), Operand::dense(v.out_eos, {v.B, v.K}),
           Operand::dense(v.out_branches, {v.B}));
  }
};

using Operators = BranchOperators<Npu>;

}  // namespace
}  // namespace lopa

STABLE_TORCH_LIBRARY_IMPL(lopa, PrivateUse1, m) {
  m.impl("branch_confidence", TORCH_BOX(&lopa::Operators::branch_confidence));
  m.impl("select_positions", TORCH_BOX(&lopa::Operators::select_positions));
  m.impl("spawn_branches", TORCH_BOX(&lopa::Operators::spawn_branches));
}
