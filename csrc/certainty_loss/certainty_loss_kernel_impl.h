// The vector kernels of the loss, written once over the vectors of lopa/simd.h, which are those of
// the instruction set that the including file is compiled for. All in an unnamed namespace: see
// certainty_loss_kernel.h.
#pragma once

#include <cfloat>
#include <cstdint>

#include "certainty_loss/certainty_loss_kernel.h"
#include "lopa/simd.h"

namespace lopa {
namespace certainty_loss {
namespace {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kInfinity = __builtin_inff();
// A floor for exponents: 2^-126 is a normal number, and negligible beside the 1 of the maximum.
constexpr float kLeast = -126.0f;
// 2^-127 is 0 for exp2_bounded: a gradient's floor, so that no weight of 0 meets an infinite one.
constexpr float kZero = -127.0f;
// How far, in powers of two, a value may pass the reference of its tile: far from overflow, and so
// little that the larger weights cost the smaller ones no accuracy that matters.
constexpr float kLargestExponent = 6.0f;
constexpr int kVectors = 4;  // in flight, to cover the latency of the exponential
constexpr int64_t kBlock = kVectors * Vec::kWidth;
constexpr int64_t kPrefetchBytes = 4096;

inline void lowest(float* x) { *x = -kInfinity; }
inline void lowest(BFloat16* x) { x->bits = 0xff80; }
inline void lowest(Half* x) { x->bits = 0xfc00; }

// Runs function(block, index of its first element) over n elements, the last block filled up with
// -inf.
template <typename T, typename Function>
inline void for_blocks(const T* x, int64_t n, Function function) {
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) function(x + i, i);
  if (i == n) return;
  T tail[kBlock];
  for (int64_t j = n - i; j < kBlock; ++j) lowest(&tail[j]);
  std::memcpy(tail, x + i, static_cast<size_t>(n - i) * sizeof(T));
  function(static_cast<const T*>(tail), i);
}

inline Vec total(const Vec (&x)[kVectors]) { return (x[0] + x[1]) + (x[2] + x[3]); }
inline Vec total_max(const Vec (&x)[kVectors]) { return max(max(x[0], x[1]), max(x[2], x[3])); }

template <typename T>
inline void prefetch_after(const T* block) {
  const char* ahead = reinterpret_cast<const char*>(block) + kPrefetchBytes;
  for (size_t line = 0; line < kBlock * sizeof(T); line += 64) __builtin_prefetch(ahead + line);
}

// A NaN in `exponent` stays.
inline Vec floored(Vec exponent, float least) { return max(set1(least), exponent); }

// With kSearches the tile's maximum, too, while it comes from memory.
template <typename T, bool kSquare, bool kSearches>
inline void sum_weights(const T* x, int64_t n, float base, float scale_value, TileSums* out) {
  const Vec reference = set1(base), log2e = set1(kLog2E), scale = set1(scale_value);
  Vec sum[kVectors], tempered[kVectors], weighted[kVectors], largest[kVectors];
  for (int j = 0; j < kVectors; ++j) {
    sum[j] = tempered[j] = weighted[j] = zero();
    largest[j] = set1(-kInfinity);
  }
  for_blocks(x, n, [&](const T* p, int64_t i) {
    if (kSearches) prefetch_after(x + i);
    for (int j = 0; j < kVectors; ++j) {
      const Vec value = load(p + j * Vec::kWidth);
      if (kSearches) largest[j] = max(value, largest[j]);
      const Vec distance = value - reference;
      const Vec t = floored(distance * log2e, kLeast);
      const Vec w = exp2_normal(t);
      sum[j] = sum[j] + w;
      if (kSquare) {
        // v = w^2; half of v * t is added up.
        tempered[j] = fma(w, w, tempered[j]);
        weighted[j] = fma(w * t, w, weighted[j]);
      } else {
        const Vec u = floored(distance * scale, kLeast);
        const Vec v = exp2_normal(u);
        tempered[j] = tempered[j] + v;
        weighted[j] = fma(v, u, weighted[j]);
      }
    }
  });
  if (kSearches) out->max = reduce_max(total_max(largest));
  out->base = base;
  out->sum = reduce_add(total(sum));
  out->tempered = reduce_add(total(tempered));
  out->weighted = (kSquare ? 2.0f : 1.0f) * reduce_add(total(weighted));
}

template <typename T, bool kSquare>
inline void scan_tile(const T* x, int64_t n, const ScanArgs& args, TileSums* out) {
  if (args.reference > -FLT_MAX) {
    sum_weights<T, kSquare, true>(x, n, args.reference, args.scale, out);
    const float above = out->max - args.reference;
    if (above * kLog2E <= kLargestExponent && above * args.scale <= kLargestExponent) return;
  }
  Vec largest[kVectors];
  for (int j = 0; j < kVectors; ++j) largest[j] = set1(-kInfinity);
  for_blocks(x, n, [&](const T* p, int64_t i) {
    prefetch_after(x + i);
    for (int j = 0; j < kVectors; ++j) {
      largest[j] = max(load(p + j * Vec::kWidth), largest[j]);
    }
  });
  out->max = reduce_max(total_max(largest));
  const float base = out->max > -FLT_MAX ? out->max : -FLT_MAX;
  sum_weights<T, kSquare, false>(x, n, base, args.scale, out);
}

template <typename T>
void scan(const void* data, int64_t n, const ScanArgs& args, TileSums* out) {
  const T* x = static_cast<const T*>(data);
  if (args.square) {
    scan_tile<T, true>(x, n, args, out);
  } else {
    scan_tile<T, false>(x, n, args, out);
  }
}

template <bool kEntropy, bool kSquare>
struct Gradient {
  Vec max, log2e, log_sum, scale, tempered, cross, slope, offset;

