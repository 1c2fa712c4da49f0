// What the host tells the kernel of branch_attention; no dependencies, so that both sides and the
// host tests include it.
#pragma once

#include <cstdint>

// Rows of a tile: pairs of a query column and a query head. A vector core owns half of them.
constexpr uint32_t BRANCH_ATTENTION_TILE_ROWS = 256;
// Keys of a step. P V of a step passes through workspace, so long steps are cheap there; this is
// what L1 and UB hold twice.
constexpr uint32_t BRANCH_ATTENTION_KEYS = 256;
constexpr uint32_t BRANCH_ATTENTION_MAX_HEAD_DIM = 128;
// A segment (the rows of one branch in a tile) begins at a fractal, 16 rows.
constexpr uint32_t BRANCH_ATTENTION_MAX_SEGMENTS = BRANCH_ATTENTION_TILE_ROWS / 16;

struct BranchAttentionTiling {
  uint32_t batch;
  uint32_t branches;
  uint32_t window;
  uint32_t queryHeads;
  uint32_t kvHeads;
  uint32_t group;  // query heads of a KV head
  uint32_t headDim;
  uint32_t capacity;    // positions of a sequence: of its cache, or of its pages
  uint32_t pageSize;    // 0: no pages
  uint32_t tablePages;  // entries of a sequence in block_table
  uint32_t pages;       // of the pool
  uint32_t blockSize;   // 0: mask "full"
  float scale;
  // A tile is `branchesPerTile` whole branches or, where one branch has too many rows, one of
  // `chunks` runs of `chunkColumns` columns of it.
  uint32_t branchesPerTile;
  uint32_t chunks;
  uint32_t chunkColumns;
  uint32_t tilesPerHead;
  uint32_t splits;  // parts of the prefix, merged in their order
  uint32_t jobs;    // batch * kvHeads * splits * tilesPerHead
  // Strides of the caches in elements; of a paged one, from page to page.
  uint64_t cacheBatchStride;
  uint64_t cacheHeadStride;
  uint32_t cachePositionStride;
  uint32_t cores;  // AI cores, each one cube and two vector cores
  // Byte offsets into the workspace.
  uint64_t scoreOffset;
  uint64_t weightOffset;
  uint64_t valueOffset;
  uint64_t partialOffset;
  uint64_t partialStateOffset;
};
