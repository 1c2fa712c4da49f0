// The merge: tiles of a row to its statistics, and the draw of a token.
//
// A policy says how a CTA goes about the rows of its list: a warp a row where the tiles' partials
// are all that is needed, the whole CTA where logits are read again (sampled here, filtered in
// filter_kernel.cuh). All orders of summation are fixed.
#pragma once

#include <cfloat>
#include <cstdint>

#include "confidence/pass_kernel.cuh"

namespace lopa {
namespace confidence {

constexpr double kLn2 = 0.6931471805599453;

// What the partials of a row say together. Weights are relative to 2^base, base = max * scale.
struct RowTotal {
  float max = -kInf;
  float second = -kInf;
  int64_t argmax = 0;
  double sum = 0;
  float weighted = 0;
  bool nan = false;
  bool empty = true;
};

// By how many powers of two a tile's weights stand below the row's. The base of an ordinary tile is
// rounded, and by how much an fma says exactly.
__device__ __forceinline__ float tile_shift(const Partial& tile, float row_max, float scale) {
  const float shift = (tile.max - row_max) * scale;
  if (tile.index_and_flags & kPartialCareful) return shift;
  return shift - fmaf(tile.max, scale, -(tile.max * scale));
}

__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kWholeWarp, x, step);
  return x;
}

__device__ __forceinline__ Partial read_partial(const Partial* partial) {
  const uint4 words = *reinterpret_cast<const uint4*>(partial);
  return {__uint_as_float(words.x), words.y, __uint_as_float(words.z), __uint_as_float(words.w)};
}

// Calls function(tile, partial) for the lane's tiles; the first kCached stay in registers between
// calls.
template <int kCached>
class LanePartials {
 public:
  __device__ LanePartials(const VocabularyArgs& args, int64_t first, int lane)
      : partials_(args.partials + first), tiles_(args.tiles), lane_(lane) {
#pragma unroll
    for (int j = 0; j < kCached; ++j) {
      if (lane + 32 * j < tiles_) cached_[j] = read_partial(partials_ + lane + 32 * j);
    }
  }

  template <typename Function>
  __device__ __forceinline__ void each(Function function) const {
#pragma unroll
    for (int j = 0; j < kCached; ++j) {
      if (lane_ + 32 * j < tiles_) function(lane_ + 32 * j, cached_[j]);
    }
    for (int64_t t = lane_ + 32 * kCached; t < tiles_; t += 32) {
      function(t, read_partial(partials_ + t));
    }
  }

 private:
  const Partial* partials_;
  int64_t tiles_;
  int lane_;
  Partial cached_[kCached];
};

constexpr int kCachedPartials = 4;  // of a lane: 262144 tokens
using Partials = LanePartials<kCachedPartials>;

// By one warp; every lane gets the result. `Sum` is double where masses are compared with the sum.
template <typename Sum = float>
__device__ RowTotal merge_row(const VocabularyArgs& args, int64_t first_partial,
                              const Partials& partials) {
  RowTotal row;
  float largest = -kInf;
  uint32_t flags = 0;
  partials.each([&](int64_t, const Partial& tile) {
    largest = fmaxf(largest, tile.max);
    flags |= tile.index_and_flags;
  });
  row.max = warp_max(largest);
  row.nan = __any_sync(kWholeWarp, (flags & kPartialNan) != 0);
  row.empty = !__any_sync(kWholeWarp, (flags & kPartialFinite) != 0);
  if (row.empty) return row;
  uint32_t first = kPartialIndex;
  Sum sum = 0;
  float weighted = 0;
  partials.each([&](int64_t, const Partial& tile) {
    if (tile.max == -kInf) return;
    if (tile.max == row.max) first = min(first, tile.index_and_flags & kPartialIndex);
    const float shift = tile_shift(tile, row.max, args.scale);
    const float factor = exp2_fast(shift);
    sum += static_cast<Sum>(factor) * tile.sum;
    if (factor > 0) weighted = fmaf(factor, fmaf(shift, tile.sum, tile.weighted), weighted);
  });
  row.argmax = __reduce_min_sync(kWholeWarp, first);
  if constexpr (sizeof(Sum) == sizeof(double)) {
    row.sum = warp_sum(sum);
    row.weighted = static_cast<float>(warp_sum(weighted));
  } else {
    const int lane = threadIdx.x % 32;
    const float pair = warp_sum_pair(sum, weighted, lane);
    const float other = __shfl_xor_sync(kWholeWarp, pair, 16);
    row.sum = lane & 16 ? other : pair;
    row.weighted = lane & 16 ? pair : other;
  }
  if (args.second != nullptr) {
    const float* second = args.second + first_partial;
    float next = -kInf;
    int holders = 0;
    partials.each([&](int64_t t, const Partial& tile) {
      if (tile.max == row.max) {
        ++holders;
        next = fmaxf(next, second[t]);
      } else {
        next = fmaxf(next, tile.max);
      }
    });
    next = warp_max(next);
    row.second = __reduce_add_sync(kWholeWarp, holders) > 1 ? row.max : next;
  }
  return row;
}

