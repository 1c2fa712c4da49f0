// Elementwise vector instructions.
#pragma once

#include "emulator/lanes.h"

namespace ascend_emulator {

template <typename T, typename F>
void unary(const char* api, const AscendC::LocalTensor<T>& dst, const AscendC::LocalTensor<T>& src,
           int64_t count, F f) {
  check_count(api, count);
  check_overlap(api, dst.place(), count * sizeof(T), src.place(), count * sizeof(T));
  const T* x = source(api, "src", src, count);
  T* y = destination(api, dst, count);
  for (int64_t i = 0; i < count; ++i) y[i] = f(x[i]);
  count_instruction(repeats_of(count * sizeof(T)));
}

template <typename T, typename F>
void unary(const char* api, const AscendC::LocalTensor<T>& dst, const AscendC::LocalTensor<T>& src,
           const LaneMask& mask, int repeats, const AscendC::UnaryRepeatParams& p, F f) {
  const Repeats shape{mask, static_cast<int>(kRepeat / sizeof(T)), repeats};
  const Strides from{p.srcBlkStride, p.srcRepStride}, to{p.dstBlkStride, p.dstRepStride};
  const uint8_t* x = source(api, "src", src, shape, from);
  uint8_t* y = destination(api, dst, shape, to);
  for (int r = 0; r < shape.count; ++r) {
    for (int i = 0; i < shape.lanes; ++i) {
      if (!mask[i]) continue;
      store<T>(y + lane_offset<T>(r, i, to), f(load<T>(x + lane_offset<T>(r, i, from))));
    }
  }
  count_instruction(repeats);
}

template <typename T, typename F>
void binary(const char* api, const AscendC::LocalTensor<T>& dst,
            const AscendC::LocalTensor<T>& src0, const AscendC::LocalTensor<T>& src1, int64_t count,
            F f) {
  check_count(api, count);
  check_overlap(api, dst.place(), count * sizeof(T), src0.place(), count * sizeof(T));
  check_overlap(api, dst.place(), count * sizeof(T), src1.place(), count * sizeof(T));
  const T* a = source(api, "src0", src0, count);
  const T* b = source(api, "src1", src1, count);
  T* y = destination(api, dst, count);
  for (int64_t i = 0; i < count; ++i) y[i] = f(a[i], b[i], y[i]);
  count_instruction(repeats_of(count * sizeof(T)));
}

template <typename T, typename F>
void binary(const char* api, const AscendC::LocalTensor<T>& dst,
            const AscendC::LocalTensor<T>& src0, const AscendC::LocalTensor<T>& src1,
            const LaneMask& mask, int repeats, const AscendC::BinaryRepeatParams& p, F f) {
  const Repeats shape{mask, static_cast<int>(kRepeat / sizeof(T)), repeats};
  const Strides from0{p.src0BlkStride, p.src0RepStride}, from1{p.src1BlkStride, p.src1RepStride},
      to{p.dstBlkStride, p.dstRepStride};
  const uint8_t* a = source(api, "src0", src0, shape, from0);
  const uint8_t* b = source(api, "src1", src1, shape, from1);
  uint8_t* y = destination(api, dst, shape, to);
  for (int r = 0; r < shape.count; ++r) {
    for (int i = 0; i < shape.lanes; ++i) {
      if (!mask[i]) continue;
      uint8_t* out = y + lane_offset<T>(r, i, to);
      store<T>(out, f(load<T>(a + lane_offset<T>(r, i, from0)),
                      load<T>(b + lane_offset<T>(r, i, from1)), load<T>(out)));
    }
  }
  count_instruction(repeats);
}

template <typename T>
constexpr uint64_t kLanes = kRepeat / sizeof(T);

// The hardware does not say what comparisons make of NaN: here a NaN stays one.
template <typename T>
T larger(T a, T b) {
  if constexpr (std::is_integral<T>::value) {
    return a > b ? a : b;
  } else {
    const float x = a, y = b;
    return std::isnan(x) || x > y ? a : b;
  }
}
template <typename T>
T smaller(T a, T b) {
  if constexpr (std::is_integral<T>::value) {
    return a < b ? a : b;
  } else {
    const float x = a, y = b;
    return std::isnan(x) || x < y ? a : b;
  }
}

// Of what is not positive the result is unknown (Sqrt, constraints).
inline float root(float x) {
  if (x <= 0) fail("domain", "Sqrt: %g is not positive", x);
  return std::sqrt(x);
}

}  // namespace ascend_emulator

