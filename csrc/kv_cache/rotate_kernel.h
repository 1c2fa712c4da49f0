// Rotary embedding (RoFormer, arXiv 2104.09864) in the rotate-half order of GPT-NeoX; included
// once by the file of each instruction set.
//
// Products and sums round one by one, as PyTorch's do: a rotated key has the same bits on every
// instruction set and in the reference.
#pragma once

#include "kv_cache/kv_cache_cpu.h"
#include "lopa/simd.h"

namespace lopa {
namespace {

template <typename T>
void rotate(const T* src, int64_t src_stride, T* dst, int64_t dst_stride, int64_t heads,
            int64_t head_dim, const float* cos_sin) {
  int64_t half = head_dim / 2;
  const float* cosine = cos_sin;
  const float* sine = cos_sin + half;
  for (int64_t h = 0; h < heads; ++h, src += src_stride, dst += dst_stride) {
    int64_t d = 0;
    for (; d + Vec::kWidth <= half; d += Vec::kWidth) {
      Vec c = load(cosine + d);
      Vec s = load(sine + d);
      Vec low = load(src + d);
      Vec high = load(src + half + d);
      store(dst + d, low * c - high * s);
      store(dst + half + d, high * c + low * s);
    }
    for (; d < half; ++d) {
      float low = to_float(src[d]);
      float high = to_float(src[half + d]);
      from_float(low * cosine[d] - high * sine[d], dst + d);
      from_float(high * cosine[d] + low * sine[d], dst + half + d);
    }
  }
}

inline void rotate_heads(FloatType type, const void* src, int64_t src_stride, void* dst,
                         int64_t dst_stride, int64_t heads, int64_t head_dim,
                         const float* cos_sin) {
  switch (type) {
    case FloatType::kBFloat16:
      return rotate(static_cast<const BFloat16*>(src), src_stride, static_cast<BFloat16*>(dst),
                    dst_stride, heads, head_dim, cos_sin);
    case FloatType::kHalf:
      return rotate(static_cast<const Half*>(src), src_stride, static_cast<Half*>(dst), dst_stride,
                    heads, head_dim, cos_sin);
    case FloatType::kFloat:
      return rotate(static_cast<const float*>(src), src_stride, static_cast<float*>(dst),
                    dst_stride, heads, head_dim, cos_sin);
  }
}

}  // namespace
}  // namespace lopa
