// What the kernels of the KV cache share: the lengths of sequences, and what is wrong with them.
#pragma once

#include "kernel_operator.h"
#include "kv_cache_tiling_data.h"

namespace lopa {

// Bits of the status word; lopa_kernels/status.py documents them.
constexpr int32_t kBadState = 4;
constexpr int32_t kCacheFull = 16;

constexpr uint32_t kBlockWords = 8;
constexpr uint32_t kChunkSequences = 64;

// int32 [batch] operands, of which a chunk of sequences is in unified buffer at a time.
template <uint32_t kOperands>
class SequenceWords {
 public:
  __aicore__ inline void Init(AscendC::TPipe* pipe) {
    pipe_ = pipe;
    pipe_->InitBuffer(buffer_, kOperands * kChunkSequences * sizeof(int32_t));
    words_ = buffer_.template Get<int32_t>();
  }

  __aicore__ inline void Bind(uint32_t operand, GM_ADDR data, uint32_t batch) {
    global_[operand].SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(data), batch);
  }

  // Words [first, first + count) of one operand. Ready() waits for all that was asked for.
  __aicore__ inline void Load(uint32_t operand, uint32_t first, uint32_t count) {
    AscendC::DataCopyExtParams shape{1, static_cast<uint32_t>(count * sizeof(int32_t)), 0, 0, 0};
    AscendC::DataCopyPadExtParams<int32_t> pad{false, 0, 0, 0};
    AscendC::DataCopyPad(words_[operand * kChunkSequences], global_[operand][first], shape, pad);
  }

  __aicore__ inline void Ready() { Sync<AscendC::HardEvent::MTE2_S>(); }

  // No word is read after this until the next Ready().
  __aicore__ inline void Release() { Sync<AscendC::HardEvent::S_MTE2>(); }

  __aicore__ inline int32_t Get(uint32_t operand, uint32_t i) {
    return words_.GetValue(operand * kChunkSequences + i);
  }

  __aicore__ inline void Or(uint32_t operand, uint32_t i, int32_t bits) {
    const uint32_t at = operand * kChunkSequences + i;
    words_.SetValue(at, words_.GetValue(at) | bits);
  }

  // Writes the words of one operand back, and waits until they may be overwritten.
  __aicore__ inline void Store(uint32_t operand, uint32_t first, uint32_t count) {
    Sync<AscendC::HardEvent::S_MTE3>();
    AscendC::DataCopyExtParams shape{1, static_cast<uint32_t>(count * sizeof(int32_t)), 0, 0, 0};
    AscendC::DataCopyPad(global_[operand][first], words_[operand * kChunkSequences], shape);
    Sync<AscendC::HardEvent::MTE3_MTE2>();
  }

 private:
  template <AscendC::HardEvent kEvent>
  __aicore__ inline void Sync() {
    const AscendC::TEventID id = pipe_->FetchEventID(kEvent);
    AscendC::SetFlag<kEvent>(id);
    AscendC::WaitFlag<kEvent>(id);
  }

  AscendC::TPipe* pipe_;
  AscendC::TBuf<AscendC::TPosition::VECCALC> buffer_;
  AscendC::LocalTensor<int32_t> words_;
  AscendC::GlobalTensor<int32_t> global_[kOperands];
};

// A write of columns below commitLen at cacheLen: both in range, and within the cache.
__aicore__ inline int32_t CommitFault(int32_t cacheLen, int32_t commitLen, uint32_t window,
                                      uint32_t capacity) {
  if (cacheLen < 0 || commitLen < 0 || static_cast<uint32_t>(commitLen) > window) return kBadState;
  const int64_t end = static_cast<int64_t>(cacheLen) + commitLen;
  return end > static_cast<int64_t>(capacity) ? kCacheFull : 0;
}

}  // namespace lopa
