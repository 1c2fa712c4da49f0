// One sequence's LoPA round from ready statistics (arXiv 2512.16229, Algorithm 1), torch-free.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "branch/round.h"

namespace lopa {

// Bounds that keep every read and write of a round inside its tensors.
inline bool well_formed(const SequenceView& s, int64_t mask_id) {
  if (s.branches < 1 || s.branches > s.K || s.cache_len < 0 || s.commit_len < 0 ||
      s.prompt_len < 0 || s.cache_len > std::numeric_limits<int32_t>::max() - s.W) {
    return false;
  }
  for (int64_t k = 0; k < s.branches; ++k) {
    const int64_t length = s.length[k];
    if (length < 0 || length > s.W || s.commit_len > length) return false;
    // The window reaches past the prompt: blocks are counted from there.
    if (s.cache_len + length < s.prompt_len) return false;
    for (int64_t c = first_generated(s.cache_len, s.prompt_len); c < s.commit_len; ++c) {
      if (s.tokens[k * s.W + c] == mask_id) return false;
    }
  }
  return true;
}

// Does the round need the logits row of column c of branch k? With shifted logits the row before
// a column predicts it, and the last committed row becomes the carry.
inline bool needs_row(const SequenceView& s, int64_t k, int64_t c, int64_t mask_id, bool shift) {
  const int64_t target = shift ? c + 1 : c;
  if (shift && s.commit_len > 0 && c == s.commit_len - 1) return true;
  return target < s.length[k] && target >= first_generated(s.cache_len, s.prompt_len) &&
         s.tokens[k * s.W + target] == mask_id;
}

class SequenceRound {
 public:
  // `stats` holds K rows of W statistics by logits row; only rows that the round needs are read.
  void run(const SequenceView& s, const ColumnStats& stats, const RoundConfig& config,
           int32_t status, const SequenceOutput& out) {
    if (s.done || !well_formed(s, config.select.mask_id)) {
      pass_through(s, config, s.done ? status : status | kBadState, out);
      return;
    }
    status_ = status;
    const int64_t winner = choose(s, stats, config, out.confidence);
    const ColumnStats own = column_stats(s, stats, winner, config.shift);
    const int64_t U = s.commit_len;
    selection_.run(s.tokens + winner * s.W, s.length[winner], s.cache_len, s.prompt_len, own,
                   config.branches - 1, config.select);

    // From here on the input state is read only through copies: `out` may be the same memory.
    anchor_.assign(s.tokens + winner * s.W, s.tokens + (winner + 1) * s.W);
    const int64_t length = s.length[winner];
    const bool had_open = open_columns(s, length) > 0;
    bool eos = s.eos[winner];
    for (int32_t c : selection_.filled) {
      anchor_[c] = own.token[c];
      eos = eos || is_eos(anchor_[c], config);
    }
    carry(s, stats, winner, config.shift, out);
    for (int64_t c = 0; c < s.W; ++c) out.committed[c] = c < U ? anchor_[c] : -1;

    Next next{s.cache_len + U, s.prompt_len, length - U, U};
    next.commit_len = complete_columns(next, config);
    if (next.length > config.window) {
      status_ |= kWindowFull;
      next.length = config.window;
      next.commit_len = std::min(next.commit_len, next.length);
      selection_.lookahead.clear();
    }
    write_branches(own, next, eos, config, out);
    finish(next, had_open, out);

    *out.winner = static_cast<int32_t>(winner);
    *out.filled = static_cast<int32_t>(selection_.filled.size());
    *out.cache_len = static_cast<int32_t>(next.cache_len);
    *out.commit_len = static_cast<int32_t>(next.commit_len);
    *out.prompt_len = static_cast<int32_t>(next.prompt_len);
    *out.status = status_;
  }

 private:
  struct Next {
    int64_t cache_len, prompt_len, length;
    int64_t slid;  // columns of anchor_ that left the window
    int64_t commit_len = 0;
    bool opened = false, waiting = false;
  };

  static bool is_eos(int64_t token, const RoundConfig& config) {
    return config.eos_id >= 0 && token == config.eos_id;
  }

  int64_t open_columns(const SequenceView& s, int64_t length) const {
    int64_t n = 0;
    for (int64_t c = first_generated(s.cache_len, s.prompt_len); c < length; ++c) {
      n += anchor_[c] == mask_;
    }
    return n;
  }

