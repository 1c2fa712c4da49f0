// The arithmetic of the confidence room's tiling. No dependencies, so that tests on any machine
// call it.
//
// A row is cut into tiles of one length, whatever the number of cores: each tile's statistics go to
// the workspace, and are merged in the order of the tiles. So results do not depend on the cores,
// and few rows keep all of them busy.
#pragma once

#include <cstdint>
#include <limits>

#include "../op_kernel/confidence_tiling_data.h"

namespace lopa {

struct ConfidenceShape {
  uint64_t vocab;
  uint64_t logits_rows;
  uint64_t rows;
  bool has_rows, has_seed, has_step;
};

struct ConfidenceFilters {
  double temperature;
  int64_t top_k;  // 0: none
  double top_p;   // 1: none
};

// Why a call cannot be done; null where it can.
inline const char* refusal(const ConfidenceShape& shape, const ConfidenceFilters& filters) {
  if (shape.vocab < 1) return "logits: expected a vocabulary of at least 1";
  if (shape.vocab > uint64_t{kMaxTiles} * kConfidenceTile) {
    return "logits: expected a vocabulary of at most 4194304 on Ascend";
  }
  if (shape.logits_rows > UINT32_MAX / 2 || shape.rows > UINT32_MAX / 2) {
    return "logits, rows: expected fewer than 2^31 rows";
  }
  if (!(filters.temperature >= 0 && filters.temperature <= std::numeric_limits<double>::max())) {
    return "temperature: expected a finite number of at least 0";
  }
  if (filters.temperature > 0 && !shape.has_seed) {
    return "seed: expected a tensor, since temperature is above 0";
  }
  const bool keeps_all = filters.top_k == 0 || static_cast<uint64_t>(filters.top_k) >= shape.vocab;
  if (!keeps_all) return "top_k: expected none, the AscendC operator does not filter";
  if (filters.top_p < 1) return "top_p: expected none, the AscendC operator does not filter";
  return nullptr;
}

// `all` of the statistics, or the one that `metric` is. Returns the number of cores to use.
inline uint32_t tile_confidence(const ConfidenceShape& shape, ConfidenceMetric metric, bool all,
                                double temperature, uint32_t cores, ConfidenceTiling* tiling) {
  tiling->vocab = shape.vocab;
  tiling->logits_rows = static_cast<uint32_t>(shape.logits_rows);
  tiling->rows = static_cast<uint32_t>(shape.rows);
  tiling->tiles = static_cast<uint32_t>((shape.vocab + kConfidenceTile - 1) / kConfidenceTile);
  tiling->has_rows = shape.has_rows ? 1 : 0;
  tiling->metric = static_cast<uint32_t>(metric);
  tiling->second = all || metric == ConfidenceMetric::kMargin ? 1 : 0;
  tiling->weighted = all || metric == ConfidenceMetric::kNegEntropy ? 1 : 0;
  tiling->sampled = temperature > 0 ? 1 : 0;
  tiling->has_step = shape.has_step ? 1 : 0;
  // A normal float, so that times it zero stays zero and infinity infinite.
  const double smallest = static_cast<double>(std::numeric_limits<float>::min());
  double inverse = temperature > 0 ? 1.0 / temperature : 1.0;
  if (inverse < smallest) inverse = smallest;
  const double largest = static_cast<double>(std::numeric_limits<float>::max());
  tiling->inverse_temperature = static_cast<float>(inverse < largest ? inverse : largest);
  tiling->lse_scale = inverse < largest ? 1.0f : 0x1p100f;
  const double factor = inverse / static_cast<double>(tiling->lse_scale);
  tiling->lse_factor = static_cast<float>(factor < largest ? factor : largest);
  const uint64_t work = shape.rows * tiling->tiles;
  if (work == 0) return 1;
  return work < cores ? static_cast<uint32_t>(work) : cores;
}

inline uint64_t workspace_bytes(const ConfidenceTiling& tiling) {
  return uint64_t{tiling.rows} * tiling.tiles *
         (tiling.sampled ? kDrawPartialBytes : kPartialBytes);
}

}  // namespace lopa
