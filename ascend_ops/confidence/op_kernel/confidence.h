// One pass over the vocabulary: token, probability and confidence of every row of logits.
//
// Vector cores take tiles of rows; each tile's maximum, its index, the sum of exp(x - max) and what
// the metric needs go to the workspace. After SyncAll, cores take rows and merge their tiles in
// order (the online softmax of arXiv 1805.02867, with a fixed tree).
#pragma once

#include "confidence_draw.h"
#include "kernel_operator.h"

namespace lopa {

using namespace AscendC;

struct ConfidenceInputs {
  GM_ADDR logits;
  GM_ADDR rows;
  GM_ADDR seed;
  GM_ADDR step;
};

// Where the outputs go; null where an operator has none.
struct ConfidenceOutputs {
  GM_ADDR token;
  GM_ADDR prob;
  GM_ADDR score;
  GM_ADDR unusable;
  GM_ADDR margin;
  GM_ADDR neg_entropy;
  GM_ADDR lse;
};

__aicore__ inline float float_of_bits(uint32_t bits) {
  union {
    uint32_t bits;
    float value;
  } word;
  word.bits = bits;
  return word.value;
}

constexpr uint32_t kNegInfBits = 0xFF800000u;
constexpr float kMaxFloat = 3.40282346638528859812e38f;
// exp(kNoWeight) is 0 in fp32, and 0 times it is 0.
constexpr float kNoWeight = -200.0f;

template <typename T>
struct NegInf {
  __aicore__ static inline T value() { return static_cast<T>(float_of_bits(kNegInfBits)); }
};
template <>
struct NegInf<bfloat16_t> {
  __aicore__ static inline bfloat16_t value() { return ToBfloat16(float_of_bits(kNegInfBits)); }
};

template <HardEvent event>
__aicore__ inline void synchronise() {
  const event_t id = static_cast<event_t>(GetTPipePtr()->FetchEventID(event));
  SetFlag<event>(id);
  WaitFlag<event>(id);
}

// The part of `total` that is this core's, as [begin, end).
struct Share {
  uint32_t begin, end;
  __aicore__ inline explicit Share(uint32_t total) {
    const uint32_t cores = static_cast<uint32_t>(GetBlockNum());
    const uint32_t index = static_cast<uint32_t>(GetBlockIdx());
    const uint32_t each = total / cores, more = total % cores;
    begin = index * each + (index < more ? index : more);
    end = begin + each + (index < more ? 1 : 0);
  }
};

template <typename T>
class Confidence {
 public:
  __aicore__ inline Confidence() {}

