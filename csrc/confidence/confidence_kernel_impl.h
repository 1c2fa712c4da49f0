// The vector kernels, written once over the sixteen-lane vocabulary of vector_*.h, which the
// including translation unit chooses. Everything is in an unnamed namespace: see
// confidence_kernel.h. With the same lanes and the same order of operations, AVX2 and AVX-512 give
// the same bits.
#pragma once

#include <cfloat>
#include <cstdint>
#include <cstring>

#include "confidence/confidence_kernel.h"

namespace lopa {
namespace confidence {
namespace {

constexpr float kInfinity = __builtin_inff();
// Weights below 2^-125 are rounded up to it: a normal number, and negligible beside the 1 of the
// maximum whatever the vocabulary.
constexpr float kSmallestExponent = -125.0f;
constexpr int64_t kBlock = 64;
// How far (in powers of two) a value may pass the guessed maximum of its tile: far from overflow,
// and so little that the larger terms cost the smaller ones no accuracy that matters.
constexpr float kLargestExponent = 6.0f;
// How many elements the first guess of a group looks at.
constexpr int64_t kGuessElements = 8 * kBlock;
// How far ahead of the arithmetic the memory is fetched.
constexpr int64_t kPrefetchBytes = 4096;

inline float negative_infinity(float) { return -kInfinity; }
inline BFloat16 negative_infinity(BFloat16) { return {0xff80}; }
inline Half negative_infinity(Half) { return {0xfc00}; }

// 2^t for t in [-125, 125]. With t = n + f, n the nearest integer, 2^f is the degree-5 polynomial
// that is 1 at 0 and otherwise minimises the relative error over [-1/2, 1/2] (least squares
// reweighted by Lawson's method): 9.1e-8, and 1.9e-7 with the rounding of float.
inline F16 exp2_approx(F16 t) {
  F16 n = round(t);
  F16 f = sub(t, n);
  F16 p = splat(1.32647145e-3f);
  p = fma(p, f, splat(9.67151299e-3f));
  p = fma(p, f, splat(5.55073395e-2f));
  p = fma(p, f, splat(2.40222424e-1f));
  p = fma(p, f, splat(6.93147004e-1f));
  p = fma(p, f, splat(1.0f));
  return scale_by_power(p, n);
}

// The last, incomplete block of a tile, filled up with -inf.
template <typename T>
struct Tail {
  T values[kBlock];

  Tail(const T* x, int64_t n) {
    for (int64_t i = n; i < kBlock; ++i) values[i] = negative_infinity(T{});
    std::memcpy(values, x, static_cast<size_t>(n) * sizeof(T));
  }
};

// Runs function(block of 64, index of its first element) over n elements, the last block filled up.
template <typename T, typename Function>
inline void for_blocks(const T* x, int64_t n, Function function) {
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) function(x + i, i);
  if (i < n) {
    Tail<T> tail(x + i, n - i);
    function(tail.values, i);
  }
}

template <typename T>
struct Block {
  F16 v[4];

  explicit Block(const T* x) {
    load_pair(x, &v[0], &v[1]);
    load_pair(x + 32, &v[2], &v[3]);
  }
};

// NaN as -inf, +inf as the largest float, -0 as +0.
inline F16 sanitized(F16 v) {
  v = max(v, splat(-kInfinity));
  return add(min(v, splat(FLT_MAX)), splat(0.0f));
}

template <typename T>
struct OrderedBlock {
  F16 v[4];

  explicit OrderedBlock(const T* x) {
    for (int i = 0; i < 4; ++i) v[i] = sanitized(load_in_order(x + 16 * i));
  }
};

inline F16 exponent(F16 v, F16 maximum, F16 scale) {
  return max(mul(sub(v, maximum), scale), splat(kSmallestExponent));
}

inline float largest(F16 a) {
  float lanes[16];
  store(lanes, a);
  float r = lanes[0];
  for (int i = 1; i < 16; ++i) r = lanes[i] > r ? lanes[i] : r;
  return r;
}

// A fixed tree, so that every instruction set adds in one order.
inline float total(const F16 a[4]) {
  float lanes[16];
  store(lanes, add(add(a[0], a[1]), add(a[2], a[3])));
  for (int step = 8; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  }
  return lanes[0];
}

// The two largest values, lane by lane; NaN passes by.
struct LargestTwo {
  F16 first[4], second[4];

  LargestTwo() {
    for (int i = 0; i < 4; ++i) first[i] = second[i] = splat(-kInfinity);
  }

  // The operand that may be NaN stands where a NaN leaves the accumulators as they are.
  template <bool kSecond>
  void take(int i, F16 v) {
    if (kSecond) second[i] = max(min(first[i], v), second[i]);
    first[i] = max(v, first[i]);
  }

