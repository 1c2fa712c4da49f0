// The merge of filtered rows: top-p and top-k, then the sums over what they leave, then the draw.
//
// A token is kept if fewer than top_k tokens come before it in the order of descending logit, then
// ascending index, and their mass is at most top_p (the nucleus rule of Holtzman et al., arXiv
// 1904.09751, with the boundary token inside). Both filters end at one place of the one order: the
// last kept key and index. It is found by narrowing an interval of keys, by histograms, until what
// lies in it fits shared memory and is sorted there. Masses are integers in units of 2^-40, so that
// atomic additions give the same sum in any order.
#pragma once

#include "confidence/merge_kernel.cuh"

namespace lopa {
namespace confidence {

constexpr int kFilterCandidates = 2048;
constexpr int kFilterBits = 12;
constexpr int kFilterBins = 1 << kFilterBits;
// Tile masses share memory with the histogram's.
static_assert(kMostFilterTiles <= kFilterBins);
constexpr int64_t kMostRankedTiles = 512;
constexpr float kMassUnits = 0x1p40f;

__device__ __forceinline__ uint32_t filter_key(float value) {
  return static_cast<uint32_t>(ordered(value)) ^ 0x80000000u;
}

__device__ __forceinline__ float filter_value(uint32_t key) {
  return from_ordered(static_cast<int>(key ^ 0x80000000u));
}

__device__ __forceinline__ uint64_t mass_units(float weight) {
  return __float2ull_rn(weight * kMassUnits);
}

// The bits of a key that two-byte logits leave alone: all 0, or all 1 where the value is negative.
template <typename T>
constexpr uint32_t kUnusedKeyBits = 0;
template <>
inline constexpr uint32_t kUnusedKeyBits<__nv_bfloat16> = 0xffffu;
template <>
inline constexpr uint32_t kUnusedKeyBits<__half> = 0x1fffu;

// The last token that is kept.
struct Cut {
  uint32_t key;
  int64_t index;

  __device__ bool keeps(uint32_t other_key, int64_t other_index) const {
    return other_key > key || (other_key == key && other_index <= index);
  }
};

template <typename T, int kCtaThreads>
struct FilteredMerge {
  static constexpr int kThreads = kCtaThreads;

  struct Shared {
    union {
      unsigned long long candidates[kFilterCandidates];  // key, then the complement of the index
      uint32_t count[kFilterBins];
    };
    union {
      unsigned long long mass[kFilterBins];  // of bins, then of tiles
      float maxima[kMostRankedTiles];
    };
    unsigned long long scan_mass[kThreads / 32];
    uint32_t scan_count[kThreads / 32];
    unsigned long long weighted;  // a signed sum
    RowTotal row;
    float floor;
    uint32_t candidate_count;
    int32_t boundary;
    int32_t lowest;
    uint32_t bin_count;
    int64_t before;
    unsigned long long mass_before;
    int32_t kept_here;
    int64_t index_limit;
    int64_t tile;
    Candidate drawn[kThreads / 32];
  };
  static constexpr size_t kSharedBytes = sizeof(Shared);

  // What all steps of a row know.
  struct Context {
    const VocabularyArgs& args;
    Shared& shared;
    int64_t row;
    const Partial* partials;
    float max;
    uint64_t mass_limit;

    __device__ float exponent(float value) const {
      return fmaxf((value - max) * args.scale, kSmallestExponent);
    }
    __device__ float weight(float value) const {
      return value > -kInf ? exp2_fast(exponent(value)) : 0.0f;
    }

    // Calls function(value, index) for every token of the tiles that reach `least`; a warp a tile.
    template <typename Function>
    __device__ void each_token(float least, const Function& function) const {
      constexpr int kElements = Vector<T>::kElements;
      const int lane = threadIdx.x % 32;
      for (int64_t tile = threadIdx.x / 32; tile < args.tiles; tile += kThreads / 32) {
        if (partials[tile].max < least) continue;
        const int64_t first = tile * kTile;
        const int n = static_cast<int>(smaller<int64_t>(kTile, args.logits.vocab - first));
        const T* logits = row_pointer<T>(args.logits, row) + first;
        const bool aligned = (reinterpret_cast<uintptr_t>(logits) & 15) == 0;
        uint4 raw[kVectors<T>];
#pragma unroll
        for (int v = 0; v < kVectors<T>; ++v) raw[v] = read_vector(logits, v, lane, n, aligned);
#pragma unroll
        for (int v = 0; v < kVectors<T>; ++v) {
          const int begin = vector_begin<T>(v, lane);
          float x[kElements];
          unpack<T>(raw[v], x);
          float largest = x[0];
#pragma unroll
          for (int e = 1; e < kElements; ++e) largest = fmaxf(largest, x[e]);
          // Most vectors hold nothing that counts. (A NaN is no larger than -inf.)
          if (!(largest >= least) && least > -kInf) continue;
#pragma unroll
          for (int e = 0; e < kElements; ++e) {
            if (begin + e < n) function(sanitized(x[e]), first + begin + e);
          }
        }
        function.end_of_tile(tile);
      }
    }
  };

