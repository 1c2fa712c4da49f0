// The arithmetic of branch_attention's tiling, without dependencies: op_host calls it with what
// the graph gives, host tests with numbers.
#pragma once

#include <cstdint>

#include "../op_kernel/branch_attention_tiling_data.h"

namespace branch_attention {

struct Shape {
  uint32_t batch;
  uint32_t branches;
  uint32_t window;
  uint32_t queryHeads;
  uint32_t kvHeads;
  uint32_t headDim;
  uint32_t capacity;     // S; of a paged prefix, the positions of a page
  bool cacheHeadsFirst;  // caches are [B, Hk, S, D] instead of [B, S, Hk, D]
  uint32_t tablePages;   // of a paged prefix, else 0: entries of a sequence in block_table
  uint32_t pages;        // and pages of the pool
};

// How a prefix is cut assumes this many AI cores. A constant and not the number of the device at
// hand, so that results are the same on every one.
constexpr uint32_t ASSUMED_CORES = 24;
constexpr uint32_t MAX_SPLITS = 16;
// Nd2NzParams holds strides in 16 bits.
constexpr uint64_t MAX_ROW_STRIDE = 65535;

inline uint32_t CeilDiv(uint32_t a, uint32_t b) { return (a + b - 1) / b; }

// nullptr, or what the kernel does not support of this shape.
inline const char* Unsupported(const Shape& shape, uint32_t blockSize, bool blockCausal) {
  if (shape.batch == 0 || shape.branches == 0 || shape.window == 0 || shape.queryHeads == 0 ||
      shape.kvHeads == 0) {
    return "batch, branches, window and heads must be positive";
  }
  if (shape.queryHeads % shape.kvHeads != 0) {
    return "the number of query heads must be a multiple of the number of KV heads";
  }
  if (shape.headDim == 0 || shape.headDim % 16 != 0 ||
      shape.headDim > BRANCH_ATTENTION_MAX_HEAD_DIM) {
    return "head_dim must be a multiple of 16 up to 128";
  }
  if (shape.queryHeads / shape.kvHeads > BRANCH_ATTENTION_TILE_ROWS) {
    return "at most 256 query heads may share a KV head";
  }
  if (static_cast<uint64_t>(shape.queryHeads) * shape.headDim > MAX_ROW_STRIDE) {
    return "query heads times head_dim must be at most 65535";
  }
  if (static_cast<uint64_t>(shape.kvHeads) * shape.headDim > MAX_ROW_STRIDE) {
    return "KV heads times head_dim must be at most 65535";
  }
  if (shape.tablePages != 0 && (shape.capacity < 16 || shape.capacity > 256 ||
                                (shape.capacity & (shape.capacity - 1)) != 0)) {
    return "a page must have 16, 32, 64, 128 or 256 positions";
  }
  if (blockCausal && blockSize == 0) {
    return "mask block_causal needs a positive block_size";
  }
  return nullptr;
}

// Into how many parts the prefix of each tile is cut, so that the rounds of jobs take the fewest
// steps. The output of a part is written and read once more, which counts as a quarter of a step.
inline uint32_t ChooseSplits(uint32_t tiles, uint32_t steps) {
  uint32_t best = 1;
  uint64_t least = UINT64_MAX;
  for (uint32_t splits = 1; splits <= MAX_SPLITS && splits <= (steps > 1 ? steps : 1); ++splits) {
    const uint64_t rounds = CeilDiv(tiles * splits, ASSUMED_CORES);
    const uint64_t quarters = rounds * (4 * CeilDiv(steps, splits) + (splits > 1 ? 1 : 0));
    if (quarters < least) {
      least = quarters;
      best = splits;
    }
  }
  return best;
}

inline void ComputeTiling(const Shape& shape, uint32_t blockSize, float scale, uint32_t cores,
                          BranchAttentionTiling* tiling) {
  BranchAttentionTiling& t = *tiling;
  t.batch = shape.batch;
  t.branches = shape.branches;
  t.window = shape.window;
  t.queryHeads = shape.queryHeads;
  t.kvHeads = shape.kvHeads;
  t.group = shape.queryHeads / shape.kvHeads;
  t.headDim = shape.headDim;
  const bool paged = shape.tablePages != 0;
  t.capacity = paged ? shape.capacity * shape.tablePages : shape.capacity;
  t.pageSize = paged ? shape.capacity : 0;
  t.tablePages = shape.tablePages;
  t.pages = shape.pages;
  t.blockSize = blockSize;
  t.scale = scale;

  const uint32_t branchRows = CeilDiv(shape.window * t.group, 16) * 16;
  if (branchRows <= BRANCH_ATTENTION_TILE_ROWS) {
    const uint32_t fit = BRANCH_ATTENTION_TILE_ROWS / branchRows;
    t.branchesPerTile = fit < shape.branches ? fit : shape.branches;
    t.chunks = 1;
    t.chunkColumns = shape.window;
    t.tilesPerHead = CeilDiv(shape.branches, t.branchesPerTile);
  } else {
    t.branchesPerTile = 1;
    t.chunks = CeilDiv(shape.window, BRANCH_ATTENTION_TILE_ROWS / t.group);
    t.chunkColumns = CeilDiv(shape.window, t.chunks);
    t.chunks = CeilDiv(shape.window, t.chunkColumns);
    t.tilesPerHead = shape.branches * t.chunks;
  }
  const uint32_t tiles = shape.batch * shape.kvHeads * t.tilesPerHead;
  t.splits = ChooseSplits(tiles, CeilDiv(t.capacity, BRANCH_ATTENTION_KEYS));
  t.jobs = tiles * t.splits;
  t.cores = cores < t.jobs ? cores : t.jobs;

  const uint64_t dim = shape.headDim;
  if (shape.cacheHeadsFirst) {
    t.cachePositionStride = shape.headDim;
    t.cacheHeadStride = dim * shape.capacity;
  } else {
    t.cachePositionStride = shape.headDim * shape.kvHeads;
    t.cacheHeadStride = dim;
  }
  t.cacheBatchStride = dim * shape.kvHeads * shape.capacity;

  // Two slots a core for S, P and P V; then the parts of split tiles.
  const uint64_t slots = 2 * static_cast<uint64_t>(t.cores) * BRANCH_ATTENTION_TILE_ROWS;
  t.scoreOffset = 0;
  t.weightOffset = t.scoreOffset + slots * BRANCH_ATTENTION_KEYS * sizeof(float);
  t.valueOffset = t.weightOffset + slots * BRANCH_ATTENTION_KEYS * sizeof(uint16_t);
  t.partialOffset = t.valueOffset + slots * dim * sizeof(float);
  const uint64_t partialRows =
      t.splits > 1 ? static_cast<uint64_t>(t.jobs) * BRANCH_ATTENTION_TILE_ROWS : 0;
  t.partialStateOffset = t.partialOffset + partialRows * dim * sizeof(float);
}

// Bytes of workspace that the kernel uses, beside what the system reserves.
inline uint64_t WorkspaceBytes(const BranchAttentionTiling& t) {
  const uint64_t partialRows =
      t.splits > 1 ? static_cast<uint64_t>(t.jobs) * BRANCH_ATTENTION_TILE_ROWS : 0;
  // Maximum and sum of a row, each as one block of 8 equal floats.
  return t.partialStateOffset + partialRows * 2 * 8 * sizeof(float);
}

}  // namespace branch_attention
