// Rotary embedding (RoFormer, arXiv 2104.09864) of a tile in unified buffer, in fp32 and the
// rotate-half order of GPT-NeoX.
#pragma once

#include "kernel_operator.h"

namespace lopa {

// One half of every head of a tile [columns, heads, head_dim], or a row of angles for all heads of
// a column. Pitches count elements.
struct HalfHeads {
  AscendC::LocalTensor<float> data;
  uint32_t columnPitch;
  uint32_t headPitch;  // 0: the same for all heads
};

enum class Arithmetic { kMul, kAdd, kSub };

// y = a op b. A repeat is one head of a column, 64 elements at a time.
template <Arithmetic kOp>
__aicore__ inline void Apply(const HalfHeads& y, const HalfHeads& a, const HalfHeads& b,
                             uint32_t columns, uint32_t heads, uint32_t half) {
  constexpr uint32_t kRepeatElements = 64;
  constexpr uint32_t kBlockElements = 8;
  const AscendC::BinaryRepeatParams shape(1, 1, 1,
                                          static_cast<uint8_t>(y.headPitch / kBlockElements),
                                          static_cast<uint8_t>(a.headPitch / kBlockElements),
                                          static_cast<uint8_t>(b.headPitch / kBlockElements));
  const uint8_t repeats = static_cast<uint8_t>(heads);
  for (uint32_t column = 0; column < columns; ++column) {
    for (uint32_t d = 0; d < half; d += kRepeatElements) {
      const uint64_t mask = half - d < kRepeatElements ? half - d : kRepeatElements;
      AscendC::LocalTensor<float> to = y.data[column * y.columnPitch + d];
      AscendC::LocalTensor<float> left = a.data[column * a.columnPitch + d];
      AscendC::LocalTensor<float> right = b.data[column * b.columnPitch + d];
      if constexpr (kOp == Arithmetic::kMul) {
        AscendC::Mul(to, left, right, mask, repeats, shape);
      } else if constexpr (kOp == Arithmetic::kAdd) {
        AscendC::Add(to, left, right, mask, repeats, shape);
      } else {
        AscendC::Sub(to, left, right, mask, repeats, shape);
      }
    }
  }
}

// y = x rotated, where `angles` has a row for each column: cosines, then sines. `product` has room
// for half a tile. Products and sums round one by one, as in every backend: the same bits.
__aicore__ inline void RotateHalves(AscendC::LocalTensor<float>& y, AscendC::LocalTensor<float>& x,
                                    AscendC::LocalTensor<float>& angles,
                                    AscendC::LocalTensor<float>& product, uint32_t columns,
                                    uint32_t heads, uint32_t headDim) {
  const uint32_t half = headDim / 2;
  const uint32_t column = heads * headDim;
  const HalfHeads xLow{x, column, headDim};
  const HalfHeads xHigh{x[half], column, headDim};
  const HalfHeads yLow{y, column, headDim};
  const HalfHeads yHigh{y[half], column, headDim};
  const HalfHeads cosine{angles, headDim, 0};
  const HalfHeads sine{angles[half], headDim, 0};
  const HalfHeads turned{product, heads * half, half};
  Apply<Arithmetic::kMul>(yLow, xLow, cosine, columns, heads, half);
  Apply<Arithmetic::kMul>(yHigh, xHigh, cosine, columns, heads, half);
  Apply<Arithmetic::kMul>(turned, xHigh, sine, columns, heads, half);
  AscendC::PipeBarrier<PIPE_V>();
  Apply<Arithmetic::kSub>(yLow, yLow, turned, columns, heads, half);
  AscendC::PipeBarrier<PIPE_V>();
  Apply<Arithmetic::kMul>(turned, xLow, sine, columns, heads, half);
  AscendC::PipeBarrier<PIPE_V>();
  Apply<Arithmetic::kAdd>(yHigh, yHigh, turned, columns, heads, half);
  AscendC::PipeBarrier<PIPE_V>();
}

}  // namespace lopa
