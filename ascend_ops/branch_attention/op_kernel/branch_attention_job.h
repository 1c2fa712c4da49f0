// The work of branch_attention, as cube and vector cores enumerate it alike.
//
// A job is a tile of rows of one sequence and KV head over one part of the prefix. Its rows are the
// live columns of its branches times the query heads of the KV head, row = column * group + head,
// each branch (a segment) beginning at a multiple of 16 rows. A step is a run of up to 256 keys:
// first those of the prefix, which all rows see, then those of each branch's own window, which only
// its segment sees. So values of one branch never meet the rows of another, not even as 0 * NaN.
#pragma once

#include "branch_attention_tiling_data.h"
#include "kernel_operator.h"

namespace branch_attention {

struct Job {
  uint32_t batch;
  uint32_t kvHead;
  uint32_t split;
  uint32_t tile;
  uint32_t segments;
  uint32_t firstBranch;
  uint32_t firstColumn;
  uint32_t tileColumns;  // columns of a segment, live or not
  uint32_t rows;         // a multiple of 16
  uint32_t cacheLen;
  uint32_t prefixBegin;  // keys of the prefix in this part
  uint32_t prefixEnd;
  int32_t promptLen;
  uint32_t segmentRow[BRANCH_ATTENTION_MAX_SEGMENTS + 1];
  uint32_t columns[BRANCH_ATTENTION_MAX_SEGMENTS];  // live ones
  uint32_t length[BRANCH_ATTENTION_MAX_SEGMENTS];
};

struct Step {
  bool valid;
  bool cached;  // keys of the prefix; otherwise of the window of `segment`
  uint32_t segment;
  uint32_t key;
  uint32_t keys;
  uint32_t rowBegin;
  uint32_t rowEnd;
};

__aicore__ inline uint32_t AlignUp(uint32_t value, uint32_t unit) {
  return (value + unit - 1) / unit * unit;
}

__aicore__ inline uint32_t Smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }

class Schedule {
 public:
  __aicore__ inline void Init(GM_ADDR cacheLen, GM_ADDR length, GM_ADDR promptLen,
                              GM_ADDR blockTable, const BranchAttentionTiling* tiling) {
    t = tiling;
    cacheLenGm.SetGlobalBuffer((__gm__ int32_t*)cacheLen, t->batch);
    lengthGm.SetGlobalBuffer((__gm__ int32_t*)length, t->batch * t->branches);
    if (t->blockSize != 0) {
      promptLenGm.SetGlobalBuffer((__gm__ int32_t*)promptLen, t->batch);
    }
    if (t->pageSize != 0) {
      tableGm.SetGlobalBuffer((__gm__ int32_t*)blockTable, t->batch * t->tablePages);
    }
  }

  // The next run of a step's keys that one page holds, from key `at` of the step on. `page` is -1
  // where the table's entry is not a page of the pool: nobody sees those keys.
  struct PageRun {
    int32_t page;
    uint32_t position;  // in the page
    uint32_t keys;
  };
  __aicore__ inline PageRun Page(const Job& job, const Step& step, uint32_t at) const {
    const uint32_t key = step.key + at;
    const int32_t page = tableGm.GetValue(job.batch * t->tablePages + key / t->pageSize);
    const uint32_t position = key % t->pageSize;
    const bool exists = page >= 0 && static_cast<uint32_t>(page) < t->pages;
    return {exists ? page : -1, position, Smaller(t->pageSize - position, step.keys - at)};
  }

  // Tiles of one KV head and part are neighbours: cores that run side by side read the same keys.
  __aicore__ inline void Get(uint32_t index, Job& job) {
    const uint32_t rest = index / t->tilesPerHead;
    Make(rest / t->splits, index % t->tilesPerHead, rest % t->splits, job);
  }