  template <typename Function>
  struct Visit {
    const Function& function;
    __device__ void operator()(float value, int64_t index) const { function(value, index); }
    __device__ void end_of_tile(int64_t) const {}
  };
  template <typename Function>
  __device__ static Visit<Function> visit(const Function& function) {
    return {function};
  }

  // A value that the last kept token is certain to reach. Top-p: all tokens below it together have
  // less than half of the mass 1 - top_p. Top-k: the k-th largest of the tiles' maxima.
  __device__ static float selection_floor(const Context& c, bool ranked) {
    const VocabularyArgs& args = c.args;
    Shared& shared = c.shared;
    if (threadIdx.x == 0) {
      float floor = -kInf;
      if (args.top_p < 1.0) {
        // Single precision, with a margin for it.
        const float share = static_cast<float>((1.0 - args.top_p) * shared.row.sum) /
                            static_cast<float>(args.logits.vocab);
        const float below = fminf(log2f(share) - 1.01f, 0.0f) / args.scale;
        floor = fmaxf(c.max + below - 1e-6f * fabsf(c.max), -FLT_MAX);
      }
      shared.floor = floor;
    }
    if (ranked) {
      for (int64_t t = threadIdx.x; t < args.tiles; t += kThreads) {
        shared.maxima[t] = c.partials[t].max;
      }
    }
    __syncthreads();
    if (ranked) {
      for (int64_t t = threadIdx.x; t < args.tiles; t += kThreads) {
        const float own = shared.maxima[t];
        const int tiles = static_cast<int>(args.tiles);
        int before = 0;
#pragma unroll 4
        for (int other = 0; other < tiles; ++other) {
          const float value = shared.maxima[other];
          before += value > own || (value == own && other < t);
        }
        // One tile alone has this rank.
        if (before == args.top_k - 1) shared.floor = fmaxf(shared.floor, own);
      }
    }
    __syncthreads();
    return shared.floor;
  }

  // Gathers the tokens with keys in [low, high]; the count may exceed what is stored.
  __device__ static uint32_t collect(const Context& c, uint32_t low, uint32_t high) {
    Shared& shared = c.shared;
    if (threadIdx.x == 0) shared.candidate_count = 0;
    __syncthreads();
    c.each_token(filter_value(low), visit([&](float value, int64_t index) {
                   const uint32_t key = filter_key(value);
                   if (key < low || key > high) return;
                   const uint32_t at = atomicAdd(&shared.candidate_count, 1u);
                   if (at < kFilterCandidates) {
                     shared.candidates[at] = static_cast<unsigned long long>(key) << 32 |
                                             (0xffffffffu - static_cast<uint32_t>(index));
                   }
                 }));
    __syncthreads();
    const uint32_t count = shared.candidate_count;
    __syncthreads();
    return count;
  }

  // Inclusive sums over the threads of the CTA, in the order of their numbers.
  __device__ static void scan(Shared& shared, uint32_t* count, uint64_t* mass) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const uint32_t other_count = __shfl_up_sync(kWholeWarp, *count, step);
      const uint64_t other_mass = __shfl_up_sync(kWholeWarp, *mass, step);
      if (lane >= step) {
        *count += other_count;
        *mass += other_mass;
      }
    }
    if (lane == 31) {
      shared.scan_count[warp] = *count;
      shared.scan_mass[warp] = *mass;
    }
    __syncthreads();
    for (int w = 0; w < warp; ++w) {
      *count += shared.scan_count[w];
      *mass += shared.scan_mass[w];
    }
    __syncthreads();
  }

