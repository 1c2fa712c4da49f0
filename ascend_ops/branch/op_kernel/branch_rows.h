// Which rows of logits a round needs: as a map of columns for the round itself (StepRows), or
// numbered in order for a decoder that gathers them (NeededRows).
#pragma once

#include "branch_state.h"

namespace lopa {

using namespace AscendC;

struct RowsInputs {
  GM_ADDR tokens;
  GM_ADDR length;
  GM_ADDR branches;
  GM_ADDR cache_len;
  GM_ADDR commit_len;
  GM_ADDR prompt_len;
  GM_ADDR done;
};

// One sequence after the other, branch by branch.
class RowsOfSequence {
 public:
  __aicore__ inline void Init(TPipe* pipe, const RowsTiling& tiling, const RowsInputs& in) {
    t_ = tiling;
    const uint64_t slots = static_cast<uint64_t>(t_.batch) * t_.branches;
    tokens_in_ = branch::global<int64_t>(in.tokens, slots * t_.window);
    length_in_ = branch::global<int32_t>(in.length, slots);
    numbers_.Init(t_.batch, in.branches, in.cache_len, in.commit_len, in.prompt_len, in.done);
    pipe->InitBuffer(tokens_, t_.window * sizeof(int64_t));
    pipe->InitBuffer(length_, t_.branches * sizeof(int32_t));
  }

  // False where the sequence is done or its state is not sound: then no row is needed.
  __aicore__ inline bool Read(uint32_t b) {
    b_ = b;
    n_ = numbers_.Read(b);
    branch::begin_loads();
    branch::load(length_.Get<int32_t>(), length_in_[static_cast<uint64_t>(b) * t_.branches],
                 t_.branches);
    branch::end_loads();
    if (n_.done || !n_.Sound(t_.branches, t_.window)) return false;
    for (uint32_t k = 0; k < static_cast<uint32_t>(n_.branches); ++k) {
      LoadBranch(k);
      if (!n_.Sound(tokens_.Get<int64_t>(), length_.Get<int32_t>().GetValue(k), t_.window,
                    t_.mask_id)) {
        return false;
      }
    }
    return true;
  }

  __aicore__ inline bool Live(uint32_t k) const { return k < static_cast<uint32_t>(n_.branches); }

  __aicore__ inline void LoadBranch(uint32_t k) {
    const uint64_t at = (static_cast<uint64_t>(b_) * t_.branches + k) * t_.window;
    branch::begin_loads();
    branch::load(tokens_.Get<int64_t>(), tokens_in_[at], t_.window);
    branch::end_loads();
  }

  // Of the branch that was loaded last.
  __aicore__ inline bool Needs(uint32_t k, uint32_t c) {
    const int32_t length = length_.Get<int32_t>().GetValue(k);
    return static_cast<int32_t>(c) < length &&
           n_.Needs(tokens_.Get<int64_t>(), length, static_cast<int32_t>(c), t_.mask_id,
                    t_.shift != 0);
  }

 private:
  RowsTiling t_;
  branch::NumbersInput numbers_;
  branch::Numbers n_;
  uint32_t b_ = 0;
  GlobalTensor<int64_t> tokens_in_;
  GlobalTensor<int32_t> length_in_;
  TBuf<TPosition::VECCALC> tokens_, length_;
};

class StepRows {
 public:
  __aicore__ inline void Init(TPipe* pipe, const RowsTiling& tiling, const RowsInputs& in,
                              GM_ADDR given, GM_ADDR wanted) {
    t_ = tiling;
    const uint64_t columns = static_cast<uint64_t>(t_.batch) * t_.branches * t_.window;
    sequence_.Init(pipe, tiling, in);
    if (t_.has_given) given_ = branch::global<int32_t>(given, columns);
    wanted_ = branch::global<int32_t>(wanted, columns);
    pipe->InitBuffer(row_, t_.window * sizeof(int32_t));
    pipe->InitBuffer(map_, t_.window * sizeof(int32_t));
  }

  __aicore__ inline void Process() {
    uint32_t begin, end;
    branch::share_of(t_.batch, begin, end);
    for (uint32_t b = begin; b < end; ++b) {
      const bool sound = sequence_.Read(b);
      for (uint32_t k = 0; k < t_.branches; ++k) WriteRow(b, k, sound && sequence_.Live(k));
    }
  }

 private:
  __aicore__ inline void WriteRow(uint32_t b, uint32_t k, bool live) {
    const uint64_t at = (static_cast<uint64_t>(b) * t_.branches + k) * t_.window;
    LocalTensor<int32_t> row = row_.Get<int32_t>(), map = map_.Get<int32_t>();
    if (live) {
      sequence_.LoadBranch(k);
      if (t_.has_given) {
        branch::begin_loads();
        branch::load(map, given_[at], t_.window);
        branch::end_loads();
      }
    }
    for (uint32_t c = 0; c < t_.window; ++c) {
      int32_t wanted = -1;
      if (live && sequence_.Needs(k, c)) {
        wanted = t_.has_given ? map.GetValue(c) : static_cast<int32_t>(at + c);
      }
      row.SetValue(c, wanted);
    }
    branch::begin_stores();
    branch::store(wanted_[at], row, t_.window);
    branch::end_stores();
  }

