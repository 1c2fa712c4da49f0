// The vocabulary pass on the GPU: rows of logits to partial statistics of tiles of 2048 tokens.
//
// A CTA has a run of neighbouring tiles and a ring of them in shared memory, which the copy engine
// fills (cp.async before sm_90). Its warps take them in turn: whoever has finished one takes the
// next into its registers, has the stage filled again and does the arithmetic. A tile's statistics
// depend on its 2048 values alone: not on the grid, the number of rows or the alignment of the row.
// merge_kernel.cuh puts the tiles of a row together.
#pragma once

#include "confidence/tile_statistics.cuh"

namespace lopa {
namespace confidence {

// A tile of the row at a position of the list, in a stage of the ring.
template <typename T>
struct alignas(16) Item {
  const T* tile;  // null where the list gives no row
  uint32_t partial;
  int32_t number;  // of the tile in its row

  // Rows at any address are read where they are needed; others go through shared memory.
  __device__ bool staged() const {
    return tile != nullptr && (reinterpret_cast<uintptr_t>(tile) & 15) == 0;
  }
};

__device__ __forceinline__ int tile_length(const VocabularyArgs& args, int number) {
  if (number + 1 < static_cast<int>(args.tiles)) return kTile;
  return static_cast<int>(args.logits.vocab) - number * kTile;
}

// The copy of one tile into shared memory: by the copy engine, or by the lanes of a warp. Either
// way a barrier counts what has arrived.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define LOPA_BULK_COPY 1
#else
#define LOPA_BULK_COPY 0
#endif

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void barrier_init(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "n"(LOPA_BULK_COPY ? 1 : 32)
               : "memory");
#if LOPA_BULK_COPY
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
#if LOPA_BULK_COPY
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#else
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.test_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#endif
}

// By one lane: `bytes` (a multiple of 16, perhaps 0) of logits, which are read once: the first to
// leave the L2 cache.
__device__ __forceinline__ void bulk_copy(void* to, const void* from, uint32_t bytes,
                                          uint64_t* barrier) {
#if LOPA_BULK_COPY
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
  if (bytes == 0) return;
  asm volatile(
      "{\n"
      ".reg .b64 policy;\n"
      "createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], policy;\n"
      "}\n" ::"r"(shared_address(to)),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
#endif
}

// By all lanes, each its share.
__device__ __forceinline__ void lane_copy(void* to, const void* from) {
#if !LOPA_BULK_COPY
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)),
               "l"(__cvta_generic_to_global(from))
               : "memory");
#endif
}

__device__ __forceinline__ void lane_copies_arrive(uint64_t* barrier) {
#if !LOPA_BULK_COPY
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier))
               : "memory");
#endif
}

// The row of logits at a position of the list; -1 where the map gives none.
__device__ __forceinline__ int64_t listed_row(const VocabularyArgs& args, int64_t position) {
  const int64_t slot = args.slots == nullptr ? position : args.slots[position];
  const int64_t row = args.rows == nullptr ? slot : args.rows[slot];
  return row < args.logits.rows ? row : -1;
}

__device__ __forceinline__ int64_t list_length(const VocabularyArgs& args) {
  return args.count == nullptr ? args.capacity : smaller<int64_t>(*args.count, args.capacity);
}

// Leading dimensions that do not merge: seldom, and long divisions.
__device__ __noinline__ inline int64_t strided_offset(const LogitsView& logits, int64_t r) {
  int64_t offset = 0;
#pragma unroll 1
  for (int d = logits.ndim - 1; d > 0; --d) {
    offset += (r % logits.sizes[d]) * logits.strides[d];
    r /= logits.sizes[d];
  }
  return offset + r * logits.strides[0];
}

template <typename T>
__device__ __forceinline__ const T* row_pointer(const LogitsView& logits, int64_t r) {
  const T* data = static_cast<const T*>(logits.data);
  if (logits.ndim == 0) return data;
  return data + (logits.ndim == 1 ? r * logits.strides[0] : strided_offset(logits, r));
}

template <typename T>
__device__ __forceinline__ void fetch(const VocabularyArgs& args, uint32_t index, T* stage,
                                      uint64_t* barrier, Item<T>* item, int lane) {
  const uint32_t position = divide(index, args.by_tiles);
  const int32_t number = static_cast<int32_t>(index - position * args.by_tiles.value);
  const int64_t row = listed_row(args, position);
  Item<T> own{nullptr, 0, number};
  if (row >= 0) {
    own.tile = row_pointer<T>(args.logits, row) + static_cast<int64_t>(number) * kTile;
    own.partial = static_cast<uint32_t>(args.first_partial(position, row)) + number;
  }
  if (lane == 0) *item = own;
  const int n = tile_length(args, number);
#if LOPA_BULK_COPY
  if (lane == 0) {
    bulk_copy(stage, own.tile, own.staged() ? n * sizeof(T) / 16 * 16 : 0, barrier);
  }
#else
  // The arrival of asynchronous copies orders nothing else.
  __threadfence_block();
  if (own.staged()) {
#pragma unroll
    for (int v = 0; v < kVectors<T>; ++v) {
      const int begin = vector_begin<T>(v, lane);
      if (begin + Vector<T>::kElements <= n) lane_copy(stage + begin, own.tile + begin);
    }
  }
  lane_copies_arrive(barrier);
#endif
}

