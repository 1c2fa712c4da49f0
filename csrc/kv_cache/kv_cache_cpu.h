// Between the driver and the rotation kernels, one an instruction set.
#pragma once

#include <cstdint>

#include "lopa/float_types.h"

namespace lopa {

// `heads` rows of `head_dim` elements, and what is done to each in fp32: RMSNorm with `weight`
// (null: none), then the rotation by one position's cosines and sines. Source and destination do
// not overlap; strides count elements.
struct RotateTask {
  FloatType type;
  const void* src;
  int64_t src_stride;
  void* dst;
  int64_t dst_stride;
  int64_t heads;
  int64_t head_dim;
  const float* cos_sin;
  const void* weight;
  float eps;
};

using RotateFunction = void (*)(const RotateTask& task);

void rotate_heads_portable(const RotateTask& task);
void rotate_heads_avx2(const RotateTask& task);
void rotate_heads_avx512(const RotateTask& task);

}  // namespace lopa
