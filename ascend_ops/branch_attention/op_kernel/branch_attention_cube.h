// branch_attention on a cube core: scores Q K^T and products P V of each step, through workspace.
#pragma once

#include "branch_attention_job.h"
#include "kernel_operator.h"

namespace branch_attention {

template <typename T>
class CubeSide {
 public:
  __aicore__ inline void Init(GM_ADDR q, GM_ADDR kCache, GM_ADDR vCache, GM_ADDR kWindow,
                              GM_ADDR vWindow, GM_ADDR workspace, Schedule* schedule,
                              const BranchAttentionTiling* tiling, AscendC::TPipe* pipe) {
    t = tiling;
    work = schedule;
    const uint64_t queries =
        static_cast<uint64_t>(t->batch) * t->branches * t->window * t->queryHeads * t->headDim;
    const uint64_t windowKeys = queries / t->group;
    const uint64_t cacheSize = t->cacheBatchStride * (t->pageSize != 0 ? t->pages : t->batch);
    qGm.SetGlobalBuffer((__gm__ T*)q, queries);
    keyGm[0].SetGlobalBuffer((__gm__ T*)kCache, cacheSize);
    keyGm[1].SetGlobalBuffer((__gm__ T*)kWindow, windowKeys);
    valueGm[0].SetGlobalBuffer((__gm__ T*)vCache, cacheSize);
    valueGm[1].SetGlobalBuffer((__gm__ T*)vWindow, windowKeys);

    const uint32_t rows = 2 * BRANCH_ATTENTION_TILE_ROWS;
    const uint64_t core = AscendC::GetBlockIdx();
    const uint32_t scores = rows * BRANCH_ATTENTION_KEYS;
    scoreGm.SetGlobalBuffer((__gm__ float*)(workspace + t->scoreOffset) + core * scores, scores);
    weightGm.SetGlobalBuffer((__gm__ T*)(workspace + t->weightOffset) + core * scores, scores);
    const uint32_t products = rows * t->headDim;
    productGm.SetGlobalBuffer((__gm__ float*)(workspace + t->valueOffset) + core * products,
                              products);

    const uint32_t keyBytes = BRANCH_ATTENTION_KEYS * t->headDim * sizeof(T);
    pipe->InitBuffer(queryL1, 1, BRANCH_ATTENTION_TILE_ROWS * t->headDim * sizeof(T));
    pipe->InitBuffer(weightL1, 2, ROW_BLOCK * BRANCH_ATTENTION_KEYS * sizeof(T));
    pipe->InitBuffer(keyL1, 2, keyBytes);
    pipe->InitBuffer(valueL1, 2, keyBytes);
    // Operands of a product: at most 128 rows of the left, 128 keys of the right, 128 of D.
    constexpr uint32_t most =
        KEY_BLOCK > BRANCH_ATTENTION_MAX_HEAD_DIM ? KEY_BLOCK : BRANCH_ATTENTION_MAX_HEAD_DIM;
    pipe->InitBuffer(leftL0, 2, ROW_BLOCK * most * sizeof(T));
    pipe->InitBuffer(rightL0, 2, KEY_BLOCK * BRANCH_ATTENTION_MAX_HEAD_DIM * sizeof(T));
    pipe->InitBuffer(resultL0, 2, ROW_BLOCK * most * sizeof(float));
  }

  // Scores run one step ahead of products, so that the vector cores' softmax of a step overlaps.
  __aicore__ inline void Process() {
    for (uint32_t index = AscendC::GetBlockIdx(); index < t->jobs; index += t->cores) {
      Job job;
      work->Get(index, job);
      Step step;
      work->First(job, step);
      if (!step.valid) {
        continue;
      }
      LoadQueries(job);
      AscendC::LocalTensor<T> queries = queryL1.template DeQue<T>();
      Scores(job, step, queries, slot);
      while (step.valid) {
        Step ahead = step;
        work->Next(job, ahead);
        if (ahead.valid) {
          Scores(job, ahead, queries, slot ^ 1);
        }
        Products(job, step, slot);
        step = ahead;
        slot ^= 1;
      }
      queryL1.FreeTensor(queries);
    }
  }

 private:
  // Rows and keys of a product: 128 x 128 in 16 bits is half of L0A, in fp32 half of L0C.
  static constexpr uint32_t ROW_BLOCK = 128;
  static constexpr uint32_t KEY_BLOCK = 128;
  static constexpr uint32_t FRACTAL = 16;
  static constexpr uint32_t FRACTAL_SIZE = FRACTAL * FRACTAL;

