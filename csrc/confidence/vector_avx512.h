// Sixteen lanes in one AVX-512 register; the interface is that of vector_portable.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "lopa/float_types.h"

namespace lopa {
namespace confidence {
namespace {

using F16 = __m512;
using U16 = __m512i;
using Mask = __mmask16;

// Whether `fma` rounds once.
constexpr bool kFusedMultiplyAdd = true;

inline F16 load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F16 a) { _mm512_storeu_ps(p, a); }
inline void store(uint32_t* p, U16 a) { _mm512_storeu_si512(p, a); }
inline F16 splat(float a) { return _mm512_set1_ps(a); }
inline F16 add(F16 a, F16 b) { return _mm512_add_ps(a, b); }
inline F16 sub(F16 a, F16 b) { return _mm512_sub_ps(a, b); }
inline F16 mul(F16 a, F16 b) { return _mm512_mul_ps(a, b); }
inline F16 fma(F16 a, F16 b, F16 c) { return _mm512_fmadd_ps(a, b, c); }
inline F16 min(F16 a, F16 b) { return _mm512_min_ps(a, b); }
inline F16 max(F16 a, F16 b) { return _mm512_max_ps(a, b); }

inline Mask no_lanes() { return 0; }
inline Mask either(Mask a, Mask b) { return _kor_mask16(a, b); }
inline bool any(Mask a) { return a != 0; }
inline uint32_t bits(Mask a) { return a; }
inline Mask unordered(F16 a, F16 b) { return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q); }
inline Mask equal(F16 a, F16 b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
inline Mask greater(F16 a, F16 b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
inline Mask less_equal(F16 a, F16 b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
inline Mask equal(U16 a, U16 b) { return _mm512_cmpeq_epi32_mask(a, b); }
inline F16 keep(Mask mask, F16 a) { return _mm512_maskz_mov_ps(mask, a); }

inline F16 round(F16 a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT); }
// a * 2^n for integral n.
inline F16 scale_by_power(F16 a, F16 n) { return _mm512_scalef_ps(a, n); }

inline U16 splat(uint32_t a) { return _mm512_set1_epi32(static_cast<int>(a)); }
inline U16 add(U16 a, U16 b) { return _mm512_add_epi32(a, b); }
inline U16 exclusive_or(U16 a, U16 b) { return _mm512_xor_si512(a, b); }
inline U16 load(const uint32_t* p) { return _mm512_loadu_si512(p); }
inline U16 shift_right(U16 a, int n) { return _mm512_srl_epi32(a, _mm_cvtsi32_si128(n)); }
inline F16 to_float(U16 a) { return _mm512_cvtepi32_ps(a); }

// Order-preserving: a < b as floats exactly if key(a) < key(b) as unsigned integers.
inline U16 sortable_key(F16 a) {
  U16 u = _mm512_castps_si512(a);
  U16 flip = _mm512_or_si512(_mm512_srai_epi32(u, 31), splat(0x80000000u));
  return _mm512_xor_si512(u, flip);
}

inline void multiply_wide(U16 a, uint32_t factor, U16* low, U16* high) {
  U16 m = splat(factor);
  U16 even = _mm512_mul_epu32(a, m);
  U16 odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), m);
  *low = _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
  *high = _mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
}

// A transposition of 4 x 4 words inside each 128-bit lane.
inline void transpose_lanes(U16 v[4]) {
  U16 a = _mm512_unpacklo_epi32(v[0], v[1]);
  U16 b = _mm512_unpacklo_epi32(v[2], v[3]);
  U16 c = _mm512_unpackhi_epi32(v[0], v[1]);
  U16 d = _mm512_unpackhi_epi32(v[2], v[3]);
  v[0] = _mm512_unpacklo_epi64(a, b);
  v[1] = _mm512_unpackhi_epi64(a, b);
  v[2] = _mm512_unpacklo_epi64(c, d);
  v[3] = _mm512_unpackhi_epi64(c, d);
}

inline void load_pair(const float* p, F16* a, F16* b) {
  *a = _mm512_loadu_ps(p);
  *b = _mm512_loadu_ps(p + 16);
}
inline void load_pair(const BFloat16* p, F16* a, F16* b) {
  __m512i v = _mm512_loadu_si512(p);
  *a = _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));
  *b = _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(-65536)));
}
inline void load_pair(const Half* p, F16* a, F16* b) {
  *a = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  *b = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16)));
}

inline F16 load_in_order(const float* p) { return _mm512_loadu_ps(p); }
inline F16 load_in_order(const BFloat16* p) {
  __m512i v = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));
}
inline F16 load_in_order(const Half* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

}  // namespace
}  // namespace confidence
}  // namespace lopa