  // `head` counts sequences and KV heads, KV heads innermost.
  __aicore__ inline void Make(uint32_t head, uint32_t tile, uint32_t split, Job& job) {
    job.batch = head / t->kvHeads;
    job.kvHead = head % t->kvHeads;
    job.tile = tile;
    job.split = split;
    job.cacheLen = Clamp(cacheLenGm.GetValue(job.batch), t->capacity);
    job.promptLen = t->blockSize != 0 ? promptLenGm.GetValue(job.batch) : 0;
    const uint32_t blocks = AlignUp(job.cacheLen, BRANCH_ATTENTION_KEYS) / BRANCH_ATTENTION_KEYS;
    const uint32_t share = (blocks + t->splits - 1) / t->splits * BRANCH_ATTENTION_KEYS;
    job.prefixBegin = Smaller(split * share, job.cacheLen);
    job.prefixEnd = Smaller(job.prefixBegin + share, job.cacheLen);

    if (t->chunks == 1) {
      job.firstBranch = tile * t->branchesPerTile;
      job.segments = Smaller(t->branchesPerTile, t->branches - job.firstBranch);
      job.firstColumn = 0;
    } else {
      job.firstBranch = tile / t->chunks;
      job.segments = 1;
      job.firstColumn = tile % t->chunks * t->chunkColumns;
    }
    job.tileColumns = Smaller(t->chunkColumns, t->window - job.firstColumn);
    uint32_t row = 0;
    for (uint32_t i = 0; i < job.segments; ++i) {
      const uint32_t length =
          Clamp(lengthGm.GetValue(job.batch * t->branches + job.firstBranch + i), t->window);
      job.length[i] = length;
      job.columns[i] =
          length > job.firstColumn ? Smaller(length - job.firstColumn, job.tileColumns) : 0;
      job.segmentRow[i] = row;
      row += AlignUp(job.columns[i] * t->group, 16);
    }
    job.segmentRow[job.segments] = row;
    job.rows = row;
  }

  // The windows belong to the last part: it is the shortest where parts are not equal.
  __aicore__ inline bool IsLastSplit(const Job& job) const { return job.split + 1 == t->splits; }

  __aicore__ inline void First(const Job& job, Step& step) const {
    step.cached = true;
    step.segment = 0;
    step.key = job.prefixBegin;
    Settle(job, step);
  }

  __aicore__ inline void Next(const Job& job, Step& step) const {
    step.key += step.keys;
    Settle(job, step);
  }

  // Number of leading window columns that a query column sees; those are all that it sees of it.
  __aicore__ inline uint32_t VisibleColumns(const Job& job, uint32_t segment,
                                            uint32_t column) const {
    const uint32_t length = job.length[segment];
    if (t->blockSize == 0) {
      return length;
    }
    const int64_t position = static_cast<int64_t>(job.cacheLen) + column;
    const int64_t generated = position - job.promptLen;
    const int64_t size = t->blockSize;
    // The prompt is one block, the one before block 0.
    const int64_t blockEnd = job.promptLen + (generated < 0 ? 0 : (generated / size + 1) * size);
    const int64_t visible = blockEnd - job.cacheLen;
    return visible < length ? static_cast<uint32_t>(visible) : length;
  }

 private:
  __aicore__ inline uint32_t Clamp(int32_t value, uint32_t most) const {
    return value < 0 ? 0 : Smaller(static_cast<uint32_t>(value), most);
  }

  // Leading columns of a segment's window that any of its rows in this tile sees.
  __aicore__ inline uint32_t WindowKeys(const Job& job, uint32_t segment) const {
    if (job.columns[segment] == 0) {
      return 0;
    }
    return VisibleColumns(job, segment, job.firstColumn + job.columns[segment] - 1);
  }

  __aicore__ inline void Settle(const Job& job, Step& step) const {
    step.valid = job.rows > 0;
    if (!step.valid) {
      return;
    }
    if (step.cached) {
      if (step.key < job.prefixEnd) {
        step.keys = Smaller(job.prefixEnd - step.key, BRANCH_ATTENTION_KEYS);
        step.rowBegin = 0;
        step.rowEnd = job.rows;
        return;
      }
      step.cached = false;
      step.segment = 0;
      step.key = 0;
      step.valid = IsLastSplit(job);
      if (!step.valid) {
        return;
      }
    }
    while (step.segment < job.segments) {
      const uint32_t keys = WindowKeys(job, step.segment);
      if (step.key < keys) {
        step.keys = Smaller(keys - step.key, BRANCH_ATTENTION_KEYS);
        step.rowBegin = job.segmentRow[step.segment];
        step.rowEnd = job.segmentRow[step.segment + 1];
        return;
      }
      ++step.segment;
      step.key = 0;
    }
    step.valid = false;
  }

  const BranchAttentionTiling* t;
  AscendC::GlobalTensor<int32_t> cacheLenGm;
  AscendC::GlobalTensor<int32_t> lengthGm;
  AscendC::GlobalTensor<int32_t> promptLenGm;
  AscendC::GlobalTensor<int32_t> tableGm;
};

// Cross-core flags, one of each for the two slots of the workspace.
constexpr uint16_t SCORES_READY = 0;
constexpr uint16_t WEIGHTS_READY = 2;
constexpr uint16_t VALUES_READY = 4;

}  // namespace branch_attention