  // Zero to rows [from, to) of an NZ matrix of `height` rows and `width` columns in L1: what a
  // fractal holds beyond the last row has to be finite, since 0 * NaN is NaN.
  __aicore__ inline void ZeroRows(const AscendC::LocalTensor<T>& matrix, uint32_t height,
                                  uint32_t width, uint32_t from, uint32_t to) {
    if (from == to) {
      return;
    }
    AscendC::InitConstValueParams<T> zero;
    zero.repeatTimes = width / FRACTAL;
    zero.blockNum = to - from;
    zero.dstGap = height - (to - from);
    AscendC::InitConstValue(matrix[from * FRACTAL], zero);
  }

  // Rows of D of a matrix in global memory, `stride` apart, to an NZ matrix of `height` rows in L1.
  __aicore__ inline void LoadRows(const AscendC::LocalTensor<T>& matrix,
                                  const AscendC::GlobalTensor<T>& source, uint32_t rows,
                                  uint32_t width, uint32_t stride, uint32_t height) {
    AscendC::Nd2NzParams params;
    params.ndNum = 1;
    params.nValue = rows;
    params.dValue = width;
    params.srcNdMatrixStride = 0;
    params.srcDValue = stride;
    params.dstNzC0Stride = height;
    params.dstNzNStride = 1;
    params.dstNzMatrixStride = 0;
    AscendC::DataCopy(matrix, source, params);
  }

  __aicore__ inline void LoadQueries(const Job& job) {
    AscendC::LocalTensor<T> queries = queryL1.template AllocTensor<T>();
    for (uint32_t i = 0; i < job.segments; ++i) {
      if (job.columns[i] == 0) {
        continue;
      }
      const uint32_t row = job.segmentRow[i];
      const uint64_t column =
          (static_cast<uint64_t>(job.batch) * t->branches + job.firstBranch + i) * t->window +
          job.firstColumn;
      AscendC::Nd2NzParams params;
      params.ndNum = job.columns[i];
      params.nValue = t->group;
      params.dValue = t->headDim;
      params.srcNdMatrixStride = t->queryHeads * t->headDim;
      params.srcDValue = t->headDim;
      params.dstNzC0Stride = job.rows;
      params.dstNzNStride = 1;
      params.dstNzMatrixStride = t->group * FRACTAL;
      AscendC::DataCopy(queries[row * FRACTAL],
                        qGm[(column * t->queryHeads + job.kvHead * t->group) * t->headDim], params);
      ZeroRows(queries, job.rows, t->headDim, row + job.columns[i] * t->group,
               job.segmentRow[i + 1]);
    }
    queryL1.EnQue(queries);
  }

  // Keys or values of a step, [keys, D] in NZ, zero from the last key to the end of its fractal.
  __aicore__ inline void LoadKeys(const Job& job, const Step& step,
                                  const AscendC::LocalTensor<T>& matrix,
                                  const AscendC::GlobalTensor<T>* source) {
    const uint32_t height = AlignUp(step.keys, FRACTAL);
    if (step.cached && t->pageSize != 0) {
      for (uint32_t at = 0; at < step.keys;) {
        const Schedule::PageRun run = work->Page(job, step, at);
        if (run.page < 0) {
          ZeroRows(matrix, height, t->headDim, at, at + run.keys);
        } else {
          LoadRows(matrix[at * FRACTAL],
                   source[0][run.page * t->cacheBatchStride + job.kvHead * t->cacheHeadStride +
                             static_cast<uint64_t>(run.position) * t->cachePositionStride],
                   run.keys, t->headDim, t->cachePositionStride, height);
        }
        at += run.keys;
      }
    } else if (step.cached) {
      LoadRows(matrix,
               source[0][job.batch * t->cacheBatchStride + job.kvHead * t->cacheHeadStride +
                         static_cast<uint64_t>(step.key) * t->cachePositionStride],
               step.keys, t->headDim, t->cachePositionStride, height);
    } else {
      const uint64_t column =
          (static_cast<uint64_t>(job.batch) * t->branches + job.firstBranch + step.segment) *
              t->window +
          step.key;
      LoadRows(matrix, source[1][(column * t->kvHeads + job.kvHead) * t->headDim], step.keys,
               t->headDim, t->kvHeads * t->headDim, height);
    }
    ZeroRows(matrix, height, t->headDim, step.keys, height);
  }