// One thread writes the row's results. `sum` and `weighted` are over the `kept` tokens that the
// filters leave; `value` is the logit of the token.
__device__ inline void write_row(const VocabularyArgs& args, const StatsOutput& out, int64_t slot,
                                 const RowTotal& row, bool missing, int64_t token, float value,
                                 float sum, float weighted, int64_t kept) {
  float prob = 0, margin = 0, neg_entropy = -kInf, lse = -kInf, score = -kInf;
  uint8_t flags =
      (row.nan ? kRowNan : 0) | (row.empty ? kRowEmpty : 0) | (missing ? kRowMissing : 0);
  if (row.empty) {
    token = 0;
  } else {
    const float inverse_sum = 1.0f / sum;
    prob = inverse_sum;
    if (value != row.max) {
      // The rounding of a distance is that of a probability, relatively: double, but for expf.
      const double distance = (static_cast<double>(value) - row.max) * args.inverse_temperature;
      prob *= expf(static_cast<float>(distance));
    }
    if (args.wants_second()) {
      const double gap = (static_cast<double>(row.second) - row.max) * args.inverse_temperature;
      margin = kept > 1 ? -expm1f(static_cast<float>(gap)) * inverse_sum : inverse_sum;
    }
    const float log_sum = log1pf(sum - 1.0f);
    neg_entropy = fminf(0.0f, static_cast<float>(kLn2) * weighted * inverse_sum - log_sum);
    if (args.all_stats) {
      // It saturates, so that -inf stays the mark of an empty row.
      const double exact = row.max * args.inverse_temperature + log_sum;
      lse = static_cast<float>(
          fmin(fmax(exact, -static_cast<double>(FLT_MAX)), static_cast<double>(FLT_MAX)));
    }
    score = args.metric == Metric::kProb     ? prob
            : args.metric == Metric::kMargin ? margin
                                             : neg_entropy;
  }
  out.token[slot] = token;
  out.prob[slot] = prob;
  if (out.score != nullptr) out.score[slot] = score;
  if (out.flags != nullptr) out.flags[slot] = flags;
  if (args.all_stats) {
    out.margin[slot] = margin;
    out.neg_entropy[slot] = row.empty ? -kInf : neg_entropy;
    out.lse[slot] = lse;
  }
}

struct ListEntry {
  int64_t slot, row;
  bool missing;  // the map gives no row of [0, R)
};

__device__ __forceinline__ ListEntry list_entry(const VocabularyArgs& args, int64_t position) {
  ListEntry entry;
  entry.slot = args.slots == nullptr ? position : args.slots[position];
  const int64_t row = args.rows == nullptr ? entry.slot : args.rows[entry.slot];
  entry.row = row >= 0 && row < args.logits.rows ? row : -1;
  entry.missing = entry.row < 0;
  return entry;
}

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11).
struct Philox {
  uint32_t key[2];
  uint32_t counter[3];  // words 1..3; word 0 is the index >> 2

  Philox() = default;

  __device__ Philox(const VocabularyArgs& args, int64_t row) {
    const uint64_t seed = static_cast<uint64_t>(*args.seed);
    const uint64_t step = args.step == nullptr ? 0 : static_cast<uint64_t>(*args.step);
    key[0] = static_cast<uint32_t>(seed);
    key[1] = static_cast<uint32_t>(seed >> 32);
    counter[0] = static_cast<uint32_t>(row);
    counter[1] = static_cast<uint32_t>(step);
    counter[2] =
        static_cast<uint32_t>(step >> 32) ^ static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32);
  }

  __device__ uint4 words(uint32_t first) const {
    uint32_t c0 = first, c1 = counter[0], c2 = counter[1], c3 = counter[2];
    uint32_t k0 = key[0], k1 = key[1];
#pragma unroll
    for (int round = 0; round < 10; ++round) {
      const uint32_t high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
      const uint32_t high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
      c0 = high1 ^ c1 ^ k0;
      c1 = low1;
      c2 = high0 ^ c3 ^ k1;
      c3 = low0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    return make_uint4(c0, c1, c2, c3);
  }
};

__device__ __forceinline__ uint32_t word_of(const uint4& words, int i) {
  return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
}

__device__ __forceinline__ float log_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y * static_cast<float>(kLn2);
}

