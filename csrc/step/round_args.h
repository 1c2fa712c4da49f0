// What the GPU's kernels of a round are told; torch-free, for host and device code.
#pragma once

#include <cstdint>

#include "branch/workspace.h"
#include "confidence/vocabulary_args.h"
#include "step/params.h"

namespace lopa {
namespace step {

// Counts of a sequence's branches lie in shared memory.
constexpr int64_t kMostBranches = 16384;

// The arrays of a sequence's round (round_kernel.cuh).
struct RoundPlaces {
  branch::Place branches;  // three words a branch: confidence, status and length
  branch::Place values;    // the winner's window, a token a column
  branch::Place scores;    // a float for each column and warp, where the reduction keeps scores
  branch::SelectPlaces select;
  // Copies of tokens and statistics, all branches, in shared memory; only if `staged`.
  branch::Place tokens, token, prob, score;
};

struct RoundArgs {
  BatchView state;
  BatchOutput output;
  ColumnStats stats;     // of all sequences, by logits row
  const uint8_t* flags;  // of the same rows, RowFlags of the vocabulary pass
  RoundConfig config;
  RoundPlaces places;
  bool staged;
  char* memory;  // `memory_of_sequence` bytes each
  int64_t memory_of_sequence;
};

// The state's fields that say which rows a round needs, and where the rows go: a list for the
// vocabulary pass (slots, offsets, arrivals), or the results of needed_rows (index, rows, count).
struct RowsArgs {
  BatchView state;  // without creation, eos and carry
  int64_t mask_id;
  bool shift;
  int sequences;      // that a CTA counts at a time
  int32_t* slots;     // [B * K * W]; null: results of needed_rows
  int32_t* offsets;   // [B + 1], where each sequence begins in the list
  int32_t* arrivals;  // [B], set to zero
  int64_t* index;     // [capacity]
  int32_t* rows;      // [B, K, W]
  int32_t* count;     // [1]
  int64_t capacity;
};

// The last kernel of lopa_step: the merge of the rows that were listed, then the rounds. `parts`
// CTAs merge a sequence's rows, and the last to arrive does its round.
struct FinishArgs {
  confidence::VocabularyArgs vocabulary;
  confidence::StatsOutput stats;
  RoundArgs round;
  const int32_t* offsets;
  int32_t* arrivals;
  int parts;
};

}  // namespace step
}  // namespace lopa
