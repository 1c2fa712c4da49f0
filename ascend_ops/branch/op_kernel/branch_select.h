// Steps 5 and 6 of a round for one window: which open columns are filled, and the ranking of the
// others (LoPA, arXiv 2512.16229, Algorithm 1).
#pragma once

#include "branch_memory.h"

namespace lopa {
namespace branch {

__aicore__ inline int32_t first_generated(int32_t cache_len, int32_t prompt_len) {
  return prompt_len > cache_len ? prompt_len - cache_len : 0;
}

// Statistics by column: those of the rows, or of the rows before with what precedes column 0.
struct ColumnStats {
  LocalTensor<int64_t> token;
  LocalTensor<float> prob, score;
  bool shift = false;
  int64_t carry_token = 0;
  float carry_prob = 0.0f, carry_score = 0.0f;

  __aicore__ inline int64_t Token(uint32_t c) const {
    if (!shift) return token.GetValue(c);
    return c == 0 ? carry_token : token.GetValue(c - 1);
  }
  __aicore__ inline float Prob(uint32_t c) const {
    if (!shift) return prob.GetValue(c);
    return c == 0 ? carry_prob : prob.GetValue(c - 1);
  }
  __aicore__ inline float Score(uint32_t c) const {
    if (!shift) return score.GetValue(c);
    return c == 0 ? carry_score : score.GetValue(c - 1);
  }
};

class Selection {
 public:
  uint32_t filled = 0;     // columns to fill, ascending, in filled_columns
  uint32_t lookahead = 0;  // columns to spawn, best first, in lookahead_columns
  LocalTensor<int32_t> filled_columns, lookahead_columns;

  __aicore__ inline void Run(const LocalTensor<int64_t>& tokens, int32_t length, int32_t cache_len,
                             int32_t prompt_len, const ColumnStats& stats, uint32_t most_lookahead,
                             const SelectTiling& config) {
    filled = 0;
    lookahead = 0;
    const int64_t T = config.block_size;
    const int32_t first = first_generated(cache_len, prompt_len);
    const int64_t offset = static_cast<int64_t>(cache_len) - prompt_len;
    int64_t previous_filled = T;  // the prompt and committed blocks are complete
    int32_t best_of_window = -1;
    float best_of_window_score = 0.0f;
    for (int32_t start = first; start < length;) {
      const int64_t block = (start + offset) / T;
      const int64_t block_end = (block + 1) * T - offset;
      const int32_t end = block_end < length ? static_cast<int32_t>(block_end) : length;
      int64_t block_filled = end + offset - block * T;
      int32_t best = -1;
      float best_score = 0.0f;
      bool accepted = false;
      for (int32_t c = start; c < end; ++c) {
        if (tokens.GetValue(c) != config.mask_id) continue;
        --block_filled;
        if (!Fillable(stats.Token(c), config)) continue;
        const float score = rankable(stats.Score(c));
        const float value = config.by_score ? stats.Score(c) : stats.Prob(c);
        if (value > config.tau_conf) {
          filled_columns.SetValue(filled++, c);
          accepted = true;
        }
        if (best < 0 || score > best_score) {
          best = c;
          best_score = score;
        }
      }
      if (!accepted && best >= 0) {
        if (!config.window && previous_filled >= config.act_count) {
          filled_columns.SetValue(filled++, best);
        } else if (best_of_window < 0 || best_score > best_of_window_score) {
          best_of_window = best;
          best_of_window_score = best_score;
        }
      }
      previous_filled = block_filled;
      start = end;
    }
    if (config.window && filled == 0 && best_of_window >= 0) {
      filled_columns.SetValue(filled++, best_of_window);
    }
    RankRest(tokens, length, first, stats, most_lookahead, config);
  }

 private:
  // A prediction of the mask itself, or of no token, fills nothing.
  __aicore__ inline static bool Fillable(int64_t token, const SelectTiling& config) {
    return token >= 0 && token != config.mask_id;
  }

  __aicore__ inline void RankRest(const LocalTensor<int64_t>& tokens, int32_t length, int32_t first,
                                  const ColumnStats& stats, uint32_t most_lookahead,
                                  const SelectTiling& config) {
    if (most_lookahead == 0) return;
    uint32_t next_filled = 0;
    for (int32_t c = first; c < length; ++c) {
      if (next_filled < filled && filled_columns.GetValue(next_filled) == c) {
        ++next_filled;
        continue;
      }
      if (tokens.GetValue(c) != config.mask_id || !Fillable(stats.Token(c), config)) continue;
      const float score = rankable(stats.Score(c));
      if (lookahead == most_lookahead && !(score > RankedScore(lookahead - 1, stats))) continue;
      if (lookahead == most_lookahead) --lookahead;
      // Insertion keeps the earlier column first among equals.
      uint32_t at = lookahead++;
      while (at > 0 && score > RankedScore(at - 1, stats)) {
        lookahead_columns.SetValue(at, lookahead_columns.GetValue(at - 1));
        --at;
      }
      lookahead_columns.SetValue(at, c);
    }
  }

  __aicore__ inline float RankedScore(uint32_t i, const ColumnStats& stats) const {
    return rankable(stats.Score(static_cast<uint32_t>(lookahead_columns.GetValue(i))));
  }
};

}  // namespace branch
}  // namespace lopa
