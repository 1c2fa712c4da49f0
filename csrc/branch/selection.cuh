// Selection in one window on the GPU, by one CTA: which open columns are filled, and the ranking of
// the others (steps 5 and 6 of a round; Selection of round.h has the rules).
//
// A column is a bit of a mask and a key in the order of the scores; blocks are ranges of bits.
#pragma once

#include "branch/score_list.cuh"
#include "branch/workspace.h"

namespace lopa {
namespace branch {

// What a row of logits says of the column that it predicts.
struct Prediction {
  int64_t token;
  float prob, score;
};

// The columns of one branch: tokens, and the statistics of its rows of logits. With shifted logits
// (shift 1) a column's are those of the row before it, and column 0's are carried.
struct Columns {
  const int64_t* tokens;
  ColumnStats stats;
  int shift;
  Prediction carried;

  __device__ __forceinline__ Prediction prediction(int c) const {
    const int row = c - shift;
    Prediction p = carried;
    if (row >= 0) p = {stats.token[row], stats.prob[row], stats.score[row]};
    return p;
  }

  __device__ __forceinline__ float score(int c) const {
    return c >= shift ? stats.score[c - shift] : carried.score;
  }
};

// Divisions by one number, at least 1, of which only the first takes long.
struct Division {
  uint32_t by, inverse;

  __device__ __forceinline__ explicit Division(int64_t divisor)
      : by(static_cast<uint32_t>(smaller<int64_t>(divisor, UINT_MAX))), inverse(UINT_MAX / by) {}

  __device__ __forceinline__ uint32_t operator()(uint32_t x) const {
    // The rounding of `inverse` takes less than one from the quotient.
    const uint32_t quotient = __umulhi(x, inverse);
    return quotient + (x - quotient * by >= by);
  }
};

// Where a window's blocks lie: columns [first, length) belong to generated blocks, and the first of
// these, which may have begun before the window, ends before column `first_end`.
struct Blocks {
  int first, length, first_end;
  Division size;

  // cache_len and prompt_len may be any numbers.
  __device__ __forceinline__ Blocks(int32_t cache_len, int32_t prompt_len, int window_length,
                                    const Division& block_size)
      : length(window_length), size(block_size) {
    const bool begun = cache_len >= prompt_len;
    const uint32_t cache = static_cast<uint32_t>(cache_len);
    const uint32_t prompt = static_cast<uint32_t>(prompt_len);
    const uint32_t distance = begun ? cache - prompt : prompt - cache;
    const uint32_t columns = static_cast<uint32_t>(window_length);
    const uint32_t start = begun ? 0 : smaller(distance, columns);
    const uint32_t phase = begun ? distance - size(distance) * size.by : 0;
    first = static_cast<int>(start);
    first_end = static_cast<int>(start + smaller(size.by - phase, columns - start));
  }

  __device__ __forceinline__ int count() const {
    if (first >= length) return 0;
    const int rest = length - first_end;
    return rest <= 0 ? 1 : static_cast<int>(size(static_cast<uint32_t>(rest - 1))) + 2;
  }

  __device__ __forceinline__ int begin(int block) const {
    return block == 0 ? first : end(block - 1);
  }

  // Of a block that there is, so that no product is beyond 2^31.
  __device__ __forceinline__ int end(int block) const {
    const uint32_t step = smaller<uint32_t>(size.by, kMostColumns);
    const uint32_t at = static_cast<uint32_t>(first_end) + static_cast<uint32_t>(block) * step;
    return static_cast<int>(smaller(at, static_cast<uint32_t>(length)));
  }
};

// The arrays of SelectPlaces.
struct SelectSpace {
  uint32_t *open, *eligible, *accepted, *fill, *eos;
  uint32_t* keys;  // of columns that may still be chosen; 0: none
  int32_t* lookahead;
  uint32_t* heads;