#define ASCEND_EMULATOR_UNARY(Name, expression, ...)                                              \
  template <typename T>                                                                           \
  void Name(const LocalTensor<T>& dst, const LocalTensor<T>& src, const int32_t& count) {         \
    static_assert(ascend_emulator::one_of<T, __VA_ARGS__>(), #Name ": this type");                \
    ascend_emulator::unary(#Name, dst, src, count, [](T x) -> T { return expression; });          \
  }                                                                                               \
  template <typename T, bool isSetMask = true>                                                    \
  void Name(const LocalTensor<T>& dst, const LocalTensor<T>& src, uint64_t mask,                  \
            const ascend_emulator::Exactly<uint8_t> repeatTime,                                   \
            const UnaryRepeatParams& repeatParams) {                                              \
    static_assert(ascend_emulator::one_of<T, __VA_ARGS__>() && isSetMask, #Name ": this type");   \
    ascend_emulator::unary(#Name, dst, src,                                                       \
                           ascend_emulator::prefix_mask(#Name, mask, ascend_emulator::kLanes<T>), \
                           repeatTime, repeatParams, [](T x) -> T { return expression; });        \
  }                                                                                               \
  template <typename T, bool isSetMask = true>                                                    \
  void Name(const LocalTensor<T>& dst, const LocalTensor<T>& src, uint64_t mask[],                \
            const ascend_emulator::Exactly<uint8_t> repeatTime,                                   \
            const UnaryRepeatParams& repeatParams) {                                              \
    static_assert(ascend_emulator::one_of<T, __VA_ARGS__>() && isSetMask, #Name ": this type");   \
    ascend_emulator::unary(#Name, dst, src,                                                       \
                           ascend_emulator::bit_mask(#Name, mask, ascend_emulator::kLanes<T>),    \
                           repeatTime, repeatParams, [](T x) -> T { return expression; });        \
  }

#define ASCEND_EMULATOR_BINARY(Name, expression, ...)                                              \
  template <typename T>                                                                            \
  void Name(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1,     \
            const int32_t& count) {                                                                \
    static_assert(ascend_emulator::one_of<T, __VA_ARGS__>(), #Name ": this type");                 \
    ascend_emulator::binary(#Name, dst, src0, src1, count,                                         \
                            [](T a, T b, T) -> T { return expression; });                          \
  }                                                                                                \
  template <typename T, bool isSetMask = true>                                                     \
  void Name(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1,     \
            uint64_t mask, const ascend_emulator::Exactly<uint8_t> repeatTime,                     \
            const BinaryRepeatParams& repeatParams) {                                              \
    static_assert(ascend_emulator::one_of<T, __VA_ARGS__>() && isSetMask, #Name ": this type");    \
    ascend_emulator::binary(#Name, dst, src0, src1,                                                \
                            ascend_emulator::prefix_mask(#Name, mask, ascend_emulator::kLanes<T>), \
                            repeatTime, repeatParams,                                              \
                            [](T a, T b, T) -> T { return expression; });                          \
  }                                                                                                \
  template <typename T, bool isSetMask = true>                                                     \
  void Name(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1,     \
            uint64_t mask[], const ascend_emulator::Exactly<uint8_t> repeatTime,                   \
            const BinaryRepeatParams& repeatParams) {                                              \
    static_assert(ascend_emulator::one_of<T, __VA_ARGS__>() && isSetMask, #Name ": this type");    \
    ascend_emulator::binary(#Name, dst, src0, src1,                                                \
                            ascend_emulator::bit_mask(#Name, mask, ascend_emulator::kLanes<T>),    \
                            repeatTime, repeatParams,                                              \
                            [](T a, T b, T) -> T { return expression; });                          \
  }

#define ASCEND_EMULATOR_SCALAR(Name, expression, ...)                                             \
  template <typename T, bool isSetMask = true>                                                    \
  void Name(const LocalTensor<T>& dst, const LocalTensor<T>& src, const T& scalarValue,           \
            const int32_t& count) {                                                               \
    static_assert(ascend_emulator::one_of<T, __VA_ARGS__>() && isSetMask, #Name ": this type");   \
    const T s = scalarValue;                                                                      \
    ascend_emulator::unary(#Name, dst, src, count, [s](T x) -> T { return expression; });         \
  }                                                                                               \
  template <typename T, bool isSetMask = true>                                                    \
  void Name(const LocalTensor<T>& dst, const LocalTensor<T>& src, const T& scalarValue,           \
            uint64_t mask, const ascend_emulator::Exactly<uint8_t> repeatTime,                    \
            const UnaryRepeatParams& repeatParams) {                                              \
    static_assert(ascend_emulator::one_of<T, __VA_ARGS__>() && isSetMask, #Name ": this type");   \
    const T s = scalarValue;                                                                      \
    ascend_emulator::unary(#Name, dst, src,                                                       \
                           ascend_emulator::prefix_mask(#Name, mask, ascend_emulator::kLanes<T>), \
                           repeatTime, repeatParams, [s](T x) -> T { return expression; });       \
  }

namespace AscendC {

ASCEND_EMULATOR_UNARY(Exp, T(std::exp(float(x))), half, float)
ASCEND_EMULATOR_UNARY(Ln, T(std::log(float(x))), half, float)
ASCEND_EMULATOR_UNARY(Abs, T(std::fabs(float(x))), half, float)
ASCEND_EMULATOR_UNARY(Reciprocal, T(1.0f / float(x)), half, float)
ASCEND_EMULATOR_UNARY(Sqrt, T(ascend_emulator::root(float(x))), half, float)
ASCEND_EMULATOR_UNARY(Not, T(~x), int16_t, uint16_t)

ASCEND_EMULATOR_BINARY(Add, T(a + b), half, float, int16_t, int32_t)
ASCEND_EMULATOR_BINARY(Sub, T(a - b), half, float, int16_t, int32_t)
ASCEND_EMULATOR_BINARY(Mul, T(a* b), half, float, int16_t, int32_t)
ASCEND_EMULATOR_BINARY(Div, T(float(a) / float(b)), half, float)
ASCEND_EMULATOR_BINARY(Max, ascend_emulator::larger(a, b), half, float, int16_t, int32_t)
ASCEND_EMULATOR_BINARY(Min, ascend_emulator::smaller(a, b), half, float, int16_t, int32_t)
ASCEND_EMULATOR_BINARY(And, T(a& b), int16_t, uint16_t)
ASCEND_EMULATOR_BINARY(Or, T(a | b), int16_t, uint16_t)

ASCEND_EMULATOR_SCALAR(Adds, T(x + s), half, float, int16_t, int32_t)
ASCEND_EMULATOR_SCALAR(Muls, T(x* s), half, float, int16_t, int32_t)
ASCEND_EMULATOR_SCALAR(Maxs, ascend_emulator::larger(x, s), half, float, int16_t, int32_t)
ASCEND_EMULATOR_SCALAR(Mins, ascend_emulator::smaller(x, s), half, float, int16_t, int32_t)

template <typename T>
void Duplicate(const LocalTensor<T>& dst, const T& scalarValue, const int32_t& count) {
  using namespace ascend_emulator;
  static_assert(one_of<T, half, bfloat16_t, float, int16_t, uint16_t, int32_t, uint32_t>(),
                "Duplicate: this type");
  check_count("Duplicate", count);
  std::fill_n(destination("Duplicate", dst, count), count, scalarValue);
  count_instruction(repeats_of(uint64_t(count) * sizeof(T)));
}

template <typename T>
void DuplicateRepeats(const LocalTensor<T>& dst, const T& value,
                      const ascend_emulator::LaneMask& mask, int repeats,
                      const ascend_emulator::Strides& to) {
  using namespace ascend_emulator;
  static_assert(one_of<T, half, bfloat16_t, float, int16_t, uint16_t, int32_t, uint32_t>(),
                "Duplicate: this type");
  const Repeats shape{mask, static_cast<int>(kLanes<T>), repeats};
  uint8_t* y = destination("Duplicate", dst, shape, to);
  each_run<T>(shape, to, [&](uint64_t offset, uint64_t bytes) {
    for (uint64_t at = 0; at < bytes; at += sizeof(T)) store<T>(y + offset + at, value);
  });
  count_instruction(repeats);
}

template <typename T, bool isSetMask = true>
void Duplicate(const LocalTensor<T>& dst, const T& scalarValue, uint64_t mask,
               const ascend_emulator::Exactly<uint8_t> repeatTime,
               const ascend_emulator::Exactly<uint16_t> dstBlockStride,
               const ascend_emulator::Exactly<uint8_t> dstRepeatStride) {
  static_assert(isSetMask, "Duplicate: a mask set outside is not emulated");
  DuplicateRepeats(dst, scalarValue,
                   ascend_emulator::prefix_mask("Duplicate", mask, ascend_emulator::kLanes<T>),
                   repeatTime, {dstBlockStride, dstRepeatStride});
}

template <typename T, bool isSetMask = true>
void Duplicate(const LocalTensor<T>& dst, const T& scalarValue, uint64_t mask[],
               const ascend_emulator::Exactly<uint8_t> repeatTime,
               const ascend_emulator::Exactly<uint16_t> dstBlockStride,
               const ascend_emulator::Exactly<uint8_t> dstRepeatStride) {
  static_assert(isSetMask, "Duplicate: a mask set outside is not emulated");
  DuplicateRepeats(dst, scalarValue,
                   ascend_emulator::bit_mask("Duplicate", mask, ascend_emulator::kLanes<T>),
                   repeatTime, {dstBlockStride, dstRepeatStride});
}

// firstValue, firstValue + 1, ...
template <typename T>
void CreateVecIndex(LocalTensor<T> dst, const T& firstValue, uint32_t count) {
  using namespace ascend_emulator;
  static_assert(one_of<T, half, float, int16_t, int32_t>(), "CreateVecIndex: this type");
  check_count("CreateVecIndex", count);
  T* y = destination("CreateVecIndex", dst, count);
  for (uint32_t i = 0; i < count; ++i) y[i] = T(firstValue + T(i));
  count_instruction(repeats_of(uint64_t{count} * sizeof(T)));
}

struct BrcbRepeatParams {
  BrcbRepeatParams() = default;
  BrcbRepeatParams(ascend_emulator::Exactly<uint16_t> dstBlkStrideIn,
                   ascend_emulator::Exactly<uint16_t> dstRepStrideIn)
      : dstBlkStride(dstBlkStrideIn), dstRepStride(dstRepStrideIn) {}
  uint16_t dstBlkStride = 1;
  uint16_t dstRepStride = 8;
};

// Each repeat spreads eight elements over a data block each.
template <typename T>
void Brcb(const LocalTensor<T>& dst, const LocalTensor<T>& src,
          const ascend_emulator::Exactly<uint8_t> repeatTime,
          const BrcbRepeatParams& repeatParams) {
  using namespace ascend_emulator;
  static_assert(sizeof(T) == 2 || sizeof(T) == 4, "Brcb: this type");
  constexpr int kPerBlock = kBlock / sizeof(T);
  const uint64_t count = uint64_t{8} * repeatTime;
  check_count("Brcb", static_cast<int64_t>(count));
  if (repeatParams.dstBlkStride == 0) fail("repeat", "Brcb: dstBlkStride is 0");
  const T* x = source("Brcb", "src", src, count);
  const Place &from = src.place(), &into = dst.place();
  const uint64_t bytes = kBlock * (uint64_t{repeatParams.dstRepStride} * (repeatTime - 1) +
                                   7 * repeatParams.dstBlkStride + 1);
  if (from.address < into.address + bytes && into.address < from.address + count * sizeof(T)) {
    fail("overlap", "Brcb: dst and src share memory");
  }
  std::vector<T> values(x, x + count);
  const Repeats shape{prefix_mask("Brcb", 8 * kPerBlock, kLanes<T>), 8 * kPerBlock, repeatTime};
  const Strides to{repeatParams.dstBlkStride, repeatParams.dstRepStride};
  uint8_t* y = destination("Brcb", dst, shape, to);
  for (int r = 0; r < repeatTime; ++r) {
    for (int i = 0; i < 8 * kPerBlock; ++i) {
      store<T>(y + lane_offset<T>(r, i, to), values[8 * r + i / kPerBlock]);
    }
  }
  count_instruction(repeatTime);
}

}  // namespace AscendC
