// What the parts of branch attention on Hopper share: sizes, arguments, the layout of shared
// memory, and the work of a CTA.
#pragma once

#include <cstddef>
#include <type_traits>

#include "branch_attention/attention_sm90_ptx.cuh"
#include "branch_attention/attention_work.h"

namespace lopa {
namespace attention {

constexpr int kKeys = 2 * kUnit;  // of a tile
constexpr int kChunks = kKeys / kChunk;
constexpr int kWarpgroup = 128;
constexpr int kGroupRows = 64;  // of a warpgroup
constexpr int kHalf = 64;       // numbers of head_dim that a row in shared memory has
constexpr int kHalfBytes = 2 * kHalf;
// Tiles whose masks are remembered: more than the stages, as masks outlive the keys.
constexpr int kNotes = 4;
// A running maximum follows the scores only when they pass it by more than this, in powers of 2:
// most tiles then scale nothing. Probabilities stay below 2^kSlack, well within fp16.
constexpr float kSlack = 8;

// Tiles of a cluster, and branches of a sequence, at most: a lane each.
constexpr int kMostTiles = 31;
constexpr int kMostBranches = 32;

// Parts of a warp's rows that a CTA gets from others. A tile's rows are shared among the CTAs whose
// runs end in it: of 2 or 3 CTAs one may go on to another tile, of 4 or 8 none does.
constexpr int kMostParts = 8;

constexpr float kInfinity = __builtin_huge_valf();

struct Sm90Arguments {
  CUtensorMap k_prefix;  // [batch or pages, kv_heads, capacity or page_size, head_dim]
  CUtensorMap v_prefix;
  CUtensorMap k_window;  // [batch, branches, kv_heads, window, head_dim]
  CUtensorMap v_window;

  const char* q;
  char* out;
  float* lse;
  int64_t q_stride[4];  // bytes: batch, branch, column, head
  int64_t out_stride[4];

  const int32_t* cache_len;
  const int32_t* length;
  const int32_t* prompt_len;   // null: the full mask
  const int32_t* block_table;  // null: not paged

  int32_t branches;
  int32_t window;
  Divisor by_window;
  int32_t capacity;
  int32_t kv_heads;
  Divisor group;        // query heads of a KV head
  Divisor tiles;        // of rows, of a sequence and KV head
  int32_t of_sequence;  // tiles of all KV heads
  int32_t shared;       // tiles of a cluster, at most kMostTiles
  int32_t ctas_log2;    // of a cluster
  bool ahead;           // the first keys are those of positions 0 to kKeys - 1, where they exist
  Divisor block_size;
  int32_t table_width;
  int32_t pages;
  int32_t page_shift;
  int32_t prefix_box;   // positions from a box of the prefix to the next: 16, 32 or 64
  int32_t prefix_rows;  // and what it loads of them: no more than the tensor has
  int32_t window_rows;  // the same of a chunk of a window
  // q & q_and ^ q_xor: with the sign of the scale in the queries, the largest score is the largest
  // scaled score; with a scale of 0 the queries are 0.
  uint32_t q_and;
  uint32_t q_xor;
  float scale_log2;
};

enum NoteFlags {
  kMasked = 1,   // not all rows see all keys
  kMissing = 2,  // some keys do not exist
  kWindows = 4,  // some keys are of windows
};

struct Note {
  Chunk chunks[kChunks];
  int32_t flags;
  int32_t strange;  // some values are not finite
  int32_t unused[2];
};

// Two warpgroups have 64 rows each and all keys (kRows = 128), or both the same 64 rows and one
// half of the keys of each tile (kSplits). A CTA has a tile of rows, or (kCluster) those of a
// cluster have several in common.
template <typename T, int kHeadDim_, bool kSplits_, bool kCluster_, int kStages_>
struct Layout {
  using Element = T;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kSplits = kSplits_;
  static constexpr bool kCluster = kCluster_;
  static constexpr int kConsumers = 2;  // warpgroups
  static constexpr int kStages = kStages_;
  static constexpr int kRows = kSplits ? kGroupRows : kGroupRows * kConsumers;
  static constexpr int kGroupKeys = kSplits ? kUnit : kKeys;  // of a tile, that a warpgroup has
  static constexpr int kHalves = kHeadDim / kHalf;
  static constexpr int kPieces = kHeadDim / 8;  // of 16 bytes, of a row
  static constexpr int kThreads = kWarpgroup * (kConsumers + 1);
  static constexpr int kConsumerThreads = kWarpgroup * kConsumers;
  static constexpr int kProducerRegisters = 56;
  static constexpr int kConsumerRegisters = 224;

  static constexpr int kTileBytes = kKeys * kHeadDim * 2;

  // Rows of a warp, of which a CTA merges some for others: sums of two rows a thread, in its order,
  // 16 bytes of each thread after another; and 8 threads' two maxima and sums.
  static constexpr int kWarps = kRows / 16;
  static constexpr int kSumsBytes = kHeadDim / 2 * 4 * 32;
  static constexpr int kTopsBytes = 8 * 16;

  // Bytes from the start of dynamic shared memory, itself at a multiple of 1024.
  static constexpr int kQ = 0;
  static constexpr int kGroupQBytes = kSplits ? kRows * kHeadDim * 2 : 0;
  static constexpr int kK = kQ + kConsumers * kGroupRows * kHeadDim * 2;
  static constexpr int kV = kK + kStages * kTileBytes;
  static constexpr int kParts = kCluster ? kMostParts : 0;
  static constexpr int kSums = kV + kStages * kTileBytes;
  static constexpr int kTops = kSums + kParts * kSumsBytes;
  static constexpr int kOtherTops = kTops + kParts * kTopsBytes;  // of the other warpgroup
  static constexpr int kBarriers = kOtherTops + (kSplits ? 4 * kTopsBytes : 0);
  static constexpr int kBarrierCount = 5 * kStages + kWarps;
  static constexpr int kNotesAt = kBarriers + (kBarrierCount + kBarrierCount % 2) * 8;
  static constexpr int kBytes = kNotesAt + kNotes * static_cast<int>(sizeof(Note));

