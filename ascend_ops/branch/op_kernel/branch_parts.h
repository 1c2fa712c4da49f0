// Parts of a round as operators of their own: BranchConfidence, SelectPositions, SpawnBranches.
#pragma once

#include "branch_reduce.h"
#include "branch_state.h"

namespace lopa {

using namespace AscendC;

class BranchConfidence {
 public:
  __aicore__ inline void Init(TPipe* pipe, const BranchConfidenceTiling& tiling, GM_ADDR score,
                              GM_ADDR open, GM_ADDR creation, GM_ADDR branches, GM_ADDR length,
                              GM_ADDR confidence) {
    t_ = tiling;
    const uint64_t slots = static_cast<uint64_t>(t_.batch) * t_.branches;
    score_in_ = branch::global<float>(score, slots * t_.window);
    open_in_ = branch::global<uint8_t>(open, slots * t_.window);
    creation_in_ = branch::global<float>(creation, slots);
    if (t_.has_branches) branches_in_ = branch::global<int32_t>(branches, t_.batch);
    if (t_.has_length) length_in_ = branch::global<int32_t>(length, slots);
    confidence_out_ = branch::global<float>(confidence, slots);
    pipe->InitBuffer(score_, (t_.window > 0 ? t_.window : 1) * sizeof(float));
    pipe->InitBuffer(open_, t_.window > 0 ? t_.window : 1);
    pipe->InitBuffer(list_, (t_.window > 0 ? t_.window : 1) * sizeof(float));
    pipe->InitBuffer(confidence_, branch::kBlockBytes);
  }

  __aicore__ inline void Process() {
    uint32_t begin, end;
    branch::share_of(t_.batch * t_.branches, begin, end);
    for (uint32_t slot = begin; slot < end; ++slot) {
      confidence_.Get<float>().SetValue(0, Of(slot));
      branch::begin_stores();
      branch::store(confidence_out_[slot], confidence_.Get<float>(), 1);
      branch::end_stores();
    }
  }

 private:
  __aicore__ inline float Of(uint32_t slot) {
    const uint32_t b = slot / t_.branches, k = slot % t_.branches;
    if (t_.has_branches && static_cast<int32_t>(k) >= branches_in_.GetValue(b)) {
      return branch::neg_inf();
    }
    int32_t columns = static_cast<int32_t>(t_.window);
    if (t_.has_length) {
      const int32_t length = length_in_.GetValue(slot);
      columns = length < columns ? length : columns;
    }
    if (columns <= 0) return 1.0f;
    const uint64_t at = static_cast<uint64_t>(slot) * t_.window;
    branch::begin_loads();
    branch::load(score_.Get<float>(), score_in_[at], static_cast<uint32_t>(columns));
    branch::load(open_.Get<uint8_t>(), open_in_[at], static_cast<uint32_t>(columns));
    branch::end_loads();
    uint32_t open = 0;
    for (int32_t c = 0; c < columns; ++c) {
      if (open_.Get<uint8_t>().GetValue(c) == 0) continue;
      list_.Get<float>().SetValue(open++, branch::rankable(score_.Get<float>().GetValue(c)));
    }
    return branch::blend(branch::rankable(creation_in_.GetValue(slot)),
                         branch::reduce_scores(list_.Get<float>(), open, t_.reduce), t_.reduce);
  }

  BranchConfidenceTiling t_;
  GlobalTensor<float> score_in_, creation_in_, confidence_out_;
  GlobalTensor<uint8_t> open_in_;
  GlobalTensor<int32_t> branches_in_, length_in_;
  TBuf<TPosition::VECCALC> score_, open_, list_, confidence_;
};

struct SelectAddresses {
  GM_ADDR token;
  GM_ADDR prob;
  GM_ADDR score;
  GM_ADDR tokens;
  GM_ADDR length;
  GM_ADDR cache_len;
  GM_ADDR prompt_len;
  GM_ADDR fill;
  GM_ADDR columns;
  GM_ADDR filled;
};

class SelectPositions {
 public:
  __aicore__ inline void Init(TPipe* pipe, const SelectPositionsTiling& tiling,
                              const SelectAddresses& a) {
    t_ = tiling;
    const uint64_t columns = static_cast<uint64_t>(t_.batch) * t_.window;
    token_in_ = branch::global<int64_t>(a.token, columns);
    prob_in_ = branch::global<float>(a.prob, columns);
    score_in_ = branch::global<float>(a.score, columns);
    tokens_in_ = branch::global<int64_t>(a.tokens, columns);
    length_in_ = branch::global<int32_t>(a.length, t_.batch);
    cache_len_in_ = branch::global<int32_t>(a.cache_len, t_.batch);
    prompt_len_in_ = branch::global<int32_t>(a.prompt_len, t_.batch);
    fill_out_ = branch::global<uint8_t>(a.fill, columns);
    if (t_.lookahead > 0) {
      columns_out_ =
          branch::global<int32_t>(a.columns, static_cast<uint64_t>(t_.batch) * t_.lookahead);
    }
    filled_out_ = branch::global<int32_t>(a.filled, t_.batch);
    pipe->InitBuffer(tokens_, t_.window * sizeof(int64_t));
    pipe->InitBuffer(token_, t_.window * sizeof(int64_t));
    pipe->InitBuffer(prob_, t_.window * sizeof(float));
    pipe->InitBuffer(score_, t_.window * sizeof(float));
    pipe->InitBuffer(list_, t_.window * sizeof(int32_t));
    pipe->InitBuffer(fill_, t_.window);
    pipe->InitBuffer(lookahead_, (t_.lookahead + 1) * sizeof(int32_t));
    pipe->InitBuffer(filled_, branch::kBlockBytes);
    selection_.filled_columns = list_.Get<int32_t>();
    selection_.lookahead_columns = lookahead_.Get<int32_t>();
  }

