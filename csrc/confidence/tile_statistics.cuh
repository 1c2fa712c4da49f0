// Statistics of one tile of 2048 tokens in the registers of a warp.
#pragma once

#include "confidence/logits_vector.cuh"

namespace lopa {
namespace confidence {

// One lane's two largest values of a tile, NaN passing by.
template <typename T, bool kSecond>
struct LaneMaxima {
  using Packed = typename Vector<T>::Packed;
  float first, second;

  __device__ explicit LaneMaxima(const uint4* raw) {
    Packed low{}, best = {T(-kInf), T(-kInf)};
    if constexpr (kSecond) low = best;
#pragma unroll
    for (int v = 0; v < kVectors<T>; ++v) {
      const Packed* word = reinterpret_cast<const Packed*>(&raw[v]);
      const Packed high01 = __hmax2(word[0], word[1]), high23 = __hmax2(word[2], word[3]);
      const Packed largest = __hmax2(high01, high23);
      if constexpr (kSecond) {
        const Packed low01 = __hmin2(word[0], word[1]), low23 = __hmin2(word[2], word[3]);
        const Packed next = __hmax2(__hmax2(low01, low23), __hmin2(high01, high23));
        low = __hmax2(__hmax2(low, next), __hmin2(best, largest));
      }
      best = __hmax2(best, largest);
    }
    const float a = Vector<T>::to_float(best.x), b = Vector<T>::to_float(best.y);
    first = fmaxf(fmaxf(a, b), -kInf);
    second = -kInf;
    if constexpr (kSecond) {
      const float c = Vector<T>::to_float(low.x), d = Vector<T>::to_float(low.y);
      second = fmaxf(fmaxf(fminf(a, b), fmaxf(c, d)), -kInf);
    }
  }
};

template <bool kSecond>
struct LaneMaxima<float, kSecond> {
  float first = -kInf, second = -kInf;

  __device__ explicit LaneMaxima(const uint4* raw) {
#pragma unroll
    for (int v = 0; v < kVectors<float>; ++v) {
      float x[4];
      unpack<float>(raw[v], x);
      const float high01 = fmaxf(x[0], x[1]), high23 = fmaxf(x[2], x[3]);
      const float largest = fmaxf(high01, high23);
      if constexpr (kSecond) {
        const float next =
            fmaxf(fmaxf(fminf(x[0], x[1]), fminf(x[2], x[3])), fminf(high01, high23));
        second = fmaxf(fmaxf(second, next), fminf(first, largest));
      }
      first = fmaxf(first, largest);
    }
  }
};

// Which elements of a vector are `wanted`, a value that occurs in the tile; the largest float
// stands for +inf. A word an element, or for two, in its halves.
template <typename T>
__device__ __forceinline__ uint4 equal_elements(const uint4& vector, float wanted) {
  if constexpr (sizeof(T) == 4) {
    float x[4];
    unpack<T>(vector, x);
    return make_uint4(fminf(x[0], FLT_MAX) == wanted, fminf(x[1], FLT_MAX) == wanted,
                      fminf(x[2], FLT_MAX) == wanted, fminf(x[3], FLT_MAX) == wanted);
  } else {
    using Packed = typename Vector<T>::Packed;
    const Packed both = {T(wanted), T(wanted)};  // exact, but for +inf
    const Packed* word = reinterpret_cast<const Packed*>(&vector);
    return make_uint4(__heq2_mask(word[0], both), __heq2_mask(word[1], both),
                      __heq2_mask(word[2], both), __heq2_mask(word[3], both));
  }
}

// The place of the first element that is `wanted`, by the warp: first vector, lane, element.
template <typename T>
__device__ __forceinline__ uint32_t first_place(const uint4* raw, float wanted, int lane) {
  uint4 equal{};
  unsigned holders = 0;
  int at = 0;
#pragma unroll
  for (int v = 0; v < kVectors<T>; ++v) {
    equal = equal_elements<T>(raw[v], wanted);
    holders = __ballot_sync(kWholeWarp, (equal.x | equal.y | equal.z | equal.w) != 0);
    at = v;
    if (holders != 0) break;
  }
  int word = equal.x != 0 ? 0 : equal.y != 0 ? 1 : equal.z != 0 ? 2 : 3;
  if constexpr (sizeof(T) == 2) {
    const uint32_t halves = word == 0   ? equal.x
                            : word == 1 ? equal.y
                            : word == 2 ? equal.z
                                        : equal.w;
    word = 2 * word + ((halves & 1) == 0);
  }
  const int winner = __ffs(holders) - 1;
  return __shfl_sync(kWholeWarp, vector_begin<T>(at, lane) + word, winner);
}

// Sums two values over the warp with five shuffles: lanes 0-15 get the first, 16-31 the second.
__device__ __forceinline__ float warp_sum_pair(float a, float b, int lane) {
  const bool upper = lane & 16;
  float kept = upper ? b : a;
  kept += __shfl_xor_sync(kWholeWarp, upper ? a : b, 16);
#pragma unroll
  for (int step = 8; step > 0; step /= 2) kept += __shfl_xor_sync(kWholeWarp, kept, step);
  return kept;
}

struct TileSums {
  float max, second, sum, weighted;
  uint32_t flags;
};

enum class Values { kFinite, kClamped, kAny };

// Sums of the weights of a tile in the warp's registers. kFinite is for finite values, and leaves a
// NaN where there are others; kClamped for all but NaN; kAny makes each finite first and takes it
// relative to the maximum before it is scaled, which costs some operations more. kPart: the first
// `vectors` of each lane only.
template <typename T, Values kValues, bool kWeighted, bool kPart = false>
__device__ __forceinline__ void sum_weights(const uint4* raw, float scale, int lane, TileSums* sums,
                                            int vectors = kVectors<T>) {
  constexpr int kElements = Vector<T>::kElements;
  const float base = sums->max * scale;
  float sum[2] = {0, 0}, weighted[2] = {0, 0};
#pragma unroll
  for (int v = 0; v < kVectors<T>; ++v) {
    if (kPart && v >= vectors) break;
    float x[kElements];
    unpack<T>(raw[v], x);
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      float t;
      if constexpr (kValues == Values::kAny) {
        t = fmaxf((sanitized(x[e]) - sums->max) * scale, kSmallestExponent);
      } else {
        t = fmaf(x[e], scale, -base);
        if constexpr (kValues == Values::kClamped) t = fmaxf(t, kSmallestExponent);
      }
      const float w = exp2_fast(t);
      sum[e % 2] += w;
      if constexpr (kWeighted) weighted[e % 2] = fmaf(w, t, weighted[e % 2]);
    }
  }
  const float kept = warp_sum_pair(sum[0] + sum[1], weighted[0] + weighted[1], lane);
  const float other = __shfl_xor_sync(kWholeWarp, kept, 16);
  sums->sum = lane & 16 ? other : kept;
  sums->weighted = lane & 16 ? kept : other;
}

// The largest two and the flags, for any values.
template <typename T, bool kSecond>
__device__ __forceinline__ TileSums careful_maxima(const uint4* raw, int lane) {
  constexpr int kElements = Vector<T>::kElements;
  bool nan = false, finite = false;
  float first = -kInf, second = -kInf;
#pragma unroll
  for (int v = 0; v < kVectors<T>; ++v) {
    float x[kElements];
    unpack<T>(raw[v], x);
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      nan |= isnan(x[e]);
      finite |= fabsf(x[e]) < kInf;
      const float value = sanitized(x[e]);
      if constexpr (kSecond) second = fmaxf(second, fminf(first, value));
      first = fmaxf(first, value);
    }
  }
  TileSums out{};
  out.max = warp_max(first);
  out.second = -kInf;
  if constexpr (kSecond) {
    const unsigned holders = __ballot_sync(kWholeWarp, first == out.max);
    const bool only = holders == 1u << lane;
    const float next = warp_max(only ? second : first);
    out.second = __popc(holders) > 1 ? out.max : next;
  }
  if (__any_sync(kWholeWarp, nan)) out.flags |= kPartialNan;
  if (__any_sync(kWholeWarp, finite)) out.flags |= kPartialFinite;
  return out;
}

