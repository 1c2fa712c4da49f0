// Sixteen lanes in two AVX2 registers; the interface is that of vector_portable.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "lopa/float_types.h"

namespace lopa {
namespace confidence {
namespace {

struct F16 {
  __m256 lo, hi;
};
struct U16 {
  __m256i lo, hi;
};
struct Mask {
  __m256 lo, hi;
};

// Whether `fma` rounds once.
constexpr bool kFusedMultiplyAdd = true;

inline F16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, F16 a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
inline void store(uint32_t* p, U16 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.lo);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), a.hi);
}
inline F16 splat(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
inline F16 add(F16 a, F16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline F16 sub(F16 a, F16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline F16 mul(F16 a, F16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline F16 fma(F16 a, F16 b, F16 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline F16 min(F16 a, F16 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline F16 max(F16 a, F16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }

inline Mask no_lanes() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Mask either(Mask a, Mask b) { return {_mm256_or_ps(a.lo, b.lo), _mm256_or_ps(a.hi, b.hi)}; }
inline uint32_t bits(Mask a) {
  return static_cast<uint32_t>(_mm256_movemask_ps(a.lo)) |
         static_cast<uint32_t>(_mm256_movemask_ps(a.hi)) << 8;
}
inline bool any(Mask a) { return _mm256_movemask_ps(_mm256_or_ps(a.lo, a.hi)) != 0; }
inline Mask unordered(F16 a, F16 b) {
  return {_mm256_cmp_ps(a.lo, b.lo, _CMP_UNORD_Q), _mm256_cmp_ps(a.hi, b.hi, _CMP_UNORD_Q)};
}
inline Mask equal(F16 a, F16 b) {
  return {_mm256_cmp_ps(a.lo, b.lo, _CMP_EQ_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_EQ_OQ)};
}
inline Mask greater(F16 a, F16 b) {
  return {_mm256_cmp_ps(a.lo, b.lo, _CMP_GT_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_GT_OQ)};
}
inline Mask less_equal(F16 a, F16 b) {
  return {_mm256_cmp_ps(a.lo, b.lo, _CMP_LE_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_LE_OQ)};
}
inline Mask equal(U16 a, U16 b) {
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(a.lo, b.lo)),
          _mm256_castsi256_ps(_mm256_cmpeq_epi32(a.hi, b.hi))};
}
inline F16 keep(Mask mask, F16 a) {
  return {_mm256_and_ps(mask.lo, a.lo), _mm256_and_ps(mask.hi, a.hi)};
}

inline F16 round(F16 a) {
  return {_mm256_round_ps(a.lo, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
          _mm256_round_ps(a.hi, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline __m256 scale_by_power(__m256 a, __m256 n) {
  __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), exponent));
}
inline F16 scale_by_power(F16 a, F16 n) {
  return {scale_by_power(a.lo, n.lo), scale_by_power(a.hi, n.hi)};
}

inline U16 splat(uint32_t a) {
  __m256i v = _mm256_set1_epi32(static_cast<int>(a));
  return {v, v};
}
inline U16 add(U16 a, U16 b) {
  return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}
inline U16 exclusive_or(U16 a, U16 b) {
  return {_mm256_xor_si256(a.lo, b.lo), _mm256_xor_si256(a.hi, b.hi)};
}
inline U16 load(const uint32_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8))};
}
inline U16 shift_right(U16 a, int n) {
  __m128i count = _mm_cvtsi32_si128(n);
  return {_mm256_srl_epi32(a.lo, count), _mm256_srl_epi32(a.hi, count)};
}
inline F16 to_float(U16 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }

inline __m256i sortable_key(__m256 a) {
  __m256i u = _mm256_castps_si256(a);
  __m256i flip = _mm256_or_si256(_mm256_srai_epi32(u, 31), _mm256_set1_epi32(INT32_MIN));
  return _mm256_xor_si256(u, flip);
}
inline U16 sortable_key(F16 a) { return {sortable_key(a.lo), sortable_key(a.hi)}; }

inline void multiply_wide(__m256i a, __m256i m, __m256i* low, __m256i* high) {
  __m256i even = _mm256_mul_epu32(a, m);
  __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), m);
  *low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
  *high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
}
inline void multiply_wide(U16 a, uint32_t factor, U16* low, U16* high) {
  __m256i m = _mm256_set1_epi32(static_cast<int>(factor));
  multiply_wide(a.lo, m, &low->lo, &high->lo);
  multiply_wide(a.hi, m, &low->hi, &high->hi);
}

inline void transpose_lanes(__m256i* v0, __m256i* v1, __m256i* v2, __m256i* v3) {
  __m256i a = _mm256_unpacklo_epi32(*v0, *v1);
  __m256i b = _mm256_unpacklo_epi32(*v2, *v3);
  __m256i c = _mm256_unpackhi_epi32(*v0, *v1);
  __m256i d = _mm256_unpackhi_epi32(*v2, *v3);
  *v0 = _mm256_unpacklo_epi64(a, b);
  *v1 = _mm256_unpackhi_epi64(a, b);
  *v2 = _mm256_unpacklo_epi64(c, d);
  *v3 = _mm256_unpackhi_epi64(c, d);
}
inline void transpose_lanes(U16 v[4]) {
  transpose_lanes(&v[0].lo, &v[1].lo, &v[2].lo, &v[3].lo);
  transpose_lanes(&v[0].hi, &v[1].hi, &v[2].hi, &v[3].hi);
}

inline void load_pair(const float* p, F16* a, F16* b) {
  *a = load(p);
  *b = load(p + 16);
}
inline void load_pair(const BFloat16* p, F16* a, F16* b) {
  __m256i lo = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  __m256i hi = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16));
  __m256i upper = _mm256_set1_epi32(-65536);
  *a = {_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)),
        _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))};
  *b = {_mm256_castsi256_ps(_mm256_and_si256(lo, upper)),
        _mm256_castsi256_ps(_mm256_and_si256(hi, upper))};
}

inline F16 load_in_order(const float* p) { return load(p); }
inline __m256 widen(const BFloat16* p) {
  __m256i v = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(v, 16));
}
inline __m256 widen(const Half* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline F16 load_in_order(const BFloat16* p) { return {widen(p), widen(p + 8)}; }
inline F16 load_in_order(const Half* p) { return {widen(p), widen(p + 8)}; }
inline void load_pair(const Half* p, F16* a, F16* b) {
  *a = load_in_order(p);
  *b = load_in_order(p + 16);
}

}  // namespace
}  // namespace confidence
}  // namespace lopa
