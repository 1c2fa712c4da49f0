// One LoPA round from ready statistics (arXiv 2512.16229, Algorithm 1), a vector core a sequence.
//
// A round has a few hundred columns, and each step follows from the one before: the scalar unit
// does it on windows in UB, branch after branch, and only the winner's stays.
#pragma once

#include "branch_reduce.h"
#include "branch_state.h"

namespace lopa {

using namespace AscendC;

struct BranchStepInputs {
  GM_ADDR token;
  GM_ADDR prob;
  GM_ADDR score;
  GM_ADDR unusable;
  branch::StateAddresses state;
};

struct BranchStepOutputs {
  branch::StateAddresses state;
  GM_ADDR winner;
  GM_ADDR filled;
  GM_ADDR confidence;
  GM_ADDR committed;
  GM_ADDR status;
};

class BranchStep {
 public:
  __aicore__ inline BranchStep() {}

  __aicore__ inline void Init(TPipe* pipe, const BranchStepTiling& tiling,
                              const BranchStepInputs& in, const BranchStepOutputs& out) {
    t_ = tiling;
    const uint32_t B = t_.batch, K = t_.branches, W = t_.window;
    const uint32_t slots = t_.next_branches;
    const uint64_t columns = static_cast<uint64_t>(B) * K * W;
    const uint64_t next_columns = static_cast<uint64_t>(B) * slots * t_.next_window;
    token_in_ = branch::global<int64_t>(in.token, columns);
    prob_in_ = branch::global<float>(in.prob, columns);
    score_in_ = branch::global<float>(in.score, columns);
    if (t_.has_unusable) unusable_in_ = branch::global<int32_t>(in.unusable, columns);
    const branch::StateAddresses& s = in.state;
    numbers_.Init(B, s.branches, s.cache_len, s.commit_len, s.prompt_len, s.done);
    tokens_in_ = branch::global<int64_t>(s.tokens, columns);
    length_in_ = branch::global<int32_t>(s.length, static_cast<uint64_t>(B) * K);
    creation_in_ = branch::global<float>(s.creation, static_cast<uint64_t>(B) * K);
    eos_in_ = branch::global<uint8_t>(s.eos, static_cast<uint64_t>(B) * K);
    carry_token_in_ = branch::global<int64_t>(s.carry_token, B);
    carry_prob_in_ = branch::global<float>(s.carry_prob, B);
    carry_score_in_ = branch::global<float>(s.carry_score, B);
    const branch::StateAddresses& o = out.state;
    tokens_out_ = branch::global<int64_t>(o.tokens, next_columns);
    length_out_ = branch::global<int32_t>(o.length, static_cast<uint64_t>(B) * slots);
    creation_out_ = branch::global<float>(o.creation, static_cast<uint64_t>(B) * slots);
    eos_out_ = branch::global<uint8_t>(o.eos, static_cast<uint64_t>(B) * slots);
    confidence_out_ = branch::global<float>(out.confidence, static_cast<uint64_t>(B) * K);
    committed_out_ = branch::global<int64_t>(out.committed, static_cast<uint64_t>(B) * W);
    GM_ADDR words[] = {o.branches, o.cache_len, o.commit_len, o.prompt_len,
                       out.winner, out.filled,  out.status};
    for (uint32_t i = 0; i < kWords; ++i) word_out_[i] = branch::global<int32_t>(words[i], B);
    carry_token_out_ = branch::global<int64_t>(o.carry_token, B);
    carry_prob_out_ = branch::global<float>(o.carry_prob, B);
    carry_score_out_ = branch::global<float>(o.carry_score, B);
    done_out_ = branch::global<uint8_t>(o.done, B);

    pipe->InitBuffer(tokens_, W * sizeof(int64_t));
    pipe->InitBuffer(token_, W * sizeof(int64_t));
    pipe->InitBuffer(prob_, W * sizeof(float));
    pipe->InitBuffer(score_, W * sizeof(float));
    pipe->InitBuffer(unusable_, W * sizeof(int32_t));
    pipe->InitBuffer(list_, W * sizeof(float));
    pipe->InitBuffer(row_, t_.next_window * sizeof(int64_t));
    pipe->InitBuffer(committed_, W * sizeof(int64_t));
    pipe->InitBuffer(lookahead_, slots * sizeof(int32_t));
    pipe->InitBuffer(length_, K * sizeof(int32_t));
    pipe->InitBuffer(creation_, K * sizeof(float));
    pipe->InitBuffer(eos_, K);
    pipe->InitBuffer(confidence_, K * sizeof(float));
    pipe->InitBuffer(next_length_, slots * sizeof(int32_t));
    pipe->InitBuffer(next_creation_, slots * sizeof(float));
    pipe->InitBuffer(next_eos_, slots);
    pipe->InitBuffer(scalars_, (kWords + 4) * branch::kBlockBytes);
    selection_.filled_columns = list_.Get<int32_t>();
    selection_.lookahead_columns = lookahead_.Get<int32_t>();
  }

