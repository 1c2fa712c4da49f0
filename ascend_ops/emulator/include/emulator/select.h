// Comparisons to bit masks, and selection by them.
#pragma once

#include "emulator/vector.h"

namespace ascend_emulator {

inline bool compare(float a, float b, AscendC::CMPMODE mode) {
  switch (mode) {
    case AscendC::CMPMODE::LT:
      return a < b;
    case AscendC::CMPMODE::GT:
      return a > b;
    case AscendC::CMPMODE::EQ:
      return a == b;
    case AscendC::CMPMODE::LE:
      return a <= b;
    case AscendC::CMPMODE::GE:
      return a >= b;
    case AscendC::CMPMODE::NE:
      return a != b;
  }
  fail("unsupported", "Compare: CMPMODE %d", static_cast<int>(mode));
}

template <typename T, typename Second>
void compare_bits(const char* api, const AscendC::LocalTensor<uint8_t>& dst, const T* a,
                  Second second, AscendC::CMPMODE mode, uint64_t count) {
  uint8_t* bits = destination(api, dst, count / 8);
  for (uint64_t i = 0; i < count; i += 8) {
    unsigned byte = 0;
    for (uint64_t j = 0; j < 8; ++j) {
      byte |= unsigned{compare(float(a[i + j]), float(second(i + j)), mode)} << j;
    }
    bits[i / 8] = static_cast<uint8_t>(byte);
  }
  count_instruction(repeats_of(count * sizeof(T)));
}

template <typename T>
void check_compare(const char* api, uint64_t count) {
  check_count(api, static_cast<int64_t>(count));
  if (count * sizeof(T) % kRepeat != 0) {
    fail("alignment", "%s: %llu elements are no multiple of 256 bytes", api,
         static_cast<unsigned long long>(count));
  }
}

template <typename T, typename U, typename Second>
void select(const AscendC::LocalTensor<T>& dst, const AscendC::LocalTensor<U>& mask, const T* a,
            Second second, uint64_t count) {
  const uint8_t* bits = reinterpret_cast<const uint8_t*>(
      source("Select", "selMask", mask, (count + 8 * sizeof(U) - 1) / (8 * sizeof(U))));
  T* y = destination("Select", dst, count);
  for (uint64_t i = 0; i < count; ++i) y[i] = bits[i / 8] >> (i % 8) & 1 ? a[i] : second(i);
  count_instruction(repeats_of(count * sizeof(T)));
}

}  // namespace ascend_emulator

namespace AscendC {

template <typename T, typename U>
void Compare(const LocalTensor<U>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1,
             CMPMODE cmpMode, uint32_t count) {
  using namespace ascend_emulator;
  static_assert(one_of<T, half, float>() && one_of<U, uint8_t>(), "Compare: these types");
  check_compare<T>("Compare", count);
  const T* a = source("Compare", "src0", src0, count);
  const T* b = source("Compare", "src1", src1, count);
  compare_bits("Compare", dst, a, [b](uint64_t i) { return b[i]; }, cmpMode, count);
}

template <typename T, typename U>
void Compares(const LocalTensor<U>& dst, const LocalTensor<T>& src0, const T src1Scalar,
              CMPMODE cmpMode, uint32_t count) {
  using namespace ascend_emulator;
  static_assert(one_of<T, half, float>() && one_of<U, uint8_t>(), "Compares: these types");
  check_compare<T>("Compares", count);
  const T* a = source("Compares", "src0", src0, count);
  compare_bits("Compares", dst, a, [=](uint64_t) { return src1Scalar; }, cmpMode, count);
}

template <typename T, typename U>
void Select(const LocalTensor<T>& dst, const LocalTensor<U>& selMask, const LocalTensor<T>& src0,
            const LocalTensor<T>& src1, SELMODE selMode, uint32_t count) {
  using namespace ascend_emulator;
  static_assert(one_of<T, half, float>(), "Select: this type");
  check_count("Select", count);
  if (selMode != SELMODE::VSEL_TENSOR_TENSOR_MODE) {
    fail("unsupported", "Select: SELMODE %d with two tensors", static_cast<int>(selMode));
  }
  const uint64_t bytes = uint64_t{count} * sizeof(T);
  check_overlap("Select", dst.place(), bytes, src0.place(), bytes);
  check_overlap("Select", dst.place(), bytes, src1.place(), bytes);
  const T* a = source("Select", "src0", src0, count);
  const T* b = source("Select", "src1", src1, count);
  select(dst, selMask, a, [b](uint64_t i) { return b[i]; }, count);
}

template <typename T, typename U>
void Select(const LocalTensor<T>& dst, const LocalTensor<U>& selMask, const LocalTensor<T>& src0,
            T src1, SELMODE selMode, uint32_t count) {
  using namespace ascend_emulator;
  static_assert(one_of<T, half, float>(), "Select: this type");
  check_count("Select", count);
  if (selMode != SELMODE::VSEL_TENSOR_SCALAR_MODE) {
    fail("unsupported", "Select: SELMODE %d with a scalar", static_cast<int>(selMode));
  }
  const uint64_t bytes = uint64_t{count} * sizeof(T);
  check_overlap("Select", dst.place(), bytes, src0.place(), bytes);
  const T* a = source("Select", "src0", src0, count);
  select(dst, selMask, a, [=](uint64_t) { return src1; }, count);
}

}  // namespace AscendC
