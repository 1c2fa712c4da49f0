// Rows on the GPU: their vectors, rotary embedding, RMSNorm ahead of it. Everything is in fp32 from
// the load to the store, and products and sums round one by one, as on the CPU: the same bits.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kv_cache/kernel_base.cuh"
#include "lopa/float_types.h"

namespace lopa {
namespace kv_cache {

template <int kBytes>
struct VectorOf;
template <>
struct VectorOf<16> {
  using Type = uint4;
};
template <>
struct VectorOf<8> {
  using Type = uint2;
};
template <>
struct VectorOf<4> {
  using Type = uint32_t;
};
template <>
struct VectorOf<2> {
  using Type = uint16_t;
};

template <typename T, int N>
union Pack {
  using Vector = typename VectorOf<N * sizeof(T)>::Type;
  Vector vector;
  T element[N];
};

template <typename T, int N>
__device__ __forceinline__ Pack<T, N> load_pack(const T* source) {
  Pack<T, N> pack;
  pack.vector = __ldcg(reinterpret_cast<const typename Pack<T, N>::Vector*>(source));
  return pack;
}

template <typename T, int N>
__device__ __forceinline__ void store_pack(T* target, const Pack<T, N>& pack) {
  *reinterpret_cast<typename Pack<T, N>::Vector*>(target) = pack.vector;
}

// N floats that neighbouring threads read again.
template <int N>
__device__ __forceinline__ void load_floats(const float* source, float* out) {
  constexpr int kStep = N < 4 ? N : 4;
  using Part = Pack<float, kStep>;
#pragma unroll
  for (int i = 0; i < N; i += kStep) {
    Part part;
    part.vector = *reinterpret_cast<const typename Part::Vector*>(source + i);
#pragma unroll
    for (int j = 0; j < kStep; ++j) out[i + j] = part.element[j];
  }
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(BFloat16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}
__device__ __forceinline__ float to_float(Half x) { return __half2float(__ushort_as_half(x.bits)); }

__device__ __forceinline__ void from_float(float x, float* out) { *out = x; }
__device__ __forceinline__ void from_float(float x, BFloat16* out) {
  out->bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
__device__ __forceinline__ void from_float(float x, Half* out) {
  out->bits = __half_as_ushort(__float2half_rn(x));
}

// Cosines and sines of N neighbouring elements of a row's first half.
template <int N>
struct Angles {
  float cosine[N];
  float sine[N];

  __device__ __forceinline__ void load(const float* cos_sin, int64_t half) {
    load_floats<N>(cos_sin, cosine);
    load_floats<N>(cos_sin + half, sine);
  }
};

// Rotary embedding of N pairs, element d with element d + half.
template <typename T, int N>
__device__ __forceinline__ void rotate(Pack<T, N>& low, Pack<T, N>& high, const Angles<N>& angles) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float cosine = angles.cosine[i];
    const float sine = angles.sine[i];
    const float a = to_float(low.element[i]);
    const float b = to_float(high.element[i]);
    from_float(__fsub_rn(__fmul_rn(a, cosine), __fmul_rn(b, sine)), &low.element[i]);
    from_float(__fadd_rn(__fmul_rn(b, cosine), __fmul_rn(a, sine)), &high.element[i]);
  }
}

// What RMSNorm multiplies a row by, before the weights.
__device__ __forceinline__ float norm_scale(float squares, float head_dim, float eps) {
  return __frcp_rn(__fsqrt_rn(__fadd_rn(__fdiv_rn(squares, head_dim), eps)));
}

// The scales of rows, for each of the warp's threads: those of a row are `lanes` neighbours, a
// power of two of them, each with N elements of each half, or zeros, whose squares' sums are in
// `sum`, which the scales replace. Element d of one half goes with that of the other, then
// neighbours with neighbours, pairs with pairs and so on: the order of every backend, so that all
// have the same bits, whatever N. Whole warps call it, with kRows to 32 lanes.
template <int kRows>
__device__ __forceinline__ void norm_scales(float (&sum)[kRows], uint32_t lanes, float head_dim,
                                            float eps) {
#pragma unroll 1
  for (uint32_t d = 1; d < lanes; d *= 2) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      sum[i] = __fadd_rn(sum[i], __shfl_xor_sync(kWholeWarp, sum[i], d));
    }
  }
  if constexpr (kRows == 1) {
    sum[0] = norm_scale(sum[0], head_dim, eps);
    return;
  }
  // A lane a row: the divisions and the root take longer than to tell the others.
  const int lane = threadIdx.x % 32;
  float own = sum[0];
#pragma unroll
  for (int i = 1; i < kRows; ++i) own = lane % kRows == i ? sum[i] : own;
  own = norm_scale(own, head_dim, eps);
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    sum[i] = __shfl_sync(kWholeWarp, own, lane - lane % kRows + i);
  }
}

