// What the GPU's kernels of the loss are told, torch-free, for host and device code.
#pragma once

#include <cstdint>

#include "certainty_loss/params.h"
#include "confidence/vocabulary_args.h"

namespace lopa {
namespace certainty_loss {

constexpr int kOneCtaThreads = 1024;  // of the kernels that are one CTA
constexpr int kRowThreads = 256;      // of the merge, a warp a row
constexpr float kLog2E = 1.4426950408889634f;

struct LossArgs {
  // Scaled by log2(e) / temperature; its list is `order`. Its partials are of exp(x / temperature).
  confidence::VocabularyArgs vocabulary;
  const int64_t* labels;
  const bool* masked;
  float* plain;          // [N, tiles]: sums of exp(x), beside the partials
  float* cross_entropy;  // [N], by position in the list
  double beta;
  bool square;
  float* loss;
  float* terms;  // [2]
  RowStatistics* stats;
  int32_t* order;   // [1 + N]
  int32_t* counts;  // [2]
};

struct GradientArgs {
  confidence::VocabularyArgs vocabulary;  // by_row
  LogitsView out;                         // rows of the gradient; its data may be the logits'
  const int64_t* labels;
  const RowStatistics* stats;
  const int32_t* counts;
  const float* grad_loss;
  float beta;
  float inverse_temperature;
  bool square;
};

}  // namespace certainty_loss
}  // namespace lopa
