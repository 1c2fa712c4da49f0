// LocalTensor and GlobalTensor.
#pragma once

#include "emulator/device.h"

namespace ascend_emulator {

// Where a LocalTensor lies, without its type.
struct Place {
  AscendC::TPosition position = AscendC::TPosition::MAX;
  Hardware hardware = Hardware::MAX;
  uint32_t address = 0;         // byte in its memory
  uint32_t begin = 0, end = 0;  // bytes of its buffer
  int buffer = -1;              // in Core::buffers
  uint32_t generation = 0;
  Core* owner = nullptr;

  // [address + offset, + bytes) as an operand of `api`; the buffer's state permitting.
  void check(const char* api, const char* operand, uint64_t offset, uint64_t bytes) const {
    if (owner == nullptr) fail("queue", "%s: %s is a tensor without memory", api, operand);
    if (owner != &core()) fail("queue", "%s: %s is another core's tensor", api, operand);
    const uint64_t from = address + offset;
    if (from < begin || from + bytes > end) {
      fail("bounds", "%s: %s takes bytes [%llu, %llu) of a buffer of %u", api, operand,
           static_cast<unsigned long long>(from - begin),
           static_cast<unsigned long long>(from - begin + bytes), end - begin);
    }
    if (static_cast<size_t>(buffer) >= owner->buffers.size()) {
      fail("queue", "%s: %s is a tensor of a buffer that Reset took back", api, operand);
    }
    const Buffer& own = owner->buffers[buffer];
    if (!own.queue) return;
    if (own.generation != generation || own.state == BufferState::kFree) {
      fail("queue", "%s: %s has been freed", api, operand);
    }
    if (own.state == BufferState::kQueued) {
      fail("queue", "%s: %s is in its queue: EnQue came before, DeQue did not", api, operand);
    }
  }

  void check_alignment(const char* api, const char* operand, uint32_t alignment) const {
    if (address % alignment != 0) {
      fail("alignment", "%s: %s starts at byte %u, which is no multiple of %u", api, operand,
           address, alignment);
    }
  }
};

}  // namespace ascend_emulator

namespace AscendC {

template <typename T>
class LocalTensor {
 public:
  using PrimType = T;
  LocalTensor() = default;
  LocalTensor(const ascend_emulator::Place& place, uint32_t size) : place_(place), size_(size) {}

  T GetValue(const uint32_t index) const {
    place_.check("GetValue", "the tensor", uint64_t{index} * sizeof(T), sizeof(T));
    const uint64_t at = place_.address + uint64_t{index} * sizeof(T);
    ++place_.owner->counters.scalar_accesses;
    T value;
    std::memcpy(&value, scalar("GetValue").read(place_.hardware, at, at + sizeof(T), PIPE_S),
                sizeof(T));
    return value;
  }

  template <typename S>
  void SetValue(const uint32_t index, const S value) const {
    place_.check("SetValue", "the tensor", uint64_t{index} * sizeof(T), sizeof(T));
    const uint64_t at = place_.address + uint64_t{index} * sizeof(T);
    ++place_.owner->counters.scalar_accesses;
    const T stored = static_cast<T>(value);
    std::memcpy(scalar("SetValue").write(place_.hardware, at, at + sizeof(T), PIPE_S), &stored,
                sizeof(T));
  }

  LocalTensor operator[](const uint32_t offset) const {
    LocalTensor part = *this;
    part.place_.address += offset * static_cast<uint32_t>(sizeof(T));
    part.size_ = offset < size_ ? size_ - offset : 0;
    return part;
  }

  template <typename U>
  LocalTensor<U> ReinterpretCast() const {
    return LocalTensor<U>(place_, static_cast<uint32_t>(uint64_t{size_} * sizeof(T) / sizeof(U)));
  }

  uint64_t GetPhyAddr() const { return place_.address; }
  uint64_t GetPhyAddr(const uint32_t offset) const {
    return place_.address + uint64_t{offset} * sizeof(T);
  }
  int32_t GetPosition() const { return static_cast<int32_t>(place_.position); }
  uint32_t GetSize() const { return size_; }
  void SetSize(const uint32_t size) { size_ = size; }

  // For the emulator.
  const ascend_emulator::Place& place() const { return place_; }

 private:
  ascend_emulator::Core& scalar(const char* api) const {
    if (place_.hardware != Hardware::UB) {
      ascend_emulator::fail("role", "%s: the scalar unit reaches UB and global memory only", api);
    }
    return *place_.owner;
  }

  ascend_emulator::Place place_;
  uint32_t size_ = 0;  // elements
};

template <typename T>
class GlobalTensor {
 public:
  using PrimType = T;

  void SetGlobalBuffer(__gm__ T* buffer, uint64_t size) {
    SetGlobalBuffer(buffer);
    size_ = size;
  }
  void SetGlobalBuffer(__gm__ T* buffer) {
    data_ = buffer;
    size_ = UINT64_MAX;
    offset_ = 0;
  }

  // Through the scalar unit's cache: only what no core writes in this launch.
  T GetValue(const uint64_t offset) const {
    T value;
    std::memcpy(&value, read(offset * sizeof(T), sizeof(T), PIPE_S, "GetValue"), sizeof(T));
    ascend_emulator::core().counters.gm_scalar += sizeof(T);
    return value;
  }

  GlobalTensor operator[](const uint64_t offset) const {
    GlobalTensor part = *this;
    part.offset_ += offset;
    return part;
  }

  const __gm__ T* GetPhyAddr() const { return data_ + offset_; }
  __gm__ T* GetPhyAddr(const uint64_t offset) const { return data_ + offset_ + offset; }
  uint64_t GetSize() const { return size_; }

  // For the emulator: bytes from this tensor's first element.
  const uint8_t* read(uint64_t offset, uint64_t bytes, pipe_t pipe, const char* api) const {
    check(offset, bytes, api);
    return ascend_emulator::core().device.read_global(address() + offset, bytes, pipe);
  }
  uint8_t* write(uint64_t offset, uint64_t bytes, pipe_t pipe, const char* api) const {
    check(offset, bytes, api);
    return ascend_emulator::core().device.write_global(address() + offset, bytes, pipe);
  }

 private:
  uint8_t* address() const { return reinterpret_cast<uint8_t*>(data_) + offset_ * sizeof(T); }

  void check(uint64_t offset, uint64_t bytes, const char* api) const {
    if (data_ == nullptr) ascend_emulator::fail("bounds", "%s: a tensor without memory", api);
    if (size_ == UINT64_MAX) return;
    const uint64_t from = offset_ * sizeof(T) + offset, all = size_ * sizeof(T);
    if (from > all || bytes > all - from) {
      ascend_emulator::fail("bounds", "%s: bytes [%llu, %llu) of a GlobalTensor of %llu", api,
                            static_cast<unsigned long long>(from),
                            static_cast<unsigned long long>(from + bytes),
                            static_cast<unsigned long long>(all));
    }
  }

  __gm__ T* data_ = nullptr;
  uint64_t size_ = 0, offset_ = 0;  // elements
};

}  // namespace AscendC