  // Steps 2 and 3. Equal confidence: the lowest lookahead slot, and the anchor last.
  int64_t choose(const SequenceView& s, const ColumnStats& stats, const RoundConfig& config,
                 float* confidence) {
    mask_ = config.select.mask_id;
    const int64_t first = first_generated(s.cache_len, s.prompt_len);
    int64_t winner = 0;
    float best = kNegInf;
    for (int64_t slot = 1; slot <= s.K; ++slot) {
      const int64_t k = slot % s.K;  // lookahead slots, then the anchor
      if (k >= s.branches) {
        confidence[k] = kNegInf;
        continue;
      }
      const int64_t* tokens = s.tokens + k * s.W;
      scores_.clear();
      for (int64_t c = first; c < s.length[k]; ++c) {
        if (tokens[c] != mask_) continue;
        const float score = !config.shift ? stats.score[k * s.W + c]
                            : c > 0       ? stats.score[k * s.W + c - 1]
                                          : s.carry_score;
        // Statistics of infinite or NaN score come from rows without a usable distribution.
        if (!std::isfinite(score)) status_ |= kNonfinite;
        scores_.push_back(rankable(score));
      }
      confidence[k] = s.length[k] == 0
                          ? 1.0f
                          : blend(rankable(s.creation[k]), reduce_scores(scores_, config.reduce),
                                  config.reduce.alpha);
      if (k == 0 ? (s.branches == 1 || confidence[k] > best)
                 : (winner == 0 || confidence[k] > best)) {
        winner = k;
        best = confidence[k];
      }
    }
    return config.force_anchor ? 0 : winner;
  }

  // The winner's statistics by column: rows as they are, or moved one column on.
  ColumnStats column_stats(const SequenceView& s, const ColumnStats& stats, int64_t k, bool shift) {
    const int64_t row = k * s.W;
    if (!shift) return {stats.token + row, stats.prob + row, stats.score + row};
    token_.resize(s.W);
    prob_.resize(s.W);
    score_.resize(s.W);
    token_[0] = s.carry_token;
    prob_[0] = s.carry_prob;
    score_[0] = s.carry_score;
    std::copy_n(stats.token + row, s.W - 1, token_.data() + 1);
    std::copy_n(stats.prob + row, s.W - 1, prob_.data() + 1);
    std::copy_n(stats.score + row, s.W - 1, score_.data() + 1);
    return {token_.data(), prob_.data(), score_.data()};
  }

  static void carry(const SequenceView& s, const ColumnStats& stats, int64_t winner, bool shift,
                    const SequenceOutput& out) {
    const bool moves = shift && s.commit_len > 0;
    const int64_t row = winner * s.W + s.commit_len - 1;
    *out.carry_token = moves ? stats.token[row] : s.carry_token;
    *out.carry_prob = moves ? stats.prob[row] : s.carry_prob;
    *out.carry_score = moves ? stats.score[row] : s.carry_score;
  }

  // Step 7: leading columns of consecutive complete blocks, after the slide.
  int64_t complete_columns(const Next& next, const RoundConfig& config) const {
    const int64_t T = config.select.block_size;
    const int64_t offset = next.cache_len - next.prompt_len;
    int64_t end = std::min(next.length, first_generated(next.cache_len, next.prompt_len));
    for (;;) {
      const int64_t block_end = (end + offset) / T * T + T - offset;
      if (block_end > next.length) return end;
      for (int64_t c = end; c < block_end; ++c) {
        if (anchor_[next.slid + c] == mask_) return end;
      }
      end = block_end;
    }
  }

  // Step 9 for one branch: does it want another block? `filled_more` is what a lookahead token
  // adds to the last block.
  bool wants_block(const Next& next, bool eos, int64_t filled_more,
                   const RoundConfig& config) const {
    const int64_t T = config.select.block_size;
    const int64_t generated = next.cache_len + next.length - next.prompt_len;
    if (eos || (generated + T - 1) / T >= config.max_blocks) return false;
    if (generated <= 0 || next.length == 0) return true;
    const int64_t start = last_block_start(next, config);
    int64_t filled = (generated - 1) % T + 1 + filled_more;
    for (int64_t c = std::max<int64_t>(start, 0); c < next.length; ++c) {
      filled -= anchor_[next.slid + c] == mask_;
    }
    return filled >= config.add_count;
  }

