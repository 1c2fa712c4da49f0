// The vocabulary pass on the GPU: rows of logits to partial statistics of tiles of 2048 tokens.
//
// A warp owns a ring of tiles in shared memory that the copy engine fills (cp.async before sm_90),
// so that some 190 KB a multiprocessor are in flight while the arithmetic runs, and no warp waits
// for another. A tile's statistics depend on its 2048 values alone: not on the grid, the number of
// rows or the alignment of the row. merge_kernel.cuh puts the tiles of a row together.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cfloat>
#include <cstdint>

#include "confidence/vocabulary_args.h"
#include "lopa/cuda.cuh"

namespace lopa {
namespace confidence {

constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr float kInf = __builtin_inff();
// Weights below 2^-125 count as that: normal numbers, negligible beside the 1 of the maximum.
constexpr float kSmallestExponent = -125.0f;
// Beyond this the rounding of max * scale is no longer small beside a power of two.
constexpr float kLargestBase = 65536.0f;

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// NaN as -inf, +inf as the largest float, -0 as +0.
__device__ __forceinline__ float sanitized(float x) {
  return fminf(fmaxf(x, -kInf), FLT_MAX) + 0.0f;
}

// A signed integer in the order of the floats.
__device__ __forceinline__ int ordered(float x) {
  int bits = __float_as_int(x);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

__device__ __forceinline__ float from_ordered(int key) {
  return __int_as_float(key ^ ((key >> 31) & 0x7fffffff));
}

__device__ __forceinline__ float warp_max(float x) {
  return from_ordered(__reduce_max_sync(kWholeWarp, ordered(x)));
}

// Sixteen bytes of logits. `Packed` is what two-wide instructions work on, where there are any.
template <typename T>
struct Vector;

template <>
struct Vector<__nv_bfloat16> {
  static constexpr int kElements = 8;
  using Packed = __nv_bfloat162;

  __device__ static void unpack(uint32_t word, float* x) {
    x[0] = __uint_as_float(word << 16);
    x[1] = __uint_as_float(word & 0xffff0000u);
  }
  __device__ static float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

  // -inf in every element.
  __device__ static uint4 lowest() {
    return make_uint4(0xff80ff80u, 0xff80ff80u, 0xff80ff80u, 0xff80ff80u);
  }
};

template <>
struct Vector<__half> {
  static constexpr int kElements = 8;
  using Packed = __half2;

  __device__ static void unpack(uint32_t word, float* x) {
    float2 both = __half22float2(*reinterpret_cast<const __half2*>(&word));
    x[0] = both.x;
    x[1] = both.y;
  }
  __device__ static float to_float(__half x) { return __half2float(x); }

  // -inf in every element.
  __device__ static uint4 lowest() {
    return make_uint4(0xfc00fc00u, 0xfc00fc00u, 0xfc00fc00u, 0xfc00fc00u);
  }
};

template <>
struct Vector<float> {
  static constexpr int kElements = 4;

  __device__ static float to_float(float x) { return x; }

  // -inf in every element.
  __device__ static uint4 lowest() {
    return make_uint4(0xff800000u, 0xff800000u, 0xff800000u, 0xff800000u);
  }
};

template <typename T>
constexpr int kVectors = kTile / (32 * Vector<T>::kElements);  // of a lane in a tile

// Where vector v of a lane begins in its tile.
template <typename T>
__device__ __forceinline__ int vector_begin(int v, int lane) {
  return (v * 32 + lane) * Vector<T>::kElements;
}

template <typename T>
__device__ __forceinline__ void unpack(const uint4& vector, float* x) {
  if constexpr (sizeof(T) == 4) {
    x[0] = __uint_as_float(vector.x);
    x[1] = __uint_as_float(vector.y);
    x[2] = __uint_as_float(vector.z);
    x[3] = __uint_as_float(vector.w);
  } else {
    Vector<T>::unpack(vector.x, x);
    Vector<T>::unpack(vector.y, x + 2);
    Vector<T>::unpack(vector.z, x + 4);
    Vector<T>::unpack(vector.w, x + 6);
  }
}

// The elements [begin, begin + kElements) of a tile of n, read one by one; -inf beyond n.
template <typename T>
__device__ __noinline__ uint4 gather_vector(const T* tile, int begin, int n) {
  constexpr int kElements = Vector<T>::kElements;
  union {
    T element[kElements];
    uint4 vector;
  } out;
#pragma unroll
  for (int e = 0; e < kElements; ++e) {
    out.element[e] = begin + e < n ? tile[begin + e] : T(-kInf);
  }
  return out.vector;
}

// One lane's two largest values of a tile, NaN passing by, and the largest of each vector.
template <typename T, bool kSecond>
struct LaneMaxima {
  using Packed = typename Vector<T>::Packed;
  Packed vector[kVectors<T>];
  float first, second;

  __device__ explicit LaneMaxima(const uint4* raw) {
    Packed low{}, best = {T(-kInf), T(-kInf)};
    if constexpr (kSecond) low = best;
#pragma unroll
    for (int v = 0; v < kVectors<T>; ++v) {
      const Packed* word = reinterpret_cast<const Packed*>(&raw[v]);
      if constexpr (kSecond) {
        const Packed low01 = __hmin2(word[0], word[1]), high01 = __hmax2(word[0], word[1]);
        const Packed low23 = __hmin2(word[2], word[3]), high23 = __hmax2(word[2], word[3]);
        const Packed next = __hmax2(__hmax2(low01, low23), __hmin2(high01, high23));
        vector[v] = __hmax2(high01, high23);
        low = __hmax2(__hmax2(low, next), __hmin2(best, vector[v]));
      } else {
        vector[v] = __hmax2(__hmax2(word[0], word[1]), __hmax2(word[2], word[3]));
      }
      best = __hmax2(best, vector[v]);
    }
    const float a = Vector<T>::to_float(best.x), b = Vector<T>::to_float(best.y);
    first = fmaxf(fmaxf(a, b), -kInf);
    second = -kInf;
    if constexpr (kSecond) {
      const float c = Vector<T>::to_float(low.x), d = Vector<T>::to_float(low.y);
      second = fmaxf(fmaxf(fminf(a, b), fmaxf(c, d)), -kInf);
    }
  }

  // The first vector that has the lane's largest value; kVectors where there is none.
  __device__ int first_vector() const {
    const Packed wanted = {T(first), T(first)};  // exact
    int at = kVectors<T>;
#pragma unroll
    for (int v = kVectors<T> - 1; v >= 0; --v) {
      if (__heq2_mask(vector[v], wanted) != 0) at = v;
    }
    return at;
  }
};

template <bool kSecond>
struct LaneMaxima<float, kSecond> {
  float vector[kVectors<float>];
  float first = -kInf, second = -kInf;

  __device__ explicit LaneMaxima(const uint4* raw) {
#pragma unroll
    for (int v = 0; v < kVectors<float>; ++v) {
      float x[4];
      unpack<float>(raw[v], x);
      const float high01 = fmaxf(x[0], x[1]), high23 = fmaxf(x[2], x[3]);
      vector[v] = fmaxf(high01, high23);
      if constexpr (kSecond) {
        const float next =
            fmaxf(fmaxf(fminf(x[0], x[1]), fminf(x[2], x[3])), fminf(high01, high23));
        second = fmaxf(fmaxf(second, next), fminf(first, vector[v]));
      }
      first = fmaxf(first, vector[v]);
    }
  }

  __device__ int first_vector() const {
    int at = kVectors<float>;
#pragma unroll
    for (int v = kVectors<float> - 1; v >= 0; --v) {
      // +inf and the largest float are equal.
      if (fminf(vector[v], FLT_MAX) == fminf(first, FLT_MAX)) at = v;
    }
    return at;
  }
};

// Sums two values over the warp with five shuffles: lanes 0-15 get the first, 16-31 the second.
__device__ __forceinline__ float warp_sum_pair(float a, float b, int lane) {
  const bool upper = lane & 16;
  float kept = upper ? b : a;
  kept += __shfl_xor_sync(kWholeWarp, upper ? a : b, 16);
#pragma unroll
  for (int step = 8; step > 0; step /= 2) kept += __shfl_xor_sync(kWholeWarp, kept, step);
  return kept;
}

struct TileSums {
  float max, second, sum, weighted;
  uint32_t flags;
};

enum class Values { kFinite, kClamped, kAny };

// Sums of the weights of a tile in the warp's registers. kFinite is for finite values, and leaves a
// NaN where there are others; kClamped for all but NaN; kAny makes each finite first and takes it
// relative to the maximum before it is scaled, which costs some operations more.
template <typename T, Values kValues, bool kWeighted>
__device__ __forceinline__ void sum_weights(const uint4* raw, float scale, int lane,
                                            TileSums* sums) {
  constexpr int kElements = Vector<T>::kElements;
  const float base = sums->max * scale;
  float sum[2] = {0, 0}, weighted[2] = {0, 0};
#pragma unroll
  for (int v = 0; v < kVectors<T>; ++v) {
    float x[kElements];
    unpack<T>(raw[v], x);
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      float t;
      if constexpr (kValues == Values::kAny) {
        t = fmaxf((sanitized(x[e]) - sums->max) * scale, kSmallestExponent);
      } else {
        t = fmaf(x[e], scale, -base);
        if constexpr (kValues == Values::kClamped) t = fmaxf(t, kSmallestExponent);
      }
      const float w = exp2_fast(t);
      sum[e % 2] += w;
      if constexpr (kWeighted) weighted[e % 2] = fmaf(w, t, weighted[e % 2]);
    }
  }
  const float kept = warp_sum_pair(sum[0] + sum[1], weighted[0] + weighted[1], lane);
  const float other = __shfl_xor_sync(kWholeWarp, kept, 16);
  sums->sum = lane & 16 ? other : kept;
  sums->weighted = lane & 16 ? kept : other;
}

// The largest two and the flags, for any values.
template <typename T, bool kSecond>
__device__ __forceinline__ TileSums careful_maxima(const uint4* raw, int lane) {
  constexpr int kElements = Vector<T>::kElements;
  bool nan = false, finite = false;
  float first = -kInf, second = -kInf;
#pragma unroll
  for (int v = 0; v < kVectors<T>; ++v) {
    float x[kElements];
    unpack<T>(raw[v], x);
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      nan |= isnan(x[e]);
      finite |= fabsf(x[e]) < kInf;
      const float value = sanitized(x[e]);
      if constexpr (kSecond) second = fmaxf(second, fminf(first, value));
      first = fmaxf(first, value);
    }
  }
  TileSums out{};
  out.max = warp_max(first);
  out.second = -kInf;
  if constexpr (kSecond) {
    const unsigned holders = __ballot_sync(kWholeWarp, first == out.max);
    const bool only = holders == 1u << lane;
    const float next = warp_max(only ? second : first);
    out.second = __popc(holders) > 1 ? out.max : next;
  }
  if (__any_sync(kWholeWarp, nan)) out.flags |= kPartialNan;
  if (__any_sync(kWholeWarp, finite)) out.flags |= kPartialFinite;
  return out;
}

// The lane's vector v of a tile of n elements in global memory.
template <typename T>
__device__ __forceinline__ uint4 read_vector(const T* tile, int v, int lane, int n, bool aligned) {
  const int begin = vector_begin<T>(v, lane);
  if (aligned && begin + Vector<T>::kElements <= n) {
    return *reinterpret_cast<const uint4*>(tile + begin);
  }
  return gather_vector(tile, begin, n);
}

// Equal as sanitized values.
__device__ __forceinline__ bool is_value(float x, float wanted) {
  return x == wanted || (x == kInf && wanted == FLT_MAX);
}

// One item of the pass: a tile of the row at a position of the list.
template <typename T>
struct Item {
  const T* tile;  // null where the list gives no row
  int64_t partial;
  int32_t first_index;
  int32_t n;

