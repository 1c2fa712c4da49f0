// Between CANN's tiling context and the arithmetic of kv_cache_tiling.h.
#pragma once

#include <cstdint>
#include <cstdio>

#include "exe_graph/runtime/tiling_context.h"
#include "kv_cache_tiling.h"
#include "register/op_impl_registry.h"
#include "tiling/platform/platform_ascendc.h"

namespace optiling {

struct Cores {
  uint32_t count;
  uint64_t ubBytes;
};

inline Cores vectorCores(gert::TilingContext* context) {
  platform_ascendc::PlatformAscendC platform(context->GetPlatformInfo());
  uint64_t bytes = 0;
  platform.GetCoreMemSize(platform_ascendc::CoreMemType::UB, bytes);
  if (bytes > lopa::kUsableUbBytes) bytes = lopa::kUsableUbBytes;
  return {platform.GetCoreNumAiv(), bytes};
}

// Of windows [layers, batch, branches, window, kv_heads, head_dim]; no cache and no queries.
inline lopa::KvCacheShape windowShape(gert::TilingContext* context, size_t input) {
  const gert::Shape& window = context->GetRequiredInputShape(input)->GetStorageShape();
  const auto dim = [&](size_t d) { return static_cast<uint64_t>(window.GetDim(d)); };
  const ge::DataType type = context->GetRequiredInputDesc(input)->GetDataType();
  return {dim(0), dim(1), dim(2), dim(3), 0, dim(4), 0, dim(5), type == ge::DT_FLOAT ? 4u : 2u};
}

inline ge::graphStatus refuse(gert::TilingContext* context, const char* reason) {
  std::fprintf(stderr, "%s: %s\n", context->GetNodeName(), reason);
  return ge::GRAPH_FAILED;
}

inline ge::graphStatus launch(gert::TilingContext* context, uint32_t cores) {
  context->SetBlockDim(cores);
  context->GetWorkspaceSizes(1)[0] = 0;
  return ge::GRAPH_SUCCESS;
}

}  // namespace optiling