  __aicore__ inline void Process() {
    uint32_t begin, end;
    branch::share_of(t_.batch, begin, end);
    for (uint32_t b = begin; b < end; ++b) {
      Read(b);
      int32_t winner = 0;
      const bool sound = !n_.done && Choose(b, winner);
      if (sound) {
        Advance(b, winner);
      } else {
        PassThrough(b);
      }
      WriteNumbers(b);
    }
  }

 private:
  // The words of a sequence's results, in the order of word_out_.
  enum Word : uint32_t {
    kBranches,
    kCacheLen,
    kCommitLen,
    kPromptLen,
    kWinner,
    kFilled,
    kStatus,
    kWords
  };

  struct Next {
    int32_t cache_len, prompt_len, length;
    int32_t slid;  // columns of the anchor that left the window
    int32_t commit_len = 0;
    bool opened = false, waiting = false;
  };

  __aicore__ inline void Read(uint32_t b) {
    n_ = numbers_.Read(b);
    status_ = 0;
    carry_token_ = carry_token_in_.GetValue(b);
    carry_prob_ = carry_prob_in_.GetValue(b);
    carry_score_ = carry_score_in_.GetValue(b);
    const uint64_t at = static_cast<uint64_t>(b) * t_.branches;
    branch::begin_loads();
    branch::load(length_.Get<int32_t>(), length_in_[at], t_.branches);
    branch::load(creation_.Get<float>(), creation_in_[at], t_.branches);
    branch::load(eos_.Get<uint8_t>(), eos_in_[at], t_.branches);
    branch::end_loads();
  }

  __aicore__ inline int32_t Length(uint32_t k) { return length_.Get<int32_t>().GetValue(k); }

  // The tokens and scores of branch k, and, of the winner, the rest.
  __aicore__ inline void LoadBranch(uint32_t b, uint32_t k, bool all) {
    const uint64_t at = (static_cast<uint64_t>(b) * t_.branches + k) * t_.window;
    branch::begin_loads();
    branch::load(tokens_.Get<int64_t>(), tokens_in_[at], t_.window);
    branch::load(score_.Get<float>(), score_in_[at], t_.window);
    if (t_.has_unusable && !all) {
      branch::load(unusable_.Get<int32_t>(), unusable_in_[at], t_.window);
    }
    if (all) {
      branch::load(token_.Get<int64_t>(), token_in_[at], t_.window);
      branch::load(prob_.Get<float>(), prob_in_[at], t_.window);
    }
    branch::end_loads();
  }

  __aicore__ inline branch::ColumnStats Stats() {
    branch::ColumnStats stats;
    stats.token = token_.Get<int64_t>();
    stats.prob = prob_.Get<float>();
    stats.score = score_.Get<float>();
    stats.shift = t_.shift != 0;
    stats.carry_token = carry_token_;
    stats.carry_prob = carry_prob_;
    stats.carry_score = carry_score_;
    return stats;
  }

