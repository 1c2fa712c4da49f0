// What the KV-cache kernels share.
#pragma once

#include <cstdint>

namespace lopa {
namespace kv_cache {

constexpr unsigned kWholeWarp = 0xffffffffu;

// The status word of each sequence; null where the caller gave none.
struct StatusView {
  int32_t* data;
  int64_t stride;
};

__device__ __forceinline__ void report(const StatusView& status, int64_t b, int32_t fault) {
  if (status.data != nullptr && fault != 0) status.data[b * status.stride] |= fault;
}

}  // namespace kv_cache
}  // namespace lopa
