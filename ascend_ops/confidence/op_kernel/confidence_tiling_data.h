// What the host tells the kernels of the confidence room. Plain data.
#pragma once

#include <cstdint>

namespace lopa {

// Tokens of a tile: two tiles in flight, and two in fp32 for the arithmetic, are 128 KiB of UB.
constexpr uint32_t kConfidenceTile = 8192;
// A draw goes by parts of a tile, first a part and then a token of it (docs/operators.md).
constexpr uint32_t kDrawTile = 2048;
constexpr uint32_t kDrawTiles = kConfidenceTile / kDrawTile;
// The merge has all partials of a row in UB: bytes of one, and of one with the masses of a draw.
constexpr uint32_t kPartialBytes = 32;
constexpr uint32_t kDrawPartialBytes = 64;
constexpr uint32_t kMaxTiles = 512;

enum class ConfidenceMetric : uint32_t { kProb = 0, kMargin = 1, kNegEntropy = 2 };

struct ConfidenceTiling {
  uint64_t vocab;
  uint32_t logits_rows;         // R
  uint32_t rows;                // to evaluate
  uint32_t tiles;               // of a row
  uint32_t has_rows;            // 1: `rows` names the rows
  uint32_t metric;              // of the score: 0 prob, 1 margin, 2 neg_entropy
  uint32_t second;              // 1: the second largest logit is wanted
  uint32_t weighted;            // 1: the sum of p log p is wanted
  uint32_t sampled;             // 1: tokens are drawn
  uint32_t has_step;            // 1: `step` is there
  float inverse_temperature;    // cut to the largest float
  float lse_factor, lse_scale;  // their product is the inverse temperature
};

}  // namespace lopa
