// The interface between the threaded driver and its vector kernels: one function table an
// instruction set. Plain data and C functions only, since the translation units behind it are
// compiled for different processors and must not share any inline function with the rest.
#pragma once

#include <cstdint>

#include "lopa/float_types.h"

namespace lopa {
namespace certainty_loss {

// Elements of a tile, whose sums one call forms; it stays in the L1 cache between its two passes.
constexpr int64_t kTile = 4096;

struct ScanArgs {
  float scale;  // log2(e) / temperature
  bool square;  // the temperature is kSquareTemperature
  // Near the largest value of tiles before this one, which spares the search for it; -inf: unknown.
  float reference;
};

// Sums of weights relative to a number m: 2^((x - m) log2(e)), and v = 2^t with t = (x - m) *
// scale. NaN or +inf makes them NaN.
struct TileSums {
  float max;   // NaN passed by
  float base;  // m: `reference` where no value is far above it, else `max`, at least -FLT_MAX
  float sum;
  float tempered;  // sum of v
  float weighted;  // sum of v * t
};

// With d = x - max: p = 2^(d log2(e) - log_sum), t = d * scale - tempered,
// gradient = cross * p + 2^t * (slope * t + offset).
struct GradientArgs {
  float max;
  float log_sum;  // base 2, as is `tempered`
  float tempered;
  float scale;
  float cross;
  float slope;
  float offset;
  bool entropy;  // slope and offset count
  bool square;
  int64_t label;  // where `cross` is subtracted; outside [0, n): nowhere
};

// `x` points to n elements of the table's dtype; `out` may be `x`.
struct Kernels {
  void (*scan)(const void* x, int64_t n, const ScanArgs& args, TileSums* sums);
  void (*gradient)(const void* x, int64_t n, const GradientArgs& args, void* out);
  // Element i as float.
  float (*at)(const void* x, int64_t i);
  // Whether one of the first n elements equals `value`.
  bool (*contains)(const void* x, int64_t n, float value);
};

// Indexed by FloatType.
const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();

}  // namespace certainty_loss
}  // namespace lopa