// A tile with other than finite values: the last of a row, filled up with -inf, one with suppressed
// tokens, NaN or infinities. A function of its own, so that the ordinary case keeps its registers.
template <typename T, bool kSecond, bool kWeighted>
__device__ __noinline__ TileSums careful_statistics(const uint4* raw, float scale, int lane) {
  TileSums sums = careful_maxima<T, kSecond>(raw, lane);
  if (sums.max == -kInf) return sums;
  if (fabsf(sums.max * scale) < kLargestBase && !(sums.flags & kPartialNan)) {
    sum_weights<T, Values::kClamped, kWeighted>(raw, scale, lane, &sums);
  } else {
    sums.flags |= kPartialCareful;
    sum_weights<T, Values::kAny, kWeighted>(raw, scale, lane, &sums);
  }
  return sums;
}

// One tile's partial statistics from the warp's registers. `best` is the largest value of the tiles
// before it that this warp had of the row: only a tile that exceeds it can have the row's first
// maximum, and its index is looked for; others get kPartialIndex.
template <typename T, bool kSecond, bool kWeighted>
__device__ __forceinline__ void tile_statistics(const uint4* raw, uint32_t first_index, int n,
                                                float scale, int lane, float* best,
                                                Partial* partial, float* second) {
  const LaneMaxima<T, kSecond> lane_maxima(raw);
  TileSums sums{};
  sums.max = warp_max(lane_maxima.first);
  constexpr int kAtOnce = 32 * Vector<T>::kElements;
  bool finite = fabsf(sums.max * scale) < kLargestBase && n % kAtOnce == 0;
  if (finite) {
    if (n == kTile) {
      sum_weights<T, Values::kFinite, kWeighted>(raw, scale, lane, &sums);
    } else {
      sum_weights<T, Values::kFinite, kWeighted, true>(raw, scale, lane, &sums, n / kAtOnce);
    }
    sums.flags = kPartialFinite;
    finite = !isnan(sums.sum + sums.weighted);
    if constexpr (kSecond) {
      const unsigned holders = __ballot_sync(kWholeWarp, lane_maxima.first == sums.max);
      const bool only = holders == 1u << lane;
      const float next = warp_max(only ? lane_maxima.second : lane_maxima.first);
      sums.second = __popc(holders) > 1 ? sums.max : next;
    }
  }
  if (!finite) {
    uint4 copy[kVectors<T>];
#pragma unroll
    for (int v = 0; v < kVectors<T>; ++v) copy[v] = raw[v];
    sums = careful_statistics<T, kSecond, kWeighted>(copy, scale, lane);
  }
  uint32_t index = kPartialIndex;
  if (sums.max > *best) {
    *best = sums.max;
    index = first_index + first_place<T>(raw, sums.max, lane);
  }
  if (lane == 0) {
    *reinterpret_cast<uint4*>(partial) =
        make_uint4(__float_as_uint(sums.max), index | sums.flags, __float_as_uint(sums.sum),
                   __float_as_uint(sums.weighted));
    if constexpr (kSecond) *second = sums.second;
  }
}

}  // namespace confidence
}  // namespace lopa
