// Reads shapes for kv_cache_tiling.h's arithmetic: Pre-Write.
#include "kv_cache_shape.h"

namespace optiling {
namespace {

// Numbers of the inputs in a definition (kv_prewrite_def.cpp).
struct Inputs {
  size_t kWindow;
  size_t qkv;  // or k
  size_t cosSin;
  size_t cacheLen;
  size_t kCache;  // kNone: not the single-phase form
  size_t q;       // kNone: k and v are not packed
  size_t qNorm;   // and k_norm after it
};

constexpr size_t kNone = SIZE_MAX;

ge::graphStatus tile(gert::TilingContext* context, const Inputs& inputs) {
  const gert::StorageShape* window = context->GetRequiredInputShape(inputs.kWindow);
  const gert::StorageShape* rows = context->GetRequiredInputShape(inputs.qkv);
  auto* data = context->GetTilingData<lopa::KvPrewriteTiling>();
  const int64_t* layer = context->GetAttrs()->GetInt(0);
  if (window == nullptr || rows == nullptr || data == nullptr || layer == nullptr) {
    return ge::GRAPH_FAILED;
  }
  lopa::KvCacheShape shape = windowShape(context, inputs.kWindow);
  if (inputs.kCache != kNone) {
    const gert::StorageShape* cache = context->GetRequiredInputShape(inputs.kCache);
    if (cache == nullptr) return ge::GRAPH_FAILED;
    shape.capacity = cache->GetStorageShape().GetDim(2);
  }
  const bool packed = inputs.q != kNone;
  if (packed) {
    const gert::StorageShape* q = context->GetRequiredInputShape(inputs.q);
    if (q == nullptr) return ge::GRAPH_FAILED;
    shape.qHeads = q->GetStorageShape().GetDim(3);
  }
  if (const char* reason = lopa::refusal(shape, packed)) return refuse(context, reason);
  if (*layer < 0 || static_cast<uint64_t>(*layer) >= shape.layers) {
    return refuse(context, "layer: not one of the window's layers");
  }
  const gert::StorageShape* cosSin = context->GetOptionalInputShape(inputs.cosSin);
  const bool hasCacheLen = context->GetOptionalInputShape(inputs.cacheLen) != nullptr;
  if (cosSin != nullptr && !hasCacheLen) {
    return refuse(context, "cache_len: expected a tensor, since cos_sin is given");
  }
  if (packed) {
    const gert::Shape* qNorm = shapeOf(context, inputs.qNorm);
    const gert::Shape* kNorm = shapeOf(context, inputs.qNorm + 1);
    if ((qNorm == nullptr) != (kNorm == nullptr)) {
      return refuse(context, "q_norm, k_norm: expected both or neither");
    }
    shape.normalises = qNorm != nullptr;
    const int64_t headDim = static_cast<int64_t>(shape.headDim);
    if (shape.normalises && (!hasShape(qNorm, {headDim}) || !hasShape(kNorm, {headDim}))) {
      return refuse(context, "q_norm, k_norm: expected [head_dim]");
    }
    constexpr size_t kNormEps = 1;
    const double eps = Attributes(context).wide(kNormEps);
    if (shape.normalises) {
      if (const char* reason = lopa::normRefusal(eps)) return refuse(context, reason);
      data->normEps = static_cast<float>(eps);
    }
  }
  const Cores cores = vectorCores(context);
  const uint32_t launched = lopa::tilePrewrite(shape, cores.count, cores.ubBytes, *data);
  data->layer = static_cast<uint32_t>(*layer);
  data->rotates = cosSin != nullptr ? 1 : 0;
  data->positions =
      cosSin != nullptr ? static_cast<uint32_t>(cosSin->GetStorageShape().GetDim(0)) : 0;
  data->hasCacheLen = hasCacheLen ? 1 : 0;
  return launch(context, launched);
}

ge::graphStatus prewrite(gert::TilingContext* context) {
  return tile(context, {0, 2, 4, 5, kNone, kNone, kNone});
}
ge::graphStatus prewriteDirect(gert::TilingContext* context) {
  return tile(context, {0, 4, 8, 6, 2, kNone, kNone});
}
ge::graphStatus packedPrewrite(gert::TilingContext* context) {
  return tile(context, {1, 3, 4, 5, kNone, 0, 6});
}
ge::graphStatus packedPrewriteDirect(gert::TilingContext* context) {
  return tile(context, {1, 5, 6, 7, 3, 0, 10});
}

}  // namespace

IMPL_OP_OPTILING(LopaKvPrewrite).Tiling(prewrite);
IMPL_OP_OPTILING(LopaKvPrewriteDirect).Tiling(prewriteDirect);
IMPL_OP_OPTILING(LopaQkvPrewrite).Tiling(packedPrewrite);
IMPL_OP_OPTILING(LopaQkvPrewriteDirect).Tiling(packedPrewriteDirect);

}  // namespace optiling