  // Steps 2 and 3: false where the state is not sound. Equal confidence: the lowest lookahead slot,
  // and the anchor last.
  __aicore__ inline bool Choose(uint32_t b, int32_t& winner) {
    if (!n_.Sound(t_.branches, t_.window)) return Bad();
    LocalTensor<float> confidence = confidence_.Get<float>();
    float best = branch::neg_inf();
    int32_t status = 0;
    for (uint32_t slot = 1; slot <= t_.branches; ++slot) {
      const uint32_t k = slot % t_.branches;
      if (k >= static_cast<uint32_t>(n_.branches)) {
        confidence.SetValue(k, branch::neg_inf());
        continue;
      }
      LoadBranch(b, k, false);
      if (!n_.Sound(tokens_.Get<int64_t>(), Length(k), t_.window, t_.select.mask_id)) {
        return Bad();
      }
      const float own = Confidence(k, status);
      confidence.SetValue(k, own);
      if (k == 0 ? (n_.branches == 1 || own > best) : (winner == 0 || own > best)) {
        winner = static_cast<int32_t>(k);
        best = own;
      }
    }
    status_ |= status;
    if (t_.force_anchor) winner = 0;
    return true;
  }

  __aicore__ inline bool Bad() {
    status_ |= kStatusBadState;
    return false;
  }

  // 1: a NaN or no finite logit; 2: no such row.
  __aicore__ inline static int32_t RowStatus(int32_t unusable) {
    return unusable == 2 ? kStatusMissingRow : unusable != 0 ? kStatusNonfinite : 0;
  }

  __aicore__ inline float Confidence(uint32_t k, int32_t& status) {
    const int32_t length = Length(k), shift = t_.shift != 0 ? 1 : 0;
    LocalTensor<int64_t> tokens = tokens_.Get<int64_t>();
    LocalTensor<int32_t> unusable = unusable_.Get<int32_t>();
    LocalTensor<float> list = list_.Get<float>();
    const branch::ColumnStats stats = Stats();
    uint32_t open = 0;
    if (t_.has_unusable && shift != 0 && n_.commit_len > 0) {
      status |= RowStatus(unusable.GetValue(n_.commit_len - 1));
    }
    for (int32_t c = n_.FirstGenerated(); c < length; ++c) {
      if (tokens.GetValue(c) != t_.select.mask_id) continue;
      const float score = stats.Score(c);
      // Statistics of infinite or NaN score come from rows without a usable distribution.
      if (!branch::is_finite(score)) status |= kStatusNonfinite;
      if (t_.has_unusable && c >= shift) status |= RowStatus(unusable.GetValue(c - shift));
      list.SetValue(open++, branch::rankable(score));
    }
    if (length == 0) return 1.0f;
    return branch::blend(branch::rankable(creation_.Get<float>().GetValue(k)),
                         branch::reduce_scores(list, open, t_.reduce), t_.reduce);
  }

  __aicore__ inline bool IsEos(int64_t token) const { return t_.eos_id >= 0 && token == t_.eos_id; }

  // Is column c of the anchor, counted after the slide, open?
  __aicore__ inline bool Masked(const Next& next, int32_t c) {
    return tokens_.Get<int64_t>().GetValue(next.slid + c) == t_.select.mask_id;
  }

