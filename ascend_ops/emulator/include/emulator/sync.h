// Flags between the pipes of a core, barriers, and the meeting of all cores.
#pragma once

#include "emulator/tpipe.h"

// Runtime questions here; constants of a compilation for one kind of core on the device.
#define ASCEND_IS_AIC (::ascend_emulator::core().role == ::ascend_emulator::Role::kCube)
#define ASCEND_IS_AIV (::ascend_emulator::core().role == ::ascend_emulator::Role::kVector)

#define KERNEL_TYPE_AIV_ONLY 0
#define KERNEL_TYPE_AIC_ONLY 1
#define KERNEL_TYPE_MIX_AIC_1_2 2
#define KERNEL_TASK_TYPE_DEFAULT(value) ::ascend_emulator::check_task_type(value)

#define TILING_KEY_IS(key) (::ascend_emulator::core().device.launch.tiling_key == (key))
#define REGISTER_TILING_DEFAULT(Struct) using EmulatedTilingData = Struct
#define GET_TILING_DATA(name, tiling) \
  const auto name = ::ascend_emulator::tiling_data<EmulatedTilingData>(tiling)
#define GET_TILING_DATA_WITH_STRUCT(Struct, name, tiling) \
  const auto name = ::ascend_emulator::tiling_data<Struct>(tiling)

namespace ascend_emulator {

inline void check_task_type(int type) {
  const Launch& launch = core().device.launch;
  const int launched = launch.mixed       ? KERNEL_TYPE_MIX_AIC_1_2
                       : launch.cube_only ? KERNEL_TYPE_AIC_ONLY
                                          : KERNEL_TYPE_AIV_ONLY;
  if (type != launched) fail("role", "the kernel's task type is not that of the launch");
}

template <typename T>
T tiling_data(GM_ADDR tiling) {
  static_assert(std::is_trivially_copyable<T>::value, "tiling data are plain structs");
  Region& region = core().device.region(tiling, sizeof(T), "reads");
  if (region.bytes != sizeof(T)) {
    fail("bounds", "tiling data of %llu bytes for a struct of %zu",
         static_cast<unsigned long long>(region.bytes), sizeof(T));
  }
  T data;
  std::memcpy(&data, core().device.read_global(tiling, sizeof(T), PIPE_S), sizeof(T));
  return data;
}

// The system's part of the workspace, before the kernel's.
constexpr uint64_t kSystemWorkspace = 512;

}  // namespace ascend_emulator

namespace AscendC {

template <HardEvent event>
void SetFlag(int32_t eventID) {
  ascend_emulator::core().set_flag(event, eventID);
}

template <HardEvent event>
void WaitFlag(int32_t eventID) {
  ascend_emulator::core().wait_flag(event, eventID);
}

template <pipe_t pipe>
void PipeBarrier() {
  ascend_emulator::core().barrier(pipe);
}

template <bool isAIVOnly = true>
void SyncAll() {
  ascend_emulator::core().device.sync_all(isAIVOnly);
}

inline GM_ADDR GetUserWorkspace(GM_ADDR workspace) {
  return workspace + ascend_emulator::kSystemWorkspace;
}

// In a MIX launch a vector core's index counts all vector cores, and GetBlockNum counts blocks.
inline int64_t GetBlockIdx() {
  const ascend_emulator::Core& core = ascend_emulator::core();
  const bool mixed_vector = core.device.launch.mixed && core.role == ascend_emulator::Role::kVector;
  return mixed_vector ? core.block * 2 + core.sub_block : core.block;
}
inline int64_t GetBlockNum() { return ascend_emulator::core().device.launch.blocks; }
inline int64_t GetSubBlockIdx() { return ascend_emulator::core().sub_block; }
inline int64_t GetSubBlockNum() {
  const ascend_emulator::Core& core = ascend_emulator::core();
  return core.device.launch.mixed && core.role == ascend_emulator::Role::kVector ? 2 : 1;
}
inline int64_t GetTaskRatio() { return GetSubBlockNum(); }

inline void InitSocState() {}

}  // namespace AscendC
