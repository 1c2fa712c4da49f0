// lopa_step, branch_step and needed_rows on NPUs. A round from logits is three operators, one after
// the other on the stream: the rows that it needs, their statistics, the round.
#include "aclnn.h"
#include "confidence/confidence_args.h"
#include "step/step_args.h"
#include "vocabulary_npu.h"

namespace lopa {
namespace {

const char* name_of(Accept accept) { return accept == Accept::kProb ? "prob" : "score"; }

const char* name_of(Fallback fallback) { return fallback == Fallback::kBlock ? "block" : "window"; }

const char* name_of(Reduction reduction) {
  const char* names[] = {"mean", "bottom", "group", "min"};
  return names[static_cast<int32_t>(reduction)];
}

class Npu : public NpuCall {
 public:
  using NpuCall::NpuCall;

  void run_from_stats(const char*, const BatchView& view, const ColumnStats& stats,
                      const RoundConfig& config, const BatchOutput& output) const {
    if (view.B == 0) return;
    round(view, stats, nullptr, config, output);
  }

  void run_from_logits(const char* op, const BatchView& view, const VocabularyTensors& vocabulary,
                       const RoundConfig& config, const BatchOutput& output) const {
    const auto& [logits, rows, seed, step, sampled] = vocabulary;
    const auto& [metric, temperature, top_k, top_p] = sampled;
    const LogitsView logits_view = make_logits_view(op, logits, device());
    const Sampling sampling =
        check_sampling(op, metric, temperature, top_k, top_p, seed, step, device());
    check_unfiltered(op, sampling, logits_view.vocab);
    if (view.B == 0) return;
    const int64_t B = view.B, K = view.K, W = view.W;
    const Tensor given = rows.has_value() ? as_contiguous(*rows) : Tensor();
    const Tensor wanted = empty({B, K, W}, ScalarType::Int),
                 token = empty({B, K, W}, ScalarType::Long),
                 prob = empty({B, K, W}, ScalarType::Float),
                 score = empty({B, K, W}, ScalarType::Float),
                 unusable = empty({B, K, W}, ScalarType::Int);
    const Operand map = Operand::dense(data<int32_t>(wanted), {B, K, W});
    launch("aclnnLopaStepRows", tokens_of(view), lengths_of(view),
           of_sequences(view, view.branches), of_sequences(view, view.cache_len),
           of_sequences(view, view.commit_len), of_sequences(view, view.prompt_len),
           of_sequences(view, view.done),
           Operand::dense(rows.has_value() ? data<int32_t>(given) : nullptr, {B, K, W}),
           config.select.mask_id, config.shift, map);
    launch_token_confidence(*this, logits, map, sampling,
                            {Operand::dense(data<int64_t>(token), {B, K, W}),
                             Operand::dense(data<float>(prob), {B, K, W}),
                             Operand::dense(data<float>(score), {B, K, W}),
                             Operand::dense(data<int32_t>(unusable), {B, K, W})});
    round(view, {data<int64_t>(token), data<float>(prob), data<float>(score)},
          data<int32_t>(unusable), config, output);
  }

  void needed_rows(const char*, const BatchView& view, int64_t mask_id, bool shift,
                   int64_t capacity, int64_t* index, int32_t* rows, int32_t* count) const {
    launch("aclnnLopaNeededRows", tokens_of(view), lengths_of(view),
           of_sequences(view, view.branches), of_sequences(view, view.cache_len),
           of_sequences(view, view.commit_len), of_sequences(view, view.prompt_len),
           of_sequences(view, view.done), mask_id, shift, capacity,
           Operand::dense(index, {capacity}), Operand::dense(rows, {view.B, view.K, view.W}),
           Operand::dense(count, {1}));
  }

 private:
  static Operand tokens_of(const BatchView& view) {
    return Operand::dense(view.tokens, {view.B, view.K, view.W});
  }

  static Operand lengths_of(const BatchView& view) {
    return Operand::dense(view.length, {view.B, view.K});
  }

  template <typename T>
  static Operand of_sequences(const BatchView& view, const T* data) {
    return Operand::dense(data, {view.B});
  }

  // `unusable` may be null.
  void round(const BatchView& v, const ColumnStats& stats, const int32_t* unusable,
             const RoundConfig& c, const BatchOutput& output) const {
    const SequenceOutput& o = output.first;
    const int64_t B = v.B, K = v.K, W = v.W, nextK = output.branches, nextW = output.window;
    launch("aclnnLopaBranchStep", Operand::dense(stats.token, {B, K, W}),
           Operand::dense(stats.prob, {B, K, W}), Operand::dense(stats.score, {B, K, W}),
           Operand::dense(unusable, {B, K, W}), tokens_of(v), lengths_of(v),
           Operand::dense(v.creation, {B, K}), Operand::dense(v.eos, {B, K}),
           of_sequences(v, v.branches), of_sequences(v, v.cache_len), of_sequences(v, v.commit_len),
           of_sequences(v, v.prompt_len), of_sequences(v, v.carry_token),
           of_sequences(v, v.carry_prob), of_sequences(v, v.carry_score), of_sequences(v, v.done),
           c.branches, c.window, static_cast<double>(c.select.tau_conf), c.add_count,
           c.select.act_count, c.select.block_size, c.max_blocks, c.select.mask_id, c.eos_id,
           name_of(c.select.accept), name_of(c.select.fallback), name_of(c.reduce.reduction),
           bits_of(c.reduce.fraction), c.reduce.group, bits_of(c.reduce.alpha), c.shift,
           c.force_anchor, Operand::dense(o.tokens, {B, nextK, nextW}),
           Operand::dense(o.length, {B, nextK}), Operand::dense(o.creation, {B, nextK}),
           Operand::dense(o.eos, {B, nextK}), of_sequences(v, o.branches),
           of_sequences(v, o.cache_len), of_sequences(v, o.commit_len),
           of_sequences(v, o.prompt_len), of_sequences(v, o.carry_token),
           of_sequences(v, o.carry_prob), of_sequences(v, o.carry_score), of_sequences(v, o.done),
           of_sequences(v, o.winner), of_sequences(v, o.filled),
           Operand::dense(o.confidence, {B, K}), Operand::dense(o.committed, {B, W}),
           of_sequences(v, o.status));
  }
};

using Operators = StepOperators<Npu>;

}  // namespace
}  // namespace lopa

STABLE_TORCH_LIBRARY_IMPL(lopa, PrivateUse1, m) {
  m.impl("lopa_step", TORCH_BOX(&lopa::Operators::lopa_step));
  m.impl("lopa_step_out", TORCH_BOX(&lopa::Operators::lopa_step_out));
  m.impl("lopa_step_", TORCH_BOX(&lopa::Operators::lopa_step_in_place));
  m.impl("branch_step", TORCH_BOX(&lopa::Operators::branch_step));
  m.impl("branch_step_out", TORCH_BOX(&lopa::Operators::branch_step_out));
  m.impl("branch_step_", TORCH_BOX(&lopa::Operators::branch_step_in_place));
  m.impl("needed_rows", TORCH_BOX(&lopa::Operators::needed_rows));
}