  template <bool kSecond>
  void finish(TileStats* stats) {
    for (int half = 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) {
        if (kSecond) {
          second[i] = max(max(second[i], second[i + half]), min(first[i], first[i + half]));
        }
        first[i] = max(first[i], first[i + half]);
      }
    }
    stats->max = largest(first[0]);
    stats->second = -kInfinity;
    if (!kSecond) return;
    float a[16], b[16];
    store(a, first[0]);
    store(b, second[0]);
    float best = -kInfinity, next = -kInfinity;
    for (int i = 0; i < 16; ++i) {
      float lower = a[i] < best ? a[i] : best;
      float higher = b[i] > next ? b[i] : next;
      next = lower > higher ? lower : higher;
      best = a[i] > best ? a[i] : best;
    }
    stats->second = next;
  }
};

// Maxima and sums in one pass, for a maximum guessed before. Without a fused operation the guess is
// subtracted first, which costs one more but no accuracy where values are large. The guess is good
// enough where no value passes it by more than kLargestExponent; the caller looks.
template <typename T, bool kSecond, bool kWeighted>
void scan_guessed(const T* x, int64_t n, float scale_value, float guess, TileStats* stats) {
  const F16 scale = splat(scale_value), reference = splat(guess);
  const F16 minus_base = splat(-(guess * scale_value));
  LargestTwo best;
  F16 sum[4], weighted[4];
  for (int i = 0; i < 4; ++i) sum[i] = weighted[i] = splat(0.0f);
  Mask nan = no_lanes();
  for_blocks(x, n, [&](const T* p, int64_t i) {
    const char* ahead = reinterpret_cast<const char*>(x + i) + kPrefetchBytes;
    for (size_t line = 0; line < kBlock * sizeof(T); line += 64) __builtin_prefetch(ahead + line);
    Block<T> block(p);
    nan = either(nan, either(unordered(block.v[0], block.v[1]), unordered(block.v[2], block.v[3])));
    for (int j = 0; j < 4; ++j) {
      best.take<kSecond>(j, block.v[j]);
      F16 t = kFusedMultiplyAdd ? fma(block.v[j], scale, minus_base)
                                : mul(sub(block.v[j], reference), scale);
      t = max(t, splat(kSmallestExponent));
      F16 w = exp2_approx(t);
      sum[j] = add(sum[j], w);
      if (kWeighted) weighted[j] = fma(w, t, weighted[j]);
    }
  });
  stats->nan = any(nan);
  best.finish<kSecond>(stats);
  stats->base = kFusedMultiplyAdd ? static_cast<double>(guess * scale_value)
                                  : static_cast<double>(guess) * scale_value;
  stats->sum = total(sum);
  stats->weighted = kWeighted ? total(weighted) : 0.0f;
}

// The same in two passes, for any values: the weights are relative to the tile's own maximum, from
// which each value is subtracted before it is scaled.
template <typename T>
void scan_careful(const T* x, int64_t n, float scale_value, TileStats* stats) {
  LargestTwo best;
  Mask nan = no_lanes(), finite = no_lanes();
  for_blocks(x, n, [&](const T* p, int64_t) {
    Block<T> block(p);
    for (int j = 0; j < 4; ++j) {
      F16 v = block.v[j];
      nan = either(nan, unordered(v, v));
      finite = either(finite, greater(splat(kInfinity), max(v, sub(splat(0.0f), v))));
      best.take<true>(j, v);
    }
  });
  best.finish<true>(stats);
  stats->nan = any(nan);
  stats->finite = any(finite);
  if (stats->max > FLT_MAX) stats->max = FLT_MAX;
  if (stats->second > FLT_MAX) stats->second = FLT_MAX;
  stats->base = stats->sum = stats->weighted = 0;
  if (stats->max == -kInfinity) return;
  const F16 maximum = splat(stats->max), scale = splat(scale_value);
  F16 sum[4], weighted[4];
  for (int i = 0; i < 4; ++i) sum[i] = weighted[i] = splat(0.0f);
  for_blocks(x, n, [&](const T* p, int64_t) {
    Block<T> block(p);
    for (int j = 0; j < 4; ++j) {
      F16 t = exponent(min(splat(FLT_MAX), block.v[j]), maximum, scale);
      F16 w = exp2_approx(t);
      sum[j] = add(sum[j], w);
      weighted[j] = fma(w, t, weighted[j]);
    }
  });
  stats->base = static_cast<double>(stats->max) * scale_value;
  stats->sum = total(sum);
  stats->weighted = total(weighted);
}

template <typename T>
float guess_max(const T* x, int64_t n) {
  F16 lanes = splat(-kInfinity);
  for_blocks(x, n < kGuessElements ? n : kGuessElements, [&](const T* p, int64_t) {
    Block<T> block(p);
    for (int j = 0; j < 4; ++j) lanes = max(block.v[j], lanes);
  });
  return largest(lanes);
}

template <typename T>
void scan(const void* data, int64_t n, const ScanOptions& options, TileStats* stats) {
  const T* x = static_cast<const T*>(data);
  float reference = options.reference > -kInfinity ? options.reference : guess_max(x, n);
  float base = reference * options.scale;
  // Beyond this the rounding of the base is no longer small beside a power of two.
  if (base > -65536.0f && base < 65536.0f) {
    auto guessed =
        options.second
            ? (options.weighted ? scan_guessed<T, true, true> : scan_guessed<T, true, false>)
            : (options.weighted ? scan_guessed<T, false, true> : scan_guessed<T, false, false>);
    guessed(x, n, options.scale, reference, stats);
    stats->finite = stats->max > -kInfinity;
    if (stats->max < kInfinity && stats->max * options.scale - base <= kLargestExponent) return;
  }
  scan_careful(x, n, options.scale, stats);
}

template <typename T>
int64_t find(const void* data, int64_t n, float value) {
  const T* x = static_cast<const T*>(data);
  const F16 wanted = splat(value);
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    OrderedBlock<T> block(x + i);
    for (int j = 0; j < 4; ++j) {
      uint32_t hits = bits(equal(block.v[j], wanted));
      if (hits != 0) return i + 16 * j + __builtin_ctz(hits);
    }
  }
  if (i < n) {
    Tail<T> tail(x + i, n - i);
    OrderedBlock<T> block(tail.values);
    for (int j = 0; j < 4; ++j) {
      uint32_t hits = bits(equal(block.v[j], wanted));
      if (hits != 0) {
        int64_t index = i + 16 * j + __builtin_ctz(hits);
        return index < n ? index : n;
      }
    }
  }
  return n;
}

