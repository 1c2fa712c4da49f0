// lopa_step, branch_step and needed_rows on the CPU: the loop over sequences; the round itself is
// in sequence.h.
#include <vector>

#include "confidence/confidence_cpu.h"
#include "step/sequence.h"
#include "step/step_args.h"

namespace lopa {
namespace {

void run(const BatchView& view, const ColumnStats& stats, const int32_t* status,
         const RoundConfig& config, const BatchOutput& output) {
  // Below some tens of thousands of columns a second thread costs more than it saves.
  const int64_t slots = view.K * view.W;
  const int64_t grain = std::max<int64_t>(1, 32768 / slots);
  torch::stable::parallel_for(0, view.B, grain, [&](int64_t begin, int64_t end) {
    thread_local SequenceRound round;
    for (int64_t b = begin; b < end; ++b) {
      const int64_t at = b * slots;
      round.run(view.sequence(b), {stats.token + at, stats.prob + at, stats.score + at}, config,
                status == nullptr ? 0 : status[b], output.sequence(b));
    }
  });
}

class Cpu {
 public:
  Cpu(const char* op, const char* argument, Device device) {
    if (!(device == kCpu)) fail(op, argument, "a CPU tensor", device_string(device));
  }

  Device device() const { return kCpu; }

  void run_from_stats(const char*, const BatchView& view, const ColumnStats& stats,
                      const RoundConfig& config, const BatchOutput& output) const {
    run(view, stats, nullptr, config, output);
  }

  void run_from_logits(const char* op, const BatchView& view, const VocabularyTensors& vocabulary,
                       const RoundConfig& config, const BatchOutput& output) const {
    const auto& [logits, rows, seed, step, sampled] = vocabulary;
    const auto& [metric, temperature, top_k, top_p] = sampled;
    const ConfidenceConfig sampling =
        make_confidence_config(op, metric, temperature, top_k, top_p, seed, step);
    const LogitsView logits_view = make_logits_view(op, logits);
    const Tensor map = rows ? as_contiguous(*rows) : Tensor();
    const int32_t* row_of = rows ? data<int32_t>(map) : nullptr;
    const int64_t K = view.K, W = view.W;
    std::vector<int32_t> status(view.B, 0);
    std::vector<int64_t> slot, row;
    for (int64_t b = 0; b < view.B; ++b) {
      const SequenceView s = view.sequence(b);
      if (s.done || !well_formed(s, config.select.mask_id)) continue;
      for (int64_t k = 0; k < s.branches; ++k) {
        for (int64_t c = 0; c < s.length[k]; ++c) {
          if (!needs_row(s, k, c, config.select.mask_id, config.shift)) continue;
          const int64_t at = (b * K + k) * W + c;
          int64_t r = row_of == nullptr ? at : row_of[at];
          if (r < 0 || r >= logits_view.rows) {
            status[b] |= kMissingRow;
            r = -1;
          }
          slot.push_back(at);
          row.push_back(r);
        }
      }
    }
    std::vector<RowStats> stats(slot.size());
    confidence_rows(logits_view, sampling, row.data(), static_cast<int64_t>(row.size()), false,
                    stats.data());
    const int64_t slots = view.B * K * W;
    std::vector<int64_t> token(slots, 0);
    std::vector<float> prob(slots, 0.0f), score(slots, kNegInf);
    for (size_t i = 0; i < slot.size(); ++i) {
      token[slot[i]] = stats[i].token;
      prob[slot[i]] = stats[i].prob;
      score[slot[i]] = stats[i].score(sampling.metric);
      if (stats[i].nan || stats[i].empty) {
        // A missing row has its own bit.
        if (row[i] >= 0) status[slot[i] / (K * W)] |= kNonfinite;
      }
    }
    run(view, {token.data(), prob.data(), score.data()}, status.data(), config, output);
  }

  void needed_rows(const char*, const BatchView& view, int64_t mask_id, bool shift,
                   int64_t capacity, int64_t* index, int32_t* rows, int32_t* total) const {
    const int64_t K = view.K, W = view.W;
    std::fill(rows, rows + view.B * K * W, -1);
    int64_t count = 0;
    for (int64_t b = 0; b < view.B; ++b) {
      SequenceView s{};
      s.K = K;
      s.W = W;
      s.tokens = view.tokens + b * K * W;
      s.length = view.length + b * K;
      s.branches = view.branches[b];
      s.cache_len = view.cache_len[b];
      s.commit_len = view.commit_len[b];
      s.prompt_len = view.prompt_len[b];
      if (view.done[b] || !well_formed(s, mask_id)) continue;
      for (int64_t k = 0; k < s.branches; ++k) {
        for (int64_t c = 0; c < s.length[k]; ++c) {
          if (!needs_row(s, k, c, mask_id, shift)) continue;
          if (count < capacity) {
            const int64_t at = (b * K + k) * W + c;
            index[count] = at;
            rows[at] = static_cast<int32_t>(count);
          }
          ++count;
        }
      }
    }
    // Index 0 exists wherever there is a row to gather, so that a gather of all `capacity` is safe.
    for (int64_t i = count; i < capacity; ++i) index[i] = 0;
    *total = static_cast<int32_t>(count);
  }
};

using Operators = StepOperators<Cpu>;

}  // namespace
}  // namespace lopa

STABLE_TORCH_LIBRARY_IMPL(lopa, CPU, m) {
  m.impl("lopa_step", TORCH_BOX(&lopa::Operators::lopa_step));
  m.impl("lopa_step_out", TORCH_BOX(&lopa::Operators::lopa_step_out));
  m.impl("lopa_step_", TORCH_BOX(&lopa::Operators::lopa_step_in_place));
  m.impl("branch_step", TORCH_BOX(&lopa::Operators::branch_step));
  m.impl("branch_step_out", TORCH_BOX(&lopa::Operators::branch_step_out));
  m.impl("branch_step_", TORCH_BOX(&lopa::Operators::branch_step_in_place));
  m.impl("needed_rows", TORCH_BOX(&lopa::Operators::needed_rows));
}

STABLE_TORCH_LIBRARY_IMPL(lopa_eager, CPU, m) {
  m.impl("lopa_step", TORCH_BOX(&lopa::Operators::lopa_step_eager));
  m.impl("lopa_step_out", TORCH_BOX(&lopa::Operators::lopa_step_out_eager));
  m.impl("lopa_step_", TORCH_BOX(&lopa::Operators::lopa_step_in_place_eager));
  m.impl("branch_step", TORCH_BOX(&lopa::Operators::branch_step_eager));
  m.impl("branch_step_out", TORCH_BOX(&lopa::Operators::branch_step_out_eager));
  m.impl("branch_step_", TORCH_BOX(&lopa::Operators::branch_step_in_place_eager));
}
