// Branch confidence (LoPA, arXiv 2512.16229, Eq. 2, and its variants) over the scores of open
// columns, in UB, by the scalar unit.
//
// The contract forms sums in double. The scalar unit has none: a sum is kept as two floats, whose
// 48 bits round to the same float but where a double lies within 2^-24 of the float's last place
// from a boundary (Dekker, Numerische Mathematik 18, 1971).
#pragma once

#include "branch_memory.h"

namespace lopa {
namespace branch {

struct TwoFloats {
  float high = 0.0f, low = 0.0f;
};

__aicore__ inline TwoFloats two_sum(float a, float b) {
  const float sum = a + b;
  // Infinity has no rest.
  if (!is_finite(sum)) return {sum, 0.0f};
  const float part = sum - a;
  return {sum, (a - (sum - part)) + (b - part)};
}

__aicore__ inline TwoFloats add(const TwoFloats& a, const TwoFloats& b) {
  const TwoFloats high = two_sum(a.high, b.high);
  const TwoFloats low = two_sum(a.low, b.low);
  const TwoFloats middle = two_sum(high.high, high.low + low.high);
  return two_sum(middle.high, middle.low + low.low);
}

__aicore__ inline TwoFloats add(const TwoFloats& a, float b) { return add(a, TwoFloats{b, 0.0f}); }

__aicore__ inline void split(float x, float& high, float& low) {
  const float scaled = x * 4097.0f;
  high = scaled - (scaled - x);
  low = x - high;
}

__aicore__ inline TwoFloats two_product(float a, float b) {
  const float product = a * b;
  // The split of a large number overflows.
  if (!is_finite(product) || !is_finite(a * 4097.0f) || !is_finite(b * 4097.0f)) {
    return {product, 0.0f};
  }
  float a_high, a_low, b_high, b_low;
  split(a, a_high, a_low);
  split(b, b_high, b_low);
  const float rest =
      ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low;
  return {product, rest};
}

__aicore__ inline TwoFloats multiply(const TwoFloats& a, const TwoFloats& b) {
  const TwoFloats product = two_product(a.high, b.high);
  if (!is_finite(product.high)) return product;
  return two_sum(product.high, product.low + (a.high * b.low + a.low * b.high));
}

__aicore__ inline TwoFloats divide(const TwoFloats& a, int32_t n) {
  const float divisor = static_cast<float>(n);
  const float first = a.high / divisor;
  if (!is_finite(first)) return {first, 0.0f};
  const TwoFloats back = two_product(first, divisor);
  const float rest = ((a.high - back.high) - back.low) + a.low;
  return two_sum(first, rest / divisor);
}

__aicore__ inline bool less(const TwoFloats& a, const TwoFloats& b) {
  return a.high < b.high || (a.high == b.high && a.low < b.low);
}

// floor of n * share, the product rounded to double first.
__aicore__ inline uint64_t floor_of_share(uint32_t n, const DoubleShare& share) {
  uint64_t low = static_cast<uint64_t>(n) * (share.mantissa & 0xFFFFFFFFu);
  uint64_t high = static_cast<uint64_t>(n) * (share.mantissa >> 32) + (low >> 32);
  low &= 0xFFFFFFFFu;
  uint32_t bits = 0;
  for (uint64_t rest = high; rest != 0; rest >>= 1) ++bits;
  if (bits > 21) {
    const uint32_t dropped = bits + 32 - 53;
    const uint64_t rest = low & ((uint64_t{1} << dropped) - 1), half = uint64_t{1} << (dropped - 1);
    low -= rest;
    if (rest > half || (rest == half && (low >> dropped & 1) != 0)) low += uint64_t{1} << dropped;
  }
  high += low >> 32;
  return share.exponent - 32 < 64 ? high >> (share.exponent - 32) : 0;
}

// A float as an integer of the same order.
__aicore__ inline uint32_t order_of(float x) {
  union {
    float value;
    uint32_t bits;
  } word;
  word.value = x;
  return word.bits & 0x80000000u ? ~word.bits : word.bits | 0x80000000u;
}
__aicore__ inline float of_order(uint32_t order) {
  union {
    uint32_t bits;
    float value;
  } word;
  word.bits = order & 0x80000000u ? order & 0x7FFFFFFFu : ~order;
  return word.value;
}

// The sum of the m lowest of n scores: the m-th lowest bit by bit, and everything below it.
__aicore__ inline TwoFloats sum_of_lowest(const LocalTensor<float>& scores, uint32_t n,
                                          uint32_t m) {
  uint32_t boundary = 0;
  for (int32_t bit = 31; bit >= 0; --bit) {
    const uint32_t trial = boundary | uint32_t{1} << bit;
    uint32_t below = 0;
    for (uint32_t i = 0; i < n; ++i) below += order_of(scores.GetValue(i)) < trial ? 1 : 0;
    if (below < m) boundary = trial;
  }
  TwoFloats sum;
  uint32_t taken = 0;
  for (uint32_t i = 0; i < n; ++i) {
    const float score = scores.GetValue(i);
    if (order_of(score) >= boundary) continue;
    sum = add(sum, score);
    ++taken;
  }
  for (; taken < m; ++taken) sum = add(sum, of_order(boundary));
  return sum;
}

// F over n scores in the order of their columns, none of them NaN.
__aicore__ inline TwoFloats reduce_scores(const LocalTensor<float>& scores, uint32_t n,
                                          const ReduceTiling& config) {
  if (n == 0) return {1.0f, 0.0f};
  TwoFloats total;
  float lowest = scores.GetValue(0);
  for (uint32_t i = 0; i < n; ++i) {
    const float score = scores.GetValue(i);
    if (score == neg_inf()) return {score, 0.0f};
    total = add(total, score);
    if (score < lowest) lowest = score;
  }
  if (config.reduction == kReduceMin) return {lowest, 0.0f};
  if (config.reduction == kReduceBottom) {
    uint32_t m = static_cast<uint32_t>(floor_of_share(n, config.fraction));
    if (m < 1) m = 1;
    if (m < n) return divide(sum_of_lowest(scores, n, m), static_cast<int32_t>(m));
  }
  const uint32_t group = config.group;
  if (config.reduction != kReduceGroup || n < group) {
    return divide(total, static_cast<int32_t>(n));
  }
  TwoFloats sum, least;
  for (uint32_t i = 0; i < n; ++i) {
    sum = add(sum, scores.GetValue(i));
    if (i >= group) sum = add(sum, -scores.GetValue(i - group));
    if (i + 1 == group || (i >= group && less(sum, least))) least = sum;
  }
  return divide(least, static_cast<int32_t>(group));
}

// C = alpha * creation + (1 - alpha) * F.
__aicore__ inline float blend(float creation, const TwoFloats& reduced,
                              const ReduceTiling& config) {
  if (config.only == 1) return reduced.high;
  if (config.only == 2) return creation;
  const TwoFloats made = multiply({config.alpha.high, config.alpha.low}, {creation, 0.0f});
  const TwoFloats own = multiply({config.rest.high, config.rest.low}, reduced);
  return add(made, own).high;
}

}  // namespace branch
}  // namespace lopa
