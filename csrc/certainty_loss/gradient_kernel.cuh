// The backward pass of the loss on the GPU: every logit of a masked row read once, every element of
// the gradient written once; it may be written over the logits.
//
// Tiles come through the ring of the vocabulary pass. With d = x - max of the row,
// p = 2^(d log2(e) - log_sum) is softmax(x), 2^t with t = d * scale - tempered is
// softmax(x / temperature), and the gradient is cross * p + 2^t * (slope * t + offset), with
// `cross` taken off at the label.
#pragma once

#include "certainty_loss/loss_args.h"
#include "confidence/pass_kernel.cuh"

namespace lopa {
namespace certainty_loss {

using confidence::Item;
using confidence::kTile;
using confidence::kVectors;
using confidence::kWholeWarp;
using confidence::Vector;

// Of a thread: one CTA a multiprocessor, and nothing beside it.
template <typename T>
constexpr int kRegisters = sizeof(T) == 4 ? 255 : 65536 / confidence::kPassThreads<T>;

// So small that ex2.approx.ftz gives 0, and finite.
constexpr float kLeastExponent = -200.0f;

template <typename T>
__device__ __forceinline__ T to_element(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else if constexpr (Vector<T>::kIsHalf) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

template <typename T>
__device__ __forceinline__ uint4 pack(const float* x) {
  union {
    uint4 vector;
    float2 whole[2];
    __half2 half[4];
    __nv_bfloat162 brain[4];
  } out;
  if constexpr (sizeof(T) == 4) {
    out.whole[0] = {x[0], x[1]};
    out.whole[1] = {x[2], x[3]};
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (Vector<T>::kIsHalf) {
        out.half[i] = __floats2half2_rn(x[2 * i], x[2 * i + 1]);
      } else {
        out.brain[i] = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
      }
    }
  }
  return out.vector;
}

// The weights of the two parts, the same for all rows.
struct Weights {
  float cross, tilt;
};

__device__ __forceinline__ Weights read_weights(const GradientArgs& args) {
  const float grad = *args.grad_loss;
  const int masked = args.counts[0], agreeing = args.counts[1];
  return {masked > 0 ? grad / masked : 0.0f,
          agreeing > 0 ? -grad * args.beta * args.inverse_temperature / agreeing : 0.0f};
}

// kSquare: scale is 2 log2(e), so that 2^t is p^2 times a constant of the row.
template <bool kSquare>
struct RowGradient {
  float max, log_sum, scale, tempered, cross, slope, offset;
  bool has_entropy;

  __device__ RowGradient(const GradientArgs& args, const Weights& weights,
                         const RowStatistics& row) {
    max = row.max;
    log_sum = row.log_sum * kLog2E;
    scale = args.vocabulary.scale;
    tempered = row.tempered * kLog2E;
    // The maximum of two numbers passes a NaN by; a row's must come through.
    cross = isnan(row.max) ? row.max : weights.cross;
    slope = weights.tilt * static_cast<float>(0.6931471805599453);
    offset = weights.tilt * row.entropy;
    has_entropy = row.entropy >= 0;
    if constexpr (kSquare) {
      // t = 2 s - distance.
      const float distance = tempered - 2 * log_sum;
      const float constant = exp2f(-distance);
      offset = (offset - slope * distance) * constant;
      slope *= 2 * constant;
    }
  }