// -log(E), E = -log(1 - v) exponentially distributed, v = (bits + 1/2) / 2^32, to 3e-6. Where 1 - v
// is near 1, E is its series; where it is small, it comes from the complement of the integer.
__device__ __forceinline__ float gumbel(uint32_t bits) {
  const float v = (static_cast<float>(bits) + 0.5f) * 0x1p-32f;
  const float rest = (static_cast<float>(0xffffffffu - bits) + 0.5f) * 0x1p-32f;
  float series = fmaf(v, 1.0f / 6, 1.0f / 5);
  series = fmaf(v, series, 1.0f / 4);
  series = fmaf(v, series, 1.0f / 3);
  series = fmaf(v, series, 1.0f / 2);
  series = v * fmaf(v, series, 1.0f);
  const float e = v < 0x1p-4f ? series : -log_fast(rest);
  return -log_fast(e);
}

// The counters of tiles have the highest bit set, those of tokens have not.
__device__ __forceinline__ uint32_t tile_word(const Philox& philox, int64_t tile) {
  return word_of(philox.words(0x80000000u | static_cast<uint32_t>(tile >> 2)), tile & 3);
}

constexpr int32_t kNoTile = 0x7fffffff;

struct Candidate {
  float score = -kInf;
  int32_t index = -1;
  float value = 0;

  // In ascending order of index.
  __device__ void offer(float other_score, int64_t other_index, float other_value) {
    if (index < 0 || other_score > score) {
      score = other_score;
      index = static_cast<int32_t>(other_index);
      value = other_value;
    }
  }

  // The highest score of the warp, and of those the lowest index; every lane gets it.
  __device__ void reduce_warp() {
    const float highest = warp_max(score);
    const bool eligible = index >= 0 && score == highest;
    const uint32_t lowest =
        __reduce_min_sync(kWholeWarp, eligible ? static_cast<uint32_t>(index) : 0xffffffffu);
    const unsigned owner = __ballot_sync(kWholeWarp, static_cast<uint32_t>(index) == lowest);
    score = highest;
    index = static_cast<int32_t>(lowest);
    value = __shfl_sync(kWholeWarp, value, __ffs(owner) - 1);
  }
};

// The Gumbel numbers of a lane's tiles, which need nothing of the pass.
class TileGumbels {
 public:
  TileGumbels() = default;

  __device__ TileGumbels(const Philox& philox, int64_t tiles, int lane) {
#pragma unroll
    for (int j = 0; j < kCachedPartials; ++j) {
      if (lane + 32 * j < tiles) cached_[j] = gumbel(tile_word(philox, lane + 32 * j));
    }
  }

  __device__ float at(const Philox& philox, int64_t tile) const {
    float value = 0;
    if (tile >= 32 * kCachedPartials) return gumbel(tile_word(philox, tile));
#pragma unroll
    for (int j = 0; j < kCachedPartials; ++j) {
      if (tile / 32 == j) value = cached_[j];
    }
    return value;
  }

 private:
  float cached_[kCachedPartials];
};

// The first stage of the draw, by one warp: a tile by the masses of all; `mass(tile, partial)` is
// the logarithm of one tile's, -inf where nothing can be drawn.
template <typename LogMass>
__device__ __forceinline__ int64_t draw_tile(const Partials& partials, const Philox& philox,
                                             const TileGumbels& gumbels, const LogMass& log_mass) {
  float best = -kInf;
  int32_t at = kNoTile;
  partials.each([&](int64_t t, const Partial& tile) {
    const float mass = log_mass(t, tile);
    if (!(mass > -kInf)) return;
    const float score = mass + gumbels.at(philox, t);
    // A lane's tiles come in ascending order.
    if (at == kNoTile || score > best) {
      best = score;
      at = static_cast<int32_t>(t);
    }
  });
  // The lowest tile with the highest score.
  const float highest = warp_max(best);
  return __reduce_min_sync(kWholeWarp, best == highest ? at : kNoTile);
}

// The second stage, by the CTA: a token of the tile. `kept(value, index)` says what the filters
// leave. The first warp gets the result; `shared` holds a candidate a warp.
template <typename T, int kThreads, typename Kept>
__device__ Candidate draw_token(const VocabularyArgs& args, int64_t row, int64_t tile, float max,
                                const Philox& philox, const Kept& kept, Candidate* shared) {
  constexpr int kElements = Vector<T>::kElements;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first = tile * kTile;
  const int n = static_cast<int>(smaller<int64_t>(kTile, args.logits.vocab - first));
  const T* logits = row_pointer<T>(args.logits, row) + first;
  const bool aligned = (reinterpret_cast<uintptr_t>(logits) & 15) == 0;
  // Finite, so that the distance of the maximum is 0 at any temperature.
  const float inverse_temperature = fminf(static_cast<float>(args.inverse_temperature), FLT_MAX);
  Candidate best;
  for (int v = warp; v < kVectors<T>; v += kThreads / 32) {
    const int begin = vector_begin<T>(v, lane);
    if (begin >= n) break;
    float x[kElements];
    unpack<T>(read_vector(logits, v, lane, n, aligned), x);
#pragma unroll
    for (int four = 0; four < kElements; four += 4) {
      const int64_t index = first + begin + four;
      const uint4 words = philox.words(static_cast<uint32_t>(index >> 2));
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float value = sanitized(x[four + e]);
        const float score = (value - max) * inverse_temperature + gumbel(word_of(words, e));
        if (value > -kInf && kept(value, index + e)) best.offer(score, index + e, value);
      }
    }
  }
  best.reduce_warp();
  if (lane == 0) shared[warp] = best;
  __syncthreads();
  if (warp == 0) {
    best = lane < kThreads / 32 ? shared[lane] : Candidate();
    best.reduce_warp();
  }
  return best;
}

