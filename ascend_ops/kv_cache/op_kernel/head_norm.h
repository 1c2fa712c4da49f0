// RMSNorm (arXiv 1910.07467) over head_dim of each head of a tile in unified buffer, in fp32: the
// q_norm and k_norm of Qwen3, which SDAR and LLaDA2 have too.
#pragma once

#include "kernel_operator.h"
#include "kv_cache_tiling_data.h"

namespace lopa {

// y = x * (mean(x^2) + eps)^-1/2 * weight. Squares are summed in the order of every backend: one
// half of a head with the other, then neighbours with neighbours, as WholeReduceSum does. Rsqrt
// would be one instruction, but of less than four digits (its document, which names Sqrt and Div).
class HeadNorm {
 public:
  enum Weight : uint32_t { kQueries, kKeys, kWeights };

  __aicore__ inline void Init(AscendC::TPipe* pipe, const KvPrewriteTiling& tiling) {
    headDim_ = tiling.headDim;
    divisor_ = tiling.headDimAsFloat;
    eps_ = tiling.normEps;
    pipe->InitBuffer(weights_, kWeights * headDim_ * sizeof(float));
    pipe->InitBuffer(scales_, kNormHeads * sizeof(float));
    pipe->InitBuffer(spread_, kNormHeads * kBlockElements * sizeof(float));
  }

  // A weight of dtype T, which a queue's buffer has brought.
  template <typename T>
  __aicore__ inline void Set(Weight which, AscendC::LocalTensor<T>& arrived) {
    AscendC::LocalTensor<float> to = Get(which);
    if constexpr (sizeof(T) < sizeof(float)) {
      AscendC::Cast(to, arrived, AscendC::RoundMode::CAST_NONE, headDim_);
    } else {
      AscendC::Muls(to, arrived, 1.0f, static_cast<int32_t>(headDim_));
    }
    AscendC::PipeBarrier<PIPE_V>();
  }

  // Normalises `heads` heads of x in place. `squares` has room for as many.
  __aicore__ inline void Apply(AscendC::LocalTensor<float>& x, AscendC::LocalTensor<float>& squares,
                               uint32_t heads, Weight which) {
    AscendC::LocalTensor<float> weight = Get(which);
    AscendC::Mul(squares, x, x, static_cast<int32_t>(heads * headDim_));
    for (uint32_t head = 0; head < heads; head += kNormHeads) {
      const uint32_t left = heads - head;
      const uint8_t count = static_cast<uint8_t>(left < kNormHeads ? left : kNormHeads);
      AscendC::LocalTensor<float> part = x[head * headDim_];
      AscendC::LocalTensor<float> sums = squares[head * headDim_];
      Spread(sums, count);
      AscendC::LocalTensor<float> spread = spread_.template Get<float>();
      Multiply(part, spread, count, 0, 1);
      Multiply(part, weight, count, 1, 0);
    }
  }

 private:
  static constexpr uint32_t kRepeatElements = 64;
  static constexpr uint32_t kBlockElements = 8;

  __aicore__ inline AscendC::LocalTensor<float> Get(Weight which) {
    return weights_.template Get<float>()[which * headDim_];
  }

  // Of the elements from d up to `end`, those of one repeat.
  __aicore__ inline uint64_t Lanes(uint32_t d, uint32_t end) {
    return end - d < kRepeatElements ? end - d : kRepeatElements;
  }

  // spread = a block for each of `count` heads, full of its scale. Scales are whole blocks too,
  // for Brcb: those beyond the heads are of a head whose squares sum to 1.
  __aicore__ inline void Spread(AscendC::LocalTensor<float>& squares, uint8_t count) {
    AscendC::LocalTensor<float> scales = scales_.template Get<float>();
    AscendC::LocalTensor<float> spread = spread_.template Get<float>();
    const int32_t blocks = (count + kBlockElements - 1) / kBlockElements;
    const int32_t padded = blocks * static_cast<int32_t>(kBlockElements);
    const uint32_t half = headDim_ / 2;
    const uint8_t pitch = static_cast<uint8_t>(headDim_ / kBlockElements);
    const AscendC::BinaryRepeatParams folded(1, 1, 1, pitch, pitch, pitch);
    AscendC::Duplicate(scales, 1.0f, padded);
    AscendC::PipeBarrier<PIPE_V>();
    for (uint32_t d = 0; d < half; d += kRepeatElements) {
      AscendC::LocalTensor<float> low = squares[d];
      AscendC::LocalTensor<float> high = squares[half + d];
      AscendC::Add(low, low, high, Lanes(d, half), count, folded);
    }
    AscendC::PipeBarrier<PIPE_V>();
    AscendC::WholeReduceSum<float>(scales, squares, static_cast<int32_t>(Lanes(0, half)), count, 1,
                                   1, pitch);
    if (half > kRepeatElements) {
      AscendC::LocalTensor<float> rest = squares[kRepeatElements];
      AscendC::WholeReduceSum<float>(spread, rest, static_cast<int32_t>(half - kRepeatElements),
                                     count, 1, 1, pitch);
      AscendC::PipeBarrier<PIPE_V>();
      AscendC::Add(scales, scales, spread, static_cast<int32_t>(count));
      AscendC::PipeBarrier<PIPE_V>();
    }
    AscendC::Duplicate(spread, divisor_, padded);
    AscendC::PipeBarrier<PIPE_V>();
    AscendC::Div(scales, scales, spread, padded);
    AscendC::PipeBarrier<PIPE_V>();
    AscendC::Adds(scales, scales, eps_, padded);
    AscendC::PipeBarrier<PIPE_V>();
    AscendC::Sqrt(scales, scales, padded);
    AscendC::Duplicate(spread, 1.0f, padded);
    AscendC::PipeBarrier<PIPE_V>();
    AscendC::Div(scales, spread, scales, padded);
    AscendC::PipeBarrier<PIPE_V>();
    AscendC::Brcb(spread, scales, static_cast<uint8_t>(blocks),
                  AscendC::BrcbRepeatParams(1, kBlockElements));
    AscendC::PipeBarrier<PIPE_V>();
  }

  // x *= factor, whose strides count blocks: a repeat is a head, 64 elements at a time.
  __aicore__ inline void Multiply(AscendC::LocalTensor<float>& x,
                                  AscendC::LocalTensor<float>& factor, uint8_t count,
                                  uint8_t blockStride, uint8_t repeatStride) {
    const uint8_t pitch = static_cast<uint8_t>(headDim_ / kBlockElements);
    const AscendC::BinaryRepeatParams shape(1, 1, blockStride, pitch, pitch, repeatStride);
    for (uint32_t d = 0; d < headDim_; d += kRepeatElements) {
      AscendC::LocalTensor<float> to = x[d];
      AscendC::LocalTensor<float> by = factor[blockStride * d];
      AscendC::Mul(to, to, by, Lanes(d, headDim_), count, shape);
    }
    AscendC::PipeBarrier<PIPE_V>();
  }

  AscendC::TBuf<AscendC::TPosition::VECCALC> weights_;
  AscendC::TBuf<AscendC::TPosition::VECCALC> scales_;
  AscendC::TBuf<AscendC::TPosition::VECCALC> spread_;
  uint32_t headDim_;
  float divisor_;
  float eps_;
};

}  // namespace lopa
