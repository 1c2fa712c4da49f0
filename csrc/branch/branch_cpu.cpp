// branch_confidence, select_positions and spawn_branches on the CPU.
#include <cstring>
#include <string>
#include <vector>

#include "branch/branch_args.h"
#include "branch/round.h"

namespace lopa {
namespace {

class Cpu {
 public:
  Cpu(const char* op, const char* argument, Device device) {
    if (!(device == kCpu)) fail(op, argument, "a CPU tensor", device_string(device));
  }

  Device device() const { return kCpu; }

  void confidence(const char*, const ConfidenceView& v, const ReductionConfig& config) const {
    const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(v.W, 1));
    torch::stable::parallel_for(0, v.B * v.K, grain, [&](int64_t begin, int64_t end) {
      std::vector<float> scores;
      for (int64_t i = begin; i < end; ++i) {
        if (v.branches != nullptr && i % v.K >= v.branches[i / v.K]) {
          v.confidence[i] = kNegInf;
          continue;
        }
        const int64_t columns = v.length != nullptr ? std::min<int64_t>(v.length[i], v.W) : v.W;
        if (columns <= 0) {
          v.confidence[i] = 1.0f;
          continue;
        }
        scores.clear();
        for (int64_t c = 0; c < columns; ++c) {
          if (v.open[i * v.W + c]) scores.push_back(rankable(v.score[i * v.W + c]));
        }
        v.confidence[i] =
            blend(rankable(v.creation[i]), reduce_scores(scores, config), config.alpha);
      }
    });
  }

  void select(const char* op, const SelectView& v, const SelectConfig& config) const {
    const int64_t W = v.W, L = v.lookahead;
    for (int64_t b = 0; b < v.B; ++b) {
      const int32_t n = v.length[b];
      if (n < 0 || n > W) {
        fail(op, ("length of sequence " + std::to_string(b)).c_str(),
             "a number in [0, " + std::to_string(W) + "]", n);
      }
    }
    const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(W, 1));
    torch::stable::parallel_for(0, v.B, grain, [&](int64_t begin, int64_t end) {
      Selection selection;
      for (int64_t b = begin; b < end; ++b) {
        const ColumnStats stats{v.stats.token + b * W, v.stats.prob + b * W, v.stats.score + b * W};
        selection.run(v.tokens + b * W, v.length[b], v.cache_len[b], v.prompt_len[b], stats, L,
                      config);
        bool* row = v.fill + b * W;
        std::fill(row, row + W, false);
        for (int32_t c : selection.filled) row[c] = true;
        int32_t* out = v.columns + b * L;
        std::fill(out, out + L, -1);
        std::copy(selection.lookahead.begin(), selection.lookahead.end(), out);
        v.filled[b] = static_cast<int32_t>(selection.filled.size());
      }
    });
  }

  void spawn(const char* op, const SpawnView& v) const {
    const int64_t W = v.W, K = v.K, L = K - 1;
    for (int64_t i = 0; i < v.B * L; ++i) {
      const int32_t column = v.columns[i];
      if (column < -1 || column >= W) {
        fail(op, ("columns of sequence " + std::to_string(i / L)).c_str(),
             "numbers in [-1, " + std::to_string(W) + ")", column);
      }
    }
    for (int64_t b = 0; b < v.B; ++b) {
      int32_t live = 1;
      for (int64_t k = 0; k < K; ++k) {
        int64_t* row = v.out_tokens + (b * K + k) * W;
        std::memcpy(row, v.tokens + b * W, W * sizeof(int64_t));
        float creation = k == 0 ? 1.0f : 0.0f;
        bool has_eos = k == 0 && v.eos[b];
        const int32_t column = k == 0 ? -1 : v.columns[b * L + k - 1];
        // The first -1 ends the ranking: live slots are contiguous.
        if (column >= 0 && live == k) {
          row[column] = v.token[b * W + column];
          creation = v.score[b * W + column];
          has_eos = v.eos[b] || (v.eos_id >= 0 && row[column] == v.eos_id);
          ++live;
        }
        v.out_creation[b * K + k] = creation;
        v.out_eos[b * K + k] = has_eos;
      }
      v.out_branches[b] = live;
    }
  }
};

using Operators = BranchOperators<Cpu>;

}  // namespace
}  // namespace lopa

STABLE_TORCH_LIBRARY_IMPL(lopa, CPU, m) {
  m.impl("branch_confidence", TORCH_BOX(&lopa::Operators::branch_confidence));
  m.impl("select_positions", TORCH_BOX(&lopa::Operators::select_positions));
  m.impl("spawn_branches", TORCH_BOX(&lopa::Operators::spawn_branches));
}
