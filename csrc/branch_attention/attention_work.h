// Which rows, keys and masks a tile of branch attention has.
//
// Rows of one sequence and KV head are (live columns of branch 0, of branch 1, ..., then the
// columns at or beyond `length` of branch 0, ...) x query heads of the group; a tile is a run of
// them. Its keys are the prefix in units of 64 positions, then the windows of the branches that the
// tile has rows of, in chunks of 16 columns, four chunks a unit.
#pragma once

#include <cstdint>

#include "lopa/divisor.h"

namespace lopa {
namespace attention {

constexpr int kChunk = 16;  // keys of one mask entry
constexpr int kUnit = 64;   // keys that the splits of a tile are cut by
constexpr int kChunksPerUnit = kUnit / kChunk;

constexpr int kNoBranch = -1;        // of a row that is not there
constexpr int kNoKeys = -2;          // of a chunk that is not there
constexpr int kPrefix = -3;          // of a chunk of the prefix
constexpr int kBefore = -(1 << 30);  // as the first column of such a chunk: every row sees it

__device__ __forceinline__ int least(int a, int b) { return b < a ? b : a; }
__device__ __forceinline__ int most(int a, int b) { return a < b ? b : a; }
__device__ __forceinline__ int clamp(int x, int low, int high) { return least(most(x, low), high); }
__device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

__device__ __forceinline__ int of_lane(int x, int lane) { return __shfl_sync(~0u, x, lane); }

// A dividend is never negative.
__device__ __forceinline__ int quotient(int x, const Divisor& by) {
  return static_cast<int>(divide(static_cast<uint32_t>(x), by));
}

// Sums of the lanes up to each.
template <int kCount>
__device__ __forceinline__ void scan(int (&x)[kCount], int lane) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int other = __shfl_up_sync(~0u, x[i], step);
      if (lane >= step) x[i] += other;
    }
  }
}

// The branches of a sequence, known to a warp: lane k has branch k.
struct Branches {
  int count;
  int window;
  int live;  // columns of all of them

  int length;
  int until;         // live columns up to the end of the branch
  int chunks_until;  // chunks of 16 columns up to there

  __device__ __forceinline__ Branches(int count, int window, int length, int lane)
      : count(count), window(window), length(length) {
    int x[2] = {length, ceil_div(length, kChunk)};
    scan(x, lane);
    until = x[0];
    chunks_until = x[1];
    live = of_lane(until, 31);
  }
};

// Blocks of the mask block_causal.
struct Blocks {
  bool causal;  // else every column sees all of its branch
  Divisor size;
  int32_t start;  // column of the first block's first position; may be negative

  // One past the last column that `column` sees, before the branch's length is considered.
  __device__ __forceinline__ int64_t end(int column) const {
    if (column < start) return start;
    const int64_t blocks = quotient(column - start, size);
    return start + (blocks + 1) * static_cast<int64_t>(size.value);
  }
};

struct Row {
  int branch;   // kNoBranch where there is none
  int column;   // of its branch's window
  int visible;  // columns of its branch that it sees; 0: the row is dead
  int head;     // of its group
};

// By a warp, each lane of its own row.
__device__ __forceinline__ Row row_at(const Branches& branches, const Blocks& blocks,
                                      const Divisor& group, int row) {
  const int column = quotient(row, group);
  const bool live = column < branches.live;
  const int x = live ? column : column - branches.live;
  int k = 0;
#pragma unroll 4
  for (int i = 0; i < branches.count; ++i) {
    const int until = of_lane(branches.until, i);
    k += (live ? until : (i + 1) * branches.window - until) <= x;
  }
  const int length = of_lane(branches.length, k & 31);
  const int before = of_lane(branches.until, k & 31) - length;
  Row result{kNoBranch, 0, 0, row - column * static_cast<int>(group.value)};
  if (k < branches.count) {
    result.branch = k;
    result.column = live ? x - before : length + x - (k * branches.window - before);
    if (live) {
      result.visible = length;
      if (blocks.causal) {
        const int64_t end = blocks.end(result.column);
        if (end < length) result.visible = static_cast<int>(end);
      }
    }
  }
  return result;
}

// Keys of a tile of rows: the units from `begin` to `end`.
struct TileKeys {
  int prefix_units;
  int first_branch;
  int last_branch;
  int begin;
  int end;

  __device__ __forceinline__ int units() const { return end - begin; }
  // Tiles of two units, and one of a single unit where another tile precedes it.
  __device__ __forceinline__ int full_tiles() const { return units() == 1 ? 1 : units() / 2; }
  __device__ __forceinline__ bool has_tail() const { return units() > 1 && units() % 2 == 1; }
};

