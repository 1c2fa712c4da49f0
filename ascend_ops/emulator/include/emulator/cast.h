// Cast between types, with the rounding modes that each pair has.
#pragma once

#include "emulator/vector.h"

namespace ascend_emulator {

inline float round_to_integer(float x, AscendC::RoundMode mode) {
  switch (mode) {
    case AscendC::RoundMode::CAST_RINT:
      return std::nearbyint(x);
    case AscendC::RoundMode::CAST_FLOOR:
      return std::floor(x);
    case AscendC::RoundMode::CAST_CEIL:
      return std::ceil(x);
    case AscendC::RoundMode::CAST_ROUND:
      return std::round(x);
    case AscendC::RoundMode::CAST_TRUNC:
      return std::trunc(x);
    default:
      fail("unsupported", "Cast: RoundMode %d from float to an integer", static_cast<int>(mode));
  }
}

template <typename To, typename From>
struct Caster;

// A conversion that loses nothing has no rounding.
inline void check_exact(AscendC::RoundMode mode) {
  if (mode != AscendC::RoundMode::CAST_NONE) {
    fail("unsupported", "Cast: RoundMode %d where nothing is rounded", static_cast<int>(mode));
  }
}
inline void check_nearest(AscendC::RoundMode mode, bool none) {
  const bool allowed =
      mode == AscendC::RoundMode::CAST_RINT || (none && mode == AscendC::RoundMode::CAST_NONE);
  if (!allowed) fail("unsupported", "Cast: RoundMode %d", static_cast<int>(mode));
}

template <>
struct Caster<float, half> {
  static void check(AscendC::RoundMode mode) { check_exact(mode); }
  static float apply(half x, AscendC::RoundMode) { return x; }
};
template <>
struct Caster<float, bfloat16_t> {
  static void check(AscendC::RoundMode mode) { check_exact(mode); }
  static float apply(bfloat16_t x, AscendC::RoundMode) { return bfloat16_to_float(x.bits); }
};
template <>
struct Caster<half, float> {
  static void check(AscendC::RoundMode mode) { check_nearest(mode, true); }
  static half apply(float x, AscendC::RoundMode) { return half(x); }
};
template <>
struct Caster<bfloat16_t, float> {
  static void check(AscendC::RoundMode mode) { check_nearest(mode, false); }
  static bfloat16_t apply(float x, AscendC::RoundMode) { return bfloat16_t(x); }
};
template <>
struct Caster<int32_t, float> {
  static void check(AscendC::RoundMode mode) { round_to_integer(0.0f, mode); }
  static int32_t apply(float x, AscendC::RoundMode mode) {
    const float rounded = round_to_integer(x, mode);
    if (std::isnan(rounded)) return 0;
    if (rounded >= 0x1p31f) return INT32_MAX;
    return rounded < -0x1p31f ? INT32_MIN : static_cast<int32_t>(rounded);
  }
};
template <>
struct Caster<float, int32_t> {
  static void check(AscendC::RoundMode mode) { check_nearest(mode, true); }
  static float apply(int32_t x, AscendC::RoundMode) { return static_cast<float>(x); }
};
template <>
struct Caster<int64_t, int32_t> {
  static void check(AscendC::RoundMode mode) { check_exact(mode); }
  static int64_t apply(int32_t x, AscendC::RoundMode) { return x; }
};
template <>
struct Caster<int32_t, int64_t> {
  static void check(AscendC::RoundMode mode) { check_exact(mode); }
  static int32_t apply(int64_t x, AscendC::RoundMode) {
    return static_cast<int32_t>(std::clamp<int64_t>(x, INT32_MIN, INT32_MAX));
  }
};

}  // namespace ascend_emulator

namespace AscendC {

template <typename T, typename U>
void Cast(const LocalTensor<T>& dst, const LocalTensor<U>& src, const RoundMode& roundMode,
          const uint32_t count) {
  using namespace ascend_emulator;
  check_count("Cast", count);
  Caster<T, U>::check(roundMode);
  check_overlap("Cast", dst.place(), uint64_t{count} * sizeof(T), src.place(),
                uint64_t{count} * sizeof(U));
  const U* x = source("Cast", "src", src, count);
  T* y = destination("Cast", dst, count);
  for (uint32_t i = 0; i < count; ++i) y[i] = Caster<T, U>::apply(x[i], roundMode);
  count_instruction(repeats_of(uint64_t{count} * std::max(sizeof(T), sizeof(U))));
}

template <typename T, typename U, bool isSetMask = true>
void Cast(const LocalTensor<T>& dst, const LocalTensor<U>& src, const RoundMode& roundMode,
          const uint64_t mask, const ascend_emulator::Exactly<uint8_t> repeatTime,
          const UnaryRepeatParams& p) {
  using namespace ascend_emulator;
  static_assert(isSetMask, "Cast: a mask set outside is not emulated");
  constexpr int kWidest = static_cast<int>(std::max(sizeof(T), sizeof(U)));
  Caster<T, U>::check(roundMode);
  const Repeats shape{prefix_mask("Cast", mask, kRepeat / kWidest),
                      static_cast<int>(kRepeat / kWidest), repeatTime};
  const Strides from{p.srcBlkStride, p.srcRepStride}, to{p.dstBlkStride, p.dstRepStride};
  const uint8_t* x = source("Cast", "src", src, shape, from);
  uint8_t* y = destination("Cast", dst, shape, to);
  for (int r = 0; r < shape.count; ++r) {
    for (int i = 0; i < shape.lanes; ++i) {
      if (!shape.mask[i]) continue;
      store<T>(y + lane_offset<T>(r, i, to),
               Caster<T, U>::apply(load<U>(x + lane_offset<U>(r, i, from)), roundMode));
    }
  }
  count_instruction(repeatTime);
}

}  // namespace AscendC
