// Sums of a tile of 2048 logits for the loss, in the registers of a warp. The tile of a warp, its
// maximum and where that is are those of the vocabulary pass.
#pragma once

#include "certainty_loss/loss_args.h"
#include "confidence/tile_statistics.cuh"

namespace lopa {
namespace certainty_loss {

using confidence::kInf;
using confidence::kTile;
using confidence::kVectors;
using confidence::kWholeWarp;
using confidence::Partial;
using confidence::Vector;

struct TileSums {
  float max;
  float plain;               // of 2^((x - max) log2(e))
  float tempered, weighted;  // of v = 2^t and v * t, t = (x - max) * scale
  uint32_t flags;
};

// Over the warp; every lane gets the sums.
__device__ __forceinline__ void reduce_sums(float plain, float tempered, float weighted, int lane,
                                            TileSums* sums) {
  const float kept = confidence::warp_sum_pair(tempered, weighted, lane);
  const float other = __shfl_xor_sync(kWholeWarp, kept, 16);
  sums->tempered = lane & 16 ? other : kept;
  sums->weighted = lane & 16 ? kept : other;
#pragma unroll
  for (int step = 16; step > 0; step /= 2) plain += __shfl_xor_sync(kWholeWarp, plain, step);
  sums->plain = plain;
}

// For finite values; leaves a NaN where there are others. kSquare: scale is 2 log2(e), so that
// v = w^2 and t twice the exponent of w, and one exponential does. kPart: the first `vectors` of
// each lane only.
template <typename T, bool kSquare, bool kPart>
__device__ __forceinline__ void sum_weights(const uint4* raw, float scale, int lane, TileSums* sums,
                                            int vectors = kVectors<T>) {
  constexpr int kElements = Vector<T>::kElements;
  const float plain_base = sums->max * kLog2E, base = sums->max * scale;
  float plain[2] = {0, 0}, tempered[2] = {0, 0}, weighted[2] = {0, 0};
#pragma unroll
  for (int v = 0; v < kVectors<T>; ++v) {
    if (kPart && v >= vectors) break;
    float x[kElements];
    confidence::unpack<T>(raw[v], x);
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      const float s = fmaf(x[e], kLog2E, -plain_base);
      const float w = confidence::exp2_fast(s);
      plain[e % 2] += w;
      if constexpr (kSquare) {
        tempered[e % 2] = fmaf(w, w, tempered[e % 2]);
        weighted[e % 2] = fmaf(w * s, w, weighted[e % 2]);
      } else {
        const float t = fmaf(x[e], scale, -base);
        const float u = confidence::exp2_fast(t);
        tempered[e % 2] += u;
        weighted[e % 2] = fmaf(u, t, weighted[e % 2]);
      }
    }
  }
  reduce_sums(plain[0] + plain[1], tempered[0] + tempered[1],
              (weighted[0] + weighted[1]) * (kSquare ? 2.0f : 1.0f), lane, sums);
}

// Any values: the last tile of a row, filled up with -inf, or one with NaN, infinities or so large
// that a rounded base is no longer near. A function of its own, so that the ordinary case keeps its
// registers. NaN and +inf give kPartialNan, which is all that matters of the row then.
template <typename T>
__device__ __noinline__ TileSums careful_sums(const uint4* raw, float scale, int lane) {
  constexpr int kElements = Vector<T>::kElements;
  bool bad = false;
  float largest = -kInf;
#pragma unroll
  for (int v = 0; v < kVectors<T>; ++v) {
    float x[kElements];
    confidence::unpack<T>(raw[v], x);
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      bad |= !(x[e] < kInf);
      largest = fmaxf(largest, x[e]);
    }
  }
  TileSums sums{};
  sums.max = confidence::warp_max(largest);
  if (__any_sync(kWholeWarp, bad)) {
    sums.flags = confidence::kPartialNan | confidence::kPartialFinite;
    return sums;
  }
  if (sums.max == -kInf) return sums;
  sums.flags = confidence::kPartialFinite | confidence::kPartialCareful;
  float plain = 0, tempered = 0, weighted = 0;
#pragma unroll
  for (int v = 0; v < kVectors<T>; ++v) {
    float x[kElements];
    confidence::unpack<T>(raw[v], x);
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      const float distance = x[e] - sums.max;
      plain += confidence::exp2_fast(distance * kLog2E);
      const float t = fmaxf(distance * scale, confidence::kSmallestExponent);
      const float u = confidence::exp2_fast(t);
      tempered += u;
      weighted = fmaf(u, t, weighted);
    }
  }
  reduce_sums(plain, tempered, weighted, lane, &sums);
  return sums;
}

// One tile's partial: that of the vocabulary pass at the loss's temperature, and `plain` beside it.
// `best` is the largest value of the tiles before it that this warp had of the row.
template <typename T, bool kSquare>
__device__ __forceinline__ void loss_tile(const uint4* raw, uint32_t first_index, int n,
                                          float scale, int lane, float* best, Partial* partial,
                                          float* plain) {
  const confidence::LaneMaxima<T, false> lane_maxima(raw);
  TileSums sums{};
  sums.max = confidence::warp_max(lane_maxima.first);
  constexpr int kAtOnce = 32 * Vector<T>::kElements;
  // The larger of the two bases is what must stay small.
  const float largest_base = fabsf(sums.max) * fmaxf(scale, kLog2E);
  bool finite = largest_base < confidence::kLargestBase && n % kAtOnce == 0;
  if (finite) {
    if (n == kTile) {
      sum_weights<T, kSquare, false>(raw, scale, lane, &sums);
    } else {
      sum_weights<T, kSquare, true>(raw, scale, lane, &sums, n / kAtOnce);
    }
    sums.flags = confidence::kPartialFinite;
    finite = !isnan(sums.plain + sums.tempered + sums.weighted);
  }
  if (!finite) {
    uint4 copy[kVectors<T>];
#pragma unroll
    for (int v = 0; v < kVectors<T>; ++v) copy[v] = raw[v];
    sums = careful_sums<T>(copy, scale, lane);
  }
  uint32_t index = confidence::kPartialIndex;
  if (sums.max > *best && !(sums.flags & confidence::kPartialNan)) {
    *best = sums.max;
    index = first_index + confidence::first_place<T>(raw, sums.max, lane);
  }
  if (lane == 0) {
    *reinterpret_cast<uint4*>(partial) =
        make_uint4(__float_as_uint(sums.max), index | sums.flags, __float_as_uint(sums.tempered),
                   __float_as_uint(sums.weighted));
    *plain = sums.plain;
  }
}

}  // namespace certainty_loss
}  // namespace lopa
