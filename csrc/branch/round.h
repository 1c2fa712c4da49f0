// The parts of a LoPA round over the columns of one sequence (LoPA, arXiv 2512.16229, Algorithm 1
// and Eq. 2), torch-free and scalar: a round has a few hundred columns.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "branch/params.h"

namespace lopa {

constexpr float kNegInf = -std::numeric_limits<float>::infinity();

// NaN ranks below every number.
inline float rankable(float score) { return std::isnan(score) ? kNegInf : score; }

// First column of the window that belongs to a generated block.
inline int64_t first_generated(int64_t cache_len, int64_t prompt_len) {
  return std::max<int64_t>(0, prompt_len - cache_len);
}

// Eq. 2 and its variants over the scores of the n open columns, in window order. Sums are formed
// in double: fp32 scores of one magnitude add up without rounding, in any order.
inline double reduce_scores(std::vector<float>& scores, const ReductionConfig& config) {
  const int64_t n = static_cast<int64_t>(scores.size());
  if (n == 0) return 1.0;
  double total = 0.0;
  float lowest = std::numeric_limits<float>::infinity();
  for (float score : scores) {
    total += score;
    lowest = std::min(lowest, score);
  }
  // A -inf lies in some group and in every bottom share, and would turn sums into NaN.
  if (std::isinf(lowest) && lowest < 0) return lowest;
  switch (config.reduction) {
    case Reduction::kMean:
      return total / static_cast<double>(n);
    case Reduction::kMin:
      return lowest;
    case Reduction::kBottom: {
      int64_t m = static_cast<int64_t>(std::floor(static_cast<double>(n) * config.fraction));
      m = std::clamp<int64_t>(m, 1, n);
      if (m < n) std::nth_element(scores.begin(), scores.begin() + (m - 1), scores.end());
      double sum = 0.0;
      for (int64_t i = 0; i < m; ++i) sum += scores[i];
      return sum / static_cast<double>(m);
    }
    case Reduction::kGroup: {
      if (n < config.group) return total / static_cast<double>(n);
      double sum = 0.0;
      for (int64_t i = 0; i < config.group; ++i) sum += scores[i];
      double least = sum;
      for (int64_t i = config.group; i < n; ++i) {
        sum += static_cast<double>(scores[i]) - static_cast<double>(scores[i - config.group]);
        least = std::min(least, sum);
      }
      return least / static_cast<double>(config.group);
    }
  }
  return 1.0;
}

// C = alpha * creation + (1 - alpha) * F; a term of weight 0 is left out, infinite or not.
inline float blend(double creation, double reduced, double alpha) {
  if (alpha <= 0.0) return static_cast<float>(reduced);
  if (alpha >= 1.0) return static_cast<float>(creation);
  return static_cast<float>(alpha * creation + (1.0 - alpha) * reduced);
}

// Steps 5 and 6 for one branch: which open columns are filled, and the ranking of the others.
class Selection {
 public:
  std::vector<int32_t> filled;     // columns to fill, ascending
  std::vector<int32_t> lookahead;  // columns to spawn, best first

  // `stats` holds the statistics of each column itself (a shift is the caller's).
  void run(const int64_t* tokens, int64_t length, int64_t cache_len, int64_t prompt_len,
           const ColumnStats& stats, int64_t num_lookahead, const SelectConfig& config) {
    filled.clear();
    lookahead.clear();
    const int64_t T = config.block_size;
    const int64_t first = first_generated(cache_len, prompt_len);
    const int64_t offset = cache_len - prompt_len;  // column + offset = generated index
    int64_t previous_filled = T;                    // the prompt and committed blocks are complete
    int64_t best_of_window = -1;
    for (int64_t start = first; start < length;) {
      const int64_t block = (start + offset) / T;
      const int64_t end = std::min(length, (block + 1) * T - offset);
      // Tokens of the block: those in the cache, and the window's that hold no mask.
      int64_t block_filled = end + offset - block * T;
      int64_t best = -1;
      bool accepted = false;
      for (int64_t c = start; c < end; ++c) {
        if (tokens[c] != config.mask_id) continue;
        --block_filled;
        if (!fillable(stats.token[c], config)) continue;
        const float value = config.accept == Accept::kProb ? stats.prob[c] : stats.score[c];
        if (value > config.tau_conf) {
          filled.push_back(static_cast<int32_t>(c));
          accepted = true;
        }
        if (best < 0 || rankable(stats.score[c]) > rankable(stats.score[best])) best = c;
      }
      if (!accepted && best >= 0) {
        const bool activated = previous_filled >= config.act_count;
        if (config.fallback == Fallback::kBlock && activated) {
          filled.push_back(static_cast<int32_t>(best));
        } else if (best_of_window < 0 ||
                   rankable(stats.score[best]) > rankable(stats.score[best_of_window])) {
          best_of_window = best;
        }
      }
      previous_filled = block_filled;
      start = end;
    }
    if (config.fallback == Fallback::kWindow && filled.empty() && best_of_window >= 0) {
      filled.push_back(static_cast<int32_t>(best_of_window));
    }
    rank_rest(tokens, length, first, stats, num_lookahead, config);
  }

 private:
  // A prediction of the mask itself, or of no token, fills nothing.
  static bool fillable(int64_t token, const SelectConfig& config) {
    return token >= 0 && token != config.mask_id;
  }

  void rank_rest(const int64_t* tokens, int64_t length, int64_t first, const ColumnStats& stats,
                 int64_t num_lookahead, const SelectConfig& config) {
    if (num_lookahead <= 0) return;
    size_t next_filled = 0;
    for (int64_t c = first; c < length; ++c) {
      if (next_filled < filled.size() && filled[next_filled] == c) {
        ++next_filled;
        continue;
      }
      if (tokens[c] != config.mask_id || !fillable(stats.token[c], config)) continue;
      const float score = rankable(stats.score[c]);
      const bool full = static_cast<int64_t>(lookahead.size()) == num_lookahead;
      if (full && !(score > rankable(stats.score[lookahead.back()]))) continue;
      if (full) lookahead.pop_back();
      // Insertion keeps the earlier column first among equals.
      size_t at = lookahead.size();
      lookahead.push_back(static_cast<int32_t>(c));
      while (at > 0 && score > rankable(stats.score[lookahead[at - 1]])) {
        lookahead[at] = lookahead[at - 1];
        --at;
      }
      lookahead[at] = static_cast<int32_t>(c);
    }
  }
};

}  // namespace lopa
