// A LopaState in global memory, and one sequence of it for the scalar unit.
#pragma once

#include "branch_select.h"

namespace lopa {
namespace branch {

// The addresses of a state's fields, in their order.
struct StateAddresses {
  GM_ADDR tokens;
  GM_ADDR length;
  GM_ADDR creation;
  GM_ADDR eos;
  GM_ADDR branches;
  GM_ADDR cache_len;
  GM_ADDR commit_len;
  GM_ADDR prompt_len;
  GM_ADDR carry_token;
  GM_ADDR carry_prob;
  GM_ADDR carry_score;
  GM_ADDR done;
};

// The numbers of a sequence that say which rows it needs.
struct Numbers {
  int32_t branches = 0, cache_len = 0, commit_len = 0, prompt_len = 0;
  bool done = false;

  __aicore__ inline int32_t FirstGenerated() const {
    return first_generated(cache_len, prompt_len);
  }

  // Bounds that keep every read and write of a round inside its tensors: those of the sequence, ...
  __aicore__ inline bool Sound(uint32_t slots, uint32_t window) const {
    return branches >= 1 && branches <= static_cast<int32_t>(slots) && cache_len >= 0 &&
           commit_len >= 0 && prompt_len >= 0 &&
           cache_len <= INT32_MAX - static_cast<int32_t>(window);
  }

  // ... and those of a branch, of which no committed column may hold a mask.
  __aicore__ inline bool Sound(const LocalTensor<int64_t>& tokens, int32_t length, uint32_t window,
                               int64_t mask_id) const {
    if (length < 0 || length > static_cast<int32_t>(window) || commit_len > length ||
        static_cast<int64_t>(cache_len) + length < prompt_len) {
      return false;
    }
    for (int32_t c = FirstGenerated(); c < commit_len; ++c) {
      if (tokens.GetValue(c) == mask_id) return false;
    }
    return true;
  }

  // Does the round need the logits row of column c?
  __aicore__ inline bool Needs(const LocalTensor<int64_t>& tokens, int32_t length, int32_t c,
                               int64_t mask_id, bool shift) const {
    if (shift && commit_len > 0 && c == commit_len - 1) return true;
    const int32_t target = shift ? c + 1 : c;
    return target < length && target >= FirstGenerated() && tokens.GetValue(target) == mask_id;
  }
};

// The part of the sequences that this core has, as [begin, end).
__aicore__ inline void share_of(uint32_t total, uint32_t& begin, uint32_t& end) {
  const uint32_t cores = static_cast<uint32_t>(GetBlockNum());
  const uint32_t index = static_cast<uint32_t>(GetBlockIdx());
  const uint32_t each = total / cores, more = total % cores;
  begin = index * each + (index < more ? index : more);
  end = begin + each + (index < more ? 1 : 0);
}

// The numbers that rows depend on, as tensors of B.
class NumbersInput {
 public:
  __aicore__ inline void Init(uint32_t batch, GM_ADDR branches, GM_ADDR cache_len,
                              GM_ADDR commit_len, GM_ADDR prompt_len, GM_ADDR done) {
    branches_ = global<int32_t>(branches, batch);
    cache_len_ = global<int32_t>(cache_len, batch);
    commit_len_ = global<int32_t>(commit_len, batch);
    prompt_len_ = global<int32_t>(prompt_len, batch);
    done_ = global<uint8_t>(done, batch);
  }

  __aicore__ inline Numbers Read(uint32_t b) const {
    Numbers n;
    n.branches = branches_.GetValue(b);
    n.cache_len = cache_len_.GetValue(b);
    n.commit_len = commit_len_.GetValue(b);
    n.prompt_len = prompt_len_.GetValue(b);
    n.done = done_.GetValue(b) != 0;
    return n;
  }

 private:
  GlobalTensor<int32_t> branches_, cache_len_, commit_len_, prompt_len_;
  GlobalTensor<uint8_t> done_;
};

}  // namespace branch
}  // namespace lopa
