// TPipe, TQue and TBuf: who holds which buffer, and the synchronisation that queues bring.
#pragma once

#include "emulator/tensor.h"

namespace ascend_emulator {

using AscendC::TPosition;

// The queue's ends (source, destination) of a position.
constexpr TPosition queue_source(TPosition p) {
  switch (p) {
    case TPosition::A2:
      return TPosition::A1;
    case TPosition::B2:
      return TPosition::B1;
    case TPosition::C2:
      return TPosition::C1;
    case TPosition::CO1:
    case TPosition::VECOUT:
    case TPosition::VECCALC:
      return p;
    default:
      return TPosition::GM;
  }
}
constexpr TPosition queue_destination(TPosition p) {
  return p == TPosition::CO1 ? TPosition::CO2 : p == TPosition::VECOUT ? TPosition::GM : p;
}

// The flag of EnQue and DeQue (`forward`), or of FreeTensor and AllocTensor.
constexpr HardEvent queue_event(Hardware from, Hardware to, bool forward) {
  if (from == Hardware::GM && to == Hardware::UB) {
    return forward ? HardEvent::MTE2_V : HardEvent::V_MTE2;
  }
  if (from == Hardware::GM && to == Hardware::L1) {
    return forward ? HardEvent::MTE2_MTE1 : HardEvent::MTE1_MTE2;
  }
  if (from == Hardware::UB && to == Hardware::GM) {
    return forward ? HardEvent::V_MTE3 : HardEvent::MTE3_V;
  }
  if (from == Hardware::UB && to == Hardware::UB) {
    return forward ? HardEvent::MTE2_MTE3 : HardEvent::MTE3_MTE2;
  }
  if (from == Hardware::L1) return forward ? HardEvent::MTE1_M : HardEvent::M_MTE1;
  if (from == Hardware::L0C) return forward ? HardEvent::M_FIX : HardEvent::FIX_M;
  return HardEvent::MAX;
}

}  // namespace ascend_emulator

namespace AscendC {

class TPipe;

template <TPosition src, TPosition dst, int32_t depth, auto mask = 0>
class TQueBind {
  static_assert(mask == 0, "TQue: layout conversions are not emulated");

 public:
  TQueBind() = default;
  TQueBind(const TQueBind&) = delete;
  TQueBind& operator=(const TQueBind&) = delete;

  template <typename T>
  LocalTensor<T> AllocTensor() {
    if (count_ == 0) ascend_emulator::fail("queue", "AllocTensor: InitBuffer has not been called");
    for (int i = 0; i < count_; ++i) {
      const int index = first_ + (next_ + i) % count_;
      ascend_emulator::Buffer& buffer = owner().buffers[index];
      if (buffer.state != State::kFree) continue;
      next_ = (next_ + i + 1) % count_;
      owner().await_queue(kFreed, buffer.freed, buffer.freed_id);
      buffer.state = State::kAllocated;
      ++buffer.generation;
      return tensor<T>(index);
    }
    ascend_emulator::fail("queue", "AllocTensor: none of the queue's %d buffers is free", count_);
  }

  template <typename T>
  void FreeTensor(LocalTensor<T>& tensor) {
    ascend_emulator::Buffer& buffer = held(tensor, "FreeTensor");
    if (buffer.state != State::kAllocated && buffer.state != State::kDequeued) {
      ascend_emulator::fail("queue", "FreeTensor: the tensor is not held");
    }
    buffer.state = State::kFree;
    buffer.freed_id = owner().signal_queue(kFreed, buffer.freed);
  }

  template <typename T>
  bool EnQue(const LocalTensor<T>& tensor) {
    ascend_emulator::Buffer& buffer = held(tensor, "EnQue");
    if (buffer.state != State::kAllocated) {
      ascend_emulator::fail("queue", "EnQue: the tensor does not come from AllocTensor");
    }
    if (queued_.size() >= static_cast<size_t>(depth)) {
      ascend_emulator::fail("queue", "EnQue: more than the queue's depth of %d", depth);
    }
    buffer.state = State::kQueued;
    buffer.filled_id = owner().signal_queue(kFilled, buffer.filled);
    queued_.push_back(tensor.place().buffer);
    return true;
  }

  template <typename T>
  LocalTensor<T> DeQue() {
    if (queued_.empty()) ascend_emulator::fail("queue", "DeQue: the queue is empty");
    const int index = queued_.front();
    queued_.erase(queued_.begin());
    ascend_emulator::Buffer& buffer = owner().buffers[index];
    owner().await_queue(kFilled, buffer.filled, buffer.filled_id);
    buffer.state = State::kDequeued;
    return tensor<T>(index);
  }

  bool HasTensorInQue() const { return !queued_.empty(); }
  bool VacantInQue() const { return queued_.size() < static_cast<size_t>(depth); }
  int32_t GetTensorCountInQue() const { return static_cast<int32_t>(queued_.size()); }
  bool HasIdleBuffer() const {
    for (int i = 0; i < count_; ++i) {
      if (owner().buffers[first_ + i].state == State::kFree) return true;
    }
    return false;
  }

 private:
  friend class TPipe;
  using State = ascend_emulator::BufferState;
  // A buffer lies where it is filled: at the source of a queue out, else at its destination.
  static constexpr TPosition kPosition =
      src == TPosition::GM || GetPhyType(src) == Hardware::L1 ? dst : src;
  static constexpr Hardware kHardware = GetPhyType(kPosition);
  static constexpr HardEvent kFilled =
      ascend_emulator::queue_event(GetPhyType(src), GetPhyType(dst), true);
  static constexpr HardEvent kFreed =
      ascend_emulator::queue_event(GetPhyType(src), GetPhyType(dst), false);
  static_assert(kFilled != HardEvent::MAX, "TQue: a position that is not emulated");

