// What the host tells the kernels of the branch room. Plain data; no doubles, which the scalar
// unit does not have: a share or weight in double arrives as its bits.
#pragma once

#include <cstdint>

namespace lopa {

enum BranchReduction : uint32_t {
  kReduceMean = 0,
  kReduceBottom = 1,
  kReduceGroup = 2,
  kReduceMin = 3,
};

struct ReduceTiling {
  uint32_t reduction;
  uint32_t group;                  // 0: none
  uint64_t fraction, alpha, rest;  // bits of doubles; rest: 1 - alpha
  uint32_t only;  // 1: alpha is 0, the scores alone; 2: alpha is 1, the creation alone
};

struct SelectTiling {
  int64_t block_size;
  int64_t act_count;
  int64_t mask_id;
  float tau_conf;
  uint32_t by_score;  // 1: `score` is what tau_conf accepts
  uint32_t window;    // 1: only where the whole window accepts none, its best column
};

struct BranchStepTiling {
  uint32_t batch, branches, window;
  uint32_t next_branches, next_window;
  uint32_t has_unusable;
  uint32_t shift, force_anchor;
  int64_t add_count;
  int64_t max_blocks;
  int64_t eos_id;  // -1: none
  ReduceTiling reduce;
  SelectTiling select;
};

// StepRows and NeededRows.
struct RowsTiling {
  uint32_t batch, branches, window;
  uint32_t shift;
  uint32_t has_given;  // StepRows: a map of rows is given
  int64_t mask_id;
  int64_t capacity;  // NeededRows
};

struct BranchConfidenceTiling {
  uint32_t batch, branches, window;
  uint32_t has_branches, has_length;
  ReduceTiling reduce;
};

struct SelectPositionsTiling {
  uint32_t batch, window, lookahead;
  SelectTiling select;
};

struct SpawnBranchesTiling {
  uint32_t batch, branches, window;
  int64_t eos_id;
};

// Bits of a status word (lopa_kernels/status.py).
constexpr int32_t kStatusNonfinite = 1;
constexpr int32_t kStatusWindowFull = 2;
constexpr int32_t kStatusBadState = 4;
constexpr int32_t kStatusMissingRow = 8;
constexpr int32_t kStatusStalled = 32;

}  // namespace lopa
