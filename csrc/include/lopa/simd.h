// One vector of fp32 lanes for the instruction set that the including file is compiled for, and
// conversions of bf16, fp16 and fp32 rows from and to it.
//
// Everything is in an anonymous namespace and nothing of the standard library is instantiated: the
// linker must never take a function compiled for AVX-512 for one of another file.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "lopa/float_types.h"

namespace lopa {
namespace {

#if defined(__AVX512F__)

struct Vec {
  static constexpr int kWidth = 16;
  __m512 v;
};

inline Vec zero() { return {_mm512_setzero_ps()}; }
inline Vec set1(float x) { return {_mm512_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x.v); }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
// A NaN in `b` is returned, one in `a` is not.
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline float reduce_max(Vec x) { return _mm512_reduce_max_ps(x.v); }
inline float reduce_add(Vec x) { return _mm512_reduce_add_ps(x.v); }
// The sums of neighbouring lanes, those of `a` in the first half.
inline Vec add_pairs(Vec a, Vec b) {
  __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  __m512i odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
  return {
      _mm512_add_ps(_mm512_permutex2var_ps(a.v, even, b.v), _mm512_permutex2var_ps(a.v, odd, b.v))};
}
// Lanes 0..n-1 of `x`, the rest of `other`.
inline Vec keep_first(Vec x, int64_t n, Vec other) {
  return {_mm512_mask_blend_ps(static_cast<__mmask16>((1u << n) - 1u), other.v, x.v)};
}

inline Vec load(const BFloat16* p) {
  __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
inline Vec load(const Half* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline void store(BFloat16* p, Vec x) {
  __m512i bits = _mm512_castps_si512(x.v);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
inline void store(Half* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#elif defined(__AVX2__)

struct Vec {
  static constexpr int kWidth = 8;
  __m256 v;
};

inline Vec zero() { return {_mm256_setzero_ps()}; }
inline Vec set1(float x) { return {_mm256_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline void store(float* p, Vec x) { _mm256_storeu_ps(p, x.v); }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
// A NaN in `b` is returned, one in `a` is not.
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline float reduce_max(Vec x) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_shuffle_ps(m, m, 1)));
}
inline float reduce_add(Vec x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
// The sums of neighbouring lanes, those of `a` in the first half.
inline Vec add_pairs(Vec a, Vec b) {
  __m256d mixed = _mm256_castps_pd(_mm256_hadd_ps(a.v, b.v));
  return {_mm256_castpd_ps(_mm256_permute4x64_pd(mixed, _MM_SHUFFLE(3, 1, 2, 0)))};
}
// Lanes 0..n-1 of `x`, the rest of `other`.
inline Vec keep_first(Vec x, int64_t n, Vec other) {
  __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  __m256i keep = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lane);
  return {_mm256_blendv_ps(other.v, x.v, _mm256_castsi256_ps(keep))};
}

inline Vec load(const BFloat16* p) {
  __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
}
inline Vec load(const Half* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline void store(BFloat16* p, Vec x) {
  __m256i bits = _mm256_castps_si256(x.v);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  __m256 nan = _mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q);
  rounded = _mm256_castps_si256(_mm256_blendv_ps(
      _mm256_castsi256_ps(rounded), _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)), nan));
  rounded = _mm256_srli_epi32(rounded, 16);
  _mm_storeu_si128(
      reinterpret_cast<__m128i*>(p),
      _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1)));
}
inline void store(Half* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#else

// The vector extension of GCC and Clang: SSE2 on x86-64, NEON on Arm.
struct Vec {
  static constexpr int kWidth = 4;
  typedef float Float4 __attribute__((vector_size(16)));
  typedef int32_t Int4 __attribute__((vector_size(16)));
  Float4 v;
};

inline Vec set1(float x) { return {Vec::Float4{x, x, x, x}}; }
inline Vec zero() { return set1(0.0f); }
inline Vec load(const float* p) {
  Vec x;
  std::memcpy(&x.v, p, sizeof(x.v));
  return x;
}
inline void store(float* p, Vec x) { std::memcpy(p, &x.v, sizeof(x.v)); }
inline Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
// Two roundings: a fused operation without hardware support is a library call a lane.
inline Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
// A NaN in `b` is returned, one in `a` is not.
inline Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
inline float reduce_max(Vec x) {
  float low = x.v[0] > x.v[1] ? x.v[0] : x.v[1];
  float high = x.v[2] > x.v[3] ? x.v[2] : x.v[3];
  return low > high ? low : high;
}
inline float reduce_add(Vec x) { return (x.v[0] + x.v[2]) + (x.v[1] + x.v[3]); }
// The sums of neighbouring lanes, those of `a` in the first half.
inline Vec add_pairs(Vec a, Vec b) {
  return {Vec::Float4{a.v[0], a.v[2], b.v[0], b.v[2]} +
          Vec::Float4{a.v[1], a.v[3], b.v[1], b.v[3]}};
}
// Lanes 0..n-1 of `x`, the rest of `other`.
inline Vec keep_first(Vec x, int64_t n, Vec other) {
  int32_t count = static_cast<int32_t>(n);
  Vec::Int4 lane = {0, 1, 2, 3};
  Vec::Int4 limit = {count, count, count, count};
  return {lane < limit ? x.v : other.v};
}

#endif

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

#if defined(__AVX2__)
inline float to_float(Half x) { return _cvtsh_ss(x.bits); }
inline void from_float(float x, Half* out) {
  out->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#else
// Binary16 through the exponent of a float: its own exponent field shifted into place, then
// rescaled by 2^112, the difference of the biases; exact for subnormals too.
inline float to_float(Half x) {
  uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  float value;
  if (magnitude >= 0x0f800000u) {
    magnitude += 0x70000000u;
    std::memcpy(&value, &magnitude, sizeof(value));
  } else {
    std::memcpy(&value, &magnitude, sizeof(value));
    value *= 0x1p112f;
  }
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  bits |= sign;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
// Round to nearest even. Below 2^-14 the sum with 0.5 leaves the subnormal's bits, rounded by the
// hardware, at the end of the significand.
inline void from_float(float x, Half* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  uint32_t sign = (bits >> 16) & 0x8000u;
  uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {
    float value;
    std::memcpy(&value, &magnitude, sizeof(value));
    value += 0.5f;
    std::memcpy(&half, &value, sizeof(half));
    half -= 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(half | sign);
}
#endif

inline void from_float(float x, float* out) { *out = x; }
inline void from_float(float x, BFloat16* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  bits += 0x7fffu + ((bits >> 16) & 1u);
  out->bits = nan ? 0x7fc0u : static_cast<uint16_t>(bits >> 16);
}

#if !defined(__AVX2__)
template <typename T>
inline Vec load(const T* p) {
  return {Vec::Float4{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
}
template <typename T>
inline void store(T* p, Vec x) {
  for (int i = 0; i < Vec::kWidth; ++i) from_float(x.v[i], p + i);
}
#endif

// The nearest integer, for |x| below 2^22; NaN for NaN.
inline Vec nearest(Vec x) {
#if defined(__AVX512F__)
  return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
#elif defined(__AVX2__)
  return {_mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
#else
  Vec magic = set1(12582912.0f);  // 1.5 * 2^23: the sum keeps no fraction bits
  return (x + magic) - magic;
#endif
}

// x * 2^n for integral n from -126 to 127; -127 gives 0, or less than the normal range.
inline Vec scale_by_power(Vec x, Vec n) {
#if defined(__AVX512F__)
  return {_mm512_scalef_ps(x.v, n.v)};
#elif defined(__AVX2__)
  __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
  return {_mm256_mul_ps(x.v, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)))};
#else
  // A NaN has no integer; its lane keeps the NaN of `x` under any finite power.
  Vec::Float4 finite = n.v == n.v ? n.v : zero().v;
  Vec::Int4 exponent = (__builtin_convertvector(finite, Vec::Int4) + 127) << 23;
  Vec power;
  std::memcpy(&power.v, &exponent, sizeof(power.v));
  return x * power;
#endif
}

// 2^x for x in [-126, 126], NaN for NaN. With x = n + f, n the nearest integer, 2^f is the degree-5
// polynomial that is 1 at 0 and otherwise minimises the relative error over [-1/2, 1/2] (least
// squares reweighted by Lawson's method): 9.1e-8, and 1.9e-7 with the rounding of float. For loops
// that are all exponentials; one term and the mask shorter than exp2_bounded.
inline Vec exp2_normal(Vec x) {
  const Vec n = nearest(x), f = x - n;
  Vec y = fma(set1(1.32647145e-3f), f, set1(9.67151299e-3f));
  y = fma(y, f, set1(5.55073395e-2f));
  y = fma(y, f, set1(2.40222424e-1f));
  y = fma(y, f, set1(6.93147004e-1f));
  y = fma(y, f, set1(1.0f));
  return scale_by_power(y, n);
}

// 2^x for x up to 126, 0 below the normal range, NaN for NaN. Relative error at most 1.8e-7.
// Coefficients: Cephes Math Library, exp2f.c (S. L. Moshier), on [-1/2, 1/2].
inline Vec exp2_bounded(Vec x) {
  Vec clamped = max(set1(-127.0f), x);
  Vec n = nearest(clamped);
  Vec f = clamped - n;
  Vec y = fma(set1(1.535336188319500e-4f), f, set1(1.339887440266574e-3f));
  y = fma(y, f, set1(9.618437357674640e-3f));
  y = fma(y, f, set1(5.550332471162809e-2f));
  y = fma(y, f, set1(2.402264791363012e-1f));
  y = fma(y, f, set1(6.931472028550421e-1f));
  y = fma(y, f, set1(1.0f));
  Vec scaled = scale_by_power(y, n);
#if defined(__AVX512F__)
  __mmask16 below = _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(-126.0f), _CMP_LT_OQ);
  return {_mm512_mask_mov_ps(scaled.v, below, _mm512_setzero_ps())};
#elif defined(__AVX2__)
  return {_mm256_andnot_ps(_mm256_cmp_ps(x.v, _mm256_set1_ps(-126.0f), _CMP_LT_OQ), scaled.v)};
#else
  return {x.v < set1(-126.0f).v ? zero().v : scaled.v};
#endif
}

// `dst[0..n)` = `src[0..n)` in fp32.
template <typename T>
inline void load_row(const T* src, float* dst, int64_t n) {
  int64_t i = 0;
  for (; i + Vec::kWidth <= n; i += Vec::kWidth) store(dst + i, load(src + i));
  for (; i < n; ++i) dst[i] = to_float(src[i]);
}

}  // namespace
}  // namespace lopa