// The same of one row of more than a warp (`lanes` over 32), which each of its warps reads:
// `load_squares` gives what lane `at` % 32 of its warp `at` / 32 has.
template <typename LoadSquares>
__device__ __forceinline__ float long_norm_scale(uint32_t lanes, float head_dim, float eps,
                                                 const LoadSquares& load_squares) {
  // Sums of 2^i warps' pieces that wait for their neighbours, each in lane i.
  float sum = 0, waiting = 0;
  const uint32_t lane = threadIdx.x % 32;
#pragma unroll 1
  for (uint32_t warp = 0; warp < lanes / 32; ++warp) {
    sum = load_squares(warp * 32 + lane);
#pragma unroll 1
    for (uint32_t d = 1; d < 32; d *= 2) sum = __fadd_rn(sum, __shfl_xor_sync(kWholeWarp, sum, d));
    uint32_t level = 0;
#pragma unroll 1
    for (; warp >> level & 1; ++level) {
      sum = __fadd_rn(__shfl_sync(kWholeWarp, waiting, level), sum);
    }
    if (lane == level) waiting = sum;
  }
  return norm_scale(sum, head_dim, eps);
}

// The sum of the squares of N elements of each half, in that order.
template <typename T, int N>
__device__ __forceinline__ float sum_squares(const Pack<T, N>& low, const Pack<T, N>& high) {
  float sum[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float a = to_float(low.element[i]);
    const float b = to_float(high.element[i]);
    sum[i] = __fadd_rn(__fmul_rn(a, a), __fmul_rn(b, b));
  }
#pragma unroll
  for (int n = N / 2; n >= 1; n /= 2) {
#pragma unroll
    for (int i = 0; i < n; ++i) sum[i] = __fadd_rn(sum[2 * i], sum[2 * i + 1]);
  }
  return sum[0];
}

// The weights of N elements of each half.
template <typename T, int N>
struct NormWeights {
  Pack<T, N> low;
  Pack<T, N> high;

  __device__ __forceinline__ void load(const T* weight, int64_t half) {
    using Vector = typename Pack<T, N>::Vector;
    low.vector = __ldg(reinterpret_cast<const Vector*>(weight));
    high.vector = __ldg(reinterpret_cast<const Vector*>(weight + half));
  }
};

// rotate() of a row that is normalised first.
template <typename T, int N>
__device__ __forceinline__ void normed_rotate(Pack<T, N>& low, Pack<T, N>& high, float scale,
                                              const NormWeights<T, N>& weights,
                                              const Angles<N>& angles) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float cosine = angles.cosine[i];
    const float sine = angles.sine[i];
    const float a =
        __fmul_rn(__fmul_rn(to_float(low.element[i]), scale), to_float(weights.low.element[i]));
    const float b =
        __fmul_rn(__fmul_rn(to_float(high.element[i]), scale), to_float(weights.high.element[i]));
    from_float(__fsub_rn(__fmul_rn(a, cosine), __fmul_rn(b, sine)), &low.element[i]);
    from_float(__fadd_rn(__fmul_rn(b, cosine), __fmul_rn(a, sine)), &high.element[i]);
  }
}

}  // namespace kv_cache
}  // namespace lopa