  template <bool kInShared>
  __device__ __forceinline__ SelectSpace(const Memory<kInShared>& memory,
                                         const SelectPlaces& places, int window)
      : open(memory.template at<uint32_t>(places.masks)),
        keys(memory.template at<uint32_t>(places.keys)),
        lookahead(memory.template at<int32_t>(places.lookahead)),
        heads(memory.template at<uint32_t>(places.heads)) {
    const int words = (window + 31) / 32;
    eligible = open + words;
    accepted = eligible + words;
    fill = accepted + words;
    eos = fill + words;
  }
};

// What was selected; every thread gets it.
struct Selected {
  bool had_open;   // before the fill
  int first_open;  // after it; the length if there is none
  int tail_open;   // columns from `tail` on that are open after it
  int filled;
  int rest;  // open columns that have a token and were not filled
  bool eos;  // among the filled
};

// The bits of [begin, end) in word w of a mask.
__device__ __forceinline__ uint32_t range_bits(int w, int begin, int end) {
  const int low = max(begin - 32 * w, 0), high = min(end - 32 * w, 32);
  if (low >= high) return 0;
  return (0xffffffffu >> (32 - high)) & (0xffffffffu << low);
}

// By a warp: how many bits of [begin, end) are set.
__device__ __forceinline__ int count_bits(const uint32_t* mask, int begin, int end) {
  int count = 0;
#pragma unroll 1
  for (int w = begin / 32 + lane_index(); 32 * w < end; w += 32) {
    count += __popc(mask[w] & range_bits(w, begin, end));
  }
  return __reduce_add_sync(kWholeWarp, count);
}

struct Best {
  uint32_t key;  // 0: there is none
  int column;
};

// By a warp: the column of [begin, end) with the highest key, the lowest among equals.
__device__ __forceinline__ Best best_column(const uint32_t* keys, int begin, int end) {
  uint32_t key = 0;
  int column = INT_MAX;
#pragma unroll 1
  for (int c = begin + lane_index(); c < end; c += 32) {
    if (keys[c] > key) {
      key = keys[c];
      column = c;
    }
  }
  const uint32_t highest = __reduce_max_sync(kWholeWarp, key);
  return {highest, __reduce_min_sync(kWholeWarp, key == highest ? column : INT_MAX)};
}

__device__ __forceinline__ void set_bit(uint32_t* mask, int column) {
  atomicOr(&mask[column / 32], 1u << (column % 32));
}

// Words of the masks, keys, and in `values` the token that each column would hold if every column
// with a token were filled.
__device__ inline void read_columns(const Columns& columns, const Blocks& blocks,
                                    const SelectConfig& config, int64_t eos_id,
                                    const SelectSpace& space, int64_t* values) {
#pragma unroll 1
  for (int w = warp_index(); 32 * w < blocks.length; w += warp_count()) {
    const int c = 32 * w + lane_index();
    int64_t value = config.mask_id;
    if (c < blocks.length) value = columns.tokens[c];
    const bool open = c >= blocks.first && c < blocks.length && value == config.mask_id;
    bool eligible = false, accepted = false, eos = false;
    uint32_t key = 0;
    if (open) {
      const Prediction p = columns.prediction(c);
      // A prediction of the mask itself, or of no token, fills nothing.
      eligible = p.token >= 0 && p.token != config.mask_id;
      if (eligible) {
        value = p.token;
        accepted = (config.accept == Accept::kProb ? p.prob : p.score) > config.tau_conf;
        eos = eos_id >= 0 && p.token == eos_id;
        if (!accepted) key = rank_key(p.score);
      }
    }
    if (values != nullptr) values[c] = value;
    space.keys[c] = key;
    const uint32_t open_word = __ballot_sync(kWholeWarp, open);
    const uint32_t eligible_word = __ballot_sync(kWholeWarp, eligible);
    const uint32_t accepted_word = __ballot_sync(kWholeWarp, accepted);
    const uint32_t eos_word = __ballot_sync(kWholeWarp, eos);
    if (lane_index() == 0) {
      space.open[w] = open_word;
      space.eligible[w] = eligible_word;
      space.accepted[w] = accepted_word;
      space.fill[w] = accepted_word;
      space.eos[w] = eos_word;
    }
  }
}

// Fills the best column of each activated block, or of the window, where nothing was accepted.
__device__ inline void fill_fallbacks(const Blocks& blocks, const SelectConfig& config,
                                      const SelectSpace& space) {
  auto force = [&](const Best& best) {
    __syncwarp();
    if (best.key != 0 && lane_index() == 0) {
      set_bit(space.fill, best.column);
      space.keys[best.column] = 0;
    }
  };
  if (config.fallback == Fallback::kWindow) {
    if (warp_index() == 0 && count_bits(space.accepted, blocks.first, blocks.length) == 0) {
      force(best_column(space.keys, blocks.first, blocks.length));
    }
    return;
  }
  const int count = blocks.count();
#pragma unroll 1
  for (int block = warp_index(); block < count; block += warp_count()) {
    // What precedes the window's first block, and what the cache holds of it, is complete.
    const int begin = blocks.begin(block), end = blocks.end(block);
    const int before = block > 0 ? blocks.begin(block - 1) : begin;
    uint32_t accepted = 0;
    int masks = 0;
#pragma unroll 1
    for (int w = before / 32 + lane_index(); 32 * w < end; w += 32) {
      accepted |= space.accepted[w] & range_bits(w, begin, end);
      masks += __popc(space.open[w] & range_bits(w, before, begin));
    }
    masks = __reduce_add_sync(kWholeWarp, masks);
    if (__any_sync(kWholeWarp, accepted != 0)) continue;
    if (block > 0 && static_cast<int64_t>(blocks.size.by) - masks < config.act_count) continue;
    force(best_column(space.keys, begin, end));
  }
}

// By a warp, from the final masks.
__device__ inline Selected summarize(const Blocks& blocks, int tail, const SelectSpace& space) {
  int first_open = blocks.length, tail_open = 0, filled = 0, rest = 0;
  unsigned seen = 0;
#pragma unroll 1
  for (int w = lane_index(); 32 * w < blocks.length; w += 32) {
    const uint32_t open = space.open[w], fill = space.fill[w], left = open & ~fill;
    if (left != 0) first_open = min(first_open, 32 * w + __ffs(left) - 1);
    tail_open += __popc(left & range_bits(w, tail, blocks.length));
    filled += __popc(fill);
    rest += __popc(space.eligible[w] & ~fill);
    seen |= (open != 0 ? 1u : 0u) | ((fill & space.eos[w]) != 0 ? 2u : 0u);
  }
  Selected selected;
  seen = __reduce_or_sync(kWholeWarp, seen);
  selected.had_open = seen & 1u;
  selected.eos = seen & 2u;
  selected.first_open = __reduce_min_sync(kWholeWarp, first_open);
  selected.tail_open = __reduce_add_sync(kWholeWarp, tail_open);
  selected.filled = __reduce_add_sync(kWholeWarp, filled);
  selected.rest = __reduce_add_sync(kWholeWarp, rest);
  return selected;
}

// The rank of a column of [first, length) is the number of those that go before it. For a few
// hundred columns: a team of lanes counts for one column.
__device__ inline void rank_by_counting(unsigned first, unsigned length, int lookahead,
                                        const SelectSpace& space) {
  const unsigned columns = length - first;
  const unsigned lane = lane_index();
  unsigned team_bits = 0;
  while (team_bits < 3 && columns << (team_bits + 1) <= blockDim.x) ++team_bits;
  const unsigned team = 1u << team_bits;
  const uint4* quads = reinterpret_cast<const uint4*>(space.keys);
#pragma unroll 1
  for (unsigned base = 32 * warp_index(); base < columns << team_bits; base += blockDim.x) {
    const unsigned member = (base + lane) & (team - 1);
    const unsigned column = first + ((base + lane) >> team_bits);
    const uint32_t key = column < length ? space.keys[column] : 0;
    if (!__any_sync(kWholeWarp, key != 0)) continue;
    int rank = 0;
    const unsigned own = column / 4;
#pragma unroll 4
    for (unsigned q = first / 4 + member; 4 * q < length; q += team) {
      const uint4 quad = quads[q];
      // Equal keys of lower columns go before this one.
      const uint32_t above = q < own ? key - 1 : key;
      rank += (quad.x > above) + (quad.y > above) + (quad.z > above) + (quad.w > above);
    }
    if (member == 0 && key != 0) {
      const uint4 quad = quads[own];
      const unsigned before = column % 4;
      rank += (before > 0 && quad.x == key) + (before > 1 && quad.y == key) +
              (before > 2 && quad.z == key);
    }
#pragma unroll 1
    for (unsigned step = 1; step < team; step *= 2) rank += __shfl_xor_sync(kWholeWarp, rank, step);
    if (member == 0 && key != 0 && rank < lookahead)
      space.lookahead[rank] = static_cast<int>(column);
  }
}

// For more columns: the best of each of 32 runs of columns, and the best of those again and again.
__device__ inline void rank_by_runs(int first, int length, int lookahead,
                                    const SelectSpace& space) {
  const int origin = first / 32 * 32, lane = lane_index();
  const int run_columns = (length - origin + 1023) / 1024 * 32;
  auto best_of_run = [&](int run) {
    const int64_t begin = origin + static_cast<int64_t>(run) * run_columns;
    return best_column(space.keys, static_cast<int>(smaller<int64_t>(begin, length)),
                       static_cast<int>(smaller<int64_t>(begin + run_columns, length)));
  };
#pragma unroll 1
  for (int run = warp_index(); run < 32; run += warp_count()) {
    const Best best = best_of_run(run);
    if (lane == 0) {
      space.heads[run] = best.key;
      space.heads[32 + run] = best.column;
    }
  }
  __syncthreads();
  if (warp_index() != 0) return;
  Best head = {space.heads[lane], static_cast<int>(space.heads[32 + lane])};
#pragma unroll 1
  for (int rank = 0; rank < lookahead; ++rank) {
    __syncwarp();
    const uint32_t highest = __reduce_max_sync(kWholeWarp, head.key);
    if (highest == 0) return;
    const int column = __reduce_min_sync(kWholeWarp, head.key == highest ? head.column : INT_MAX);
    if (lane == 0) {
      space.lookahead[rank] = column;
      space.keys[column] = 0;
    }
    __syncwarp();
    const int run = (column - origin) / run_columns;
    const Best next = best_of_run(run);
    if (lane == run) head = next;
  }
}

// By the whole CTA. Masks and the first min(rest, lookahead) entries of space.lookahead are final,
// and visible to all threads, when it returns; `values` may be null.
__device__ inline Selected select_columns(const Columns& columns, const Blocks& blocks,
                                          int lookahead, int tail, const SelectConfig& config,
                                          int64_t eos_id, const SelectSpace& space,
                                          int64_t* values) {
  read_columns(columns, blocks, config, eos_id, space, values);
  __syncthreads();
  fill_fallbacks(blocks, config, space);
  __syncthreads();
  const Selected selected = summarize(blocks, tail, space);
  if (lookahead > 0 && selected.rest > 0) {
    // Columns before the first that is open have no rank. Counting costs about n^2 / 57 cycles, a
    // rank by runs about 170.
    const int first = selected.first_open, length = blocks.length;
    const int64_t n = length - first;
    if (n * n <= int64_t{8192} * lookahead) {
      rank_by_counting(first, length, lookahead, space);
    } else {
      rank_by_runs(first, length, lookahead, space);
    }
  }
  __syncthreads();
  return selected;
}

}  // namespace branch
}  // namespace lopa
