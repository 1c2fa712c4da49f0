// Between CANN's tiling context and the arithmetic of a room's *_tiling.h.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>

#include "exe_graph/runtime/tiling_context.h"
#include "register/op_impl_registry.h"
#include "tiling/platform/platform_ascendc.h"

namespace optiling {

// Unified buffer of architecture 2201, less what the toolchain and its library calls keep.
constexpr uint64_t kUsableUb = 192 * 1024 - 256 - 8192;

struct Cores {
  uint32_t count;
  uint64_t ubBytes;
};

inline Cores vectorCores(gert::TilingContext* context) {
  platform_ascendc::PlatformAscendC platform(context->GetPlatformInfo());
  uint64_t bytes = 0;
  platform.GetCoreMemSize(platform_ascendc::CoreMemType::UB, bytes);
  return {platform.GetCoreNumAiv(), bytes < kUsableUb ? bytes : kUsableUb};
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

// A kernel with SyncAll, for which all its cores have to run at once, and a workspace of its own.
inline ge::graphStatus launchTogether(gert::TilingContext* context, uint32_t cores,
                                      uint64_t workspace) {
  platform_ascendc::PlatformAscendC platform(context->GetPlatformInfo());
  context->SetBlockDim(cores);
  context->SetScheduleMode(1);
  context->GetWorkspaceSizes(1)[0] = platform.GetLibApiWorkSpaceSize() + workspace;
  return ge::GRAPH_SUCCESS;
}

// The shape of an input of the definition; null where an optional one is absent.
inline const gert::Shape* shapeOf(gert::TilingContext* context, size_t input) {
  const gert::StorageShape* shape = context->GetOptionalInputShape(input);
  return shape == nullptr ? nullptr : &shape->GetStorageShape();
}

inline bool hasShape(const gert::Shape* shape, std::initializer_list<int64_t> expected) {
  if (shape == nullptr || shape->GetDimNum() != expected.size()) return false;
  size_t d = 0;
  for (int64_t size : expected) {
    if (shape->GetDim(d++) != size) return false;
  }
  return true;
}

// Attributes in the order of the definition.
class Attributes {
 public:
  explicit Attributes(gert::TilingContext* context) : attributes_(context->GetAttrs()) {}

  int64_t number(size_t i) const { return *attributes_->GetInt(i); }
  float real(size_t i) const { return *attributes_->GetFloat(i); }
  bool flag(size_t i) const { return *attributes_->GetBool(i); }
  bool is(size_t i, const char* text) const {
    return std::strcmp(attributes_->GetStr(i), text) == 0;
  }

  // Of an integer that holds the 64 bits of a double.
  double wide(size_t i) const {
    const int64_t bits = number(i);
    double value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }

 private:
  const gert::RuntimeAttrs* attributes_;
};

}  // namespace optiling
