// Bits of the status word of a sequence; lopa_kernels/status.py documents them.
#pragma once

#include <cstdint>

namespace lopa {

enum Status : int32_t {
  kNonfinite = 1,
  kWindowFull = 2,
  kBadState = 4,
  kMissingRow = 8,
  kCacheFull = 16,
  kStalled = 32,
};

}  // namespace lopa
