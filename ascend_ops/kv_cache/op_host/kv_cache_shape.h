// The shape of a call from CANN's tiling context.
#pragma once

#include "../../common/tiling_context.h"
#include "kv_cache_tiling.h"

namespace optiling {

// Of windows [layers, batch, branches, window, kv_heads, head_dim]; no cache and no queries.
inline lopa::KvCacheShape windowShape(gert::TilingContext* context, size_t input) {
  const gert::Shape& window = context->GetRequiredInputShape(input)->GetStorageShape();
  const auto dim = [&](size_t d) { return static_cast<uint64_t>(window.GetDim(d)); };
  const ge::DataType type = context->GetRequiredInputDesc(input)->GetDataType();
  const uint32_t elementBytes = type == ge::DT_FLOAT ? 4 : 2;
  return {dim(0), dim(1), dim(2), dim(3), 0, dim(4), 0, dim(5), elementBytes, false};
}

}  // namespace optiling
