// The results of branch_attention: rows of a tile to out [B, K, W, Hq, D] and lse [B, K, Hq, W].
#pragma once

#include "branch_attention_job.h"
#include "kernel_operator.h"

namespace branch_attention {

constexpr uint32_t LANES = 64;       // floats of a repeat
constexpr uint32_t BLOCK = 8;        // floats of a block of 32 bytes
constexpr uint32_t CHUNK_ROWS = 32;  // of outputs, at a time
constexpr uint32_t VECTORS_PER_CUBE = 2;
constexpr uint32_t HALF_ROWS = BRANCH_ATTENTION_TILE_ROWS / VECTORS_PER_CUBE;

// Multiplies or divides rows of `width` floats by a block of 8 equal floats each.
template <bool divide>
__aicore__ inline void ScaleRows(const AscendC::LocalTensor<float>& matrix,
                                 const AscendC::LocalTensor<float>& factors, uint32_t rows,
                                 uint32_t width) {
  const uint8_t stride = width / BLOCK;
  const AscendC::BinaryRepeatParams params(1, 1, 0, stride, stride, 1);
  for (uint32_t d = 0; d < width; d += LANES) {
    const uint64_t lanes = Smaller(width - d, LANES);
    if constexpr (divide) {
      AscendC::Div(matrix[d], matrix[d], factors, lanes, rows, params);
    } else {
      AscendC::Mul(matrix[d], matrix[d], factors, lanes, rows, params);
    }
  }
}

template <typename T>
class RowWriter {
 public:
  // `chunk`: elements of a buffer of the queue.
  __aicore__ inline void Init(GM_ADDR out, GM_ADDR lse, uint32_t subBlockIndex, uint32_t chunk,
                              const BranchAttentionTiling* tiling, AscendC::TPipe* pipe) {
    t = tiling;
    subBlock = subBlockIndex;
    const uint64_t rows = static_cast<uint64_t>(t->batch) * t->branches * t->window * t->queryHeads;
    outGm.SetGlobalBuffer((__gm__ T*)out, rows * t->headDim);
    lseGm.SetGlobalBuffer((__gm__ float*)lse, rows);
    pipe->InitBuffer(queue, 2, chunk * sizeof(T));
    pipe->InitBuffer(lseQueue, 1, HALF_ROWS * BLOCK * sizeof(float));
  }

  // Divides rows of a tile by their sums and writes those that are live.
  __aicore__ inline void WriteRows(const Job& job, uint32_t row, uint32_t rows,
                                   const AscendC::LocalTensor<float>& sums,
                                   const AscendC::LocalTensor<float>& denominators) {
    ScaleRows<true>(sums, denominators, rows, t->headDim);
    AscendC::PipeBarrier<PIPE_V>();
    AscendC::LocalTensor<T> result = queue.template AllocTensor<T>();
    AscendC::Cast(result, sums, AscendC::RoundMode::CAST_RINT, rows * t->headDim);
    queue.EnQue(result);
    result = queue.template DeQue<T>();
    for (uint32_t i = 0; i < job.segments; ++i) {
      const uint32_t first = job.segmentRow[i];
      const uint32_t live = Smaller(first + job.columns[i] * t->group, row + rows);
      uint32_t at = row > first ? row : first;
      while (at < live) {
        const uint32_t column = (at - first) / t->group;
        const uint32_t head = (at - first) % t->group;
        const uint32_t run = Smaller(t->group - head, live - at);
        AscendC::DataCopy(outGm[OutRow(job, i, column, head) * t->headDim],
                          result[(at - row) * t->headDim], run * t->headDim);
        at += run;
      }
    }
    queue.FreeTensor(result);
  }

