// branch_attention on a vector core: the online softmax of its half of a tile's rows, and the
// running output, in fp32. A row's maximum, sum and rescaling factor fill a block of 8 equal
// floats, so that instructions with a block stride of 0 apply them to whole rows.
#pragma once

#include "branch_attention_job.h"
#include "branch_attention_output.h"
#include "kernel_operator.h"

namespace branch_attention {

// The rows that a vector core owns of a job, [begin, end), multiples of 16.
struct Half {
  uint32_t begin;
  uint32_t end;
};

__aicore__ inline Half OwnHalf(const Job& job, uint32_t subBlock) {
  const uint32_t middle = (job.rows / 16 + 1) / 2 * 16;
  return subBlock == 0 ? Half{0, middle} : Half{middle, job.rows};
}

// Below every score, yet finite: the difference of two of them is 0 and not NaN.
constexpr float MASKED = -3.0e38f;
constexpr uint32_t SCORE_ROWS = 16;  // of scores, at a time

template <typename T>
class VectorSide {
 public:
  __aicore__ inline void Init(GM_ADDR out, GM_ADDR lse, GM_ADDR workspace, Schedule* schedule,
                              const BranchAttentionTiling* tiling, AscendC::TPipe* pipe) {
    t = tiling;
    work = schedule;
    core = AscendC::GetBlockIdx() / VECTORS_PER_CUBE;
    subBlock = AscendC::GetSubBlockIdx();
    const uint32_t rows = 2 * BRANCH_ATTENTION_TILE_ROWS;
    const uint32_t scores = rows * BRANCH_ATTENTION_KEYS;
    const uint64_t block = core;
    scoreGm.SetGlobalBuffer((__gm__ float*)(workspace + t->scoreOffset) + block * scores, scores);
    weightGm.SetGlobalBuffer((__gm__ T*)(workspace + t->weightOffset) + block * scores, scores);
    const uint32_t products = rows * t->headDim;
    productGm.SetGlobalBuffer((__gm__ float*)(workspace + t->valueOffset) + block * products,
                              products);
    if (t->splits > 1) {
      const uint64_t partialRows = static_cast<uint64_t>(t->jobs) * BRANCH_ATTENTION_TILE_ROWS;
      partialGm.SetGlobalBuffer((__gm__ float*)(workspace + t->partialOffset),
                                partialRows * t->headDim);
      stateGm.SetGlobalBuffer((__gm__ float*)(workspace + t->partialStateOffset),
                              partialRows * 2 * BLOCK);
    }

    constexpr uint32_t scoreChunk = SCORE_ROWS * BRANCH_ATTENTION_KEYS;
    constexpr uint32_t outChunk = CHUNK_ROWS * BRANCH_ATTENTION_MAX_HEAD_DIM;
    constexpr uint32_t chunk = scoreChunk > outChunk ? scoreChunk : outChunk;
    constexpr uint32_t states = HALF_ROWS * BLOCK * sizeof(float);
    pipe->InitBuffer(scoreQueue, 2, chunk * sizeof(float));
    pipe->InitBuffer(productQueue, 2, chunk * sizeof(float));
    writer.Init(out, lse, subBlock, chunk, tiling, pipe);
    pipe->InitBuffer(outputBuffer, HALF_ROWS * t->headDim * sizeof(float));
    pipe->InitBuffer(maximumBuffer, states);
    pipe->InitBuffer(sumBuffer, states);
    pipe->InitBuffer(rescaleBuffer, 2 * states);
    pipe->InitBuffer(foldBuffer, SCORE_ROWS * LANES * sizeof(float));
    pipe->InitBuffer(reducedBuffer, SCORE_ROWS * sizeof(float));
    pipe->InitBuffer(spreadBuffer, CHUNK_ROWS * BLOCK * sizeof(float));
    output = outputBuffer.template Get<float>();
    maximum = maximumBuffer.template Get<float>();
    sum = sumBuffer.template Get<float>();
    rescale = rescaleBuffer.template Get<float>();
    fold = foldBuffer.template Get<float>();
    reduced = reducedBuffer.template Get<float>();
    spread = spreadBuffer.template Get<float>();
  }

