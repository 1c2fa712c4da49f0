// What the kernels of the branch room share: copies between global memory and UB that the scalar
// unit waits for, and float constants.
#pragma once

#include "branch_tiling_data.h"
#include "kernel_operator.h"

namespace lopa {
namespace branch {

using namespace AscendC;

__aicore__ inline float neg_inf() {
  union {
    uint32_t bits;
    float value;
  } word;
  word.bits = 0xFF800000u;
  return word.value;
}
__aicore__ inline bool is_nan(float x) { return x != x; }
__aicore__ inline bool is_finite(float x) { return x - x == 0.0f; }
// NaN ranks below every number.
__aicore__ inline float rankable(float x) { return is_nan(x) ? neg_inf() : x; }

template <HardEvent event>
__aicore__ inline void synchronise() {
  const event_t id = static_cast<event_t>(GetTPipePtr()->FetchEventID(event));
  SetFlag<event>(id);
  WaitFlag<event>(id);
}

constexpr uint32_t kBlockBytes = 32;

__aicore__ inline uint32_t in_blocks(uint32_t bytes) {
  return (bytes + kBlockBytes - 1) / kBlockBytes * kBlockBytes;
}

// A copy that the scalar unit is to read: between begin_loads() and end_loads().
__aicore__ inline void begin_loads() { synchronise<HardEvent::S_MTE2>(); }
__aicore__ inline void end_loads() { synchronise<HardEvent::MTE2_S>(); }

template <typename T>
__aicore__ inline void load(const LocalTensor<T>& to, const GlobalTensor<T>& from, uint32_t count) {
  const DataCopyExtParams copy{1, static_cast<uint32_t>(count * sizeof(T)), 0, 0, 0};
  const DataCopyPadExtParams<T> pad{false, 0, 0, 0};
  DataCopyPad(to, from, copy, pad);
}

// And copies of what the scalar unit has written.
__aicore__ inline void begin_stores() { synchronise<HardEvent::S_MTE3>(); }
__aicore__ inline void end_stores() { synchronise<HardEvent::MTE3_S>(); }

template <typename T>
__aicore__ inline void store(const GlobalTensor<T>& to, const LocalTensor<T>& from,
                             uint32_t count) {
  DataCopyPad(to, from, {1, static_cast<uint32_t>(count * sizeof(T)), 0, 0, 0});
}

template <typename T>
__aicore__ inline GlobalTensor<T> global(GM_ADDR address, uint64_t count) {
  GlobalTensor<T> tensor;
  tensor.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(address), count);
  return tensor;
}

}  // namespace branch
}  // namespace lopa