  template <bool kEntropy>
  __device__ __forceinline__ float at(float x) const {
    const float distance = x - max;
    const float s = fmaxf(fmaf(distance, kLog2E, -log_sum), kLeastExponent);
    const float p = confidence::exp2_fast(s);
    if constexpr (!kEntropy) return cross * p;
    if constexpr (kSquare) return p * fmaf(p, fmaf(slope, s, offset), cross);
    const float t = fmaxf(fmaf(distance, scale, -tempered), kLeastExponent);
    return fmaf(confidence::exp2_fast(t), fmaf(slope, t, offset), cross * p);
  }
};

// Stores the first elements of a vector one by one: at the end of a row, or at any address.
template <typename T>
__device__ __noinline__ void store_elements(T* out, uint4 vector, int n) {
  const T* element = reinterpret_cast<const T*>(&vector);
  for (int e = 0; e < Vector<T>::kElements; ++e) {
    if (e < n) out[e] = element[e];
  }
}

// Written once, and read by another kernel at the earliest: the first to leave the L2 cache.
template <typename T>
__device__ __forceinline__ void stream(T* out, const uint4& vector) {
  __stcs(reinterpret_cast<uint4*>(out), vector);
}

template <typename T>
__device__ __forceinline__ void store_vector(T* out, const uint4& vector, int n, bool aligned) {
  if (aligned && n >= Vector<T>::kElements) {
    stream(out, vector);
  } else if (n > 0) {
    store_elements(out, vector, n);
  }
}

template <typename T>
__device__ __forceinline__ bool is_aligned(const T* pointer) {
  return (reinterpret_cast<uintptr_t>(pointer) & 15) == 0;
}

template <typename T, bool kEntropy, bool kSquare, bool kWhole>
__device__ __forceinline__ void write_vectors(const RowGradient<kSquare>& gradient,
                                              const uint4* raw, int n, int lane, T* out) {
  constexpr int kElements = Vector<T>::kElements;
  const bool aligned = is_aligned(out);
#pragma unroll
  for (int v = 0; v < kVectors<T>; ++v) {
    float x[kElements];
    confidence::unpack<T>(raw[v], x);
#pragma unroll
    for (int e = 0; e < kElements; ++e) x[e] = gradient.template at<kEntropy>(x[e]);
    const int begin = confidence::vector_begin<T>(v, lane);
    if constexpr (kWhole) {
      stream(out + begin, pack<T>(x));
    } else {
      store_vector(out + begin, pack<T>(x), n - begin, aligned);
    }
  }
}

// The last tile of a row, or one at any address. A function of its own, so that the ordinary case
// keeps its registers.
template <typename T, bool kEntropy, bool kSquare>
__device__ __noinline__ void write_edge(RowGradient<kSquare> gradient, const uint4* raw, int n,
                                        int lane, T* out) {
  write_vectors<T, kEntropy, kSquare, false>(gradient, raw, n, lane, out);
}

template <typename T, bool kEntropy, bool kSquare>
__device__ __forceinline__ void write_tile(const RowGradient<kSquare>& gradient, const uint4* raw,
                                           int n, int lane, T* out) {
  if (n == kTile && is_aligned(out)) {
    write_vectors<T, kEntropy, kSquare, true>(gradient, raw, n, lane, out);
    return;
  }
  uint4 copy[kVectors<T>];
#pragma unroll
  for (int v = 0; v < kVectors<T>; ++v) copy[v] = raw[v];
  write_edge<T, kEntropy, kSquare>(gradient, copy, n, lane, out);
}

// One tile of a masked row. The label's element is written after the rest, by the lane that wrote
// it there, from the logit that it has read before: the gradient may overwrite it.
template <typename T, bool kSquare>
__device__ __forceinline__ void gradient_tile(const GradientArgs& args, const Weights& weights,
                                              const Item<T>& item, int n, const uint4* raw,
                                              int lane) {
  const int64_t row = divide(item.partial, args.vocabulary.by_tiles);
  const int64_t begin = int64_t{item.number} * kTile;
  const uint4 words = *reinterpret_cast<const uint4*>(&args.stats[row]);
  const RowStatistics statistics{__uint_as_float(words.x), __uint_as_float(words.y),
                                 __uint_as_float(words.z), __uint_as_float(words.w)};
  const int64_t label = args.labels[row] - begin;
  T* out = const_cast<T*>(confidence::row_pointer<T>(args.out, row)) + begin;
  const bool own_label = label >= 0 && label < n && label / Vector<T>::kElements % 32 == lane;
  const float label_logit = own_label ? Vector<T>::to_float(item.tile[label]) : 0.0f;
  const RowGradient<kSquare> gradient(args, weights, statistics);
  if (gradient.has_entropy) {
    write_tile<T, true>(gradient, raw, n, lane, out);
  } else {
    write_tile<T, false>(gradient, raw, n, lane, out);
  }
  if (!own_label) return;
  const float value = gradient.has_entropy ? gradient.template at<true>(label_logit)
                                           : gradient.template at<false>(label_logit);
  out[label] = to_element<T>(value - gradient.cross);
}

// The rows behind the list are 0.
template <typename T>
__device__ __forceinline__ void clear_rows(const GradientArgs& args) {
  constexpr int kElements = Vector<T>::kElements;
  const confidence::VocabularyArgs& vocabulary = args.vocabulary;
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const uint32_t tiles = static_cast<uint32_t>(vocabulary.tiles);
  const uint32_t first = static_cast<uint32_t>(confidence::list_length(vocabulary)) * tiles;
  const uint32_t end = static_cast<uint32_t>(vocabulary.capacity) * tiles;
  for (uint32_t i = first + blockIdx.x * warps + threadIdx.x / 32; i < end;
       i += gridDim.x * warps) {
    const uint32_t position = divide(i, vocabulary.by_tiles);
    const int number = static_cast<int>(i - position * tiles);
    const int64_t row = confidence::listed_row(vocabulary, position);
    if (row < 0) continue;
    T* out = const_cast<T*>(confidence::row_pointer<T>(args.out, row)) + int64_t{number} * kTile;
    const bool aligned = is_aligned(out);
    const int n = confidence::tile_length(vocabulary, number);
#pragma unroll
    for (int v = 0; v < kVectors<T>; ++v) {
      const int begin = confidence::vector_begin<T>(v, lane);
      store_vector(out + begin, make_uint4(0, 0, 0, 0), n - begin, aligned);
    }
    static_assert(kTile % (32 * kElements) == 0);
  }
}

template <typename T, bool kSquare>
__global__ void __maxnreg__(kRegisters<T>)
    gradient_kernel(const __grid_constant__ GradientArgs args, int stages) {
  extern __shared__ __align__(128) unsigned char memory[];
  Weights weights{};
  confidence::for_each_tile<T>(
      args.vocabulary, stages, memory, [&] { weights = read_weights(args); },
      [&](const Item<T>& item, int n, const uint4* raw, int lane) {
        gradient_tile<T, kSquare>(args, weights, item, n, raw, lane);
      });
  clear_rows<T>(args);
}

}  // namespace certainty_loss
}  // namespace lopa
