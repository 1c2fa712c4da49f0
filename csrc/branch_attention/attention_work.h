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

// The same of a dividend and a divisor that only the device knows, by the divisor's reciprocal. It
// is exact below 2^21, and beyond at least no less than that.
__device__ __forceinline__ int quotient(int x, int by, float inverse) {
  const int q = static_cast<int>(static_cast<float>(x) * inverse);
  const int rest = x - q * by;
  return q + (rest >= by) - (rest < 0);
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

  // Mostly the first branches are of one length and the others of none. A division then finds the
  // branch of a column, and nothing is summed over the lanes.
  int same;    // that length; 0 where they differ
  int chunks;  // of such a branch
  float by_same;
  float by_chunks;

  __device__ __forceinline__ Branches(int count, int window, int length, int lane)
      : count(count), window(window), length(length) {
    const uint32_t some = __ballot_sync(~0u, length > 0);
    const int first = of_lane(length, 0);
    const uint32_t others = __ballot_sync(~0u, length > 0 && length != first);
    chunks = ceil_div(first, kChunk);
    same = others == 0 && first > 0 && (some & (some + 1)) == 0 ? first : 0;
    if (same > 0) {
      const int branches = __popc(some);
      live = branches * same;
      until = least(lane + 1, branches) * same;
      chunks_until = least(lane + 1, branches) * chunks;
      by_same = reciprocal(static_cast<float>(same));
      by_chunks = reciprocal(static_cast<float>(chunks));
      return;
    }
    int x[2] = {length, ceil_div(length, kChunk)};
    scan(x, lane);
    until = x[0];
    chunks_until = x[1];
    live = of_lane(until, 31);
  }

  // Every branch has its whole window.
  __device__ __forceinline__ bool whole() const { return same == window && live == count * window; }

  // Of branch `k`; by a warp, each lane of its own.
  __device__ __forceinline__ int length_of(int k) const {
    return same > 0 ? same : of_lane(length, k & 31);
  }
  __device__ __forceinline__ int until_of(int k) const {
    return same > 0 ? (k + 1) * same : of_lane(until, k & 31);
  }
  __device__ __forceinline__ int chunks_until_of(int k) const {
    return same > 0 ? (k + 1) * chunks : of_lane(chunks_until, k & 31);
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
  if (branches.same > 0 && __all_sync(~0u, live)) {
    k = quotient(x, branches.same, branches.by_same);
  } else {
#pragma unroll 4
    for (int i = 0; i < branches.count; ++i) {
      const int until = of_lane(branches.until, i);
      k += (live ? until : (i + 1) * branches.window - until) <= x;
    }
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
  if (branches.same > 0) {
    tile.first_branch = quotient(begin, branches.same, branches.by_same);
    tile.last_branch = quotient(end, branches.same, branches.by_same);
  } else {
#pragma unroll 4
    for (int i = 0; i < branches.count; ++i) {
      const int until = of_lane(branches.until, i);
      tile.first_branch += until <= begin;
      tile.last_branch += until <= end;
    }
  }
  const int until = branches.chunks_until_of(tile.last_branch);
  const int first = ceil_div(branches.length_of(tile.first_branch), kChunk);
  const int before = branches.chunks_until_of(tile.first_branch) - first;
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
struct ClusterRuns {
  int units;
  int log2;

  __device__ __forceinline__ ClusterRuns(const Tiles& tiles, bool several, int ctas_log2)
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

// All of a tile, by its only CTA.
struct OneRun {
  int units;

  __device__ __forceinline__ explicit OneRun(const Tiles& tiles) : units(tiles.units) {}
  __device__ __forceinline__ int begin(int) const { return 0; }
  __device__ __forceinline__ int end(int) const { return units; }
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
  const int first = ceil_div(branches.length_of(keys.first_branch), kChunk);
  const int index = branches.chunks_until_of(keys.first_branch) - first +
                    (unit - keys.prefix_units) * kChunksPerUnit + piece;
  int k = 0;
  if (branches.same > 0) {
    // A unit of the prefix has no index.
    k = quotient(most(index, 0), branches.chunks, branches.by_chunks);
  } else {
#pragma unroll 4
    for (int i = 0; i < branches.count; ++i) k += of_lane(branches.chunks_until, i) <= index;
  }
  const int length = branches.length_of(k);
  const int before = branches.chunks_until_of(k) - ceil_div(length, kChunk);
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
