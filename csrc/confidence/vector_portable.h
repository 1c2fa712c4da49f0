// Sixteen lanes in four 128-bit vectors of the compiler's vector extension: what every processor
// runs. `min` and `max` return their second operand where either is NaN, as x86 does; the kernels
// rely on it to ignore NaN.
#pragma once

#include <cstdint>
#include <cstring>

#include "lopa/float_types.h"

namespace lopa {
namespace confidence {
namespace {

typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));
typedef uint32_t Uint4 __attribute__((vector_size(16)));
typedef uint16_t Ushort4 __attribute__((vector_size(8)));

struct F16 {
  Float4 q[4];
};
struct U16 {
  Uint4 q[4];
};
struct Mask {
  Int4 q[4];
};

template <typename R, typename Function>
inline R quarters(Function function) {
  R r;
  for (int i = 0; i < 4; ++i) r.q[i] = function(i);
  return r;
}

template <typename To, typename From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// Whether `fma` rounds once.
constexpr bool kFusedMultiplyAdd = false;

inline F16 load(const float* p) {
  F16 r;
  std::memcpy(&r, p, sizeof(r));
  return r;
}
inline U16 load(const uint32_t* p) {
  U16 r;
  std::memcpy(&r, p, sizeof(r));
  return r;
}
inline void store(float* p, F16 a) { std::memcpy(p, &a, sizeof(a)); }
inline void store(uint32_t* p, U16 a) { std::memcpy(p, &a, sizeof(a)); }
inline F16 splat(float a) {
  return quarters<F16>([=](int) { return Float4{a, a, a, a}; });
}
inline F16 add(F16 a, F16 b) {
  return quarters<F16>([&](int i) { return a.q[i] + b.q[i]; });
}
inline F16 sub(F16 a, F16 b) {
  return quarters<F16>([&](int i) { return a.q[i] - b.q[i]; });
}
inline F16 mul(F16 a, F16 b) {
  return quarters<F16>([&](int i) { return a.q[i] * b.q[i]; });
}
// Two roundings: a fused one would be a library call where the processor has none.
inline F16 fma(F16 a, F16 b, F16 c) {
  return quarters<F16>([&](int i) { return a.q[i] * b.q[i] + c.q[i]; });
}
inline F16 min(F16 a, F16 b) {
  return quarters<F16>([&](int i) { return a.q[i] < b.q[i] ? a.q[i] : b.q[i]; });
}
inline F16 max(F16 a, F16 b) {
  return quarters<F16>([&](int i) { return a.q[i] > b.q[i] ? a.q[i] : b.q[i]; });
}

inline Mask no_lanes() {
  return quarters<Mask>([](int) { return Int4{0, 0, 0, 0}; });
}
inline Mask either(Mask a, Mask b) {
  return quarters<Mask>([&](int i) { return a.q[i] | b.q[i]; });
}
inline bool any(Mask a) {
  Int4 all = (a.q[0] | a.q[1]) | (a.q[2] | a.q[3]);
  return (all[0] | all[1] | all[2] | all[3]) != 0;
}
inline uint32_t bits(Mask a) {
  uint32_t r = 0;
  for (int i = 0; i < 16; ++i) r |= static_cast<uint32_t>(a.q[i / 4][i % 4] != 0) << i;
  return r;
}
inline Mask unordered(F16 a, F16 b) {
  return quarters<Mask>([&](int i) { return (a.q[i] != a.q[i]) | (b.q[i] != b.q[i]); });
}
inline Mask equal(F16 a, F16 b) {
  return quarters<Mask>([&](int i) { return a.q[i] == b.q[i]; });
}
inline Mask greater(F16 a, F16 b) {
  return quarters<Mask>([&](int i) { return a.q[i] > b.q[i]; });
}
inline Mask less_equal(F16 a, F16 b) {
  return quarters<Mask>([&](int i) { return a.q[i] <= b.q[i]; });
}
inline Mask equal(U16 a, U16 b) {
  return quarters<Mask>([&](int i) { return bit_cast<Int4>(a.q[i] == b.q[i]); });
}
inline F16 keep(Mask mask, F16 a) {
  return quarters<F16>([&](int i) { return bit_cast<Float4>(bit_cast<Int4>(a.q[i]) & mask.q[i]); });
}

// Adding and subtracting 1.5 * 2^23 rounds to the nearest integer, for |a| < 2^22.
inline F16 round(F16 a) {
  const float magic = 12582912.0f;
  return quarters<F16>([&](int i) { return (a.q[i] + magic) - magic; });
}
inline F16 scale_by_power(F16 a, F16 n) {
  return quarters<F16>([&](int i) {
    Int4 exponent = __builtin_convertvector(n.q[i], Int4) << 23;
    return bit_cast<Float4>(bit_cast<Int4>(a.q[i]) + exponent);
  });
}

inline U16 splat(uint32_t a) {
  return quarters<U16>([=](int) { return Uint4{a, a, a, a}; });
}
inline U16 add(U16 a, U16 b) {
  return quarters<U16>([&](int i) { return a.q[i] + b.q[i]; });
}
inline U16 exclusive_or(U16 a, U16 b) {
  return quarters<U16>([&](int i) { return a.q[i] ^ b.q[i]; });
}
inline U16 shift_right(U16 a, int n) {
  return quarters<U16>([&](int i) { return n < 32 ? a.q[i] >> n : Uint4{0, 0, 0, 0}; });
}
inline F16 to_float(U16 a) {
  return quarters<F16>(
      [&](int i) { return __builtin_convertvector(bit_cast<Int4>(a.q[i]), Float4); });
}

inline U16 sortable_key(F16 a) {
  return quarters<U16>([&](int i) {
    Uint4 u = bit_cast<Uint4>(a.q[i]);
    Uint4 flip = bit_cast<Uint4>(bit_cast<Int4>(u) >> 31) | 0x80000000u;
    return u ^ flip;
  });
}

inline void multiply_wide(U16 a, uint32_t factor, U16* low, U16* high) {
  for (int i = 0; i < 16; ++i) {
    uint64_t product = static_cast<uint64_t>(a.q[i / 4][i % 4]) * factor;
    low->q[i / 4][i % 4] = static_cast<uint32_t>(product);
    high->q[i / 4][i % 4] = static_cast<uint32_t>(product >> 32);
  }
}

inline void transpose_lanes(U16 v[4]) {
  for (int lane = 0; lane < 4; ++lane) {
    Uint4 rows[4] = {v[0].q[lane], v[1].q[lane], v[2].q[lane], v[3].q[lane]};
    for (int i = 0; i < 4; ++i) {
      v[i].q[lane] = Uint4{rows[0][i], rows[1][i], rows[2][i], rows[3][i]};
    }
  }
}

inline F16 load_in_order(const float* p) { return load(p); }

inline U16 widen(const void* p) {
  Ushort4 halves[4];
  std::memcpy(halves, p, sizeof(halves));
  return quarters<U16>([&](int i) { return __builtin_convertvector(halves[i], Uint4); });
}

inline F16 load_in_order(const BFloat16* p) {
  U16 u = widen(p);
  return quarters<F16>([&](int i) { return bit_cast<Float4>(u.q[i] << 16); });
}

// Exponent and mantissa are moved into place and the exponent's bias is corrected by a
// multiplication with 2^112, which also normalises subnormal halves.
inline F16 load_in_order(const Half* p) {
  U16 u = widen(p);
  return quarters<F16>([&](int i) {
    Uint4 magnitude = (u.q[i] & 0x7fffu) << 13;
    Float4 value = bit_cast<Float4>(magnitude) * 0x1p112f;
    Uint4 special = bit_cast<Uint4>(magnitude >= 0x0f800000u) & 0x7f800000u;
    Uint4 sign = (u.q[i] & 0x8000u) << 16;
    return bit_cast<Float4>(bit_cast<Uint4>(value) | special | sign);
  });
}

template <typename T>
inline void load_pair(const T* p, F16* a, F16* b) {
  *a = load_in_order(p);
  *b = load_in_order(p + 16);
}

}  // namespace
}  // namespace confidence
}  // namespace lopa