  // Rows [row, row + rows) and columns [column, column + width) of an NZ matrix of `height` rows in
  // L1 to L0A, fractals in row order.
  __aicore__ inline void LoadLeft(const AscendC::LocalTensor<T>& matrix, uint32_t height,
                                  uint32_t row, uint32_t rows, uint32_t column, uint32_t width) {
    AscendC::LocalTensor<T> left = leftL0.template AllocTensor<T>();
    AscendC::LoadData2DParams params;
    params.repeatTimes = width / FRACTAL;
    params.srcStride = height / FRACTAL;
    params.dstGap = 0;
    params.ifTranspose = false;
    for (uint32_t i = 0; i < rows / FRACTAL; ++i) {
      params.startIndex = column / FRACTAL * (height / FRACTAL) + row / FRACTAL + i;
      AscendC::LoadData(left[i * (width / FRACTAL) * FRACTAL_SIZE], matrix, params);
    }
    leftL0.EnQue(left);
  }

  // The left operand of LoadLeft times `right`, to the result or added to it.
  __aicore__ inline void Multiply(const AscendC::LocalTensor<float>& result,
                                  const AscendC::LocalTensor<T>& right, uint32_t rows,
                                  uint32_t columns, uint32_t depth, bool add) {
    AscendC::LocalTensor<T> left = leftL0.template DeQue<T>();
    AscendC::MmadParams params;
    params.m = rows;
    params.n = columns;
    params.k = depth;
    params.cmatrixInitVal = !add;
    // Small products into one place follow each other only past a barrier (Mmad, constraints).
    if (add && rows / FRACTAL * (columns / FRACTAL) < 10) {
      AscendC::PipeBarrier<PIPE_M>();
    }
    AscendC::Mmad(result, left, right, params);
    leftL0.FreeTensor(left);
  }

  // A result to rows of the workspace, `stride` apart.
  __aicore__ inline void Store(AscendC::LocalTensor<float>& result,
                               const AscendC::GlobalTensor<float>& destination, uint32_t rows,
                               uint32_t columns, uint32_t stride) {
    resultL0.EnQue(result);
    AscendC::LocalTensor<float> done = resultL0.template DeQue<float>();
    AscendC::FixpipeParamsV220 params;
    params.nSize = columns;
    params.mSize = rows;
    params.srcStride = rows;
    params.dstStride = stride;
    AscendC::Fixpipe<float, float, AscendC::CFG_ROW_MAJOR>(destination, done, params);
    resultL0.FreeTensor(done);
  }

  __aicore__ inline void Scores(const Job& job, const Step& step,
                                const AscendC::LocalTensor<T>& queries, uint32_t to) {
    AscendC::LocalTensor<T> loading = keyL1.template AllocTensor<T>();
    LoadKeys(job, step, loading, keyGm);
    keyL1.EnQue(loading);
    AscendC::LocalTensor<T> keys = keyL1.template DeQue<T>();
    const uint32_t height = AlignUp(step.keys, FRACTAL);
    for (uint32_t key = 0; key < height; key += KEY_BLOCK) {
      // K in NZ is K^T as L0B wants it: fractals of 16 keys in the order of D, then of keys.
      const uint32_t columns = Smaller(height - key, KEY_BLOCK);
      AscendC::LocalTensor<T> right = rightL0.template AllocTensor<T>();
      AscendC::LoadData2DParams params;
      params.repeatTimes = columns / FRACTAL;
      params.srcStride = 1;
      params.dstGap = 0;
      params.ifTranspose = false;
      for (uint32_t i = 0; i < t->headDim / FRACTAL; ++i) {
        params.startIndex = i * (height / FRACTAL) + key / FRACTAL;
        AscendC::LoadData(right[i * columns * FRACTAL], keys, params);
      }
      rightL0.EnQue(right);
      right = rightL0.template DeQue<T>();
      for (uint32_t row = step.rowBegin; row < step.rowEnd; row += ROW_BLOCK) {
        const uint32_t rows = Smaller(step.rowEnd - row, ROW_BLOCK);
        LoadLeft(queries, job.rows, row, rows, 0, t->headDim);
        AscendC::LocalTensor<float> result = resultL0.template AllocTensor<float>();
        Multiply(result, right, rows, columns, t->headDim, false);
        const uint64_t place = (to * BRANCH_ATTENTION_TILE_ROWS + row) * BRANCH_ATTENTION_KEYS;
        Store(result, scoreGm[place + key], rows, columns, BRANCH_ATTENTION_KEYS);
      }
      rightL0.FreeTensor(right);
    }
    keyL1.FreeTensor(keys);
    AscendC::CrossCoreSetFlag<2, PIPE_FIX>(SCORES_READY + to);
  }