template <typename T>
int64_t count_equal(const void* data, int64_t n, float value) {
  const F16 wanted = splat(value);
  int64_t count = 0;
  for_blocks(static_cast<const T*>(data), n, [&](const T* p, int64_t) {
    OrderedBlock<T> block(p);
    for (int j = 0; j < 4; ++j) count += __builtin_popcount(bits(equal(block.v[j], wanted)));
  });
  return count;
}

template <typename T>
void lane_maxima(const void* data, int64_t n, float maxima[kLanes]) {
  F16 first[4];
  for (int i = 0; i < 4; ++i) first[i] = splat(-kInfinity);
  for_blocks(static_cast<const T*>(data), n, [&](const T* p, int64_t) {
    Block<T> block(p);
    for (int i = 0; i < 4; ++i) first[i] = max(block.v[i], first[i]);
  });
  for (int i = 0; i < 4; ++i) store(maxima + 16 * i, min(first[i], splat(FLT_MAX)));
}

template <typename T>
void sum_above(const void* data, int64_t n, const AboveArgs& args, AboveSums* sums) {
  const F16 maximum = splat(args.max), scale = splat(args.scale), threshold = splat(args.threshold);
  F16 sum[4], weighted[4];
  for (int i = 0; i < 4; ++i) sum[i] = weighted[i] = splat(0.0f);
  sums->equal = 0;
  for_blocks(static_cast<const T*>(data), n, [&](const T* p, int64_t i) {
    OrderedBlock<T> block(p);
    Mask reaching[4];
    for (int j = 0; j < 4; ++j) reaching[j] = less_equal(threshold, block.v[j]);
    if (!any(either(either(reaching[0], reaching[1]), either(reaching[2], reaching[3])))) return;
    uint64_t equals = 0;
    for (int j = 0; j < 4; ++j) {
      equals |= uint64_t{bits(equal(block.v[j], threshold))} << (16 * j);
      F16 t = exponent(block.v[j], maximum, scale);
      F16 w = keep(greater(block.v[j], threshold), exp2_approx(t));
      sum[j] = add(sum[j], w);
      weighted[j] = fma(w, t, weighted[j]);
    }
    if (n - i < kBlock) equals &= (uint64_t{1} << (n - i)) - 1;
    sums->equal += __builtin_popcountll(equals);
  });
  sums->sum = total(sum);
  sums->weighted = total(weighted);
}

