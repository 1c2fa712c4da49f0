// What a pass over the vocabulary is asked and what it answers; torch-free, shared by every
// backend.
#pragma once

#include <cstdint>
#include <limits>

#include "lopa/float_types.h"

namespace lopa {

enum class Metric : int32_t { kProb = 0, kMargin = 1, kNegEntropy = 2 };

constexpr int kMaxLeadingDims = 8;

// logits[..., V] seen as [rows, vocab]: unit stride on the vocabulary, any strides before it.
struct LogitsView {
  const void* data;
  FloatType dtype;
  int64_t vocab;
  int64_t rows;
  int32_t ndim;  // leading dimensions, those of size 1 left out and neighbours merged
  int64_t sizes[kMaxLeadingDims];
  int64_t strides[kMaxLeadingDims];  // in elements

  int64_t element_bytes() const { return element_size(dtype); }

  const void* row(int64_t r) const {
    int64_t offset = 0;
    for (int32_t d = ndim - 1; d > 0; --d) {
      offset += (r % sizes[d]) * strides[d];
      r /= sizes[d];
    }
    if (ndim > 0) offset += r * strides[0];
    return static_cast<const char*>(data) + offset * element_bytes();
  }
};

struct ConfidenceConfig {
  Metric metric;
  double temperature;  // 0: greedy
  int64_t top_k;       // 0: none
  double top_p;        // 1: none
  uint64_t seed;
  uint64_t step;

  double inverse_temperature() const { return temperature > 0 ? 1.0 / temperature : 1.0; }
};

struct RowStats {
  int64_t token;
  float prob;
  float margin;
  float neg_entropy;
  float lse;
  bool nan;    // a NaN was among the logits
  bool empty;  // no logit was finite, or there was no row

  float score(Metric metric) const {
    if (empty) return -std::numeric_limits<float>::infinity();
    return metric == Metric::kProb ? prob : metric == Metric::kMargin ? margin : neg_entropy;
  }
};

}  // namespace lopa
