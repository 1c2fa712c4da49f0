// Reads shapes and attributes for confidence_tiling.h's arithmetic.
#include "confidence_tiling.h"

#include "../../common/tiling_context.h"

namespace optiling {
namespace {

uint64_t elements(const gert::Shape& shape, size_t dims) {
  uint64_t count = 1;
  for (size_t d = 0; d < dims; ++d) count *= static_cast<uint64_t>(shape.GetDim(d));
  return count;
}

// `sampling` is the number of the attribute temperature_bits.
ge::graphStatus tile(gert::TilingContext* context, lopa::ConfidenceMetric metric, bool all,
                     size_t sampling) {
  const gert::Shape* logits = shapeOf(context, 0);
  const gert::Shape* rows = shapeOf(context, 1);
  auto* data = context->GetTilingData<lopa::ConfidenceTiling>();
  if (logits == nullptr || data == nullptr || logits->GetDimNum() == 0) {
    return refuse(context, "logits: expected [..., V]");
  }
  const size_t leading = logits->GetDimNum() - 1;
  lopa::ConfidenceShape shape{};
  shape.vocab = static_cast<uint64_t>(logits->GetDim(leading));
  shape.logits_rows = elements(*logits, leading);
  shape.has_rows = rows != nullptr;
  shape.has_seed = shapeOf(context, 2) != nullptr;
  shape.has_step = shapeOf(context, 3) != nullptr;
  shape.rows = rows != nullptr ? elements(*rows, rows->GetDimNum()) : shape.logits_rows;
  const Attributes attributes(context);
  const lopa::ConfidenceFilters filters{attributes.wide(sampling), attributes.number(sampling + 1),
                                        attributes.wide(sampling + 2)};
  if (const char* reason = lopa::refusal(shape, filters)) return refuse(context, reason);
  const uint32_t cores = lopa::tile_confidence(shape, metric, all, filters.temperature,
                                               vectorCores(context).count, data);
  return launchTogether(context, cores, lopa::workspace_bytes(*data));
}

ge::graphStatus confidence(gert::TilingContext* context) {
  const Attributes attributes(context);
  lopa::ConfidenceMetric metric = lopa::ConfidenceMetric::kProb;
  if (attributes.is(0, "margin")) {
    metric = lopa::ConfidenceMetric::kMargin;
  } else if (attributes.is(0, "neg_entropy")) {
    metric = lopa::ConfidenceMetric::kNegEntropy;
  } else if (!attributes.is(0, "prob")) {
    return refuse(context, "metric: expected prob, margin or neg_entropy");
  }
  return tile(context, metric, false, 1);
}

ge::graphStatus stats(gert::TilingContext* context) {
  return tile(context, lopa::ConfidenceMetric::kProb, true, 0);
}

}  // namespace

IMPL_OP_OPTILING(LopaTokenConfidence).Tiling(confidence);
IMPL_OP_OPTILING(LopaSoftmaxStats).Tiling(stats);

}  // namespace optiling
