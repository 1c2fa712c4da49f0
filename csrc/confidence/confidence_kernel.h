// The interface between the threaded driver and its vector kernels: one function table an
// instruction set. Plain data and C functions only, since the translation units behind it are
// compiled for different processors and must not share any inline function with the rest.
#pragma once

#include <cstdint>

#include "lopa/float_types.h"

namespace lopa {
namespace confidence {

// A tile is what one call works on.
constexpr int64_t kTileBytes = 16384;
// Vocabulary indices of a tile of the two-stage draw.
constexpr int64_t kDrawTile = 2048;
// How many maxima over interleaved parts of a tile `lane_maxima` gives.
constexpr int64_t kLanes = 64;
constexpr int64_t kHistogramBits = 11;
constexpr int64_t kHistogramBins = int64_t{1} << kHistogramBits;

// Logits are weighed in units of `scale` = log2(e) / temperature: the weight of x is
// 2^(x * scale - base), for a base near that of the maximum.
struct ScanOptions {
  float scale;
  bool second;      // the second largest value is wanted
  bool weighted;    // the sum for the entropy is wanted
  float reference;  // the largest value so far: a guess at this tile's. -inf: none
};

struct TileStats {
  float max;     // of the values with NaN as -inf and +inf as the largest float
  float second;  // the next one, equal to max where that occurs twice
  double base;
  double sum;       // sum of w = 2^t, t = x * scale - base
  double weighted;  // sum of w * t
  bool nan;
  bool finite;  // a finite value was seen
};

// Of the values strictly above `threshold`, relative to the row's maximum `max`.
struct AboveArgs {
  float max;
  float scale;
  float threshold;
};

struct AboveSums {
  double sum;
  double weighted;
  int64_t equal;  // how many values equal the threshold
};

// One level of a radix selection over the order-preserving integer key of a float: the values whose
// key >> prefix_shift equals `prefix`, and which are not below `floor`, are counted into bins of
// (key >> bin_shift).
struct HistogramArgs {
  float max;
  float scale;
  float floor;
  int32_t bin_shift;
  int32_t prefix_shift;  // 32: every value
  uint32_t prefix;
  uint32_t bin_mask;
};

struct Histogram {
  int64_t count[kHistogramBins];
  double mass[kHistogramBins];
};

struct DrawArgs {
  float max;
  float scale;
  float threshold;    // a value is kept if it is larger, or equal and
  int64_t tie_limit;  // its index is below this
  double inverse_temperature;
  uint32_t key[2];
  uint32_t counter[3];  // words 1..3 of the Philox counter; word 0 is the index >> 2
};

// The best candidate so far: the smallest `race`. With E = exponential(random word), the Gumbel
// number is -log(E), and the largest log(weight) + Gumbel number is the smallest E / weight.
struct Draw {
  double race;
  double distance;  // log(weight) = (x - max) / temperature
  int64_t index;
};

// `x` points to n elements of the table's dtype; `base` is the vocabulary index of x[0].
struct Kernels {
  void (*scan)(const void* x, int64_t n, const ScanOptions& options, TileStats* stats);
  // The first index whose value (as `scan` sees it) equals `value`, or n.
  int64_t (*find)(const void* x, int64_t n, float value);
  int64_t (*count_equal)(const void* x, int64_t n, float value);
  void (*lane_maxima)(const void* x, int64_t n, float maxima[kLanes]);
  void (*sum_above)(const void* x, int64_t n, const AboveArgs& args, AboveSums* sums);
  void (*histogram)(const void* x, int64_t n, const HistogramArgs& args, Histogram* histogram);
  // Replaces `best` where a kept value beats it; `base` is a multiple of 64.
  void (*draw)(const void* x, int64_t n, int64_t base, const DrawArgs& args, Draw* best);
};

// Indexed by FloatType.
const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();

// The exponentially distributed number of a 32-bit random word, exact in both tails.
double exponential(uint32_t word);
// The four words of Philox4x32-10 at counter (first, counter...).
void philox(uint32_t first, const uint32_t counter[3], const uint32_t key[2], uint32_t words[4]);

}  // namespace confidence
}  // namespace lopa
