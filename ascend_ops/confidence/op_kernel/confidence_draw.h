// Random numbers of a draw: the words of Philox4x32-10 by the scalar unit, and what the Gumbel-max
// rule makes of them by the vector unit (docs/operators.md, "Sampling").
#pragma once

#include "confidence_tiling_data.h"
#include "kernel_operator.h"

namespace lopa {

using namespace AscendC;

// Philox4x32-10 (Salmon et al., SC 2011), keyed by the seed, in the stream of a row and step.
class Philox {
 public:
  uint32_t words[4] = {0, 0, 0, 0};

  __aicore__ inline void Init(int64_t seed, int64_t step, int64_t row) {
    const uint64_t s = static_cast<uint64_t>(seed), t = static_cast<uint64_t>(step);
    const uint64_t r = static_cast<uint64_t>(row);
    key_[0] = static_cast<uint32_t>(s);
    key_[1] = static_cast<uint32_t>(s >> 32);
    counter_[0] = static_cast<uint32_t>(r);
    counter_[1] = static_cast<uint32_t>(t);
    counter_[2] = static_cast<uint32_t>(t >> 32) ^ static_cast<uint32_t>(r >> 32);
  }

  // The four words of counter `c`, to `words`.
  __aicore__ inline void Generate(uint32_t c) {
    uint32_t c0 = c, c1 = counter_[0], c2 = counter_[1], c3 = counter_[2];
    uint32_t k0 = key_[0], k1 = key_[1];
    for (int32_t round = 0; round < 10; ++round) {
      const uint64_t product0 = static_cast<uint64_t>(c0) * 0xD2511F53u;
      const uint64_t product1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
      c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
      c1 = static_cast<uint32_t>(product1);
      c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
      c3 = static_cast<uint32_t>(product0);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    words[0] = c0;
    words[1] = c1;
    words[2] = c2;
    words[3] = c3;
  }

 private:
  uint32_t key_[2] = {0, 0};
  uint32_t counter_[3] = {0, 0, 0};
};

// Words to E of Gumbel numbers -log(E): E = -log1p(-v) in the lower half of the words, where
// log1p(-v) = log(w) v / (1 - w) for w = 1 - v as it is rounded (Kahan), and -log(1 - v) from the
// word's complement in the upper. So E = constant - factor log(argument).
class Gumbels {
 public:
  // Three tensors of as many elements as there are numbers.
  __aicore__ inline void Init(const LocalTensor<float>& argument, const LocalTensor<float>& factor,
                              const LocalTensor<float>& constant) {
    argument_ = argument;
    factor_ = factor;
    constant_ = constant;
  }

  // Numbers 0..n-1 by the words from counter `first` on; by the scalar unit.
  __aicore__ inline void Put(Philox& philox, uint32_t first, uint32_t n) {
    constexpr float kUnit = 2.3283064365386963e-10f;  // 2^-32
    for (uint32_t i = 0; i < n; ++i) {
      if (i % 4 == 0) philox.Generate(first + i / 4);
      const uint32_t word = philox.words[i % 4];
      float argument, factor = 1.0f, constant = 0.0f;
      if (word < 0x80000000u) {
        const float v = (static_cast<float>(word) + 0.5f) * kUnit;
        argument = 1.0f - v;
        if (argument == 1.0f) {
          constant = v;
        } else {
          factor = v / (1.0f - argument);
        }
      } else {
        argument = (static_cast<float>(0xFFFFFFFFu - word) + 0.5f) * kUnit;
      }
      argument_.SetValue(i, argument);
      factor_.SetValue(i, factor);
      constant_.SetValue(i, constant);
    }
  }

  // weights + Gumbel numbers, to `argument`; by the vector unit.
  __aicore__ inline void AddTo(const LocalTensor<float>& weights, uint32_t n) {
    const int32_t count = static_cast<int32_t>(n);
    Ln(argument_, argument_, count);
    Mul(argument_, argument_, factor_, count);
    Sub(argument_, constant_, argument_, count);
    Ln(argument_, argument_, count);
    Sub(argument_, weights, argument_, count);
  }

 private:
  LocalTensor<float> argument_, factor_, constant_;
};

}  // namespace lopa
