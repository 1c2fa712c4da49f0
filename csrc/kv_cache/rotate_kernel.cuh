// Rows on the GPU: their vectors, rotary embedding, RMSNorm ahead of it. Everything is in fp32 from
// the load to the store, and products and sums round one by one, as on the CPU: the same bits.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "lopa/float_types.h"

namespace lopa {
namespace kv_cache {

constexpr unsigned kWholeWarp = 0xffffffffu;

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

// Rotary embedding of N pairs, element d with element d + half. Products and sums round one by one,
// as on the CPU: the same bits.
template <typename T, int N>
__device__ __forceinline__ void rotate(Pack<T, N>& low, Pack<T, N>& high, const float* cos_sin,
                                       int64_t half) {
  float cosine[N];
  float sine[N];
  load_floats<N>(cos_sin, cosine);
  load_floats<N>(cos_sin + half, sine);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    float a = to_float(low.element[i]);
    float b = to_float(high.element[i]);
    from_float(__fsub_rn(__fmul_rn(a, cosine[i]), __fmul_rn(b, sine[i])), &low.element[i]);
    from_float(__fadd_rn(__fmul_rn(b, cosine[i]), __fmul_rn(a, sine[i])), &high.element[i]);
  }
}

// What RMSNorm multiplies a row by, before the weights, for each of the warp's threads: those of a
// row are `lanes` neighbours, a power of two of them, each with N elements of each half, or zeros.
// Element d of one half goes with that of the other, then neighbours with neighbours, pairs with
// pairs and so on: the order of every backend, so that all have the same bits, whatever N. A row of
// more than a warp (`lanes` over 32) is read by each of its warps: `load_squares` gives what lane
// threadIdx.x % 32 of each has, `own` is the thread's. Whole warps call it.
template <typename LoadSquares>
__device__ __forceinline__ float norm_scale(float own, uint32_t lanes, float head_dim, float eps,
                                            const LoadSquares& load_squares) {
  auto of_lanes = [](float sum, uint32_t count) {
#pragma unroll 1
    for (uint32_t d = 1; d < count; d *= 2) {
      sum = __fadd_rn(sum, __shfl_xor_sync(kWholeWarp, sum, d));
    }
    return sum;
  };
  float sum = own;
  if (lanes <= 32) {
    sum = of_lanes(own, lanes);
  } else {
    // Sums of 2^i warps' pieces that wait for their neighbours, each in lane i.
    float waiting = 0;
    const uint32_t lane = threadIdx.x % 32;
#pragma unroll 1
    for (uint32_t warp = 0; warp < lanes / 32; ++warp) {
      sum = of_lanes(load_squares(warp * 32 + lane), 32);
      uint32_t level = 0;
#pragma unroll 1
      for (; warp >> level & 1; ++level) {
        sum = __fadd_rn(__shfl_sync(kWholeWarp, waiting, level), sum);
      }
      if (lane == level) waiting = sum;
    }
  }
  return __frcp_rn(__fsqrt_rn(__fadd_rn(__fdiv_rn(sum, head_dim), eps)));
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

// rotate() of a row that is normalised first; `weight` and `cos_sin` are its first element's.
template <typename T, int N>
__device__ __forceinline__ void normed_rotate(Pack<T, N>& low, Pack<T, N>& high, float scale,
                                              const T* weight, const float* cos_sin, int64_t half) {
  using Vector = typename Pack<T, N>::Vector;
  Pack<T, N> low_weight;
  Pack<T, N> high_weight;
  low_weight.vector = __ldg(reinterpret_cast<const Vector*>(weight));
  high_weight.vector = __ldg(reinterpret_cast<const Vector*>(weight + half));
  float cosine[N];
  float sine[N];
  load_floats<N>(cos_sin, cosine);
  load_floats<N>(cos_sin + half, sine);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float a =
        __fmul_rn(__fmul_rn(to_float(low.element[i]), scale), to_float(low_weight.element[i]));
    const float b =
        __fmul_rn(__fmul_rn(to_float(high.element[i]), scale), to_float(high_weight.element[i]));
    from_float(__fsub_rn(__fmul_rn(a, cosine[i]), __fmul_rn(b, sine[i])), &low.element[i]);
    from_float(__fadd_rn(__fmul_rn(b, cosine[i]), __fmul_rn(a, sine[i])), &high.element[i]);
  }
}

}  // namespace kv_cache
}  // namespace lopa
