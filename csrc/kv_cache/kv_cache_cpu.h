// Between the driver and the rotation kernels, one an instruction set.
#pragma once

#include <cstdint>

#include "lopa/float_types.h"

namespace lopa {

// Rotates `heads` rows of `head_dim` elements by one position's cosines and sines, in fp32. Source
// and destination do not overlap; strides count elements.
using RotateFunction = void (*)(FloatType type, const void* src, int64_t src_stride, void* dst,
                                int64_t dst_stride, int64_t heads, int64_t head_dim,
                                const float* cos_sin);

void rotate_heads_portable(FloatType, const void*, int64_t, void*, int64_t, int64_t, int64_t,
                           const float*);
void rotate_heads_avx2(FloatType, const void*, int64_t, void*, int64_t, int64_t, int64_t,
                       const float*);
void rotate_heads_avx512(FloatType, const void*, int64_t, void*, int64_t, int64_t, int64_t,
                         const float*);

}  // namespace lopa