  __aicore__ inline void Process() {
    uint32_t begin, end;
    branch::share_of(t_.batch, begin, end);
    for (uint32_t b = begin; b < end; ++b) Select(b);
  }

 private:
  __aicore__ inline void Select(uint32_t b) {
    const uint64_t at = static_cast<uint64_t>(b) * t_.window;
    branch::begin_loads();
    branch::load(tokens_.Get<int64_t>(), tokens_in_[at], t_.window);
    branch::load(token_.Get<int64_t>(), token_in_[at], t_.window);
    branch::load(prob_.Get<float>(), prob_in_[at], t_.window);
    branch::load(score_.Get<float>(), score_in_[at], t_.window);
    branch::end_loads();
    branch::ColumnStats stats;
    stats.token = token_.Get<int64_t>();
    stats.prob = prob_.Get<float>();
    stats.score = score_.Get<float>();
    int32_t length = length_in_.GetValue(b);
    if (length > static_cast<int32_t>(t_.window)) length = static_cast<int32_t>(t_.window);
    selection_.Run(tokens_.Get<int64_t>(), length, cache_len_in_.GetValue(b),
                   prompt_len_in_.GetValue(b), stats, t_.lookahead, t_.select);
    LocalTensor<uint8_t> fill = fill_.Get<uint8_t>();
    for (uint32_t c = 0; c < t_.window; ++c) fill.SetValue(c, uint8_t{0});
    for (uint32_t i = 0; i < selection_.filled; ++i) {
      fill.SetValue(selection_.filled_columns.GetValue(i), uint8_t{1});
    }
    for (uint32_t i = selection_.lookahead; i < t_.lookahead; ++i) {
      selection_.lookahead_columns.SetValue(i, -1);
    }
    filled_.Get<int32_t>().SetValue(0, static_cast<int32_t>(selection_.filled));
    branch::begin_stores();
    branch::store(fill_out_[at], fill, t_.window);
    if (t_.lookahead > 0) {
      branch::store(columns_out_[static_cast<uint64_t>(b) * t_.lookahead],
                    selection_.lookahead_columns, t_.lookahead);
    }
    branch::store(filled_out_[b], filled_.Get<int32_t>(), 1);
    branch::end_stores();
  }