  __aicore__ inline void Process() {
    for (uint32_t index = core; index < t->jobs; index += t->cores) {
      Job job;
      work->Get(index, job);
      if (work->IsLastSplit(job)) {
        writer.WriteDeadRows(job);
      }
      Step step;
      work->First(job, step);
      if (!step.valid) {
        continue;
      }
      half = OwnHalf(job, subBlock);
      StartRows();
      Softmax(job, step, slot);
      while (step.valid) {
        Step ahead = step;
        work->Next(job, ahead);
        if (ahead.valid) {
          Softmax(job, ahead, slot ^ 1);
        }
        Accumulate(step, slot);
        step = ahead;
        slot ^= 1;
      }
      if (t->splits == 1) {
        FinishRows(job);
      } else {
        StorePart(index);
      }
    }
    if (t->splits > 1) {
      AscendC::SyncAll();
      Merge();
    }
  }

 private:
  static constexpr uint32_t STATE = HALF_ROWS * BLOCK;
  static constexpr uint8_t STRIDE = BRANCH_ATTENTION_KEYS / BLOCK;  // of a row of scores, in blocks

  __aicore__ inline void Settle() { AscendC::PipeBarrier<PIPE_V>(); }

  __aicore__ inline void StartRows() {
    const uint32_t rows = half.end - half.begin;
    if (rows == 0) {
      return;
    }
    AscendC::Duplicate(output, 0.0f, rows * t->headDim);
    AscendC::Duplicate(maximum, MASKED, rows * BLOCK);
    AscendC::Duplicate(sum, 0.0f, rows * BLOCK);
    Settle();
  }

  // The rows of a step that this core owns.
  __aicore__ inline Half Own(const Step& step) const {
    const uint32_t begin = step.rowBegin > half.begin ? step.rowBegin : half.begin;
    const uint32_t end = Smaller(step.rowEnd, half.end);
    return {begin, end > begin ? end : begin};
  }

  // The flag also lets the cube core write the slot of two steps ago anew: in rows that this core
  // has read its copies have ended, since the weights of those rows follow them.
  __aicore__ inline void Softmax(const Job& job, const Step& step, uint32_t from) {
    AscendC::CrossCoreWaitFlag(SCORES_READY + from);
    const Half own = Own(step);
    for (uint32_t row = own.begin; row < own.end; row += SCORE_ROWS) {
      SoftmaxRows(job, step, row, Smaller(own.end - row, SCORE_ROWS), from);
    }
    AscendC::CrossCoreSetFlag<2, PIPE_MTE3>(WEIGHTS_READY + from);
  }

  __aicore__ inline void SoftmaxRows(const Job& job, const Step& step, uint32_t row, uint32_t rows,
                                     uint32_t from) {
    constexpr uint32_t keys = BRANCH_ATTENTION_KEYS;
    const uint32_t computed = AlignUp(step.keys, 16);
    // Whole repeats of a row; what lies behind `computed` in the last is masked.
    const uint32_t active = AlignUp(computed, LANES);
    const uint64_t place = (from * BRANCH_ATTENTION_TILE_ROWS + row) * keys;
    {
      AscendC::LocalTensor<float> loading = scoreQueue.template AllocTensor<float>();
      AscendC::DataCopyParams copy;
      copy.blockCount = rows;
      copy.blockLen = computed / BLOCK;
      copy.srcStride = (keys - computed) / BLOCK;
      copy.dstStride = (keys - computed) / BLOCK;
      AscendC::DataCopy(loading, scoreGm[place], copy);
      scoreQueue.EnQue(loading);
    }
    AscendC::LocalTensor<float> scores = scoreQueue.template DeQue<float>();
    const AscendC::UnaryRepeatParams rowwise(1, 1, STRIDE, STRIDE);
    for (uint32_t lane = 0; lane < computed; lane += LANES) {
      const uint64_t lanes = Smaller(computed - lane, LANES);
      AscendC::Muls(scores[lane], scores[lane], t->scale, lanes, rows, rowwise);
    }
    Settle();
    Mask(job, step, row, rows, active, scores);

    const uint32_t local = (row - half.begin) * BLOCK;
    const uint64_t all = LANES;
    AscendC::LocalTensor<float> factor = rescale[from * STATE + local];
    ReduceRows<false>(scores, rows, active);
    AscendC::Max(spread, spread, maximum[local], rows * BLOCK);
    Settle();
    AscendC::Sub(factor, maximum[local], spread, rows * BLOCK);
    for (uint32_t lane = 0; lane < active; lane += LANES) {
      AscendC::Sub(scores[lane], scores[lane], spread, all, rows,
                   AscendC::BinaryRepeatParams(1, 1, 0, STRIDE, STRIDE, 1));
    }
    Settle();
    AscendC::Adds(maximum[local], spread, 0.0f, rows * BLOCK);
    AscendC::Exp(factor, factor, rows * BLOCK);
    for (uint32_t lane = 0; lane < active; lane += LANES) {
      AscendC::Exp(scores[lane], scores[lane], all, rows, rowwise);
    }
    Settle();

    AscendC::LocalTensor<T> weights = writer.queue.template AllocTensor<T>();
    constexpr uint8_t halfStride = keys * sizeof(T) / 32;
    for (uint32_t lane = 0; lane < active; lane += LANES) {
      AscendC::Cast(weights[lane], scores[lane], AscendC::RoundMode::CAST_RINT, all, rows,
                    AscendC::UnaryRepeatParams(1, 1, halfStride, STRIDE));
    }
    writer.queue.EnQue(weights);
    AscendC::Mul(sum[local], sum[local], factor, rows * BLOCK);
    ReduceRows<true>(scores, rows, active);
    AscendC::Add(sum[local], sum[local], spread, rows * BLOCK);
    Settle();
    scoreQueue.FreeTensor(scores);

    weights = writer.queue.template DeQue<T>();
    AscendC::DataCopyParams copy;
    constexpr uint32_t unit = 32 / sizeof(T);
    copy.blockCount = rows;
    copy.blockLen = computed / unit;
    copy.srcStride = (keys - computed) / unit;
    copy.dstStride = (keys - computed) / unit;
    AscendC::DataCopy(weightGm[place], weights, copy);
    writer.queue.FreeTensor(weights);
  }