  // Steps 4 to 10.
  __aicore__ inline void Advance(uint32_t b, int32_t winner) {
    LoadBranch(b, static_cast<uint32_t>(winner), true);
    const branch::ColumnStats own = Stats();
    const int32_t U = n_.commit_len, length = Length(winner);
    LocalTensor<int64_t> anchor = tokens_.Get<int64_t>();
    selection_.Run(anchor, length, n_.cache_len, n_.prompt_len, own, t_.next_branches - 1,
                   t_.select);
    bool had_open = false;
    for (int32_t c = n_.FirstGenerated(); c < length; ++c) {
      had_open = had_open || anchor.GetValue(c) == t_.select.mask_id;
    }
    bool eos = eos_.Get<uint8_t>().GetValue(winner) != 0;
    for (uint32_t i = 0; i < selection_.filled; ++i) {
      const int32_t c = selection_.filled_columns.GetValue(i);
      anchor.SetValue(c, own.Token(c));
      eos = eos || IsEos(own.Token(c));
    }
    if (t_.shift != 0 && U > 0) {
      carry_token_ = own.token.GetValue(U - 1);
      carry_prob_ = own.prob.GetValue(U - 1);
      carry_score_ = own.score.GetValue(U - 1);
    }
    for (uint32_t c = 0; c < t_.window; ++c) {
      const bool left = static_cast<int32_t>(c) < U;
      committed_.Get<int64_t>().SetValue(c, left ? anchor.GetValue(c) : int64_t{-1});
    }

    Next next{};
    next.cache_len = n_.cache_len + U;
    next.prompt_len = n_.prompt_len;
    next.length = length - U;
    next.slid = U;
    next.commit_len = CompleteColumns(next);
    if (next.length > static_cast<int32_t>(t_.next_window)) {
      status_ |= kStatusWindowFull;
      next.length = static_cast<int32_t>(t_.next_window);
      if (next.commit_len > next.length) next.commit_len = next.length;
      selection_.lookahead = 0;
    }
    WriteBranches(b, own, next, eos);
    Finish(next, had_open);
    word_[kCacheLen] = next.cache_len;
    word_[kCommitLen] = next.commit_len;
    word_[kPromptLen] = next.prompt_len;
    word_[kWinner] = winner;
    word_[kFilled] = static_cast<int32_t>(selection_.filled);
  }

  // Step 7: leading columns of consecutive complete blocks, after the slide.
  __aicore__ inline int32_t CompleteColumns(const Next& next) {
    const int64_t T = t_.select.block_size;
    const int64_t offset = static_cast<int64_t>(next.cache_len) - next.prompt_len;
    const int32_t first = branch::first_generated(next.cache_len, next.prompt_len);
    int64_t end = first < next.length ? first : next.length;
    for (;;) {
      const int64_t block_end = (end + offset) / T * T + T - offset;
      if (block_end > next.length) return static_cast<int32_t>(end);
      for (int64_t c = end; c < block_end; ++c) {
        if (Masked(next, static_cast<int32_t>(c))) return static_cast<int32_t>(end);
      }
      end = block_end;
    }
  }

  __aicore__ inline int64_t LastBlockStart(const Next& next) const {
    const int64_t T = t_.select.block_size;
    const int64_t offset = static_cast<int64_t>(next.cache_len) - next.prompt_len;
    return (next.length - 1 + offset) / T * T - offset;
  }

  // Step 9 for one branch: does it want another block? `more` is what a lookahead token adds to
  // the filled ones of the last block.
  __aicore__ inline bool WantsBlock(const Next& next, bool eos, int32_t more) {
    const int64_t T = t_.select.block_size;
    const int64_t generated = static_cast<int64_t>(next.cache_len) + next.length - next.prompt_len;
    if (eos || (generated + T - 1) / T >= t_.max_blocks) return false;
    if (generated <= 0 || next.length == 0) return true;
    const int64_t start = LastBlockStart(next);
    int64_t filled = (generated - 1) % T + 1 + more;
    for (int64_t c = start > 0 ? start : 0; c < next.length; ++c) {
      if (Masked(next, static_cast<int32_t>(c))) --filled;
    }
    return filled >= t_.add_count;
  }