  explicit Gradient(const GradientArgs& args)
      : max(set1(args.max)),
        log2e(set1(kLog2E)),
        log_sum(set1(args.log_sum)),
        scale(set1(args.scale)),
        tempered(set1(kSquare ? args.tempered - 2.0f * args.log_sum : args.tempered)),
        cross(set1(args.cross)),
        slope(set1(args.slope)),
        offset(set1(args.offset)) {
    if (!kSquare) return;
    // 2^t is p^2 times a constant of the row.
    const Vec constant = set1(__builtin_exp2f(2.0f * args.log_sum - args.tempered));
    slope = slope * constant;
    offset = offset * constant;
  }

  Vec operator()(Vec x) const {
    const Vec distance = x - max;
    const Vec s = floored(distance * log2e - log_sum, kZero);
    const Vec p = exp2_bounded(s);
    if (!kEntropy) return cross * p;
    if (kSquare) {
      const Vec t = (s + s) - tempered;
      return p * fma(p, fma(slope, t, offset), cross);
    }
    const Vec t = floored(distance * scale - tempered, kZero);
    return fma(exp2_bounded(t), fma(slope, t, offset), cross * p);
  }
};

template <typename T, bool kEntropy, bool kSquare>
inline void write_gradient(const T* x, int64_t n, const GradientArgs& args, T* out) {
  const Gradient<kEntropy, kSquare> gradient(args);
  const bool labelled = args.label >= 0 && args.label < n;
  const float label = labelled ? to_float(x[args.label]) : 0.0f;
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    for (int j = 0; j < kVectors; ++j) {
      store(out + i + j * Vec::kWidth, gradient(load(x + i + j * Vec::kWidth)));
    }
  }
  float lanes[Vec::kWidth];
  for (; i < n; ++i) {
    store(lanes, gradient(set1(to_float(x[i]))));
    from_float(lanes[0], out + i);
  }
  if (labelled) {
    store(lanes, gradient(set1(label)));
    from_float(lanes[0] - args.cross, out + args.label);
  }
}

template <typename T>
void gradient(const void* data, int64_t n, const GradientArgs& args, void* out) {
  const T* x = static_cast<const T*>(data);
  if (!args.entropy) {
    write_gradient<T, false, false>(x, n, args, static_cast<T*>(out));
  } else if (args.square) {
    write_gradient<T, true, true>(x, n, args, static_cast<T*>(out));
  } else {
    write_gradient<T, true, false>(x, n, args, static_cast<T*>(out));
  }
}

template <typename T>
float at(const void* data, int64_t i) {
  return to_float(static_cast<const T*>(data)[i]);
}

template <typename T>
bool contains(const void* data, int64_t n, float value) {
  const T* x = static_cast<const T*>(data);
  for (int64_t i = 0; i < n; ++i) {
    if (to_float(x[i]) == value) return true;
  }
  return false;
}

template <typename T>
constexpr Kernels table() {
  return {scan<T>, gradient<T>, at<T>, contains<T>};
}

constexpr Kernels kKernels[3] = {table<BFloat16>(), table<Half>(), table<float>()};

}  // namespace
}  // namespace certainty_loss
}  // namespace lopa