  // Narrows [low, high] to the bin in which the cut lies; counts and masses before it grow.
  //
  // Keys of two-byte logits differ in their upper bits only, so that a bin can be one value: then
  // its mass needs no sum.
  __device__ static void narrow(const Context& c, uint32_t* low, uint32_t* high, int64_t* before,
                                uint64_t* mass_before) {
    Shared& shared = c.shared;
    const uint32_t to = *high;
    const uint32_t from = c.max < FLT_MAX ? *low & ~kUnusedKeyBits<T> : *low;
    int shift = max(0, 32 - __clz(to - from) - kFilterBits);
    // The largest float, which stands for +inf, is no number of two bytes.
    const bool single =
        kUnusedKeyBits<T> > 0 && (1u << shift) - 1 <= kUnusedKeyBits<T> && c.max < FLT_MAX;
    if (single) shift = 32 - __clz(kUnusedKeyBits<T>);
    // The one key in a bin of `single` ones.
    const auto only_key = [&](int bin) {
      const uint32_t key = from + (static_cast<uint32_t>(bin) << shift);
      return key >> 31 ? key : key | kUnusedKeyBits<T>;
    };
    const auto bin_mass = [&](int bin, uint32_t count) -> uint64_t {
      if (!single) return shared.mass[bin];
      return count * mass_units(c.weight(filter_value(only_key(bin))));
    };
    for (int bin = threadIdx.x; bin < kFilterBins; bin += kThreads) {
      shared.count[bin] = 0;
      shared.mass[bin] = 0;
    }
    if (threadIdx.x == 0) {
      shared.boundary = -1;
      shared.lowest = kFilterBins;
    }
    __syncthreads();
    c.each_token(filter_value(from), visit([&](float value, int64_t) {
                   const uint32_t key = filter_key(value);
                   if (key < from || key > to) return;
                   const uint32_t bin = (key - from) >> shift;
                   atomicAdd(&shared.count[bin], 1u);
                   if (!single) {
                     const unsigned long long mass = mass_units(c.weight(value));
                     if (mass != 0) atomicAdd(&shared.mass[bin], mass);
                   }
                 }));
    __syncthreads();
    // Thread 0 has the highest bins.
    constexpr int kEach = kFilterBins / kThreads;
    const int top = kFilterBins - 1 - static_cast<int>(threadIdx.x) * kEach;
    uint32_t count = 0;
    uint64_t mass = 0;
    for (int i = 0; i < kEach; ++i) {
      const uint32_t here = shared.count[top - i];
      if (here == 0) continue;
      count += here;
      mass += bin_mass(top - i, here);
      atomicMin(&shared.lowest, top - i);
    }
    const uint32_t own_count = count;
    const uint64_t own_mass = mass;
    scan(shared, &count, &mass);
    int64_t above = *before + (count - own_count);
    uint64_t mass_above = *mass_before + (mass - own_mass);
    const int lowest = shared.lowest;
    for (int i = 0; i < kEach; ++i) {
      const int bin = top - i;
      const uint32_t here = shared.count[bin];
      if (here == 0) continue;
      const uint64_t mass_here = bin_mass(bin, here);
      const bool open = above < c.args.top_k && mass_above <= c.mass_limit;
      const bool ends = above + here >= c.args.top_k || mass_above + mass_here > c.mass_limit;
      if (open && (ends || bin == lowest)) {
        shared.boundary = bin;
        shared.bin_count = here;
        shared.before = above;
        shared.mass_before = mass_above;
      }
      above += here;
      mass_above += mass_here;
    }
    __syncthreads();
    const uint32_t start = from + (static_cast<uint32_t>(shared.boundary) << shift);
    *low = single ? only_key(shared.boundary) : start;
    *high = single ? *low : min(to, start + ((1u << shift) - 1));
    *before = shared.before;
    *mass_before = shared.mass_before;
    __syncthreads();
  }