template <typename T>
void histogram(const void* data, int64_t n, const HistogramArgs& args, Histogram* out) {
  const T* x = static_cast<const T*>(data);
  const F16 maximum = splat(args.max), scale = splat(args.scale), floor = splat(args.floor);
  const U16 prefix = splat(args.prefix);
  for_blocks(x, n, [&](const T* p, int64_t i) {
    OrderedBlock<T> block(p);
    U16 keys[4];
    uint64_t hits = 0;
    for (int j = 0; j < 4; ++j) {
      keys[j] = sortable_key(block.v[j]);
      uint64_t mask = bits(less_equal(floor, block.v[j])) &
                      bits(equal(shift_right(keys[j], args.prefix_shift), prefix));
      hits |= mask << (16 * j);
    }
    if (n - i < kBlock) hits &= (uint64_t{1} << (n - i)) - 1;
    if (hits == 0) return;
    uint32_t bins[kBlock];
    float weights[kBlock];
    for (int j = 0; j < 4; ++j) {
      store(bins + 16 * j, shift_right(keys[j], args.bin_shift));
      store(weights + 16 * j, exp2_approx(exponent(block.v[j], maximum, scale)));
    }
    for (; hits != 0; hits &= hits - 1) {
      int lane = __builtin_ctzll(hits);
      uint32_t bin = bins[lane] & args.bin_mask;
      ++out->count[bin];
      out->mass[bin] += weights[lane];
    }
  });
}

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11) for the
// sixteen counters from `first`, in the order of the vocabulary: word l of counter c is at 4 c + l.
inline void philox_block(uint32_t first, const DrawArgs& args, U16 out[4]) {
  // Lane 4 L + q works on counter 4 q + L, so that the transposition inside 128-bit lanes at the
  // end leaves the numbers in order.
  static const uint32_t kOrder[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
  out[0] = add(splat(first), load(kOrder));
  for (int i = 0; i < 3; ++i) out[i + 1] = splat(args.counter[i]);
  uint32_t key0 = args.key[0], key1 = args.key[1];
  for (int round = 0; round < 10; ++round) {
    U16 low0, high0, low1, high1;
    multiply_wide(out[0], 0xD2511F53u, &low0, &high0);
    multiply_wide(out[2], 0xCD9E8D57u, &low1, &high1);
    out[0] = exclusive_or(exclusive_or(high1, out[1]), splat(key0));
    out[2] = exclusive_or(exclusive_or(high0, out[3]), splat(key1));
    out[1] = low1;
    out[3] = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  transpose_lanes(out);
}

// With the race of the best candidate: what v * 2^24 is at most, over the weight, for a candidate
// that beats it. (Its E is at least v = (word + 1/2) / 2^32.) The margin covers the rounding of the
// weights.
inline float race_limit(double race) {
  double limit = race * 16777216.0 * (1 + 1e-4);
  return limit < FLT_MAX ? static_cast<float>(limit) : kInfinity;
}

template <typename T>
void draw(const void* data, int64_t n, int64_t base, const DrawArgs& args, Draw* best) {
  const F16 maximum = splat(args.max), scale = splat(args.scale), threshold = splat(args.threshold);
  const F16 smallest = splat(0x1p-9f);  // v * 2^24 of the word 0
  float limit = race_limit(best->race);
  for_blocks(static_cast<const T*>(data), n, [&](const T* p, int64_t i) {
    OrderedBlock<T> block(p);
    F16 weight[4], bound[4];
    Mask hopeful = no_lanes();
    for (int j = 0; j < 4; ++j) {
      weight[j] = exp2_approx(exponent(block.v[j], maximum, scale));
      bound[j] = mul(weight[j], splat(limit));
      hopeful = either(hopeful, less_equal(smallest, bound[j]));
    }
    if (!any(hopeful)) return;
    U16 random[4];
    philox_block(static_cast<uint32_t>((base + i) >> 2), args, random);
    uint64_t candidates = 0;
    float values[kBlock], weights[kBlock], uniform[kBlock];
    uint32_t words[kBlock];
    for (int j = 0; j < 4; ++j) {
      F16 v = to_float(shift_right(random[j], 8));
      uint64_t kept = bits(less_equal(threshold, block.v[j]));
      candidates |= (bits(less_equal(v, bound[j])) & kept) << (16 * j);
      store(values + 16 * j, block.v[j]);
      store(weights + 16 * j, weight[j]);
      store(uniform + 16 * j, v);
      store(words + 16 * j, random[j]);
    }
    if (n - i < kBlock) candidates &= (uint64_t{1} << (n - i)) - 1;
    for (; candidates != 0; candidates &= candidates - 1) {
      int lane = __builtin_ctzll(candidates);
      if (uniform[lane] > weights[lane] * limit) continue;
      int64_t index = base + i + lane;
      float value = values[lane];
      if (value == args.threshold && index >= args.tie_limit) continue;
      if (value == -kInfinity) continue;
      double distance = (static_cast<double>(value) - args.max) * args.inverse_temperature;
      double race = exponential(words[lane]) / __builtin_exp(distance);
      if (race < best->race) {
        *best = {race, distance, index};
        limit = race_limit(race);
      }
    }
  });
}

template <typename T>
constexpr Kernels table() {
  return {scan<T>, find<T>, count_equal<T>, lane_maxima<T>, sum_above<T>, histogram<T>, draw<T>};
}

constexpr Kernels kKernels[3] = {table<BFloat16>(), table<Half>(), table<float>()};

}  // namespace
}  // namespace confidence
}  // namespace lopa
