// A batch's state and next state as plain pointers, torch-free: shared by every backend in C++.
#pragma once

#include <cstdint>

#include "branch/params.h"

namespace lopa {

// A LopaState of B sequences, K branches and W columns; all fields contiguous.
struct BatchView {
  int64_t B, K, W;
  const int64_t* tokens;
  const int32_t* length;
  const float* creation;
  const bool* eos;
  const int32_t *branches, *cache_len, *commit_len, *prompt_len;
  const int64_t* carry_token;
  const float *carry_prob, *carry_score;
  const bool* done;

  constexpr SequenceView sequence(int64_t b) const {
    const int64_t bk = b * K;
    return {K,
            W,
            tokens + bk * W,
            length + bk,
            creation + bk,
            eos + bk,
            branches[b],
            cache_len[b],
            commit_len[b],
            prompt_len[b],
            carry_token[b],
            carry_prob[b],
            carry_score[b],
            done[b]};
  }
};

// The next state, of `branches` slots and `window` columns, and the results, of the K and W of the
// state that comes in. The next state may be that state's own memory.
struct BatchOutput {
  SequenceOutput first;
  int64_t branches, window, K, W;

  constexpr SequenceOutput sequence(int64_t b) const {
    const int64_t bk = b * branches;
    const SequenceOutput& o = first;
    return {o.tokens + bk * window,
            o.length + bk,
            o.creation + bk,
            o.eos + bk,
            o.branches + b,
            o.cache_len + b,
            o.commit_len + b,
            o.prompt_len + b,
            o.carry_token + b,
            o.carry_prob + b,
            o.carry_score + b,
            o.done + b,
            o.winner + b,
            o.filled + b,
            o.confidence + b * K,
            o.committed + b * W,
            o.status + b};
  }
};

}  // namespace lopa