  __aicore__ inline void WriteLse(const Job& job, uint32_t row, uint32_t rows,
                                  const AscendC::LocalTensor<float>& maxima,
                                  const AscendC::LocalTensor<float>& sums) {
    AscendC::LocalTensor<float> lse = lseQueue.template AllocTensor<float>();
    AscendC::Ln(lse, sums, rows * BLOCK);
    AscendC::PipeBarrier<PIPE_V>();
    AscendC::Add(lse, lse, maxima, rows * BLOCK);
    lseQueue.EnQue(lse);
    lse = lseQueue.template DeQue<float>();
    for (uint32_t i = 0; i < job.segments; ++i) {
      const uint32_t first = job.segmentRow[i];
      const uint32_t live = Smaller(first + job.columns[i] * t->group, row + rows);
      const uint32_t begin = row > first ? row : first;
      for (uint32_t at = begin; at < Smaller(live, begin + t->group); ++at) {
        // Rows of one head are `group` apart; their columns are neighbours in lse.
        AscendC::DataCopyExtParams copy;
        copy.blockCount = (live - at + t->group - 1) / t->group;
        copy.blockLen = sizeof(float);
        copy.srcStride = t->group - 1;
        copy.dstStride = 0;
        AscendC::DataCopyPad(lseGm[LseAt(job, i, (at - first) / t->group, (at - first) % t->group)],
                             lse[(at - row) * BLOCK], copy);
      }
    }
    lseQueue.FreeTensor(lse);
  }

  // Columns at or beyond `length`: 0, and lse -inf. The two vector cores share the branches.
  __aicore__ inline void WriteDeadRows(const Job& job) {
    bool any = false;
    for (uint32_t i = subBlock; i < job.segments; i += VECTORS_PER_CUBE) {
      any = any || job.columns[i] < job.tileColumns;
    }
    if (!any) {
      return;
    }
    constexpr uint32_t columnsAtOnce = HALF_ROWS * BLOCK;
    AscendC::LocalTensor<T> zeros = queue.template AllocTensor<T>();
    AscendC::Duplicate(zeros, static_cast<T>(0.0f), CHUNK_ROWS * t->headDim);
    queue.EnQue(zeros);
    zeros = queue.template DeQue<T>();
    AscendC::LocalTensor<float> nothing = lseQueue.template AllocTensor<float>();
    AscendC::Duplicate(nothing, -__builtin_inff(), columnsAtOnce);
    lseQueue.EnQue(nothing);
    nothing = lseQueue.template DeQue<float>();
    for (uint32_t i = subBlock; i < job.segments; i += VECTORS_PER_CUBE) {
      for (uint32_t column = job.columns[i]; column < job.tileColumns; ++column) {
        for (uint32_t head = 0; head < t->group; head += CHUNK_ROWS) {
          AscendC::DataCopy(outGm[OutRow(job, i, column, head) * t->headDim], zeros,
                            Smaller(t->group - head, CHUNK_ROWS) * t->headDim);
        }
      }
      for (uint32_t head = 0; head < t->group; ++head) {
        for (uint32_t column = job.columns[i]; column < job.tileColumns; column += columnsAtOnce) {
          AscendC::DataCopyExtParams copy;
          copy.blockCount = 1;
          copy.blockLen = Smaller(job.tileColumns - column, columnsAtOnce) * sizeof(float);
          copy.srcStride = 0;
          copy.dstStride = 0;
          AscendC::DataCopyPad(lseGm[LseAt(job, i, column, head)], nothing, copy);
        }
      }
    }
    lseQueue.FreeTensor(nothing);
    queue.FreeTensor(zeros);
  }

  // What leaves UB in 16 bits: weights too, which the softmax writes.
  AscendC::TQue<AscendC::TPosition::VECOUT, 1> queue;

 private:
  // Row of `out` of a column of a segment and a query head of the job's KV head.
  __aicore__ inline uint64_t OutRow(const Job& job, uint32_t segment, uint32_t column,
                                    uint32_t head) const {
    const uint64_t branch =
        static_cast<uint64_t>(job.batch) * t->branches + job.firstBranch + segment;
    return (branch * t->window + job.firstColumn + column) * t->queryHeads + job.kvHead * t->group +
           head;
  }

  // The place in lse, [B, K, Hq, W].
  __aicore__ inline uint64_t LseAt(const Job& job, uint32_t segment, uint32_t column,
                                   uint32_t head) const {
    const uint64_t branch =
        static_cast<uint64_t>(job.batch) * t->branches + job.firstBranch + segment;
    return (branch * t->queryHeads + job.kvHead * t->group + head) * t->window + job.firstColumn +
           column;
  }

  const BranchAttentionTiling* t;
  uint32_t subBlock;
  AscendC::GlobalTensor<T> outGm;
  AscendC::GlobalTensor<float> lseGm;
  AscendC::TQue<AscendC::TPosition::VECOUT, 1> lseQueue;
};

}  // namespace branch_attention
