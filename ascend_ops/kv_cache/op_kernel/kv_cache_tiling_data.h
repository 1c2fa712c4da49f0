// What the host tells the kernels of the KV cache. Plain data; tensors are contiguous.
#pragma once

#include <cstdint>

namespace lopa {

// Heads that are normalised at once: the scales of as many are a repeat of one instruction.
constexpr uint32_t kNormHeads = 64;

struct KvPrewriteTiling {
  uint32_t batch;
  uint32_t branches;
  uint32_t window;
  uint32_t capacity;
  uint32_t kvHeads;
  uint32_t qHeads;  // 0 where there are no queries
  uint32_t headDim;
  uint32_t layer;
  uint32_t positions;    // rows of cos_sin
  uint32_t rotates;      // 1: keys and queries are rotated
  uint32_t hasCacheLen;  // 1: cache_len is there
  uint32_t tileColumns;  // of one piece of work
  uint32_t tileHeads;    // in unified buffer at a time
  uint32_t normalises;   // 1: q_norm and k_norm are there
  float normEps;
  float headDimAsFloat;
};

struct KvCommitTiling {
  uint32_t layers;
  uint32_t batch;
  uint32_t branches;
  uint32_t window;
  uint32_t capacity;
  uint32_t columnBlocks;  // of 32 bytes in one column of one layer, keys or values
  uint32_t tileBlocks;    // in unified buffer at a time
};

}  // namespace lopa