  SelectPositionsTiling t_;
  GlobalTensor<int64_t> token_in_, tokens_in_;
  GlobalTensor<float> prob_in_, score_in_;
  GlobalTensor<int32_t> length_in_, cache_len_in_, prompt_len_in_, columns_out_, filled_out_;
  GlobalTensor<uint8_t> fill_out_;
  TBuf<TPosition::VECCALC> tokens_, token_, prob_, score_, list_, fill_, lookahead_, filled_;
  branch::Selection selection_;
};

struct SpawnAddresses {
  GM_ADDR tokens;
  GM_ADDR eos;
  GM_ADDR token;
  GM_ADDR score;
  GM_ADDR columns;
  GM_ADDR out_tokens;
  GM_ADDR out_creation;
  GM_ADDR out_eos;
  GM_ADDR out_branches;
};

class SpawnBranches {
 public:
  __aicore__ inline void Init(TPipe* pipe, const SpawnBranchesTiling& tiling,
                              const SpawnAddresses& a) {
    t_ = tiling;
    const uint64_t columns = static_cast<uint64_t>(t_.batch) * t_.window;
    const uint64_t slots = static_cast<uint64_t>(t_.batch) * t_.branches;
    tokens_in_ = branch::global<int64_t>(a.tokens, columns);
    eos_in_ = branch::global<uint8_t>(a.eos, t_.batch);
    token_in_ = branch::global<int64_t>(a.token, columns);
    score_in_ = branch::global<float>(a.score, columns);
    if (t_.branches > 1) {
      columns_in_ =
          branch::global<int32_t>(a.columns, static_cast<uint64_t>(t_.batch) * (t_.branches - 1));
    }
    tokens_out_ = branch::global<int64_t>(a.out_tokens, slots * t_.window);
    creation_out_ = branch::global<float>(a.out_creation, slots);
    eos_out_ = branch::global<uint8_t>(a.out_eos, slots);
    branches_out_ = branch::global<int32_t>(a.out_branches, t_.batch);
    pipe->InitBuffer(tokens_, t_.window * sizeof(int64_t));
    pipe->InitBuffer(token_, t_.window * sizeof(int64_t));
    pipe->InitBuffer(score_, t_.window * sizeof(float));
    pipe->InitBuffer(columns_, t_.branches * sizeof(int32_t));
    pipe->InitBuffer(creation_, t_.branches * sizeof(float));
    pipe->InitBuffer(eos_, t_.branches);
    pipe->InitBuffer(branches_, branch::kBlockBytes);
  }

  __aicore__ inline void Process() {
    uint32_t begin, end;
    branch::share_of(t_.batch, begin, end);
    for (uint32_t b = begin; b < end; ++b) Spawn(b);
  }

 private:
  __aicore__ inline void Spawn(uint32_t b) {
    const uint64_t at = static_cast<uint64_t>(b) * t_.window;
    LocalTensor<int64_t> tokens = tokens_.Get<int64_t>();
    LocalTensor<int32_t> columns = columns_.Get<int32_t>();
    LocalTensor<float> creation = creation_.Get<float>();
    LocalTensor<uint8_t> eos = eos_.Get<uint8_t>();
    branch::begin_loads();
    branch::load(tokens, tokens_in_[at], t_.window);
    branch::load(token_.Get<int64_t>(), token_in_[at], t_.window);
    branch::load(score_.Get<float>(), score_in_[at], t_.window);
    if (t_.branches > 1) {
      branch::load(columns, columns_in_[static_cast<uint64_t>(b) * (t_.branches - 1)],
                   t_.branches - 1);
    }
    branch::end_loads();
    const bool anchor_eos = eos_in_.GetValue(b) != 0;
    int32_t live = 1;
    for (uint32_t k = 0; k < t_.branches; ++k) {
      int32_t column = -1;
      if (k > 0 && static_cast<int32_t>(k) == live) column = columns.GetValue(k - 1);
      int64_t kept = 0;
      float made = k == 0 ? 1.0f : 0.0f;
      bool own_eos = k == 0 && anchor_eos;
      if (column >= 0 && column < static_cast<int32_t>(t_.window)) {
        const int64_t token = token_.Get<int64_t>().GetValue(column);
        made = score_.Get<float>().GetValue(column);
        own_eos = anchor_eos || (t_.eos_id >= 0 && token == t_.eos_id);
        kept = tokens.GetValue(column);
        tokens.SetValue(column, token);
        ++live;
      } else {
        column = -1;
      }
      creation.SetValue(k, made);
      eos.SetValue(k, static_cast<uint8_t>(own_eos ? 1 : 0));
      branch::begin_stores();
      branch::store(tokens_out_[(static_cast<uint64_t>(b) * t_.branches + k) * t_.window], tokens,
                    t_.window);
      branch::end_stores();
      if (column >= 0) tokens.SetValue(column, kept);
    }
    branches_.Get<int32_t>().SetValue(0, live);
    branch::begin_stores();
    branch::store(creation_out_[static_cast<uint64_t>(b) * t_.branches], creation, t_.branches);
    branch::store(eos_out_[static_cast<uint64_t>(b) * t_.branches], eos, t_.branches);
    branch::store(branches_out_[b], branches_.Get<int32_t>(), 1);
    branch::end_stores();
  }

  SpawnBranchesTiling t_;
  GlobalTensor<int64_t> tokens_in_, token_in_, tokens_out_;
  GlobalTensor<float> score_in_, creation_out_;
  GlobalTensor<int32_t> columns_in_, branches_out_;
  GlobalTensor<uint8_t> eos_in_, eos_out_;
  TBuf<TPosition::VECCALC> tokens_, token_, score_, columns_, creation_, eos_, branches_;
};

}  // namespace lopa