  __device__ bool aligned() const { return (reinterpret_cast<uintptr_t>(tile) & 15) == 0; }
  // Rows at any address are read where they are needed; others go through shared memory.
  __device__ bool staged() const { return tile != nullptr && aligned(); }
};

// A tile with other than finite values: the last of a row, filled up with -inf, one with suppressed
// tokens, NaN or infinities. A function of its own, so that the ordinary case keeps its registers.
template <typename T, bool kSecond, bool kWeighted>
__device__ __noinline__ TileSums careful_statistics(const uint4* raw, float scale, int lane) {
  TileSums sums = careful_maxima<T, kSecond>(raw, lane);
  if (sums.max == -kInf) return sums;
  if (fabsf(sums.max * scale) < kLargestBase && !(sums.flags & kPartialNan)) {
    sum_weights<T, Values::kClamped, kWeighted>(raw, scale, lane, &sums);
  } else {
    sums.flags |= kPartialCareful;
    sum_weights<T, Values::kAny, kWeighted>(raw, scale, lane, &sums);
  }
  return sums;
}

// One tile's partial statistics from the warp's registers.
template <typename T, bool kSecond, bool kWeighted>
__device__ __forceinline__ void tile_statistics(const uint4* raw, const Item<T>& item, float scale,
                                                int lane, Partial* partial, float* second) {
  constexpr int kElements = Vector<T>::kElements;
  const LaneMaxima<T, kSecond> lane_maxima(raw);
  TileSums sums{};
  sums.max = warp_max(lane_maxima.first);
  bool finite = fabsf(sums.max * scale) < kLargestBase && item.n == kTile;
  if (finite) {
    sum_weights<T, Values::kFinite, kWeighted>(raw, scale, lane, &sums);
    sums.flags = kPartialFinite;
    finite = !isnan(sums.sum + sums.weighted);
    if constexpr (kSecond) {
      const unsigned holders = __ballot_sync(kWholeWarp, lane_maxima.first == sums.max);
      const bool only = holders == 1u << lane;
      const float next = warp_max(only ? lane_maxima.second : lane_maxima.first);
      sums.second = __popc(holders) > 1 ? sums.max : next;
    }
  }
  if (!finite) {
    uint4 copy[kVectors<T>];
#pragma unroll
    for (int v = 0; v < kVectors<T>; ++v) copy[v] = raw[v];
    sums = careful_statistics<T, kSecond, kWeighted>(copy, scale, lane);
  }

  // The lowest index with the maximum: the first vector that has it, then the first lane, then the
  // first element. A maximum that was +inf is the largest float now.
  const float wanted = sums.max;
  const float seen = wanted == FLT_MAX ? sanitized(lane_maxima.first) : lane_maxima.first;
  const int at = seen == wanted ? lane_maxima.first_vector() : kVectors<T>;
  const int winner = __reduce_min_sync(kWholeWarp, at * 32 + lane) & 31;
  if (lane == winner) {
    uint4 vector = raw[0];
#pragma unroll
    for (int v = 1; v < kVectors<T>; ++v) {
      if (at == v) vector = raw[v];
    }
    float x[kElements];
    unpack<T>(vector, x);
    int element = 0;
#pragma unroll
    for (int e = kElements - 1; e >= 0; --e) {
      if (is_value(x[e], wanted)) element = e;
    }
    // Without any value above -inf no vector was found, and the index means nothing.
    const int64_t index =
        at < kVectors<T> ? item.first_index + vector_begin<T>(at, lane) + element : 0;
    *reinterpret_cast<uint4*>(partial) =
        make_uint4(__float_as_uint(sums.max), static_cast<uint32_t>(index) | sums.flags,
                   __float_as_uint(sums.sum), __float_as_uint(sums.weighted));
    if constexpr (kSecond) *second = sums.second;
  }
}

// The copy of one tile into shared memory: by the copy engine, or by the lanes themselves.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define LOPA_BULK_COPY 1
#else
#define LOPA_BULK_COPY 0
#endif

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void barrier_init(uint64_t* barrier) {
#if LOPA_BULK_COPY
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
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
#endif
}

// Lane 0 asks the copy engine for `bytes` (a multiple of 16, perhaps 0) of logits that are read
// once: the first to leave the L2 cache.
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

__device__ __forceinline__ void lane_copy(void* to, const void* from) {
#if defined(__CUDA_ARCH__) && !LOPA_BULK_COPY
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)),
               "l"(__cvta_generic_to_global(from))
               : "memory");