  // The sum or the maximum of the first `active` scores of each row, to a block of `spread`.
  template <bool add>
  __aicore__ inline void ReduceRows(const AscendC::LocalTensor<float>& scores, uint32_t rows,
                                    uint32_t active) {
    AscendC::LocalTensor<float> folded = scores;
    uint8_t stride = STRIDE;
    for (uint32_t lane = LANES; lane < active; lane += LANES) {
      const AscendC::BinaryRepeatParams params(1, 1, 1, BLOCK, stride, STRIDE);
      const uint64_t all = LANES;
      if constexpr (add) {
        AscendC::Add(fold, folded, scores[lane], all, rows, params);
      } else {
        AscendC::Max(fold, folded, scores[lane], all, rows, params);
      }
      Settle();
      folded = fold;
      stride = BLOCK;
    }
    if constexpr (add) {
      AscendC::WholeReduceSum<float>(reduced, folded, LANES, rows, 1, 1, stride);
    } else {
      AscendC::WholeReduceMax<float>(reduced, folded, LANES, rows, 1, 1, stride,
                                     AscendC::ReduceOrder::ORDER_ONLY_VALUE);
    }
    Settle();
    SpreadRows(rows);
  }

  // Each of `rows` values of `reduced` to a block of `spread`.
  __aicore__ inline void SpreadRows(uint32_t rows) {
    AscendC::Brcb(spread, reduced, rows / BLOCK, AscendC::BrcbRepeatParams(1, BLOCK));
    Settle();
  }

  // Every score that a row does not see becomes MASKED, whatever it was, up to key `active`.
  __aicore__ inline void Mask(const Job& job, const Step& step, uint32_t row, uint32_t rows,
                              uint32_t active, const AscendC::LocalTensor<float>& scores) {
    if (step.cached || t->blockSize == 0) {
      MaskKeys(scores, rows, step.keys, active);
      for (uint32_t at = 0; step.cached && t->pageSize != 0 && at < step.keys;) {
        const Schedule::PageRun run = work->Page(job, step, at);
        if (run.page < 0) {
          MaskKeys(scores, rows, at, at + run.keys);
        }
        at += run.keys;
      }
      Settle();
      return;
    }
    const uint32_t first = job.segmentRow[step.segment];
    const uint32_t live = first + job.columns[step.segment] * t->group;
    uint32_t at = row;
    while (at < row + rows) {
      uint32_t end = row + rows;
      uint32_t seen = step.keys;
      if (at < live) {
        // Neighbouring columns of one block see the same keys.
        const uint32_t column = (at - first) / t->group;
        const uint32_t visible = Visible(job, step, column);
        uint32_t next = column + 1;
        while (next < job.columns[step.segment] && first + next * t->group < end &&
               Visible(job, step, next) == visible) {
          ++next;
        }
        end = Smaller(end, first + next * t->group);
        seen = visible > step.key ? Smaller(visible - step.key, step.keys) : 0;
      }
      MaskKeys(scores[(at - row) * BRANCH_ATTENTION_KEYS], end - at, seen, active);
      at = end;
    }
    Settle();
  }

  __aicore__ inline uint32_t Visible(const Job& job, const Step& step, uint32_t column) const {
    return work->VisibleColumns(job, step.segment, job.firstColumn + column);
  }

