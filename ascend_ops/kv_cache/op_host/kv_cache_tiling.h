// The arithmetic of the KV cache's tiling: how work is cut for a number of vector cores. No
// dependencies, so that tests on any machine call it.
#pragma once

#include <cmath>
#include <cstdint>

#include "../op_kernel/kv_cache_tiling_data.h"

namespace lopa {

constexpr uint32_t kBlockBytes = 32;
// Unified buffer of architecture 2201, less what the toolchain and its library calls keep.
constexpr uint64_t kUsableUbBytes = 192 * 1024 - 256 - 8192;
// Lengths of a chunk of sequences, four operands of 64 words (kv_cache_common.h).
constexpr uint64_t kLengthsBytes = 4 * 64 * 4;
// A piece of work has no more columns: their rows of cos_sin are in unified buffer twice.
constexpr uint32_t kMaxTileColumns = 16;
// Repeats of one vector instruction.
constexpr uint32_t kMaxTileHeads = 255;
constexpr uint32_t kMaxHeadDim = 256;
// Blocks of 32 bytes that a copy's 16-bit gap can skip.
constexpr uint64_t kMaxGapBlocks = 65535;
// Copies in flight, and what each holds at most; below the lower bound a copy is all latency.
constexpr uint32_t kCommitBuffers = 4;
constexpr uint32_t kCommitMaxBlocks = 32 * 1024 / kBlockBytes;
constexpr uint32_t kCommitMinBlocks = 4 * 1024 / kBlockBytes;
constexpr uint32_t kCommitTilesPerCore = 4;

struct KvCacheShape {
  uint64_t layers;
  uint64_t batch;
  uint64_t branches;
  uint64_t window;
  uint64_t capacity;  // 0 without a cache
  uint64_t kvHeads;
  uint64_t qHeads;  // 0 without queries
  uint64_t headDim;
  uint32_t elementBytes;
  bool normalises = false;  // queries and keys, by q_norm and k_norm
};

inline uint64_t ceilDiv(uint64_t a, uint64_t b) { return b == 0 ? 0 : (a + b - 1) / b; }

inline uint64_t clampTo(uint64_t value, uint64_t low, uint64_t high) {
  return value < low ? low : value > high ? high : value;
}

// Why the kernels do not take a shape, or null.
inline const char* refusal(const KvCacheShape& s, bool packed) {
  if (s.headDim == 0 || s.headDim % 16 != 0 || s.headDim > kMaxHeadDim) {
    return "head_dim: expected a multiple of 16, at most 256";
  }
  if (s.kvHeads == 0) return "kv_heads: expected 1 or more";
  const uint64_t heads = packed ? s.qHeads + 2 * s.kvHeads : s.kvHeads;
  if (heads * s.headDim * s.elementBytes / kBlockBytes > kMaxGapBlocks) {
    return "heads * head_dim: a column exceeds 2 MiB";
  }
  if (s.layers > UINT32_MAX || s.batch > UINT32_MAX || s.branches * s.window > UINT32_MAX ||
      s.capacity > UINT32_MAX) {
    return "a dimension exceeds 32 bits";
  }
  return nullptr;
}

// Unified buffer that an element of a tile takes: two buffers each for what comes, leaves and is
// only copied; in fp32 half an element of products, and where the input is narrower its value and
// its result.
inline uint64_t prewriteBytesPerElement(uint32_t elementBytes) {
  return 6 * elementBytes + 2 + (elementBytes < 4 ? 8 : 0);
}

// And what normalising takes, whatever the tile: both weights, and of the heads at once a scale and
// a block each (head_norm.h).
inline uint64_t normBytes(const KvCacheShape& s) {
  if (!s.normalises) return 0;
  return 2 * s.headDim * sizeof(float) + kNormHeads * (sizeof(float) + kBlockBytes);
}

// Sqrt of 0, which a head of zeros would be without it, is undefined.
inline const char* normRefusal(double eps) {
  const float rounded = static_cast<float>(eps);
  return rounded > 0.0f && std::isfinite(rounded) ? nullptr : "norm_eps: expected above 0";
}

// Fills `t` but for layer, positions, rotates, hasCacheLen and normEps; returns the cores to
// launch.
inline uint32_t tilePrewrite(const KvCacheShape& s, uint32_t cores, uint64_t ubBytes,
                             KvPrewriteTiling& t) {
  t.batch = static_cast<uint32_t>(s.batch);
  t.branches = static_cast<uint32_t>(s.branches);
  t.window = static_cast<uint32_t>(s.window);
  t.capacity = static_cast<uint32_t>(s.capacity);
  t.kvHeads = static_cast<uint32_t>(s.kvHeads);
  t.qHeads = static_cast<uint32_t>(s.qHeads);
  t.headDim = static_cast<uint32_t>(s.headDim);
  t.normalises = s.normalises ? 1 : 0;
  t.headDimAsFloat = static_cast<float>(s.headDim);

  const uint64_t heads = s.qHeads > s.kvHeads ? s.qHeads : s.kvHeads;
  const uint64_t head = s.headDim * prewriteBytesPerElement(s.elementBytes);
  const uint64_t angles = 2 * s.headDim * sizeof(float);
  const uint64_t room = ubBytes - kLengthsBytes - normBytes(s);
  const uint64_t whole = heads <= kMaxTileHeads ? room / (heads * head + angles) : 0;
  const uint64_t slots = s.batch * s.branches;
  const uint64_t fair = ceilDiv(slots * s.window, cores);
  t.tileColumns = static_cast<uint32_t>(clampTo(whole < fair ? whole : fair, 1, kMaxTileColumns));
  t.tileHeads =
      static_cast<uint32_t>(whole > 0 ? heads : clampTo((room - angles) / head, 1, kMaxTileHeads));
  const uint64_t tiles = slots * ceilDiv(s.window, t.tileColumns);
  return static_cast<uint32_t>(clampTo(tiles, 1, cores));
}

// Returns the cores to launch: all, since only the device knows how much there is to do.
inline uint32_t tileCommit(const KvCacheShape& s, uint32_t cores, uint64_t ubBytes,
                           KvCommitTiling& t) {
  t.layers = static_cast<uint32_t>(s.layers);
  t.batch = static_cast<uint32_t>(s.batch);
  t.branches = static_cast<uint32_t>(s.branches);
  t.window = static_cast<uint32_t>(s.window);
  t.capacity = static_cast<uint32_t>(s.capacity);
  const uint64_t column = s.kvHeads * s.headDim * s.elementBytes / kBlockBytes;
  t.columnBlocks = static_cast<uint32_t>(column);
  const uint64_t blocks = 2 * s.layers * s.batch * s.window * column;
  const uint64_t fair = blocks / (static_cast<uint64_t>(cores) * kCommitTilesPerCore);
  const uint64_t room = (ubBytes - kLengthsBytes) / kCommitBuffers / kBlockBytes;
  const uint64_t most = room < kCommitMaxBlocks ? room : kCommitMaxBlocks;
  t.tileBlocks = static_cast<uint32_t>(clampTo(fair, kCommitMinBlocks, most));
  return static_cast<uint32_t>(clampTo(blocks / kCommitMinBlocks, 1, cores));
}

}  // namespace lopa