// Tiles of rows, known to a warp, a lane each.
struct Tiles {
  int first_branch;
  int last_branch;
  int units;  // of all of its keys; 0 where no row is live, and beyond the last tile
  int until;  // units up to the end of the tile
};

// The lane's tile of `rows` rows from `first_row`; a scan only where there are `several`.
__device__ __forceinline__ Tiles tiles_of(const Branches& branches, const Divisor& group,
                                          bool exists, bool several, int first_row, int rows,
                                          int prefix_units, int lane) {
  const int live = branches.live * static_cast<int>(group.value);
  exists = exists && first_row < live;
  const int begin = exists ? quotient(first_row, group) : 0;
  const int end = exists ? quotient(least(first_row + rows, live) - 1, group) : 0;
  Tiles tile{0, 0, 0, 0};
#pragma unroll 4
  for (int i = 0; i < branches.count; ++i) {
    const int until = of_lane(branches.until, i);
    tile.first_branch += until <= begin;
    tile.last_branch += until <= end;
  }
  const int until = of_lane(branches.chunks_until, tile.last_branch & 31);
  const int first = ceil_div(of_lane(branches.length, tile.first_branch & 31), kChunk);
  const int before = of_lane(branches.chunks_until, tile.first_branch & 31) - first;
  if (exists) tile.units = prefix_units + ceil_div(until - before, kChunksPerUnit);
  if (several) {
    int x[1] = {tile.units};
    scan(x, lane);
    tile.until = x[0];
  } else {
    tile.until = of_lane(tile.units, 0);
  }
  return tile;
}

// How the CTAs of a cluster share its tiles: the units of all of them, one tile after another, are
// cut into runs, as equal as can be, for the first 2^log2 CTAs. None of them is empty, and no tile
// meets more than three, unless there is only one tile.
struct Runs {
  int units;
  int log2;

  __device__ __forceinline__ Runs(int units, int log2) : units(units), log2(log2) {}
  __device__ __forceinline__ Runs(const Tiles& tiles, bool several, int ctas_log2)
      : units(of_lane(tiles.until, 31)), log2(ctas_log2) {
    while (log2 > 0 && (units >> log2 == 0 ||
                        (several && __any_sync(~0u, tiles.units - 1 > 2 * (units >> log2))))) {
      --log2;
    }
  }
  __device__ __forceinline__ int begin(int cta) const {
    return cta >> log2 ? units : units * cta >> log2;
  }
  __device__ __forceinline__ int end(int cta) const { return begin(cta + 1); }
  // The CTA that has a unit.
  __device__ __forceinline__ int owner(int unit, int lane) const {
    return __popc(__ballot_sync(~0u, lane >> log2 == 0 && end(lane) <= unit));
  }
};

struct alignas(16) Chunk {
  int branch;    // kPrefix, kNoKeys, or of the window that it is from
  int first;     // column of key 0; kBefore in the prefix
  int valid;     // keys that exist: the first of them
  int position;  // of key 0, along the prefix or the window
};

// By a warp, each lane of its own unit and piece, all of them below `until`, or not there.
__device__ __forceinline__ Chunk chunk_of(const TileKeys& keys, const Branches& branches,
                                          int cache_len, int unit, int piece, int until) {
  Chunk chunk{kNoKeys, 0, 0, 0};
  if (unit < keys.prefix_units && unit < keys.end) {
    const int position = unit * kUnit + piece * kChunk;
    chunk = Chunk{kPrefix, kBefore, clamp(cache_len - position, 0, kChunk), position};
  }
  if (until <= keys.prefix_units) return chunk;
  const int first = ceil_div(of_lane(branches.length, keys.first_branch), kChunk);
  const int index = of_lane(branches.chunks_until, keys.first_branch) - first +
                    (unit - keys.prefix_units) * kChunksPerUnit + piece;
  int k = 0;
#pragma unroll 4
  for (int i = 0; i < branches.count; ++i) k += of_lane(branches.chunks_until, i) <= index;
  const int length = of_lane(branches.length, k & 31);
  const int before = of_lane(branches.chunks_until, k & 31) - ceil_div(length, kChunk);
  if (unit >= keys.prefix_units && unit < keys.end && k <= keys.last_branch) {
    const int column = (index - before) * kChunk;
    chunk = Chunk{k, column, least(length - column, kChunk), column};
  }
  return chunk;
}

// How many keys of a chunk, from its first, a row sees; perhaps negative.
__device__ __forceinline__ int limit_of(const Chunk& chunk, const Row& row) {
  return chunk.branch == kPrefix || chunk.branch == row.branch
             ? least(chunk.valid, row.visible - chunk.first)
             : 0;
}

}  // namespace attention
}  // namespace lopa
