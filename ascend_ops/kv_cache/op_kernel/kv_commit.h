// Commit-Winner-Cache: columns below commit_len of the winner's windows become positions of the
// cache, in all layers.
//
// A sequence's run of one layer, keys or values, is contiguous on both ends. The runs of all
// sequences are cut into tiles, dealt out to the cores in turn: what a core copies depends on the
// lengths, which it reads itself, and on no grid that the host would have to know.
#pragma once

#include "kernel_operator.h"
#include "kv_cache_common.h"

namespace lopa {

class KvCommit {
 public:
  __aicore__ inline KvCommit() {}

  __aicore__ inline void Init(AscendC::TPipe* pipe, const KvCommitTiling& tiling, GM_ADDR kCache,
                              GM_ADDR vCache, GM_ADDR kWindow, GM_ADDR vWindow, GM_ADDR winner,
                              GM_ADDR cacheLen, GM_ADDR commitLen, GM_ADDR status) {
    t_ = tiling;
    words_.Init(pipe);
    words_.Bind(kWinner, winner, t_.batch);
    words_.Bind(kCacheLen, cacheLen, t_.batch);
    words_.Bind(kCommitLen, commitLen, t_.batch);
    words_.Bind(kStatus, status, t_.batch);
    const uint64_t sequences = static_cast<uint64_t>(t_.layers) * t_.batch;
    const uint64_t column = static_cast<uint64_t>(t_.columnBlocks) * kBlockWords;
    const uint64_t cacheWords = sequences * t_.capacity * column;
    const uint64_t windowWords = sequences * t_.branches * t_.window * column;
    cache_[0].SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(kCache), cacheWords);
    cache_[1].SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(vCache), cacheWords);
    window_[0].SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(kWindow), windowWords);
    window_[1].SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(vWindow), windowWords);
    pipe->InitBuffer(copies_, kBuffers, t_.tileBlocks * kBlockWords * sizeof(int32_t));
  }

  __aicore__ inline void Process() {
    for (uint32_t first = 0; first < t_.batch; first += kChunkSequences) {
      const uint32_t left = t_.batch - first;
      const uint32_t count = left < kChunkSequences ? left : kChunkSequences;
      words_.Load(kWinner, first, count);
      words_.Load(kCacheLen, first, count);
      words_.Load(kCommitLen, first, count);
      words_.Ready();
      for (uint32_t i = 0; i < count; ++i) Sequence(first + i, i);
      if (AscendC::GetBlockIdx() == 0) Report(first, count);
      words_.Release();
    }
  }

 private:
  enum Operand : uint32_t { kWinner, kCacheLen, kCommitLen, kStatus, kOperands };
  static constexpr int32_t kBuffers = 4;  // kCommitBuffers of the tiling

  __aicore__ inline int32_t Fault(uint32_t i) {
    const int32_t commitLen = words_.Get(kCommitLen, i);
    const int32_t fault = CommitFault(words_.Get(kCacheLen, i), commitLen, t_.window, t_.capacity);
    if (fault != 0 || commitLen == 0) return fault;
    const int32_t winner = words_.Get(kWinner, i);
    return winner < 0 || static_cast<uint32_t>(winner) >= t_.branches ? kBadState : 0;
  }

  // This core's tiles of sequence b, which is number i of the chunk.
  __aicore__ inline void Sequence(uint32_t b, uint32_t i) {
    const int32_t columns = words_.Get(kCommitLen, i);
    if (Fault(i) != 0 || columns == 0) return;
    const uint64_t blocks = static_cast<uint64_t>(columns) * t_.columnBlocks;
    const uint64_t tiles = (blocks + t_.tileBlocks - 1) / t_.tileBlocks;
    const uint64_t units = 2 * t_.layers * tiles;
    const uint64_t cores = AscendC::GetBlockNum();
    // Unit 0 is the turn of core next_.
    const uint64_t own = (AscendC::GetBlockIdx() + cores - next_) % cores;
    for (uint64_t unit = own; unit < units; unit += cores) {
      const uint64_t run = unit / tiles;
      const uint64_t begin = (unit - run * tiles) * t_.tileBlocks;
      const uint64_t left = blocks - begin;
      const uint64_t sequence = run / 2 * t_.batch + b;
      const uint64_t slot = sequence * t_.branches + static_cast<uint32_t>(words_.Get(kWinner, i));
      const uint64_t position =
          sequence * t_.capacity + static_cast<uint32_t>(words_.Get(kCacheLen, i));
      Copy(cache_[run % 2], position * t_.columnBlocks + begin, window_[run % 2],
           slot * t_.window * t_.columnBlocks + begin, left < t_.tileBlocks ? left : t_.tileBlocks);
    }
    next_ = (next_ + units) % cores;
  }

  // Offsets and size in blocks of 32 bytes.
  __aicore__ inline void Copy(AscendC::GlobalTensor<int32_t>& to, uint64_t toBlock,
                              AscendC::GlobalTensor<int32_t>& from, uint64_t fromBlock,
                              uint64_t blocks) {
    const uint32_t words = static_cast<uint32_t>(blocks * kBlockWords);
    AscendC::LocalTensor<int32_t> loaded = copies_.AllocTensor<int32_t>();
    AscendC::DataCopy(loaded, from[fromBlock * kBlockWords], words);
    copies_.EnQue(loaded);
    AscendC::LocalTensor<int32_t> tile = copies_.DeQue<int32_t>();
    AscendC::DataCopy(to[toBlock * kBlockWords], tile, words);
    copies_.FreeTensor(tile);
  }

  __aicore__ inline void Report(uint32_t first, uint32_t count) {
    bool any = false;
    for (uint32_t i = 0; i < count; ++i) any = any || Fault(i) != 0;
    if (!any) return;
    words_.Load(kStatus, first, count);
    words_.Ready();
    for (uint32_t i = 0; i < count; ++i) words_.Or(kStatus, i, Fault(i));
    words_.Store(kStatus, first, count);
  }

  KvCommitTiling t_;
  SequenceWords<kOperands> words_;
  AscendC::GlobalTensor<int32_t> cache_[2];  // keys, values
  AscendC::GlobalTensor<int32_t> window_[2];
  AscendC::TQueBind<AscendC::TPosition::VECIN, AscendC::TPosition::VECOUT, 1> copies_;
  uint64_t next_ = 0;
};

}  // namespace lopa