  // Steps 6, 8 and 9: the next anchor and its lookahead branches, slid and extended.
  __aicore__ inline void WriteBranches(uint32_t b, const branch::ColumnStats& own, Next& next,
                                       bool eos) {
    LocalTensor<int64_t> row = row_.Get<int64_t>();
    const uint32_t live = 1 + selection_.lookahead;
    for (uint32_t k = 0; k < t_.next_branches; ++k) {
      int32_t length = 0;
      float creation = 0.0f;
      bool branch_eos = false;
      const int32_t copied = k < live ? next.length : 0;
      for (int32_t c = 0; c < copied; ++c) {
        row.SetValue(c, tokens_.Get<int64_t>().GetValue(next.slid + c));
      }
      for (uint32_t c = static_cast<uint32_t>(copied); c < t_.next_window; ++c) {
        row.SetValue(c, t_.select.mask_id);
      }
      if (k < live) {
        int32_t more = 0;
        branch_eos = eos;
        creation = 1.0f;
        length = next.length;
        if (k > 0) {
          const int32_t column = selection_.lookahead_columns.GetValue(k - 1);
          const int64_t token = own.Token(column);
          row.SetValue(column - next.slid, token);
          branch_eos = branch_eos || IsEos(token);
          more = column - next.slid >= LastBlockStart(next) ? 1 : 0;
          creation = branch::rankable(own.Score(column));
        }
        const bool wants = (status_ & kStatusWindowFull) == 0 && WantsBlock(next, branch_eos, more);
        const bool opens =
            wants && length + t_.select.block_size <= static_cast<int64_t>(t_.next_window);
        if (opens) length += static_cast<int32_t>(t_.select.block_size);
        if (k == 0) {
          next.opened = opens;
          next.waiting = wants && !opens;
        }
      }
      StoreBranch(b, k, length, creation, branch_eos);
    }
    word_[kBranches] = static_cast<int32_t>(live);
  }

  // The row in row_, and the numbers of slot k.
  __aicore__ inline void StoreBranch(uint32_t b, uint32_t k, int32_t length, float creation,
                                     bool eos) {
    next_length_.Get<int32_t>().SetValue(k, length);
    next_creation_.Get<float>().SetValue(k, creation);
    next_eos_.Get<uint8_t>().SetValue(k, static_cast<uint8_t>(eos ? 1 : 0));
    branch::begin_stores();
    const uint64_t slot = static_cast<uint64_t>(b) * t_.next_branches + k;
    branch::store(tokens_out_[slot * t_.next_window], row_.Get<int64_t>(), t_.next_window);
    branch::end_stores();
  }

  // Step 10, and the two ways in which a sequence cannot go on.
  __aicore__ inline void Finish(const Next& next, bool had_open) {
    bool open = false;
    for (int32_t c = branch::first_generated(next.cache_len, next.prompt_len); c < next.length;
         ++c) {
      open = open || Masked(next, c);
    }
    const bool stalled = had_open && selection_.filled == 0 && selection_.lookahead == 0 &&
                         next.slid == 0 && next.commit_len == 0 && !next.opened;
    if (stalled) status_ |= kStatusStalled;
    done_ =
        (!open && !next.opened && !next.waiting) || stalled || (status_ & kStatusWindowFull) != 0;
  }

  __aicore__ inline void PassThrough(uint32_t b) {
    LocalTensor<int64_t> row = row_.Get<int64_t>();
    const uint32_t columns = t_.window < t_.next_window ? t_.window : t_.next_window;
    const uint32_t slots = t_.branches < t_.next_branches ? t_.branches : t_.next_branches;
    for (uint32_t k = 0; k < t_.next_branches; ++k) {
      const bool exists = k < t_.branches;
      int32_t length = 0;
      float creation = 0.0f;
      bool eos = false;
      if (exists) {
        LoadBranch(b, k, false);
        for (uint32_t c = 0; c < columns; ++c) row.SetValue(c, tokens_.Get<int64_t>().GetValue(c));
        length = Length(k);
        if (length < 0) length = 0;
        if (length > static_cast<int32_t>(columns)) length = static_cast<int32_t>(columns);
        creation = creation_.Get<float>().GetValue(k);
        eos = eos_.Get<uint8_t>().GetValue(k) != 0;
      }
      for (uint32_t c = exists ? columns : 0; c < t_.next_window; ++c) {
        row.SetValue(c, t_.select.mask_id);
      }
      StoreBranch(b, k, length, creation, eos);
    }
    for (uint32_t k = 0; k < t_.branches; ++k) {
      confidence_.Get<float>().SetValue(k, branch::neg_inf());
    }
    for (uint32_t c = 0; c < t_.window; ++c) committed_.Get<int64_t>().SetValue(c, int64_t{-1});
    int32_t live = n_.branches;
    if (live > static_cast<int32_t>(slots)) live = static_cast<int32_t>(slots);
    if (live < 1) live = 1;
    word_[kBranches] = live;
    word_[kCacheLen] = n_.cache_len;
    word_[kCommitLen] = n_.commit_len;
    word_[kPromptLen] = n_.prompt_len;
    word_[kWinner] = 0;
    word_[kFilled] = 0;
    done_ = true;
  }