  __aicore__ inline void Init(TPipe* pipe, const ConfidenceTiling& tiling,
                              const ConfidenceInputs& inputs, const ConfidenceOutputs& outputs,
                              GM_ADDR workspace) {
    tiling_ = tiling;
    outputs_ = outputs;
    part_words_ = (tiling.sampled ? kDrawPartialBytes : kPartialBytes) / sizeof(float);
    logits_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(inputs.logits),
                            static_cast<uint64_t>(tiling.logits_rows) * tiling.vocab);
    if (tiling.has_rows) {
      rows_.SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(inputs.rows), tiling.rows);
    }
    if (tiling.sampled) {
      GlobalTensor<int64_t> number;
      number.SetGlobalBuffer(reinterpret_cast<__gm__ int64_t*>(inputs.seed), 1);
      seed_ = number.GetValue(0);
      if (tiling.has_step) {
        number.SetGlobalBuffer(reinterpret_cast<__gm__ int64_t*>(inputs.step), 1);
        step_ = number.GetValue(0);
      }
    }
    partials_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(workspace),
                              static_cast<uint64_t>(tiling.rows) * tiling.tiles * part_words_);
    pipe->InitBuffer(in_, 2, kConfidenceTile * sizeof(T));
    pipe->InitBuffer(x_, kConfidenceTile * sizeof(float));
    pipe->InitBuffer(y_, kConfidenceTile * sizeof(float));
    pipe->InitBuffer(mask_, kConfidenceTile / 8);
    pipe->InitBuffer(work_, kWorkBytes);
    pipe->InitBuffer(results_, kSlots * kBlockBytes);
    pipe->InitBuffer(staged_, kAtOnce * part_words_ * sizeof(float));
    pipe->InitBuffer(row_, tiling.tiles * part_words_ * sizeof(float));
    pipe->InitBuffer(deltas_, (kMaxTiles + 8) * sizeof(float));
    pipe->InitBuffer(weights_, (kMaxTiles + 8) * sizeof(float));
    pipe->InitBuffer(token_, kAtOnce * sizeof(int64_t));
    pipe->InitBuffer(floats_, kFloatOutputs * kAtOnce * sizeof(float));
    pipe->InitBuffer(unusable_, kAtOnce * sizeof(int32_t));
  }

  __aicore__ inline void Process() {
    ReduceTiles();
    SyncAll();
    MergeRows();
  }

 private:
  static constexpr uint32_t kBlockBytes = 32;
  static constexpr uint32_t kAtOnce = 64;  // partials, and rows, that are copied out together
  static constexpr uint32_t kFloatOutputs = 5;
  // ReduceMax with an index: two words for each repeat of 64, in three rounds.
  static constexpr uint32_t kWorkBytes = 2048;
  // Results of reductions, a data block each.
  enum Slot : uint32_t {
    kMaximum = 0,
    kAny,
    kSum,
    kWeighted,
    kSecond,
    kFinite,
    kMasses,
    kSlots = kMasses + kDrawTiles
  };
  static constexpr uint32_t kSlotWords = kBlockBytes / sizeof(float);
  enum Flag : uint32_t { kHasFinite = 1, kHasNan = 2 };
  // The words of a partial.
  enum Word : uint32_t {
    kPartMax = 0,
    kPartIndex,
    kPartSum,
    kPartWeighted,
    kPartSecond,
    kPartFlags,
    kPartMasses = 8
  };

  // The row of logits for output `n`, or -1.
  __aicore__ inline int64_t LogitsRow(uint32_t n) {
    const int64_t row =
        tiling_.has_rows ? static_cast<int64_t>(rows_.GetValue(n)) : static_cast<int64_t>(n);
    return row >= 0 && row < static_cast<int64_t>(tiling_.logits_rows) ? row : -1;
  }

  __aicore__ inline uint32_t TileLength(uint32_t tile) {
    const uint64_t left = tiling_.vocab - static_cast<uint64_t>(tile) * kConfidenceTile;
    return left < kConfidenceTile ? static_cast<uint32_t>(left) : kConfidenceTile;
  }

  __aicore__ inline static uint32_t RoundUp(uint32_t n, uint32_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
  }

  __aicore__ inline void ReduceTiles() {
    const Share share(tiling_.rows * tiling_.tiles);
    if (share.begin < share.end) CopyIn(share.begin);
    uint32_t first = share.begin, staged = 0;
    for (uint32_t unit = share.begin; unit < share.end; ++unit) {
      if (unit + 1 < share.end) CopyIn(unit + 1);
      if (staged == 0) synchronise<HardEvent::MTE3_S>();
      if (LogitsRow(unit / tiling_.tiles) >= 0) {
        ReduceTile(unit % tiling_.tiles, staged);
      } else {
        Stage(staged, float_of_bits(kNegInfBits), 0, 0.0f, 0.0f, 0.0f, 0);
      }
      ++staged;
      if (staged == kAtOnce || unit + 1 == share.end) {
        synchronise<HardEvent::S_MTE3>();
        DataCopy(partials_[static_cast<uint64_t>(first) * part_words_], staged_.Get<float>(),
                 staged * part_words_);
        first = unit + 1;
        staged = 0;
      }
    }
  }

  __aicore__ inline void CopyIn(uint32_t unit) {
    const int64_t row = LogitsRow(unit / tiling_.tiles);
    if (row < 0) return;
    const uint32_t tile = unit % tiling_.tiles, n = TileLength(tile);
    CopyTokens(
        static_cast<uint64_t>(row) * tiling_.vocab + static_cast<uint64_t>(tile) * kConfidenceTile,
        n);
  }

  // n logits from `offset` on to the queue, filled up with -inf to a whole data block.
  __aicore__ inline void CopyTokens(uint64_t offset, uint32_t n) {
    LocalTensor<T> in = in_.template AllocTensor<T>();
    const uint8_t padding = static_cast<uint8_t>(RoundUp(n, kBlockBytes / sizeof(T)) - n);
    const DataCopyExtParams copy{1, static_cast<uint32_t>(n * sizeof(T)), 0, 0, 0};
    const DataCopyPadExtParams<T> pad{padding > 0, 0, padding, NegInf<T>::value()};
    DataCopyPad(in, logits_[offset], copy, pad);
    in_.EnQue(in);
  }

  // The tile in fp32, filled up with -inf to whole repeats; its length with them.
  __aicore__ inline uint32_t Convert(uint32_t n) {
    LocalTensor<T> in = in_.template DeQue<T>();
    LocalTensor<float> x = x_.Get<float>();
    const uint32_t copied = RoundUp(n, kBlockBytes / sizeof(T)), whole = RoundUp(n, 64);
    if constexpr (sizeof(T) == sizeof(float)) {
      DataCopy(x, in, copied);
    } else {
      Cast(x, in, RoundMode::CAST_NONE, copied);
    }
    if (copied < whole) Duplicate(x[copied], float_of_bits(kNegInfBits), whole - copied);
    in_.FreeTensor(in);
    return whole;
  }

  __aicore__ inline LocalTensor<float> Result(Slot slot) {
    return results_.Get<float>()[slot * kSlotWords];
  }

  __aicore__ inline void FindMaximum(uint32_t count, float& maximum, uint32_t& index) {
    ReduceMax(Result(kMaximum), x_.Get<float>(), work_.Get<float>(), static_cast<int32_t>(count),
              true);
    synchronise<HardEvent::V_S>();
    maximum = Result(kMaximum).GetValue(0);
    index = Result(kMaximum).template ReinterpretCast<uint32_t>().GetValue(1);
  }

  __aicore__ inline void ReduceTile(uint32_t tile, uint32_t slot) {
    const uint32_t count = Convert(TileLength(tile));
    LocalTensor<float> x = x_.Get<float>(), y = y_.Get<float>(), work = work_.Get<float>();
    const int32_t n = static_cast<int32_t>(count);
    float maximum;
    uint32_t index, flags = kHasFinite;
    // A sum with a NaN among its terms is one.
    ReduceSum(Result(kAny), x, work, n);
    FindMaximum(count, maximum, index);
    const float any = Result(kAny).GetValue(0);
    // Zeros of both signs are equal, +inf is the largest finite number, and NaN is -inf.
    if (any != any || maximum != maximum || maximum > kMaxFloat || maximum == 0.0f) {
      flags = Sanitise(count, maximum, index);
    }
    if (maximum == float_of_bits(kNegInfBits)) {
      Stage(slot, maximum, 0, 0.0f, 0.0f, 0.0f, flags & kHasNan);
      synchronise<HardEvent::S_V>();
      return;
    }
    Adds(x, x, -maximum, n);
    if (tiling_.inverse_temperature != 1.0f) Muls(x, x, tiling_.inverse_temperature, n);
    Maxs(x, x, kNoWeight, n);
    Exp(y, x, n);
    ReduceSum(Result(kSum), y, work, n);
    if (tiling_.sampled) SumDrawTiles(y, work, count);
    if (tiling_.weighted) {
      Mul(y, y, x, n);
      ReduceSum(Result(kWeighted), y, work, n);
    }
    if (tiling_.second) {
      uint64_t only[2] = {uint64_t{1} << (index % 8), 0};
      Duplicate(x[index / 8 * 8], kNoWeight, only, 1, 1, 8);
      ReduceMax(Result(kSecond), x, work, n);
    }
    synchronise<HardEvent::V_S>();
    const float sum = Result(kSum).GetValue(0);
    const float weighted = tiling_.weighted ? Result(kWeighted).GetValue(0) : 0.0f;
    const float second = tiling_.second ? Result(kSecond).GetValue(0) : kNoWeight;
    Stage(slot, maximum, tile * kConfidenceTile + index, sum, weighted, second, flags);
    for (uint32_t i = 0; tiling_.sampled && i * kDrawTile < count; ++i) {
      staged_.Get<float>().SetValue(slot * part_words_ + kPartMasses + i,
                                    results_.Get<float>().GetValue((kMasses + i) * kSlotWords));
    }
    synchronise<HardEvent::S_V>();
  }

  // The mass of each part that a draw can go to.
  __aicore__ inline void SumDrawTiles(const LocalTensor<float>& y, const LocalTensor<float>& work,
                                      uint32_t count) {
    for (uint32_t i = 0; i * kDrawTile < count; ++i) {
      const uint32_t left = count - i * kDrawTile;
      ReduceSum(results_.Get<float>()[(kMasses + i) * kSlotWords], y[i * kDrawTile], work,
                static_cast<int32_t>(left < kDrawTile ? left : kDrawTile));
    }
  }

  // A tile with values that are not ordinary. Returns its flags.
  __aicore__ inline uint32_t Sanitise(uint32_t count, float& maximum, uint32_t& index) {
    LocalTensor<float> x = x_.Get<float>(), y = y_.Get<float>(), work = work_.Get<float>();
    LocalTensor<uint8_t> mask = mask_.Get<uint8_t>();
    const float neg_inf = float_of_bits(kNegInfBits);
    const int32_t n = static_cast<int32_t>(count);
    synchronise<HardEvent::S_V>();
    // Only a NaN differs from itself.
    Compare(mask, x, x, CMPMODE::EQ, count);
    Duplicate(y, 0.0f, n);
    Select(y, mask, y, 1.0f, SELMODE::VSEL_TENSOR_SCALAR_MODE, count);
    ReduceMax(Result(kAny), y, work, n);
    Select(x, mask, x, neg_inf, SELMODE::VSEL_TENSOR_SCALAR_MODE, count);
    Compares(mask, x, kMaxFloat, CMPMODE::LE, count);
    Select(y, mask, x, neg_inf, SELMODE::VSEL_TENSOR_SCALAR_MODE, count);
    ReduceMax(Result(kFinite), y, work, n);
    Mins(x, x, kMaxFloat, n);
    Adds(x, x, 0.0f, n);
    FindMaximum(count, maximum, index);
    uint32_t flags = Result(kAny).GetValue(0) > 0.0f ? kHasNan : 0;
    if (Result(kFinite).GetValue(0) > neg_inf) flags |= kHasFinite;
    return flags;
  }

  __aicore__ inline void Stage(uint32_t slot, float maximum, uint32_t index, float sum,
                               float weighted, float second, uint32_t flags) {
    LocalTensor<float> part = staged_.Get<float>()[slot * part_words_];
    LocalTensor<uint32_t> words = part.ReinterpretCast<uint32_t>();
    part.SetValue(kPartMax, maximum);
    words.SetValue(kPartIndex, index);
    part.SetValue(kPartSum, sum);
    part.SetValue(kPartWeighted, weighted);
    part.SetValue(kPartSecond, second);
    words.SetValue(kPartFlags, flags);
    for (uint32_t i = kPartFlags + 1; i < part_words_; ++i) words.SetValue(i, 0u);
  }

  // Why a row's statistics are of no use.
  enum Unusable : int32_t { kUsable = 0, kNotFinite = 1, kNoRow = 2 };

  struct Row {
    int64_t token = 0;
    float prob = 0.0f, margin = 0.0f;
    float neg_entropy, lse;
    int32_t unusable = kUsable;
    __aicore__ inline Row()
        : neg_entropy(float_of_bits(kNegInfBits)), lse(float_of_bits(kNegInfBits)) {}
  };

  __aicore__ inline void MergeRows() {
    const Share share(tiling_.rows);
    for (uint32_t first = share.begin; first < share.end; first += kAtOnce) {
      const uint32_t left = share.end - first, count = left < kAtOnce ? left : kAtOnce;
      synchronise<HardEvent::MTE3_S>();
      for (uint32_t i = 0; i < count; ++i) {
        Row row;
        if (LogitsRow(first + i) >= 0) {
          Merge(first + i, row);
        } else {
          row.unusable = kNoRow;
        }
        Put(i, row);
      }
      synchronise<HardEvent::S_MTE3>();
      CopyOut(first, count);
    }
  }

  __aicore__ inline void Merge(uint32_t n, Row& row) {
    const uint32_t tiles = tiling_.tiles;
    LocalTensor<float> parts = row_.Get<float>();
    LocalTensor<uint32_t> words = row_.Get<uint32_t>();
    synchronise<HardEvent::S_MTE2>();
    DataCopy(parts, partials_[static_cast<uint64_t>(n) * tiles * part_words_], tiles * part_words_);
    synchronise<HardEvent::MTE2_S>();
    float maximum = float_of_bits(kNegInfBits);
    uint32_t flags = 0, best = 0;
    for (uint32_t t = 0; t < tiles; ++t) {
      const float own = parts.GetValue(t * part_words_ + kPartMax);
      flags |= words.GetValue(t * part_words_ + kPartFlags);
      if (own > maximum) {
        maximum = own;
        best = t;
      }
    }
    row.unusable = (flags & kHasNan) != 0 || (flags & kHasFinite) == 0 ? kNotFinite : kUsable;
    if ((flags & kHasFinite) == 0) return;

    LocalTensor<float> deltas = deltas_.Get<float>(), weights = weights_.Get<float>();
    float second = parts.GetValue(best * part_words_ + kPartSecond);
    for (uint32_t t = 0; t < tiles; ++t) {
      const float own = parts.GetValue(t * part_words_ + kPartMax);
      float delta = (own - maximum) * tiling_.inverse_temperature;
      if (!(delta > kNoWeight)) delta = kNoWeight;
      deltas.SetValue(t, delta);
      if (t != best && delta > second) second = delta;
    }
    deltas.SetValue(tiles, second);
    synchronise<HardEvent::S_V>();
    Exp(weights, deltas, static_cast<int32_t>(tiles + 1));
    synchronise<HardEvent::V_S>();
    float sum = 0.0f, weighted = 0.0f;
    for (uint32_t t = 0; t < tiles; ++t) {
      const float weight = weights.GetValue(t);
      const float own = parts.GetValue(t * part_words_ + kPartSum);
      sum += weight * own;
      weighted +=
          weight * (parts.GetValue(t * part_words_ + kPartWeighted) + own * deltas.GetValue(t));
    }
    const float second_weight = weights.GetValue(tiles);
    float log_weight = 0.0f;
    const int64_t drawn = tiling_.sampled ? Draw(LogitsRow(n), maximum, log_weight) : 0;
    const float log_sum = Log(sum);
    row.token = tiling_.sampled
                    ? drawn
                    : static_cast<int64_t>(words.GetValue(best * part_words_ + kPartIndex));
    row.prob = tiling_.sampled ? Exponential(log_weight) / sum : 1.0f / sum;
    row.margin = OneMinusExp(second, second_weight) / sum;
    row.neg_entropy = weighted / sum - log_sum;
    if (row.neg_entropy > 0.0f) row.neg_entropy = 0.0f;
    row.lse = maximum * tiling_.lse_factor * tiling_.lse_scale + log_sum;
    if (row.lse > kMaxFloat) row.lse = kMaxFloat;
    if (row.lse < -kMaxFloat) row.lse = -kMaxFloat;
  }

  // 1 - exp(x) for x <= 0: the difference of neighbours cancels, so that near 0 the series is
  // summed.
  __aicore__ inline static float OneMinusExp(float x, float exp_x) {
    if (x < -0.25f) return 1.0f - exp_x;
    float sum = 1.0f;
    for (int32_t n = 7; n > 1; --n) sum = 1.0f + x / static_cast<float>(n) * sum;
    return -x * sum;
  }

  // A token of row `r` by the Gumbel-max rule, and (its logit - maximum) / temperature: a part of
  // the vocabulary by its mass, then a token of that part.
  __aicore__ inline int64_t Draw(int64_t r, float maximum, float& log_weight) {
    LocalTensor<float> x = x_.Get<float>(), y = y_.Get<float>();
    Philox philox;
    philox.Init(seed_, step_, r);
    Gumbels gumbels;
    gumbels.Init(y, y[kDrawTile], y[2 * kDrawTile]);
    const uint32_t parts = static_cast<uint32_t>((tiling_.vocab + kDrawTile - 1) / kDrawTile);
    uint32_t part = 0;
    if (parts > 1) {
      for (uint32_t i = 0; i < parts; ++i) {
        const uint32_t tile = i / kDrawTiles;
        const float mass =
            row_.Get<float>().GetValue(tile * part_words_ + kPartMasses + i % kDrawTiles);
        // A part without mass is never drawn.
        x.SetValue(i, mass > 0.0f ? mass : 1.0f);
        x.SetValue(kDrawTile + i, mass > 0.0f ? deltas_.Get<float>().GetValue(tile) : -kMaxFloat);
      }
      gumbels.Put(philox, 0x80000000u, parts);
      synchronise<HardEvent::S_V>();
      Ln(x, x, static_cast<int32_t>(parts));
      Add(x, x, x[kDrawTile], static_cast<int32_t>(parts));
      gumbels.AddTo(x, parts);
      part = Best(y, parts);
    }
    const uint64_t first = static_cast<uint64_t>(part) * kDrawTile;
    const uint64_t left = tiling_.vocab - first;
    const uint32_t n = left < kDrawTile ? static_cast<uint32_t>(left) : kDrawTile;
    CopyTokens(static_cast<uint64_t>(r) * tiling_.vocab + first, n);
    const uint32_t count = Convert(n);
    float ignored;
    uint32_t place;
    Sanitise(count, ignored, place);
    Adds(x, x, -maximum, static_cast<int32_t>(count));
    Muls(x, x, tiling_.inverse_temperature, static_cast<int32_t>(count));
    gumbels.Put(philox, static_cast<uint32_t>(first / 4), count);
    synchronise<HardEvent::S_V>();
    gumbels.AddTo(x, count);
    place = Best(y, count);
    log_weight = x.GetValue(place);
    return static_cast<int64_t>(first) + place;
  }

  // The first place of the largest of n.
  __aicore__ inline uint32_t Best(const LocalTensor<float>& values, uint32_t n) {
    ReduceMax(Result(kMaximum), values, work_.Get<float>(), static_cast<int32_t>(n), true);
    synchronise<HardEvent::V_S>();
    return Result(kMaximum).template ReinterpretCast<uint32_t>().GetValue(1);
  }

  __aicore__ inline float Exponential(float value) {
    LocalTensor<float> cell = deltas_.Get<float>();
    cell.SetValue(0, value > kNoWeight ? value : kNoWeight);
    synchronise<HardEvent::S_V>();
    Exp(cell, cell, 1);
    synchronise<HardEvent::V_S>();
    return cell.GetValue(0);
  }

  // The scalar unit has no logarithm.
  __aicore__ inline float Log(float value) {
    LocalTensor<float> cell = deltas_.Get<float>();
    cell.SetValue(0, value);
    synchronise<HardEvent::S_V>();
    Ln(cell, cell, 1);
    synchronise<HardEvent::V_S>();
    return cell.GetValue(0);
  }

  __aicore__ inline LocalTensor<float> FloatOutput(uint32_t which) {
    return floats_.Get<float>()[which * kAtOnce];
  }

  __aicore__ inline void Put(uint32_t i, const Row& row) {
    token_.Get<int64_t>().SetValue(i, row.token);
    FloatOutput(0).SetValue(i, row.prob);
    FloatOutput(1).SetValue(i, Score(row));
    FloatOutput(2).SetValue(i, row.margin);
    FloatOutput(3).SetValue(i, row.neg_entropy);
    FloatOutput(4).SetValue(i, row.lse);
    unusable_.Get<int32_t>().SetValue(i, row.unusable);
  }

  __aicore__ inline float Score(const Row& row) {
    // Without a finite logit there is no distribution.
    if (row.lse == float_of_bits(kNegInfBits)) return row.lse;
    if (tiling_.metric == static_cast<uint32_t>(ConfidenceMetric::kProb)) return row.prob;
    if (tiling_.metric == static_cast<uint32_t>(ConfidenceMetric::kMargin)) return row.margin;
    return row.neg_entropy;
  }

  template <typename U>
  __aicore__ inline void CopyOutput(GM_ADDR to, LocalTensor<U> from, uint32_t first,
                                    uint32_t count) {
    if (to == nullptr) return;
    GlobalTensor<U> out;
    out.SetGlobalBuffer(reinterpret_cast<__gm__ U*>(to), tiling_.rows);
    DataCopyPad(out[first], from, {1, static_cast<uint32_t>(count * sizeof(U)), 0, 0, 0});
  }

  __aicore__ inline void CopyOut(uint32_t first, uint32_t count) {
    CopyOutput(outputs_.token, token_.Get<int64_t>(), first, count);
    CopyOutput(outputs_.prob, FloatOutput(0), first, count);
    CopyOutput(outputs_.score, FloatOutput(1), first, count);
    CopyOutput(outputs_.margin, FloatOutput(2), first, count);
    CopyOutput(outputs_.neg_entropy, FloatOutput(3), first, count);
    CopyOutput(outputs_.lse, FloatOutput(4), first, count);
    CopyOutput(outputs_.unusable, unusable_.Get<int32_t>(), first, count);
  }

  ConfidenceTiling tiling_;
  uint32_t part_words_ = 0;
  int64_t seed_ = 0, step_ = 0;
  ConfidenceOutputs outputs_;
  GlobalTensor<T> logits_;
  GlobalTensor<int32_t> rows_;
  GlobalTensor<float> partials_;
  TQue<TPosition::VECIN, 2> in_;
  TBuf<TPosition::VECCALC> x_, y_, mask_, work_, results_, staged_, row_, deltas_, weights_;
  TBuf<TPosition::VECCALC> token_, floats_, unusable_;
};

}  // namespace lopa
