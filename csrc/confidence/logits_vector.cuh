// Logits on the GPU: sixteen bytes at a time, and numbers in the order of the operators.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cfloat>
#include <cstdint>

#include "confidence/vocabulary_args.h"
#include "lopa/cuda.cuh"

namespace lopa {
namespace confidence {

constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr float kInf = __builtin_inff();
// Weights below 2^-125 count as that: normal numbers, negligible beside the 1 of the maximum.
constexpr float kSmallestExponent = -125.0f;
// Beyond this the rounding of max * scale is no longer small beside a power of two.
constexpr float kLargestBase = 65536.0f;

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// NaN as -inf, +inf as the largest float, -0 as +0.
__device__ __forceinline__ float sanitized(float x) {
  return fminf(fmaxf(x, -kInf), FLT_MAX) + 0.0f;
}

// A signed integer in the order of the floats.
__device__ __forceinline__ int ordered(float x) {
  int bits = __float_as_int(x);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

__device__ __forceinline__ float from_ordered(int key) {
  return __int_as_float(key ^ ((key >> 31) & 0x7fffffff));
}

__device__ __forceinline__ float warp_max(float x) {
  return from_ordered(__reduce_max_sync(kWholeWarp, ordered(x)));
}

// Sixteen bytes of logits. `Packed` is what two-wide instructions work on, where there are any.
template <typename T>
struct Vector;

template <>
struct Vector<__nv_bfloat16> {
  static constexpr int kElements = 8;
  static constexpr bool kIsHalf = false;
  using Packed = __nv_bfloat162;

  __device__ static void unpack(uint32_t word, float* x) {
    x[0] = __uint_as_float(word << 16);
    x[1] = __uint_as_float(word & 0xffff0000u);
  }
  __device__ static float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

  // -inf in every element.
  __device__ static uint4 lowest() {
    return make_uint4(0xff80ff80u, 0xff80ff80u, 0xff80ff80u, 0xff80ff80u);
  }
};

template <>
struct Vector<__half> {
  static constexpr int kElements = 8;
  static constexpr bool kIsHalf = true;
  using Packed = __half2;

  __device__ static void unpack(uint32_t word, float* x) {
    float2 both = __half22float2(*reinterpret_cast<const __half2*>(&word));
    x[0] = both.x;
    x[1] = both.y;
  }
  __device__ static float to_float(__half x) { return __half2float(x); }

  // -inf in every element.
  __device__ static uint4 lowest() {
    return make_uint4(0xfc00fc00u, 0xfc00fc00u, 0xfc00fc00u, 0xfc00fc00u);
  }
};

template <>
struct Vector<float> {
  static constexpr int kElements = 4;

  __device__ static float to_float(float x) { return x; }

  // -inf in every element.
  __device__ static uint4 lowest() {
    return make_uint4(0xff800000u, 0xff800000u, 0xff800000u, 0xff800000u);
  }
};

template <typename T>
constexpr int kVectors = kTile / (32 * Vector<T>::kElements);  // of a lane in a tile

// Where vector v of a lane begins in its tile.
template <typename T>
__device__ __forceinline__ int vector_begin(int v, int lane) {
  return (v * 32 + lane) * Vector<T>::kElements;
}

template <typename T>
__device__ __forceinline__ void unpack(const uint4& vector, float* x) {
  if constexpr (sizeof(T) == 4) {
    x[0] = __uint_as_float(vector.x);
    x[1] = __uint_as_float(vector.y);
    x[2] = __uint_as_float(vector.z);
    x[3] = __uint_as_float(vector.w);
  } else {
    Vector<T>::unpack(vector.x, x);
    Vector<T>::unpack(vector.y, x + 2);
    Vector<T>::unpack(vector.z, x + 4);
    Vector<T>::unpack(vector.w, x + 6);
  }
}

// The elements [begin, begin + kElements) of a tile of n, read one by one; -inf beyond n.
template <typename T>
__device__ __noinline__ uint4 gather_vector(const T* tile, int begin, int n) {
  constexpr int kElements = Vector<T>::kElements;
  union {
    T element[kElements];
    uint4 vector;
  } out;
#pragma unroll
  for (int e = 0; e < kElements; ++e) {
    out.element[e] = begin + e < n ? tile[begin + e] : T(-kInf);
  }
  return out.vector;
}

// The lane's vector v of a tile of n elements in global memory.
template <typename T>
__device__ __forceinline__ uint4 read_vector(const T* tile, int v, int lane, int n, bool aligned) {
  const int begin = vector_begin<T>(v, lane);
  if (aligned && begin + Vector<T>::kElements <= n) {
    return *reinterpret_cast<const uint4*>(tile + begin);
  }
  return gather_vector(tile, begin, n);
}

// Equal as sanitized values.
__device__ __forceinline__ bool is_value(float x, float wanted) {
  return x == wanted || (x == kInf && wanted == FLT_MAX);
}

}  // namespace confidence
}  // namespace lopa
