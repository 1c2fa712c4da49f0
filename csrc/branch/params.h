// Settings and views of a LoPA round, torch-free: shared by every backend written in C++.
#pragma once

#include <cstdint>

#include "lopa/status.h"

namespace lopa {

enum class Accept : int32_t { kProb, kScore };
enum class Fallback : int32_t { kBlock, kWindow };
enum class Reduction : int32_t { kMean, kBottom, kGroup, kMin };

struct ReductionConfig {
  Reduction reduction;
  double fraction;
  int64_t group;  // 0: not set
  double alpha;
};

struct SelectConfig {
  float tau_conf;
  // Thresholds on a share of a block, as the least number of filled tokens that reaches it.
  int64_t act_count;
  int64_t block_size;
  int64_t mask_id;
  Accept accept;
  Fallback fallback;
};

struct RoundConfig {
  SelectConfig select;
  ReductionConfig reduce;
  int64_t branches;  // slots of the next state
  int64_t window;    // columns of the next state
  int64_t add_count;
  int64_t max_blocks;
  int64_t eos_id;  // -1: none
  bool shift;
  bool force_anchor;
};

// One column's statistics, as arrays over the columns of one branch.
struct ColumnStats {
  const int64_t* token;
  const float* prob;
  const float* score;
};

// One sequence's slice of a LopaState: K branches of W columns.
struct SequenceView {
  int64_t K, W;
  const int64_t* tokens;
  const int32_t* length;
  const float* creation;
  const bool* eos;
  int32_t branches, cache_len, commit_len, prompt_len;
  int64_t carry_token;
  float carry_prob, carry_score;
  bool done;
};

// Where one sequence's next state goes; may be the memory that its SequenceView reads.
struct SequenceOutput {
  int64_t* tokens;
  int32_t* length;
  float* creation;
  bool* eos;
  int32_t *branches, *cache_len, *commit_len, *prompt_len;
  int64_t* carry_token;
  float *carry_prob, *carry_score;
  bool* done;
  int32_t *winner, *filled;
  float* confidence;
  int64_t* committed;
  int32_t* status;
};

// Scores of branches and where their confidence goes. `branches` and `length` may be null.
struct ConfidenceView {
  int64_t B, K, W;
  const float* score;
  const bool* open;
  const float* creation;
  const int32_t *branches, *length;
  float* confidence;
};

// One window a sequence, its statistics, and where the selection goes.
struct SelectView {
  int64_t B, W, lookahead;
  const int64_t* tokens;
  ColumnStats stats;
  const int32_t *length, *cache_len, *prompt_len;
  bool* fill;
  int32_t *columns, *filled;
};

// Anchors, the columns that make lookahead branches of them, and where the branches go.
struct SpawnView {
  int64_t B, K, W;
  const int64_t* tokens;
  const bool* eos;
  const int64_t* token;
  const float* score;
  const int32_t* columns;
  int64_t eos_id;
  int64_t* out_tokens;
  float* out_creation;
  bool* out_eos;
  int32_t* out_branches;
};

// The least n with n / block_size >= share: double division is IEEE-exact, so that every backend,
// and the published code's Python floats, agree on the boundary.
inline int64_t least_count(double share, int64_t block_size) {
  int64_t n = static_cast<int64_t>(share * static_cast<double>(block_size)) - 1;
  if (n < 0) n = 0;
  while (n <= block_size && static_cast<double>(n) / static_cast<double>(block_size) < share) ++n;
  return n;
}

}  // namespace lopa