#endif
}

__device__ __forceinline__ void lane_copies_commit() {
#if defined(__CUDA_ARCH__) && !LOPA_BULK_COPY
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until all but the last `pending` groups of this lane have arrived.
__device__ __forceinline__ void lane_copies_wait(int pending) {
#if defined(__CUDA_ARCH__) && !LOPA_BULK_COPY
  if (pending >= 2) {
    asm volatile("cp.async.wait_group 2;" ::: "memory");
  } else if (pending == 1) {
    asm volatile("cp.async.wait_group 1;" ::: "memory");
  } else {
    asm volatile("cp.async.wait_group 0;" ::: "memory");
  }
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

// Walks over a warp's items, every `step`-th pair of position and tile, and fetches them.
template <typename T>
class ItemWalk {
 public:
  __device__ ItemWalk(const VocabularyArgs& args, uint32_t first, uint32_t step)
      : args_(args), length_(list_length(args)) {
    const uint32_t tiles = static_cast<uint32_t>(args.tiles);
    position_ = first / tiles;
    tile_ = first % tiles;
    step_positions_ = step / tiles;
    step_tiles_ = step % tiles;
    look_up();
  }

  __device__ bool more() const { return position_ < length_; }

  // Starts the copy of the next item, and leaves word of it in `item`.
  __device__ void fetch(T* stage, uint64_t* barrier, Item<T>* item, int lane) {
    Item<T> own;
    own.tile = nullptr;
    own.partial = 0;
    own.first_index = static_cast<int32_t>(tile_ * kTile);
    own.n = static_cast<int>(smaller<int64_t>(kTile, args_.logits.vocab - own.first_index));
    if (row_ >= 0) {
      own.tile = row_pointer<T>(args_.logits, row_) + own.first_index;
      own.partial = args_.first_partial(position_, row_) + tile_;
    }
#if LOPA_BULK_COPY
    if (lane == 0) {
      const uint32_t bytes = own.staged() ? own.n * sizeof(T) / 16 * 16 : 0;
      bulk_copy(stage, own.tile, bytes, barrier);
      *item = own;
    }
#else
    if (own.staged()) {
#pragma unroll
      for (int v = 0; v < kVectors<T>; ++v) {
        const int begin = vector_begin<T>(v, lane);
        if (begin + Vector<T>::kElements <= own.n) lane_copy(stage + begin, own.tile + begin);
      }
    }
    lane_copies_commit();
    if (lane == 0) *item = own;
#endif
    position_ += step_positions_;
    tile_ += step_tiles_;
    if (tile_ >= args_.tiles) {
      tile_ -= static_cast<uint32_t>(args_.tiles);
      ++position_;
    }
    // Ahead of its use, since the list is in global memory.
    look_up();
  }

 private:
  __device__ void look_up() { row_ = more() ? listed_row(args_, position_) : -1; }

  const VocabularyArgs& args_;
  int64_t length_, position_, row_;
  uint32_t tile_, step_positions_, step_tiles_;
};

template <typename T>
__device__ __forceinline__ void load_tile(const Item<T>& item, const T* stage, int lane,
                                          uint4* raw) {
  constexpr int kElements = Vector<T>::kElements;
  if (item.n == kTile && item.staged()) {
#pragma unroll
    for (int v = 0; v < kVectors<T>; ++v) {
      raw[v] = *reinterpret_cast<const uint4*>(stage + vector_begin<T>(v, lane));
    }
    return;
  }
  const int staged = item.staged() ? item.n / kElements * kElements : 0;
#pragma unroll
  for (int v = 0; v < kVectors<T>; ++v) {
    const int begin = vector_begin<T>(v, lane);
    raw[v] = Vector<T>::lowest();
    if (begin < staged) {
      raw[v] = *reinterpret_cast<const uint4*>(stage + begin);
    } else if (begin < item.n) {
      raw[v] = gather_vector(item.tile, begin, item.n);
    }
  }
}

// In dynamic shared memory: the rings of all warps, their barriers, their items.
template <typename T>
constexpr size_t kStageBytes = kTile * sizeof(T) + sizeof(uint64_t) + sizeof(Item<T>);

template <typename T, bool kSecond, bool kWeighted>
__global__ void __launch_bounds__(kPassThreads<T>, 1)
    vocabulary_pass_kernel(const __grid_constant__ VocabularyArgs args, int stages) {
  extern __shared__ __align__(128) unsigned char shared[];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int warps = blockDim.x / 32;
  T* ring = reinterpret_cast<T*>(shared);
  uint64_t* barriers = reinterpret_cast<uint64_t*>(ring + warps * stages * kTile);
  Item<T>* items = reinterpret_cast<Item<T>*>(barriers + warps * stages);
  ring += warp * stages * kTile;
  barriers += warp * stages;
  items += warp * stages;
  release_successor();
#if LOPA_BULK_COPY
  if (lane == 0) {
    for (int s = 0; s < stages; ++s) barrier_init(&barriers[s]);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncwarp();
#endif
  wait_for_predecessor();

  // Neighbouring tiles go to different multiprocessors, and so does what is left over.
  ItemWalk<T> walk(args, warp * gridDim.x + blockIdx.x, warps * gridDim.x);
  int pending = 0;
  for (; pending < stages && walk.more(); ++pending) {
    walk.fetch(ring + pending * kTile, &barriers[pending], &items[pending], lane);
  }
  __syncwarp();
  uint32_t parity = 0;
  for (int stage = 0; pending > 0;) {
    const Item<T> item = items[stage];
    T* own = ring + stage * kTile;
    barrier_wait(&barriers[stage], parity);
    lane_copies_wait(pending - 1);
    uint4 raw[kVectors<T>];
    if (item.tile != nullptr) load_tile(item, own, lane, raw);
    __syncwarp();
    --pending;
    if (walk.more()) {
      walk.fetch(own, &barriers[stage], &items[stage], lane);
      ++pending;
    }
    __syncwarp();
    if (item.tile != nullptr) {
      tile_statistics<T, kSecond, kWeighted>(raw, item, args.scale, lane,
                                             &args.partials[item.partial],
                                             kSecond ? &args.second[item.partial] : nullptr);
    }
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
}

}  // namespace confidence
}  // namespace lopa
