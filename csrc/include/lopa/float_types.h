// The floating-point element types of the kernels, torch-free, for host and device code alike.
#pragma once

#include <cstdint>

namespace lopa {

enum class FloatType : int32_t { kBFloat16, kHalf, kFloat };

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

constexpr int64_t element_size(FloatType type) { return type == FloatType::kFloat ? 4 : 2; }

}  // namespace lopa
