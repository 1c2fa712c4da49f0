// Branch confidence (LoPA, arXiv 2512.16229, Eq. 2, and its variants) over the scores of open
// columns, in UB, by the scalar unit.
#pragma once

#include "soft_double.h"

namespace lopa {
namespace branch {

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
__aicore__ inline Double sum_of_lowest(const LocalTensor<float>& scores, uint32_t n, uint32_t m) {
  uint32_t boundary = 0;
  for (int32_t bit = 31; bit >= 0; --bit) {
    const uint32_t trial = boundary | uint32_t{1} << bit;
    uint32_t below = 0;
    for (uint32_t i = 0; i < n; ++i) below += order_of(scores.GetValue(i)) < trial ? 1 : 0;
    if (below < m) boundary = trial;
  }
  Double sum;
  uint32_t taken = 0;
  for (uint32_t i = 0; i < n; ++i) {
    const float score = scores.GetValue(i);
    if (order_of(score) >= boundary) continue;
    sum = sum.Plus(Double::OfFloat(score));
    ++taken;
  }
  for (; taken < m; ++taken) sum = sum.Plus(Double::OfFloat(of_order(boundary)));
  return sum;
}

// F over n scores in the order of their columns, none of them NaN.
__aicore__ inline Double reduce_scores(const LocalTensor<float>& scores, uint32_t n,
                                       const ReduceTiling& config) {
  if (n == 0) return Double::OfFloat(1.0f);
  Double total;
  float lowest = scores.GetValue(0);
  for (uint32_t i = 0; i < n; ++i) {
    const float score = scores.GetValue(i);
    if (score == neg_inf()) return Double::OfFloat(score);
    total = total.Plus(Double::OfFloat(score));
    if (score < lowest) lowest = score;
  }
  if (config.reduction == kReduceMin) return Double::OfFloat(lowest);
  if (config.reduction == kReduceBottom) {
    uint32_t m = Double::OfInteger(n).Times(Double::OfBits(config.fraction)).Floor();
    if (m < 1) m = 1;
    if (m < n) return sum_of_lowest(scores, n, m).Over(Double::OfInteger(m));
  }
  const uint32_t group = config.group;
  if (config.reduction != kReduceGroup || n < group) {
    return total.Over(Double::OfInteger(n));
  }
  Double sum, least;
  for (uint32_t i = 0; i < n; ++i) {
    Double change = Double::OfFloat(scores.GetValue(i));
    if (i >= group) {
      change = change.Plus(Double::OfFloat(scores.GetValue(i - group)).Negated());
    }
    sum = sum.Plus(change);
    if (i + 1 == group || (i >= group && sum.Less(least))) least = sum;
  }
  return least.Over(Double::OfInteger(group));
}

// C = alpha * creation + (1 - alpha) * F.
__aicore__ inline float blend(float creation, const Double& reduced, const ReduceTiling& config) {
  // A term of weight zero is left out, infinite or not.
  if (config.only == 1) return reduced.ToFloat();
  if (config.only == 2) return creation;
  const Double made = Double::OfBits(config.alpha).Times(Double::OfFloat(creation));
  return made.Plus(Double::OfBits(config.rest).Times(reduced)).ToFloat();
}

}  // namespace branch
}  // namespace lopa