  static int64_t last_block_start(const Next& next, const RoundConfig& config) {
    const int64_t T = config.select.block_size;
    const int64_t offset = next.cache_len - next.prompt_len;
    return (next.length - 1 + offset) / T * T - offset;
  }

  // Steps 6, 8 and 9: the next anchor and its lookahead branches, slid and extended.
  void write_branches(const ColumnStats& own, Next& next, bool eos, const RoundConfig& config,
                      const SequenceOutput& out) {
    const int64_t live = 1 + static_cast<int64_t>(selection_.lookahead.size());
    for (int64_t k = 0; k < config.branches; ++k) {
      int64_t* row = out.tokens + k * config.window;
      if (k >= live) {
        std::fill(row, row + config.window, mask_);
        out.length[k] = 0;
        out.creation[k] = 0.0f;
        out.eos[k] = false;
        continue;
      }
      bool branch_eos = eos;
      int64_t filled_more = 0;
      std::copy_n(anchor_.data() + next.slid, next.length, row);
      out.creation[k] = 1.0f;
      if (k > 0) {
        const int64_t column = selection_.lookahead[k - 1];
        const int64_t token = own.token[column];
        row[column - next.slid] = token;
        branch_eos = branch_eos || is_eos(token, config);
        filled_more = column - next.slid >= last_block_start(next, config);
        out.creation[k] = rankable(own.score[column]);
      }
      int64_t length = next.length;
      const bool wants =
          !(status_ & kWindowFull) && wants_block(next, branch_eos, filled_more, config);
      const bool opens = wants && length + config.select.block_size <= config.window;
      if (opens) length += config.select.block_size;
      if (k == 0) {
        next.opened = opens;
        next.waiting = wants && !opens;
      }
      std::fill(row + next.length, row + config.window, mask_);
      out.length[k] = static_cast<int32_t>(length);
      out.eos[k] = branch_eos;
    }
    *out.branches = static_cast<int32_t>(live);
  }

  // Step 10, and the two ways in which a sequence cannot go on.
  void finish(const Next& next, bool had_open, const SequenceOutput& out) {
    const int64_t first = first_generated(next.cache_len, next.prompt_len);
    bool open = false;
    for (int64_t c = first; c < next.length; ++c) open |= anchor_[next.slid + c] == mask_;
    const bool stalled = had_open && selection_.filled.empty() && selection_.lookahead.empty() &&
                         next.slid == 0 && next.commit_len == 0 && !next.opened;
    if (stalled) status_ |= kStalled;
    *out.done = (!open && !next.opened && !next.waiting) || stalled || (status_ & kWindowFull);
  }

  void pass_through(const SequenceView& s, const RoundConfig& config, int32_t status,
                    const SequenceOutput& out) {
    mask_ = config.select.mask_id;
    const int64_t live = std::clamp<int64_t>(s.branches, 1, std::min(s.K, config.branches));
    const int64_t columns = std::min(s.W, config.window);
    for (int64_t k = 0; k < config.branches; ++k) {
      int64_t* row = out.tokens + k * config.window;
      const bool exists = k < s.K;
      if (exists) std::memmove(row, s.tokens + k * s.W, columns * sizeof(int64_t));
      std::fill(row + (exists ? columns : 0), row + config.window, mask_);
      out.length[k] =
          exists ? static_cast<int32_t>(std::clamp<int64_t>(s.length[k], 0, columns)) : 0;
      out.creation[k] = exists ? s.creation[k] : 0.0f;
      out.eos[k] = exists && s.eos[k];
    }
    std::fill(out.confidence, out.confidence + s.K, kNegInf);
    std::fill(out.committed, out.committed + s.W, static_cast<int64_t>(-1));
    *out.branches = static_cast<int32_t>(live);
    *out.cache_len = s.cache_len;
    *out.commit_len = s.commit_len;
    *out.prompt_len = s.prompt_len;
    *out.carry_token = s.carry_token;
    *out.carry_prob = s.carry_prob;
    *out.carry_score = s.carry_score;
    *out.done = true;
    *out.winner = 0;
    *out.filled = 0;
    *out.status = status;
  }

  int32_t status_ = 0;
  int64_t mask_ = 0;
  Selection selection_;
  std::vector<float> scores_;
  std::vector<int64_t> anchor_, token_;
  std::vector<float> prob_, score_;
};

}  // namespace lopa