struct KeepAll {
  __device__ bool operator()(float, int64_t) const { return true; }
};

// Every policy's `merge_rows` is called by all threads of a CTA of kThreads and works on the
// positions begin + part, begin + part + parts, ... of the list, or in such units of warps. It
// waits for the pass itself, behind what does not need it: the list, the seed and what they give.
struct GreedyMerge {
  static constexpr int kThreads = kMergeThreads;
  static constexpr size_t kSharedBytes = 0;

  __device__ static void merge_rows(const VocabularyArgs& args, const StatsOutput& out,
                                    int64_t begin, int64_t end, unsigned part, unsigned parts,
                                    char*) {
    const int lane = threadIdx.x % 32;
    constexpr unsigned kWarps = kThreads / 32;
    const int64_t first = begin + static_cast<int64_t>(threadIdx.x / 32) * parts + part;
    const int64_t stride = static_cast<int64_t>(kWarps) * parts;
    ListEntry next{};
    if (first < end) next = list_entry(args, first);
    wait_for_predecessor();
    for (int64_t position = first; position < end; position += stride) {
      const ListEntry entry = next;
      if (position + stride < end) next = list_entry(args, position + stride);
      RowTotal row;
      if (entry.row >= 0) {
        const int64_t first_partial = args.first_partial(position, entry.row);
        row = merge_row(args, first_partial, Partials(args, first_partial, lane));
      }
      if (lane == 0) {
        write_row(args, out, entry.slot, row, entry.missing, row.argmax, row.max,
                  static_cast<float>(row.sum), row.weighted, args.logits.vocab);
      }
    }
  }
};

template <typename T>
struct SampledMerge {
  static constexpr int kThreads = kMergeThreads;

  struct Shared {
    RowTotal row;
    int64_t tile;
    Candidate candidates[kThreads / 32];
  };
  static constexpr size_t kSharedBytes = sizeof(Shared);

  __device__ static void merge_rows(const VocabularyArgs& args, const StatsOutput& out,
                                    int64_t begin, int64_t end, unsigned part, unsigned parts,
                                    char* memory) {
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int64_t first = begin + part;
    ListEntry next{};
    Philox philox;
    TileGumbels gumbels;
    const auto prepare = [&](int64_t position) {
      next = list_entry(args, position);
      if (next.row < 0) return;
      philox = Philox(args, next.row);
      if (threadIdx.x < 32) gumbels = TileGumbels(philox, args.tiles, threadIdx.x);
    };
    if (first < end) prepare(first);
    wait_for_predecessor();
    for (int64_t position = first; position < end; position += parts) {
      if (position > first) prepare(position);
      const ListEntry entry = next;
      if (entry.row < 0) {
        if (threadIdx.x == 0) {
          write_row(args, out, entry.slot, RowTotal(), entry.missing, 0, 0, 0, 0, 0);
        }
        continue;
      }
      if (threadIdx.x < 32) {
        const int64_t first_partial = args.first_partial(position, entry.row);
        const Partials partials(args, first_partial, threadIdx.x);
        const RowTotal row = merge_row(args, first_partial, partials);
        int64_t tile = 0;
        if (!row.empty && args.tiles > 1) {
          tile = draw_tile(partials, philox, gumbels, [&](int64_t, const Partial& p) {
            if (p.max == -kInf) return -kInf;
            const float shift = tile_shift(p, row.max, args.scale);
            return static_cast<float>(kLn2) * shift + log_fast(p.sum);
          });
        }
        if (threadIdx.x == 0) {
          shared.row = row;
          shared.tile = tile;
        }
      }
      __syncthreads();
      const RowTotal row = shared.row;
      Candidate drawn;
      if (!row.empty) {
        drawn = draw_token<T, kThreads>(args, entry.row, shared.tile, row.max, philox, KeepAll(),
                                        shared.candidates);
      }
      if (threadIdx.x == 0) {
        write_row(args, out, entry.slot, row, false, drawn.index, drawn.value,
                  static_cast<float>(row.sum), row.weighted, args.logits.vocab);
      }
      __syncthreads();
    }
  }
};

}  // namespace confidence
}  // namespace lopa
