// The arithmetic of the branch room's tiling. No dependencies, so that tests on any machine call
// it.
#pragma once

#include <cstdint>
#include <cstring>

#include "../op_kernel/branch_tiling_data.h"

namespace lopa {

// UB that kernels may use, and what a round keeps in it: bytes a column and a branch slot.
constexpr uint64_t kBranchUbBytes = 192 * 1024 - 256 - 8 * 1024;
constexpr uint64_t kStepBytesOfColumn = 8 + 8 + 4 + 4 + 4 + 4 + 8;
constexpr uint64_t kStepBytesOfNextColumn = 8;
constexpr uint64_t kStepBytesOfSlot = 4 * 4 + 4 * 3 + 2;
constexpr uint64_t kStepBytes = 2048;  // scalars, and each buffer's last block

inline double double_of_bits(int64_t bits) {
  double value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint64_t bits_of_double(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline ReduceTiling tile_reduction(BranchReduction reduction, double fraction, int64_t group,
                                   double alpha) {
  ReduceTiling tiling{};
  tiling.reduction = reduction;
  tiling.group = static_cast<uint32_t>(group);
  tiling.fraction = bits_of_double(fraction);
  tiling.alpha = bits_of_double(alpha);
  tiling.rest = bits_of_double(1.0 - alpha);
  tiling.only = alpha <= 0.0 ? 1 : alpha >= 1.0 ? 2 : 0;
  return tiling;
}

// Why a round's shape cannot be done; null where it can.
inline const char* step_refusal(int64_t branches, int64_t window, int64_t next_branches,
                                int64_t next_window) {
  if (branches < 1 || window < 1) return "tokens: expected [B, K, W] with K and W at least 1";
  if (next_branches < 1 || next_window < 1) {
    return "out_branches, out_window: expected at least 1";
  }
  const uint64_t slots = static_cast<uint64_t>(branches) + static_cast<uint64_t>(next_branches);
  const uint64_t bytes = kStepBytes + kStepBytesOfColumn * static_cast<uint64_t>(window) +
                         kStepBytesOfNextColumn * static_cast<uint64_t>(next_window) +
                         kStepBytesOfSlot * slots;
  if (bytes > kBranchUbBytes) {
    return "tokens: a window of W columns needs 40 W + 8 out_window bytes of a core's 188160";
  }
  return nullptr;
}

// Sequences are dealt to cores.
inline uint32_t branch_cores(uint64_t batch, uint32_t cores) {
  return batch == 0 ? 1 : batch < cores ? static_cast<uint32_t>(batch) : cores;
}

}  // namespace lopa
