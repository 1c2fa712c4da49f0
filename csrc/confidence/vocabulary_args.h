// What the GPU's vocabulary pass and merge are told, torch-free, for host and device code.
#pragma once

#include <cstdint>

#include "confidence/params.h"
#include "lopa/divisor.h"

namespace lopa {
namespace confidence {

// Tokens of a tile: the unit of the pass, and of the draw (docs/operators.md).
constexpr int kTile = 2048;
// The index of a partial shares its word with the flags.
constexpr int64_t kMostVocab = int64_t{1} << 29;
constexpr int64_t kMostItems = (int64_t{1} << 31) - 1;  // tiles of all listed rows
constexpr uint32_t kPartialNan = 1u << 31;
constexpr uint32_t kPartialFinite = 1u << 30;
constexpr uint32_t kPartialCareful = 1u << 29;
constexpr uint32_t kPartialIndex = kPartialCareful - 1;  // as an index: not the row's first maximum

constexpr int kMergeThreads = 256;
// A filter holds a number for each tile in shared memory.
constexpr int64_t kMostFilterTiles = 4096;

template <typename T>
constexpr int kPassThreads = sizeof(T) == 4 ? 256 : 512;
// So few that a CTA of the merge waits beside the pass.
constexpr int kMergeRegisters = 64;
template <typename T>
constexpr int kPassRegisters = (65536 - kMergeThreads * kMergeRegisters) / kPassThreads<T> / 8 * 8;

// Statistics of a tile. Its weights are 2^(x * scale - base): base is max * scale, rounded to float
// or, in a careful tile, not at all.
struct alignas(16) Partial {
  float max;
  uint32_t index_and_flags;  // of the first maximum, in the vocabulary
  float sum;                 // of weights w
  float weighted;            // of w * log2(w)
};

struct VocabularyArgs {
  LogitsView logits;
  const int32_t* rows;   // row of logits of each slot; null: the slot itself
  const int32_t* slots;  // the list: slots to evaluate; null: slot i at position i
  const int32_t* count;  // length of the list, on the device; null: `capacity`
  int64_t capacity;      // of the list
  int64_t tiles;         // of a row
  Divisor by_tiles;
  Partial* partials;  // [capacity, tiles], or [R, tiles] where that is less: `by_row`
  float* second;      // likewise, the second largest values; null: not wanted
  bool by_row;
  float scale;     // log2(e) / temperature
  bool all_stats;  // margin, neg_entropy and lse besides what the metric needs
  Metric metric;
  double inverse_temperature;
  bool sampled;
  bool filtered;
  int64_t top_k;  // the size of the vocabulary: no limit
  double top_p;   // 1: no limit
  const int64_t* seed;
  const int64_t* step;  // null: 0

  // Where the partials of a row begin that is listed at `position`.
  constexpr int64_t first_partial(int64_t position, int64_t row) const {
    return (by_row ? row : position) * tiles;
  }
  constexpr bool wants_second() const { return all_stats || metric == Metric::kMargin; }
  constexpr bool wants_weighted() const { return all_stats || metric == Metric::kNegEntropy; }
};

enum RowFlags : uint8_t {
  kRowNan = 1,
  kRowEmpty = 2,    // no finite logit, or no row
  kRowMissing = 4,  // the map gave a row outside [0, R)
};

// Where the merge writes, indexed by slot; null where nothing is wanted.
struct StatsOutput {
  int64_t* token = nullptr;
  float* prob = nullptr;
  float* score = nullptr;
  float* margin = nullptr;
  float* neg_entropy = nullptr;
  float* lse = nullptr;
  uint8_t* flags = nullptr;
};

}  // namespace confidence
}  // namespace lopa
