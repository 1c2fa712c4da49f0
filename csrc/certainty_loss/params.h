// What dParallel's certainty-forcing loss keeps of a row between its two passes; torch-free, shared
// by every backend.
#pragma once

#include <cstdint>

#include "lopa/float_types.h"

namespace lopa {
namespace certainty_loss {

// With m the largest logit of the row, in fp32; NaN throughout for a row that makes the loss NaN.
struct alignas(16) RowStatistics {
  float max;       // m
  float log_sum;   // log sum exp(x - m)
  float tempered;  // log sum exp((x - m) / temperature)
  float entropy;   // of softmax(x / temperature); negative: the row has no part in that mean
};

// Of the rows that have no part in the mean of the entropies.
constexpr float kNoEntropy = -1.0f;

// At this temperature exp(x / temperature) is the square of exp(x), and one exponential does.
constexpr double kSquareTemperature = 0.5;

}  // namespace certainty_loss
}  // namespace lopa