  // MASKED to keys [from, to) of rows of scores.
  __aicore__ inline void MaskKeys(const AscendC::LocalTensor<float>& scores, uint32_t rows,
                                  uint32_t from, uint32_t to) {
    for (uint32_t lane = 0; lane < BRANCH_ATTENTION_KEYS; lane += LANES) {
      const uint32_t begin = from > lane ? from - lane : 0;
      const uint32_t end = to > lane ? Smaller(to - lane, LANES) : 0;
      if (begin < end) {
        const uint64_t below = ~uint64_t{0} >> (LANES - end);
        uint64_t mask[2] = {below & (~uint64_t{0} << begin), 0};
        AscendC::Duplicate(scores[lane], MASKED, mask, rows, 1, STRIDE);
      }
    }
  }

  __aicore__ inline void Accumulate(const Step& step, uint32_t from) {
    AscendC::CrossCoreWaitFlag(VALUES_READY + from);
    const Half own = Own(step);
    for (uint32_t row = own.begin; row < own.end; row += CHUNK_ROWS) {
      const uint32_t rows = Smaller(own.end - row, CHUNK_ROWS);
      AscendC::LocalTensor<float> loading = productQueue.template AllocTensor<float>();
      AscendC::DataCopy(loading, productGm[(from * BRANCH_ATTENTION_TILE_ROWS + row) * t->headDim],
                        rows * t->headDim);
      productQueue.EnQue(loading);
      const uint32_t local = row - half.begin;
      AscendC::LocalTensor<float> sums = output[local * t->headDim];
      ScaleRows<false>(sums, rescale[from * STATE + local * BLOCK], rows, t->headDim);
      Settle();
      AscendC::LocalTensor<float> products = productQueue.template DeQue<float>();
      AscendC::Add(sums, sums, products, rows * t->headDim);
      Settle();
      productQueue.FreeTensor(products);
    }
  }

  // Output and lse of the own half, from the running state.
  __aicore__ inline void FinishRows(const Job& job) {
    const uint32_t all = half.end - half.begin;
    for (uint32_t local = 0; local < all; local += CHUNK_ROWS) {
      const uint32_t rows = Smaller(all - local, CHUNK_ROWS);
      writer.WriteRows(job, half.begin + local, rows, output[local * t->headDim],
                       sum[local * BLOCK]);
      writer.WriteLse(job, half.begin + local, rows, maximum[local * BLOCK], sum[local * BLOCK]);
    }
  }

  // The running state of the own half as it is, for Merge.
  __aicore__ inline void StorePart(uint32_t index) {
    const uint32_t rows = half.end - half.begin;
    if (rows == 0) {
      return;
    }
    const AscendC::TEventID ready = GetTPipePtr()->FetchEventID(AscendC::HardEvent::V_MTE3);
    AscendC::SetFlag<AscendC::HardEvent::V_MTE3>(ready);
    AscendC::WaitFlag<AscendC::HardEvent::V_MTE3>(ready);
    const uint64_t first = static_cast<uint64_t>(index) * BRANCH_ATTENTION_TILE_ROWS + half.begin;
    AscendC::DataCopy(partialGm[first * t->headDim], output, rows * t->headDim);
    AscendC::DataCopy(stateGm[StateAt(index, 0, half.begin)], maximum, rows * BLOCK);
    AscendC::DataCopy(stateGm[StateAt(index, 1, half.begin)], sum, rows * BLOCK);
    const AscendC::TEventID stored = GetTPipePtr()->FetchEventID(AscendC::HardEvent::MTE3_V);
    AscendC::SetFlag<AscendC::HardEvent::MTE3_V>(stored);
    AscendC::WaitFlag<AscendC::HardEvent::MTE3_V>(stored);
  }

  __aicore__ inline uint64_t StateAt(uint32_t index, uint32_t which, uint32_t row) const {
    return ((static_cast<uint64_t>(index) * 2 + which) * BRANCH_ATTENTION_TILE_ROWS + row) * BLOCK;
  }

  // Parts of split tiles, joined in the order of the prefix; chunks of rows are dealt to all cores.
  __aicore__ inline void Merge() {
    constexpr uint32_t chunks = BRANCH_ATTENTION_TILE_ROWS / CHUNK_ROWS;
    const uint32_t heads = t->batch * t->kvHeads;
    const uint32_t units = heads * t->tilesPerHead * chunks;
    const uint32_t own = core * VECTORS_PER_CUBE + subBlock;
    for (uint32_t unit = own; unit < units; unit += t->cores * VECTORS_PER_CUBE) {
      const uint32_t row = unit % chunks * CHUNK_ROWS;
      const uint32_t tile = unit / chunks % t->tilesPerHead;
      const uint32_t head = unit / chunks / t->tilesPerHead;
      Job job;
      work->Make(head, tile, t->splits - 1, job);
      if (row < job.rows) {
        MergeRows(job, head, row, Smaller(job.rows - row, CHUNK_ROWS));
      }
    }
  }