  RowsTiling t_;
  RowsOfSequence sequence_;
  GlobalTensor<int32_t> given_, wanted_;
  TBuf<TPosition::VECCALC> row_, map_;
};

// Cores count the rows of their sequences; after SyncAll each knows where its first row goes.
class NeededRows {
 public:
  __aicore__ inline void Init(TPipe* pipe, const RowsTiling& tiling, const RowsInputs& in,
                              GM_ADDR index, GM_ADDR rows, GM_ADDR count, GM_ADDR workspace) {
    t_ = tiling;
    sequence_.Init(pipe, tiling, in);
    index_ = branch::global<int64_t>(index, static_cast<uint64_t>(t_.capacity));
    rows_ =
        branch::global<int32_t>(rows, static_cast<uint64_t>(t_.batch) * t_.branches * t_.window);
    count_ = branch::global<int32_t>(count, 1);
    counts_ = branch::global<int32_t>(workspace, static_cast<uint64_t>(GetBlockNum()) * kWords);
    pipe->InitBuffer(row_, t_.window * sizeof(int32_t));
    pipe->InitBuffer(list_, t_.window * sizeof(int64_t));
    pipe->InitBuffer(words_, static_cast<uint32_t>(GetBlockNum()) * branch::kBlockBytes);
  }

  __aicore__ inline void Process() {
    uint32_t begin, end;
    branch::share_of(t_.batch, begin, end);
    int64_t own = 0;
    for (uint32_t b = begin; b < end; ++b) own += Count(b);
    int64_t before = 0, total = 0;
    Exchange(own, before, total);
    for (uint32_t b = begin; b < end; ++b) Write(b, before);
    Finish(total);
  }

 private:
  static constexpr uint32_t kWords = branch::kBlockBytes / sizeof(int32_t);

  __aicore__ inline int64_t Count(uint32_t b) {
    if (!sequence_.Read(b)) return 0;
    int64_t count = 0;
    for (uint32_t k = 0; k < t_.branches && sequence_.Live(k); ++k) {
      sequence_.LoadBranch(k);
      for (uint32_t c = 0; c < t_.window; ++c) count += sequence_.Needs(k, c) ? 1 : 0;
    }
    return count;
  }

  // The rows of the cores before this one, and of all.
  __aicore__ inline void Exchange(int64_t own, int64_t& before, int64_t& total) {
    const uint32_t cores = static_cast<uint32_t>(GetBlockNum());
    const uint32_t index = static_cast<uint32_t>(GetBlockIdx());
    LocalTensor<int32_t> words = words_.Get<int32_t>();
    words.SetValue(0, static_cast<int32_t>(own));
    branch::begin_stores();
    branch::store(counts_[index * kWords], words, 1);
    SyncAll();
    branch::begin_loads();
    for (uint32_t i = 0; i < cores; ++i) {
      branch::load(words[i * kWords], counts_[i * kWords], 1);
    }
    branch::end_loads();
    for (uint32_t i = 0; i < cores; ++i) {
      const int32_t rows = words.GetValue(i * kWords);
      if (i < index) before += rows;
      total += rows;
    }
  }

  __aicore__ inline void Write(uint32_t b, int64_t& before) {
    LocalTensor<int32_t> row = row_.Get<int32_t>();
    LocalTensor<int64_t> list = list_.Get<int64_t>();
    const bool sound = sequence_.Read(b);
    for (uint32_t k = 0; k < t_.branches; ++k) {
      const uint64_t at = (static_cast<uint64_t>(b) * t_.branches + k) * t_.window;
      const bool live = sound && sequence_.Live(k);
      if (live) sequence_.LoadBranch(k);
      const int64_t first = before;
      uint32_t kept = 0;
      for (uint32_t c = 0; c < t_.window; ++c) {
        int32_t place = -1;
        if (live && sequence_.Needs(k, c)) {
          if (before < t_.capacity) {
            place = static_cast<int32_t>(before);
            list.SetValue(kept++, static_cast<int64_t>(at + c));
          }
          ++before;
        }
        row.SetValue(c, place);
      }
      branch::begin_stores();
      branch::store(rows_[at], row, t_.window);
      if (kept > 0) branch::store(index_[static_cast<uint64_t>(first)], list, kept);
      branch::end_stores();
    }
  }

  // Index 0 exists wherever there is a row to gather, so that a gather of all `capacity` is safe.
  __aicore__ inline void Finish(int64_t total) {
    const int64_t cores = GetBlockNum(), core = GetBlockIdx();
    LocalTensor<int64_t> list = list_.Get<int64_t>();
    for (uint32_t c = 0; c < t_.window; ++c) list.SetValue(c, int64_t{0});
    LocalTensor<int32_t> words = words_.Get<int32_t>();
    words.SetValue(0, static_cast<int32_t>(total));
    branch::begin_stores();
    for (int64_t at = total + core * t_.window; at < t_.capacity; at += cores * t_.window) {
      const int64_t left = t_.capacity - at;
      branch::store(index_[static_cast<uint64_t>(at)], list,
                    left < t_.window ? static_cast<uint32_t>(left) : t_.window);
    }
    if (core == 0) branch::store(count_, words, 1);
    branch::end_stores();
  }

  RowsTiling t_;
  RowsOfSequence sequence_;
  GlobalTensor<int64_t> index_;
  GlobalTensor<int32_t> rows_, count_, counts_;
  TBuf<TPosition::VECCALC> row_, list_, words_;
};

}  // namespace lopa