template <typename T>
__device__ __forceinline__ void load_tile(const Item<T>& item, int n, const T* stage, int lane,
                                          uint4* raw) {
  constexpr int kElements = Vector<T>::kElements;
  if (n == kTile && item.staged()) {
#pragma unroll
    for (int v = 0; v < kVectors<T>; ++v) {
      raw[v] = *reinterpret_cast<const uint4*>(stage + vector_begin<T>(v, lane));
    }
    return;
  }
  const int staged = item.staged() ? n / kElements * kElements : 0;
#pragma unroll
  for (int v = 0; v < kVectors<T>; ++v) {
    const int begin = vector_begin<T>(v, lane);
    raw[v] = Vector<T>::lowest();
    if (begin < staged) {
      raw[v] = *reinterpret_cast<const uint4*>(stage + begin);
    } else if (begin < n) {
      raw[v] = gather_vector(item.tile, begin, n);
    }
  }
}

// The neighbouring tiles that a CTA evaluates: `count` of them, from `first`.
struct Share {
  uint32_t first, count;

  __device__ explicit Share(const VocabularyArgs& args) {
    const uint32_t items =
        static_cast<uint32_t>(list_length(args)) * static_cast<uint32_t>(args.tiles);
    const uint32_t each = items / gridDim.x, rest = items - each * gridDim.x;
    first = blockIdx.x * each + min(blockIdx.x, rest);
    count = each + (blockIdx.x < rest ? 1 : 0);
  }
};

// The next turn, by one lane. (Additions the compiler would first gather over the warp.)
__device__ __forceinline__ uint32_t take_turn(uint32_t* taken) {
  return atomicInc(taken, 0xfffffffeu);
}

// In dynamic shared memory: the ring, its items, its barriers, its turns; then the turns taken.
template <typename T>
constexpr size_t kStageBytes =
    kTile * sizeof(T) + sizeof(Item<T>) + sizeof(uint64_t) + sizeof(uint32_t);

// Runs visit(item, n, raw, lane) for every tile of the CTA's share: by one warp, with the tile's n
// elements in its registers. `memory` is dynamic shared memory; `stages` is a power of two, and no
// fewer than the warps. `prepare` runs once memory of other kernels may be read.
template <typename T, typename Prepare, typename Visit>
__device__ __forceinline__ void for_each_tile(const VocabularyArgs& args, int stages,
                                              unsigned char* memory, Prepare prepare, Visit visit) {
  const int lane = threadIdx.x % 32;
  const uint32_t warp = threadIdx.x / 32, warps = blockDim.x / 32;
  // Kept in a register: the compiler would find it anew, from the CTA's place in the cluster.
  uint32_t base = shared_address(memory);
  asm("" : "+r"(base));
  T* ring = static_cast<T*>(__cvta_shared_to_generic(base));
  Item<T>* items = reinterpret_cast<Item<T>*>(ring + stages * kTile);
  uint64_t* barriers = reinterpret_cast<uint64_t*>(items + stages);
  volatile uint32_t* turns = reinterpret_cast<uint32_t*>(barriers + stages);
  if (lane == 0) {
#pragma unroll 1
    for (int stage = warp; stage < stages; stage += warps) {
      barrier_init(&barriers[stage]);
      turns[stage] = stage;
    }
  }
  uint32_t* taken = const_cast<uint32_t*>(turns) + stages;
  if (threadIdx.x == 0) *taken = warps;
  __syncthreads();
  wait_for_predecessor();
  // Only now, so that the next kernel may read before its wait what was there before this one.
  release_successor();
  prepare();

  const Share share(args);
  const uint32_t mask = stages - 1;
  const int shift = __popc(mask);
  // The first turns of a warp fill its part of the ring, so that there is one copy of the fetch.
  uint32_t filled = warp, turn = warp;
  bool full = false;
  for (;;) {
    uint4 raw[kVectors<T>];
    Item<T> item;
    int n = 0;
    uint32_t next = filled;
    if (full) {
      if (turn >= share.count) return;
      const uint32_t stage = turn & mask;
      // A warp that is a lap behind may not have had the stage filled again, and the parity of the
      // barrier tells neighbouring laps apart only.
      while (turns[stage] != turn) {
      }
      barrier_wait(&barriers[stage], turn >> shift & 1);
      item = items[stage];
      n = tile_length(args, item.number);
      if (item.tile != nullptr) load_tile(item, n, ring + stage * kTile, lane, raw);
      __syncwarp();
      next = turn + stages;
    }
    if (next < share.count) {
      const uint32_t stage = next & mask;
      if (full && lane == 0) turns[stage] = next;
      fetch(args, share.first + next, ring + stage * kTile, &barriers[stage], &items[stage], lane);
    }
    if (!full) {
      filled += warps;
      full = filled >= stages;
      continue;
    }
    // Whoever is ready takes the next tile.
    if (lane == 0) turn = take_turn(taken);
    if (item.tile != nullptr) visit(item, n, raw, lane);
    turn = __shfl_sync(kWholeWarp, turn, 0);
  }
}

// The largest value of the tiles that a warp had of a row before this one. The same row again
// begins anew.
struct BestOfRow {
  float best = -kInf;
  uint32_t row = 0, until = 0;

  template <typename T>
  __device__ __forceinline__ float* of(const Item<T>& item) {
    const uint32_t first = item.partial - item.number;
    if (first != row || item.partial <= until) best = -kInf;
    row = first;
    until = item.partial;
    return &best;
  }
};

template <typename T, bool kSecond, bool kWeighted>
__global__ void __maxnreg__(kPassRegisters<T>)
    vocabulary_pass_kernel(const __grid_constant__ VocabularyArgs args, int stages) {
  extern __shared__ __align__(128) unsigned char memory[];
  BestOfRow best;
  for_each_tile<T>(
      args, stages, memory, [] {},
      [&](const Item<T>& item, int n, const uint4* raw, int lane) {
        tile_statistics<T, kSecond, kWeighted>(raw, item.number * kTile, n, args.scale, lane,
                                               best.of(item), &args.partials[item.partial],
                                               kSecond ? &args.second[item.partial] : nullptr);
      });
}

}  // namespace confidence
}  // namespace lopa
