// Rotary embedding (RoFormer, arXiv 2104.09864) in the rotate-half order of GPT-NeoX, after an
// optional RMSNorm (arXiv 1910.07467); included once by the file of each instruction set.
//
// Products and sums round one by one, as PyTorch's do, those of squares in one order: a key has the
// same bits on every instruction set and in the reference.
#pragma once

#include "kv_cache/kv_cache_cpu.h"
#include "lopa/simd.h"

namespace lopa {
namespace {

// Elements of a block of squares(), a multiple of every vector's width.
constexpr int64_t kSquaresBlock = 64;

// The sum of the squares of elements `first` to `first + count`, a power of two of them, of both
// halves of a row; elements past `half` are 0. Element d of one half goes with that of the other,
// then neighbours with neighbours, pairs with pairs and so on: the order of every backend, so that
// all have the same bits.
template <typename T>
float squares(const T* src, int64_t half, int64_t first, int64_t count) {
  if (first >= half) return 0.0f;
  if (count > kSquaresBlock) {
    return squares(src, half, first, count / 2) + squares(src, half, first + count / 2, count / 2);
  }
  Vec sums[kSquaresBlock / Vec::kWidth];
  int64_t vectors = (count + Vec::kWidth - 1) / Vec::kWidth;
  const T* low = src + first;
  const T* high = low + half;
  int64_t rest = half - first;
  for (int64_t i = 0; i < vectors; ++i) {
    int64_t d = i * Vec::kWidth;
    if (d + Vec::kWidth <= rest) {
      Vec a = load(low + d);
      Vec b = load(high + d);
      sums[i] = a * a + b * b;
      continue;
    }
    float tail[Vec::kWidth] = {};
    for (int64_t j = 0; d + j < rest && j < Vec::kWidth; ++j) {
      float a = to_float(low[d + j]);
      float b = to_float(high[d + j]);
      tail[j] = a * a + b * b;
    }
    sums[i] = load(tail);
  }
  for (int64_t n = vectors; n > 1; n /= 2) {
    for (int64_t i = 0; i < n / 2; ++i) sums[i] = add_pairs(sums[2 * i], sums[2 * i + 1]);
  }
  for (int64_t n = Vec::kWidth; n > 1; n /= 2) sums[0] = add_pairs(sums[0], sums[0]);
  float lanes[Vec::kWidth];
  store(lanes, sums[0]);
  return lanes[0];
}

// What RMSNorm multiplies a row by, before the weights.
template <typename T>
float norm_scale(const T* src, int64_t head_dim, float eps) {
  int64_t half = head_dim / 2;
  int64_t count = 1;
  while (count < half) count *= 2;
  float mean = squares(src, half, 0, count) / static_cast<float>(head_dim);
  return 1.0f / __builtin_sqrtf(mean + eps);
}

template <typename T, bool kNorm>
void rotate(const RotateTask& task) {
  const T* src = static_cast<const T*>(task.src);
  T* dst = static_cast<T*>(task.dst);
  const T* weight = static_cast<const T*>(task.weight);
  int64_t half = task.head_dim / 2;
  const float* cosine = task.cos_sin;
  const float* sine = cosine + half;
  for (int64_t h = 0; h < task.heads; ++h, src += task.src_stride, dst += task.dst_stride) {
    float scale = kNorm ? norm_scale(src, task.head_dim, task.eps) : 1.0f;
    int64_t d = 0;
    for (; d + Vec::kWidth <= half; d += Vec::kWidth) {
      Vec c = load(cosine + d);
      Vec s = load(sine + d);
      Vec low = load(src + d);
      Vec high = load(src + half + d);
      if constexpr (kNorm) {
        low = low * set1(scale) * load(weight + d);
        high = high * set1(scale) * load(weight + half + d);
      }
      store(dst + d, low * c - high * s);
      store(dst + half + d, high * c + low * s);
    }
    for (; d < half; ++d) {
      float low = to_float(src[d]);
      float high = to_float(src[half + d]);
      if constexpr (kNorm) {
        low = low * scale * to_float(weight[d]);
        high = high * scale * to_float(weight[half + d]);
      }
      from_float(low * cosine[d] - high * sine[d], dst + d);
      from_float(high * cosine[d] + low * sine[d], dst + half + d);
    }
  }
}

template <typename T>
void rotate(const RotateTask& task) {
  if (task.weight != nullptr) return rotate<T, true>(task);
  rotate<T, false>(task);
}

inline void rotate_heads(const RotateTask& task) {
  switch (task.type) {
    case FloatType::kBFloat16:
      return rotate<BFloat16>(task);
    case FloatType::kHalf:
      return rotate<Half>(task);
    case FloatType::kFloat:
      return rotate<float>(task);
  }
}

}  // namespace
}  // namespace lopa
