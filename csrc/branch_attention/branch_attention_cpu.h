// Between the driver, which cuts the work into tasks, and the kernels, one an instruction set.
#pragma once

#include <cstdint>

#include "branch_attention/params.h"

namespace lopa {

// Columns [begin, end) of one branch that see the same window keys: columns [0, visible).
struct AttentionSegment {
  int32_t branch;
  int32_t begin;
  int32_t end;
  int32_t visible;
};

// One KV head of one sequence, for a run of segments ordered by branch and column.
struct AttentionTask {
  int32_t batch;
  int32_t kv_head;
  int32_t first_segment;
  int32_t last_segment;
  int32_t rows;  // columns of the segments times the query heads of a KV head
};

// Keys of a tile. At head_dim 64 a tile of K and V is 32 KiB of fp32 and stays in the L1 cache.
constexpr int64_t kKeyTile = 64;
// Rows whose scores are formed together; see `row_block`.
constexpr int64_t kRowBlock = 6;
// The widest vector of any instruction set; scratch rows are padded to it.
constexpr int64_t kMaxLanes = 16;

// Internal linkage: compiled for several instruction sets, these must not be merged by the linker.
namespace {

constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Where a task keeps its operands, as offsets in floats into one 64-byte aligned buffer.
struct AttentionScratch {
  int64_t head_dim_padded;
  int64_t k_tile;   // [head_dim, kKeyTile]: transposed, so that keys lie along the lanes
  int64_t v_tile;   // [kKeyTile, head_dim_padded]
  int64_t scores;   // [kRowBlock, kKeyTile]
  int64_t q;        // [rows, head_dim]
  int64_t out;      // [rows, head_dim_padded], not yet divided by the sum
  int64_t sum;      // [rows, kMaxLanes], partial sums of the probabilities by lane
  int64_t maximum;  // [rows], of the scaled scores in units of log2
  int64_t floats;

  AttentionScratch(int64_t head_dim, int64_t rows)
      : head_dim_padded(round_up(head_dim, kMaxLanes)),
        k_tile(0),
        v_tile(k_tile + head_dim * kKeyTile),
        scores(v_tile + kKeyTile * head_dim_padded),
        q(scores + kRowBlock * kKeyTile),
        out(q + round_up(rows * head_dim, kMaxLanes)),
        sum(out + rows * head_dim_padded),
        maximum(sum + rows * kMaxLanes),
        floats(maximum + round_up(rows, kMaxLanes)) {}
};

}  // namespace

using AttentionTaskFunction = void (*)(const BranchAttentionParams& params,
                                       const AttentionSegment* segments, const AttentionTask& task,
                                       float* scratch);

void branch_attention_task_portable(const BranchAttentionParams&, const AttentionSegment*,
                                    const AttentionTask&, float*);
void branch_attention_task_avx2(const BranchAttentionParams&, const AttentionSegment*,
                                const AttentionTask&, float*);
void branch_attention_task_avx512(const BranchAttentionParams&, const AttentionSegment*,
                                  const AttentionTask&, float*);

}  // namespace lopa