  __aicore__ inline void MergeRows(const Job& last, uint32_t head, uint32_t row, uint32_t rows) {
    const uint32_t cells = rows * BLOCK;
    const uint32_t numbers = rows * t->headDim;
    AscendC::Duplicate(output, 0.0f, numbers);
    AscendC::Duplicate(maximum, MASKED, cells);
    AscendC::Duplicate(sum, 0.0f, cells);
    Settle();
    for (uint32_t split = 0; split < t->splits; ++split) {
      Job job;
      work->Make(head, last.tile, split, job);
      Step step;
      work->First(job, step);
      if (!step.valid) {
        continue;
      }
      const uint32_t index = (head * t->splits + split) * t->tilesPerHead + last.tile;
      AscendC::LocalTensor<float> state = scoreQueue.template AllocTensor<float>();
      AscendC::DataCopy(state, stateGm[StateAt(index, 0, row)], cells);
      AscendC::DataCopy(state[STATE], stateGm[StateAt(index, 1, row)], cells);
      scoreQueue.EnQue(state);
      AscendC::LocalTensor<float> part = productQueue.template AllocTensor<float>();
      AscendC::DataCopy(
          part,
          partialGm[(static_cast<uint64_t>(index) * BRANCH_ATTENTION_TILE_ROWS + row) * t->headDim],
          numbers);
      productQueue.EnQue(part);

      state = scoreQueue.template DeQue<float>();
      AscendC::LocalTensor<float> before = rescale;
      AscendC::LocalTensor<float> here = rescale[STATE];
      AscendC::Max(spread, maximum, state, cells);
      Settle();
      AscendC::Sub(before, maximum, spread, cells);
      AscendC::Sub(here, state, spread, cells);
      Settle();
      AscendC::Adds(maximum, spread, 0.0f, cells);
      AscendC::Exp(before, before, cells);
      AscendC::Exp(here, here, cells);
      Settle();
      AscendC::Mul(sum, sum, before, cells);
      AscendC::Mul(state[STATE], state[STATE], here, cells);
      Settle();
      AscendC::Add(sum, sum, state[STATE], cells);
      Settle();
      scoreQueue.FreeTensor(state);
      part = productQueue.template DeQue<float>();
      ScaleRows<false>(output, before, rows, t->headDim);
      ScaleRows<false>(part, here, rows, t->headDim);
      Settle();
      AscendC::Add(output, output, part, numbers);
      Settle();
      productQueue.FreeTensor(part);
    }
    writer.WriteRows(last, row, rows, output, sum);
    writer.WriteLse(last, row, rows, maximum, sum);
    Settle();
  }

  const BranchAttentionTiling* t;
  Schedule* work;
  uint32_t core;
  uint32_t subBlock;
  uint32_t slot = 0;
  Half half;
  RowWriter<T> writer;
  AscendC::GlobalTensor<float> scoreGm;
  AscendC::GlobalTensor<T> weightGm;
  AscendC::GlobalTensor<float> productGm;
  AscendC::GlobalTensor<float> partialGm;
  AscendC::GlobalTensor<float> stateGm;
  AscendC::TQue<AscendC::TPosition::VECIN, 1> scoreQueue;
  AscendC::TQue<AscendC::TPosition::VECIN, 1> productQueue;
  AscendC::TBuf<AscendC::TPosition::VECCALC> outputBuffer;
  AscendC::TBuf<AscendC::TPosition::VECCALC> maximumBuffer;
  AscendC::TBuf<AscendC::TPosition::VECCALC> sumBuffer;
  AscendC::TBuf<AscendC::TPosition::VECCALC> rescaleBuffer;
  AscendC::TBuf<AscendC::TPosition::VECCALC> foldBuffer;
  AscendC::TBuf<AscendC::TPosition::VECCALC> reducedBuffer;
  AscendC::TBuf<AscendC::TPosition::VECCALC> spreadBuffer;
  AscendC::LocalTensor<float> output;
  AscendC::LocalTensor<float> maximum;
  AscendC::LocalTensor<float> sum;
  AscendC::LocalTensor<float> rescale;
  AscendC::LocalTensor<float> fold;
  AscendC::LocalTensor<float> reduced;
  AscendC::LocalTensor<float> spread;
};

}  // namespace branch_attention