  template <typename T>
  __aicore__ inline LocalTensor<T> Cell(uint32_t i) {
    return scalars_.GetWithOffset<T>(branch::kBlockBytes / sizeof(T), i * branch::kBlockBytes);
  }

  __aicore__ inline void WriteNumbers(uint32_t b) {
    word_[kStatus] = status_;
    for (uint32_t i = 0; i < kWords; ++i) Cell<int32_t>(i).SetValue(0, word_[i]);
    Cell<int64_t>(kWords).SetValue(0, carry_token_);
    Cell<float>(kWords + 1).SetValue(0, carry_prob_);
    Cell<float>(kWords + 2).SetValue(0, carry_score_);
    Cell<uint8_t>(kWords + 3).SetValue(0, static_cast<uint8_t>(done_ ? 1 : 0));
    branch::begin_stores();
    for (uint32_t i = 0; i < kWords; ++i) branch::store(word_out_[i][b], Cell<int32_t>(i), 1);
    branch::store(carry_token_out_[b], Cell<int64_t>(kWords), 1);
    branch::store(carry_prob_out_[b], Cell<float>(kWords + 1), 1);
    branch::store(carry_score_out_[b], Cell<float>(kWords + 2), 1);
    branch::store(done_out_[b], Cell<uint8_t>(kWords + 3), 1);
    const uint64_t slot = static_cast<uint64_t>(b) * t_.next_branches;
    branch::store(length_out_[slot], next_length_.Get<int32_t>(), t_.next_branches);
    branch::store(creation_out_[slot], next_creation_.Get<float>(), t_.next_branches);
    branch::store(eos_out_[slot], next_eos_.Get<uint8_t>(), t_.next_branches);
    branch::store(confidence_out_[static_cast<uint64_t>(b) * t_.branches], confidence_.Get<float>(),
                  t_.branches);
    branch::store(committed_out_[static_cast<uint64_t>(b) * t_.window], committed_.Get<int64_t>(),
                  t_.window);
    branch::end_stores();
  }

  BranchStepTiling t_;
  branch::NumbersInput numbers_;
  GlobalTensor<int64_t> token_in_, tokens_in_, carry_token_in_;
  GlobalTensor<float> prob_in_, score_in_, creation_in_, carry_prob_in_, carry_score_in_;
  GlobalTensor<int32_t> unusable_in_, length_in_;
  GlobalTensor<uint8_t> eos_in_;
  GlobalTensor<int64_t> tokens_out_, committed_out_, carry_token_out_;
  GlobalTensor<float> creation_out_, confidence_out_, carry_prob_out_, carry_score_out_;
  GlobalTensor<int32_t> length_out_, word_out_[kWords];
  GlobalTensor<uint8_t> eos_out_, done_out_;
  TBuf<TPosition::VECCALC> tokens_, token_, prob_, score_, unusable_, list_, row_, committed_;
  TBuf<TPosition::VECCALC> lookahead_, length_, creation_, eos_, confidence_;
  TBuf<TPosition::VECCALC> next_length_, next_creation_, next_eos_, scalars_;
  branch::Selection selection_;
  // Of the sequence under way.
  branch::Numbers n_;
  int64_t carry_token_ = 0;
  float carry_prob_ = 0.0f, carry_score_ = 0.0f;
  int32_t status_ = 0;
  int32_t word_[kWords] = {};
  bool done_ = false;
};

}  // namespace lopa