  static_assert(kHeadDim % kHalf == 0 && kStages < kNotes && kNotesAt % 16 == 0);
};

// Barriers of the rings, by stage.
template <typename L>
struct Barriers {
  uint32_t base;

  __device__ uint32_t k_full(int stage) const { return base + stage * 8; }
  __device__ uint32_t k_empty(int stage) const { return base + (L::kStages + stage) * 8; }
  __device__ uint32_t v_full(int stage) const { return base + (2 * L::kStages + stage) * 8; }
  __device__ uint32_t v_empty(int stage) const { return base + (3 * L::kStages + stage) * 8; }
  __device__ uint32_t v_checked(int stage) const { return base + (4 * L::kStages + stage) * 8; }
  __device__ uint32_t parts(int warp) const { return base + (5 * L::kStages + warp) * 8; }
};

// Named barriers.
constexpr int kAllConsumers = 1;
__device__ __forceinline__ int barrier_of_group(int group) { return 2 + group; }
// Of two warpgroups that share rows: both have their queries in registers, the second's sums are
// there, the first has read them.
constexpr int kQueriesRead = 4;
constexpr int kSumsThere = 5;
constexpr int kSumsRead = 6;
__device__ __forceinline__ int barrier_of_turn(int group) { return 8 + group; }

// Where a tile's turn through the ring is.
template <int kStages>
struct Turn {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void next() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// What all threads of a CTA know.
template <typename L>
struct Task {
  uint32_t memory;  // shared address
  unsigned char* pointer;
  Barriers<L> barriers;
  int batch;
  int first_tile;  // of the cluster, in its sequence: head * tiles + tile
  int tiles;       // of the cluster
  int cache_len;
  int rank;    // in the cluster
  bool ahead;  // the first tile of keys and values was asked for before the lengths were known
  bool vain;   // a tile was, and turned out to be nobody's: everybody lets it go first

  __device__ Note* note(uint32_t tile) const {
    return reinterpret_cast<Note*>(pointer + L::kNotesAt) + tile % kNotes;
  }
  __device__ uint32_t flags_at(uint32_t tile) const {
    return memory + L::kNotesAt + tile % kNotes * static_cast<uint32_t>(sizeof(Note)) +
           static_cast<uint32_t>(offsetof(Note, flags));
  }
};

// A tile of rows, and the keys of it that a CTA sees.
template <typename L>
struct Part {
  int tile;  // of the cluster's
  int head;
  int first_row;
  int start;  // units of the tiles before
  int units;  // of all CTAs
  TileKeys keys;

  __device__ __forceinline__ bool whole() const { return keys.units() == units; }

  __device__ __forceinline__ void set_tile(const Sm90Arguments& args, const Task<L>& task,
                                           int number) {
    tile = number;
    const int in_sequence = task.first_tile + number;
    head = quotient(in_sequence, args.tiles);
    first_row = (in_sequence - head * static_cast<int>(args.tiles.value)) * L::kRows;
  }

  // From the unit `from` of the cluster, which is below `until`: the end of the CTA's run. By a
  // warp, after set_tile.
  __device__ __forceinline__ void set_keys(const Task<L>& task, const Tiles& tiles, int from,
                                           int until) {
    keys.prefix_units = ceil_div(task.cache_len, kUnit);
    if constexpr (L::kCluster) {
      units = of_lane(tiles.units, tile);
      start = of_lane(tiles.until, tile) - units;
      keys.first_branch = of_lane(tiles.first_branch, tile);
      keys.last_branch = of_lane(tiles.last_branch, tile);
    } else {
      units = tiles.units;
      start = 0;
      keys.first_branch = tiles.first_branch;
      keys.last_branch = tiles.last_branch;
    }
    keys.begin = from - start;
    keys.end = least(until - start, units);
  }
};

// The tile that has the unit `from`, by a warp.
template <typename L>
__device__ __forceinline__ int tile_at(const Tiles& tiles, int from) {
  if constexpr (!L::kCluster) return 0;
  return __popc(__ballot_sync(~0u, tiles.until <= from));
}

// A sequence's branches, by a warp: lane k reads the length of branch k.
__device__ __forceinline__ int length_of_lane(const Sm90Arguments& args, int batch, int lane) {
  if (lane >= args.branches) return 0;
  const int32_t* lengths = args.length + static_cast<int64_t>(batch) * args.branches;
  return clamp(lengths[lane], 0, args.window);
}

// What there is to do, by a warp.
template <typename L>
struct Plan {
  using Runs = std::conditional_t<L::kCluster, ClusterRuns, OneRun>;

  Branches branches;
  Tiles tiles;
  Runs runs;
};

template <typename L>
__device__ __forceinline__ Tiles tiles_of_task(const Sm90Arguments& args, const Task<L>& task,
                                               const Branches& branches, int lane) {
  // All lanes have the only tile.
  Part<L> part;
  part.set_tile(args, task, L::kCluster ? lane : 0);
  return tiles_of(branches, args.group, !L::kCluster || lane < task.tiles,
                  L::kCluster && task.tiles > 1, part.first_row, L::kRows,
                  ceil_div(task.cache_len, kUnit), lane);
}

}  // namespace attention
}  // namespace lopa