  void init(uint8_t count, uint32_t bytes) {
    if (count_ != 0) ascend_emulator::fail("queue", "InitBuffer: the queue has buffers already");
    if (count == 0) ascend_emulator::fail("queue", "InitBuffer: no buffers");
    owner_ = &ascend_emulator::core();
    for (int i = 0; i < count; ++i) {
      const uint32_t index = owner_->allocate(kHardware, bytes, true);
      if (i == 0) first_ = static_cast<int>(index);
    }
    count_ = count;
  }

  ascend_emulator::Core& owner() const { return *owner_; }

  template <typename T>
  ascend_emulator::Buffer& held(const LocalTensor<T>& tensor, const char* api) const {
    const ascend_emulator::Place& place = tensor.place();
    if (place.owner == nullptr || place.owner != owner_ || place.buffer < first_ ||
        place.buffer >= first_ + count_) {
      ascend_emulator::fail("queue", "%s: the tensor is not this queue's", api);
    }
    ascend_emulator::Buffer& buffer = owner_->buffers[place.buffer];
    if (buffer.generation != place.generation || buffer.state == State::kFree) {
      ascend_emulator::fail("queue", "%s: the tensor has been freed", api);
    }
    return buffer;
  }

  template <typename T>
  LocalTensor<T> tensor(int index) const {
    const ascend_emulator::Buffer& buffer = owner_->buffers[index];
    return LocalTensor<T>({kPosition, kHardware, buffer.begin, buffer.begin,
                           buffer.begin + buffer.bytes, index, buffer.generation, owner_},
                          buffer.bytes / static_cast<uint32_t>(sizeof(T)));
  }

  ascend_emulator::Core* owner_ = nullptr;
  int first_ = 0, count_ = 0, next_ = 0;
  std::vector<int> queued_;
};

template <TPosition pos, int32_t depth, auto mask = 0>
class TQue : public TQueBind<ascend_emulator::queue_source(pos),
                             ascend_emulator::queue_destination(pos), depth, mask> {};

template <TPosition pos = TPosition::LCM>
class TBuf {
 public:
  TBuf() = default;
  TBuf(const TBuf&) = delete;
  TBuf& operator=(const TBuf&) = delete;

  template <typename T>
  LocalTensor<T> Get() {
    return GetWithOffset<T>(bytes_ / static_cast<uint32_t>(sizeof(T)), 0);
  }
  template <typename T>
  LocalTensor<T> Get(uint32_t len) {
    return GetWithOffset<T>(len, 0);
  }
  template <typename T>
  LocalTensor<T> GetWithOffset(uint32_t size, uint32_t bufOffset) {
    if (owner_ == nullptr) ascend_emulator::fail("queue", "TBuf: InitBuffer has not been called");
    if (uint64_t{bufOffset} + uint64_t{size} * sizeof(T) > bytes_) {
      ascend_emulator::fail("bounds", "TBuf: %u elements at byte %u of a buffer of %u", size,
                            bufOffset, bytes_);
    }
    const ascend_emulator::Buffer& buffer = owner_->buffers[index_];
    const uint32_t begin = buffer.begin;
    return LocalTensor<T>({pos, GetPhyType(pos), begin + bufOffset, begin, begin + bytes_,
                           static_cast<int>(index_), 0, owner_},
                          size);
  }

 private:
  friend class TPipe;
  void init(uint32_t bytes) {
    owner_ = &ascend_emulator::core();
    index_ = owner_->allocate(GetPhyType(pos), bytes, false);
    bytes_ = owner_->buffers[index_].bytes;
  }

  ascend_emulator::Core* owner_ = nullptr;
  uint32_t index_ = 0, bytes_ = 0;
};

class TPipe {
 public:
  TPipe() : owner_(&ascend_emulator::core()) {
    if (owner_->tpipe != nullptr) ascend_emulator::fail("queue", "TPipe: a core has one already");
    owner_->tpipe = this;
  }
  ~TPipe() { owner_->tpipe = nullptr; }
  TPipe(const TPipe&) = delete;
  TPipe& operator=(const TPipe&) = delete;

  template <class T>
  bool InitBuffer(T& que, uint8_t num, uint32_t len) {
    que.init(num, len);
    return true;
  }
  template <TPosition pos>
  bool InitBuffer(TBuf<pos>& buf, uint32_t len) {
    buf.init(len);
    return true;
  }

  template <HardEvent evt>
  TEventID AllocEventID() {
    return static_cast<TEventID>(owner_->take_event(evt));
  }
  template <HardEvent evt>
  void ReleaseEventID(TEventID id) {
    owner_->give_event(evt, id);
  }
  // An id that is free now; nothing reserves it.
  template <HardEvent evt>
  TEventID FetchEventID() {
    return static_cast<TEventID>(owner_->peek_event(evt));
  }
  TEventID FetchEventID(HardEvent evt) { return static_cast<TEventID>(owner_->peek_event(evt)); }

  void Reset() { owner_->reset_buffers(); }
  void Destroy() { owner_->reset_buffers(); }

 private:
  ascend_emulator::Core* owner_;
};

}  // namespace AscendC

inline AscendC::TPipe* GetTPipePtr() {
  return static_cast<AscendC::TPipe*>(ascend_emulator::core().tpipe);
}