  // Descending, by bitonic merging (Batcher 1968).
  __device__ static void sort(Shared& shared, uint32_t count) {
    uint32_t padded = 2;
    while (padded < count) padded *= 2;
    for (uint32_t i = count + threadIdx.x; i < padded; i += kThreads) shared.candidates[i] = 0;
    for (uint32_t size = 2; size <= padded; size *= 2) {
      for (uint32_t stride = size / 2; stride > 0; stride /= 2) {
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < padded / 2; i += kThreads) {
          const uint32_t a = 2 * i - (i & (stride - 1)), b = a + stride;
          const unsigned long long x = shared.candidates[a], y = shared.candidates[b];
          if ((x < y) == ((a & size) == 0)) {
            shared.candidates[a] = y;
            shared.candidates[b] = x;
          }
        }
      }
    }
    __syncthreads();
  }

  __device__ static uint32_t candidate_key(unsigned long long candidate) {
    return static_cast<uint32_t>(candidate >> 32);
  }
  __device__ static int64_t candidate_index(unsigned long long candidate) {
    return 0xffffffffu - static_cast<uint32_t>(candidate);
  }

  // How many of the sorted candidates are kept.
  __device__ static int32_t cut_sorted(const Context& c, uint32_t count, int64_t before,
                                       uint64_t mass_before) {
    Shared& shared = c.shared;
    const uint32_t each = (count + kThreads - 1) / kThreads;
    const uint32_t first = min(count, threadIdx.x * each), last = min(count, first + each);
    uint64_t mass = 0;
    for (uint32_t i = first; i < last; ++i) {
      mass += mass_units(c.weight(filter_value(candidate_key(shared.candidates[i]))));
    }
    if (threadIdx.x == 0) shared.kept_here = 0;
    const uint64_t own = mass;
    uint32_t unused = 0;
    scan(shared, &unused, &mass);
    uint64_t above = mass_before + mass - own;
    int32_t kept = 0;
    for (uint32_t i = first; i < last; ++i) {
      kept += before + i < c.args.top_k && above <= c.mass_limit;
      above += mass_units(c.weight(filter_value(candidate_key(shared.candidates[i]))));
    }
    if (kept > 0) atomicAdd(&shared.kept_here, kept);
    __syncthreads();
    // The first is kept whatever the rounding of its surroundings.
    return max(1, shared.kept_here);
  }

  // The index of the n-th token, from 1, whose key is `key`.
  __device__ static int64_t nth_index(const Context& c, uint32_t key, int64_t n) {
    Shared& shared = c.shared;
    const VocabularyArgs& args = c.args;
    constexpr int kElements = Vector<T>::kElements;
    const float wanted = filter_value(key);
    if (threadIdx.x < 32) {
      const int lane = threadIdx.x;
      int64_t left = n;
      for (int64_t tile = 0; tile < args.tiles && left > 0; ++tile) {
        if (c.partials[tile].max < wanted) continue;
        const int64_t first = tile * kTile;
        const int tokens = static_cast<int>(smaller<int64_t>(kTile, args.logits.vocab - first));
        const T* logits = row_pointer<T>(args.logits, c.row) + first;
        const bool aligned = (reinterpret_cast<uintptr_t>(logits) & 15) == 0;
        for (int v = 0; v < kVectors<T> && left > 0; ++v) {
          const int begin = vector_begin<T>(v, lane);
          float x[kElements];
          unpack<T>(read_vector(logits, v, lane, tokens, aligned), x);
          int own = 0;
          for (int e = 0; e < kElements; ++e) own += begin + e < tokens && is_value(x[e], wanted);
          int until = own;
          for (int step = 1; step < 32; step *= 2) {
            const int other = __shfl_up_sync(kWholeWarp, until, step);
            if (lane >= step) until += other;
          }
          const int total = __shfl_sync(kWholeWarp, until, 31);
          if (until - own < left && left <= until) {
            int64_t rest = left - (until - own);
            for (int e = 0; e < kElements; ++e) {
              if (begin + e < tokens && is_value(x[e], wanted) && --rest == 0) {
                shared.index_limit = first + begin + e;
              }
            }
          }
          left -= total;
        }
      }
    }
    __syncthreads();
    return shared.index_limit;
  }

  // Masses of the tiles and the weighted sum, over the kept tokens.
  struct SumKept {
    const Context& c;
    Cut cut;
    mutable float sum, weighted;

    __device__ void operator()(float value, int64_t index) const {
      if (!(value > -kInf) || !cut.keeps(filter_key(value), index)) return;
      const float t = c.exponent(value);
      const float w = exp2_fast(t);
      sum += w;
      weighted = fmaf(w, t, weighted);
    }
    __device__ void end_of_tile(int64_t tile) const {
      const int lane = threadIdx.x % 32;
      const float total = warp_sum_pair(sum, weighted, lane);
      if (lane == 0) c.shared.mass[tile] = mass_units(total);
      if (lane == 16) add_weighted(c.shared, total);
      sum = weighted = 0;
    }
  };

  __device__ static void add_weighted(Shared& shared, float weighted) {
    const long long units = __float2ll_rn(weighted * kMassUnits);
    atomicAdd(&shared.weighted, static_cast<unsigned long long>(units));
  }

  __device__ static void merge_row_filtered(const VocabularyArgs& args, const StatsOutput& out,
                                            int64_t position, Shared& shared) {
    const ListEntry entry = list_entry(args, position);
    const int64_t first_partial = args.first_partial(position, entry.row);
    RowTotal row;
    if (entry.row >= 0) {
      if (threadIdx.x < 32) {
        row = merge_row<double>(args, first_partial, Partials(args, first_partial, threadIdx.x));
        if (threadIdx.x == 0) shared.row = row;
      }
      __syncthreads();
      row = shared.row;
    }
    if (row.empty) {
      if (threadIdx.x == 0) {
        write_row(args, out, entry.slot, row, entry.missing, 0, 0, 0, 0, 0);
      }
      __syncthreads();
      return;
    }
    // With room for the rounding of the weights in the sum, so that a boundary between equal
    // masses lies where it would without.
    const double limit =
        args.top_p < 1.0 ? args.top_p * row.sum * (1.0 + 0x1p-22) * kMassUnits : 0x1p63;
    const Context c{args,      shared,
                    entry.row, args.partials + first_partial,
                    row.max,   static_cast<uint64_t>(limit)};

    const bool ranked = args.top_k <= args.tiles && args.tiles <= kMostRankedTiles;
    uint32_t low = filter_key(selection_floor(c, ranked)), high = filter_key(row.max);
    int64_t before = 0;
    uint64_t mass_before = 0;
    bool fits = ranked || args.logits.vocab <= kFilterCandidates;
    uint32_t count = 0;
    Cut cut;
    int64_t kept;
    for (;;) {
      if (fits) {
        count = collect(c, low, high);
        if (count <= kFilterCandidates) {
          sort(shared, count);
          const int32_t here = cut_sorted(c, count, before, mass_before);
          const unsigned long long last = shared.candidates[here - 1];
          cut = {candidate_key(last), candidate_index(last)};
          kept = before + here;
          break;
        }
      }
      if (low == high && count > 0) {
        // More equal logits than fit: the order among them is that of their indices.
        const uint64_t each = mass_units(c.weight(filter_value(low)));
        int64_t here = smaller<int64_t>(count, args.top_k - before);
        if (each > 0) {
          here =
              smaller<uint64_t>(here, (c.mass_limit - min(c.mass_limit, mass_before)) / each + 1);
        }
        cut = {low, here < count ? nth_index(c, low, here) : args.logits.vocab};
        kept = before + here;
        break;
      }
      narrow(c, &low, &high, &before, &mass_before);
      count = shared.bin_count;
      fits = count <= kFilterCandidates;
    }
    const bool in_candidates = before == 0 && count <= kFilterCandidates;

    for (int64_t t = threadIdx.x; t < args.tiles; t += kThreads) shared.mass[t] = 0;
    if (threadIdx.x == 0) shared.weighted = 0;
    __syncthreads();
    if (in_candidates) {
      for (int64_t i = threadIdx.x; i < kept; i += kThreads) {
        const float value = filter_value(candidate_key(shared.candidates[i]));
        if (!(value > -kInf)) continue;
        const float t = c.exponent(value);
        const float w = exp2_fast(t);
        atomicAdd(&shared.mass[candidate_index(shared.candidates[i]) / kTile],
                  static_cast<unsigned long long>(mass_units(w)));
        add_weighted(shared, w * t);
      }
    } else {
      const SumKept sums{c, cut, 0.0f, 0.0f};
      c.each_token(filter_value(cut.key), sums);
    }
    __syncthreads();

    const Philox philox = args.sampled ? Philox(args, entry.row) : Philox();
    double sum = 0;
    if (threadIdx.x < 32) {
      Candidate best;
      for (int64_t t = threadIdx.x; t < args.tiles; t += 32) {
        const uint64_t units = shared.mass[t];
        if (units == 0) continue;
        sum += static_cast<double>(units);
        if (args.sampled) {
          best.offer(logf(static_cast<float>(units)) + gumbel(tile_word(philox, t)), t, 0.0f);
        }
      }
      sum = warp_sum(sum) / kMassUnits;
      best.reduce_warp();
      if (threadIdx.x == 0) shared.tile = args.tiles > 1 ? best.index : 0;
    }
    __syncthreads();
    Candidate token;
    if (args.sampled) {
      const auto keeps = [&](float value, int64_t index) {
        return cut.keeps(filter_key(value), index);
      };
      token = draw_token<T, kThreads>(args, entry.row, shared.tile, row.max, philox, keeps,
                                      shared.drawn);
    } else {
      token.index = row.argmax;
      token.value = row.max;
    }
    if (threadIdx.x == 0) {
      const double weighted = static_cast<double>(static_cast<long long>(shared.weighted));
      write_row(args, out, entry.slot, row, false, token.index, token.value,
                static_cast<float>(sum), static_cast<float>(weighted / kMassUnits), kept);
    }
    __syncthreads();
  }

  __device__ static void merge_rows(const VocabularyArgs& args, const StatsOutput& out,
                                    int64_t begin, int64_t end, unsigned part, unsigned parts,
                                    char* memory) {
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    wait_for_predecessor();
    for (int64_t position = begin + part; position < end; position += parts) {
      merge_row_filtered(args, out, position, shared);
    }
  }
};

}  // namespace confidence
}  // namespace lopa