  __aicore__ inline void Products(const Job& job, const Step& step, uint32_t from) {
    AscendC::LocalTensor<T> loading = valueL1.template AllocTensor<T>();
    LoadKeys(job, step, loading, valueGm);
    valueL1.EnQue(loading);
    AscendC::LocalTensor<T> values = valueL1.template DeQue<T>();
    const uint32_t height = AlignUp(step.keys, FRACTAL);
    for (uint32_t key = 0; key < height; key += KEY_BLOCK) {
      // V in NZ has fractals of 16 keys x 16 of D; L0B wants them transposed, keys innermost.
      AscendC::LocalTensor<T> right = rightL0.template AllocTensor<T>();
      AscendC::LoadData2dTransposeParams params;
      params.repeatTimes = t->headDim / FRACTAL;
      params.srcStride = height / FRACTAL;
      params.dstGap = 0;
      params.dstFracGap = 0;
      for (uint32_t i = 0; i < Smaller(height - key, KEY_BLOCK) / FRACTAL; ++i) {
        params.startIndex = key / FRACTAL + i;
        AscendC::LoadDataWithTranspose(right[i * t->headDim * FRACTAL], values, params);
      }
      rightL0.EnQue(right);
    }
    valueL1.FreeTensor(values);

    AscendC::CrossCoreWaitFlag(WEIGHTS_READY + from);
    AscendC::LocalTensor<T> right[BRANCH_ATTENTION_KEYS / KEY_BLOCK];
    const uint32_t blocks = (height + KEY_BLOCK - 1) / KEY_BLOCK;
    for (uint32_t i = 0; i < blocks; ++i) {
      right[i] = rightL0.template DeQue<T>();
    }
    for (uint32_t row = step.rowBegin; row < step.rowEnd; row += ROW_BLOCK) {
      const uint32_t rows = Smaller(step.rowEnd - row, ROW_BLOCK);
      const uint64_t place = from * BRANCH_ATTENTION_TILE_ROWS + row;
      AscendC::LocalTensor<T> arriving = weightL1.template AllocTensor<T>();
      LoadRows(arriving, weightGm[place * BRANCH_ATTENTION_KEYS], rows, height,
               BRANCH_ATTENTION_KEYS, rows);
      weightL1.EnQue(arriving);
      AscendC::LocalTensor<T> weights = weightL1.template DeQue<T>();
      AscendC::LocalTensor<float> result = resultL0.template AllocTensor<float>();
      for (uint32_t i = 0; i < blocks; ++i) {
        const uint32_t key = i * KEY_BLOCK;
        const uint32_t depth = Smaller(height - key, KEY_BLOCK);
        LoadLeft(weights, rows, 0, rows, key, depth);
        Multiply(result, right[i], rows, t->headDim, depth, i > 0);
      }
      weightL1.FreeTensor(weights);
      Store(result, productGm[place * t->headDim], rows, t->headDim, t->headDim);
    }
    for (uint32_t i = 0; i < blocks; ++i) {
      rightL0.FreeTensor(right[i]);
    }
    AscendC::CrossCoreSetFlag<2, PIPE_FIX>(VALUES_READY + from);
  }

  const BranchAttentionTiling* t;
  Schedule* work;
  AscendC::GlobalTensor<T> qGm;
  AscendC::GlobalTensor<T> keyGm[2];  // the cache, the windows
  AscendC::GlobalTensor<T> valueGm[2];
  AscendC::GlobalTensor<float> scoreGm;
  AscendC::GlobalTensor<T> weightGm;
  AscendC::GlobalTensor<float> productGm;
  AscendC::TQue<AscendC::TPosition::A1, 1> queryL1;
  AscendC::TQue<AscendC::TPosition::A1, 1> weightL1;
  AscendC::TQue<AscendC::TPosition::B1, 1> keyL1;
  AscendC::TQue<AscendC::TPosition::B1, 1> valueL1;
  AscendC::TQue<AscendC::TPosition::A2, 1> leftL0;
  AscendC::TQue<AscendC::TPosition::B2, 2> rightL0;
  AscendC::TQue<AscendC::TPosition::CO1, 1> resultL0;
  uint32_t slot = 0;
};

}  // namespace branch_attention
