// One sequence's round from ready statistics on the GPU, by one CTA: SequenceRound of sequence.h.
//
// A warp a branch forms the confidences; each warp finds the winner for itself; all select in its
// window (selection.cuh); a warp a branch writes the next state. What the state holds is in
// registers or in the workspace by the time the next state, perhaps the same memory, is written.
#pragma once

#include <type_traits>

#include "branch/selection.cuh"
#include "confidence/vocabulary_args.h"
#include "step/round_args.h"
#include "step/sequence.cuh"

namespace lopa {
namespace step {

template <int kBytes>
__device__ __forceinline__ void copy_async(void* to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(__cvta_generic_to_global(from)), "n"(kBytes)
               : "memory");
}

// Copies of all statistics and tokens of a sequence, by the whole CTA: all of them, before it is
// known which are needed, so that there is one latency instead of four. `n` is a multiple of 4, and
// all addresses are multiples of 16 bytes.
__device__ __forceinline__ void stage(int64_t* tokens, int64_t* token, float* prob, float* score,
                                      const int64_t* from_tokens, const ColumnStats& from, int n) {
#pragma unroll 1
  for (int i = 4 * threadIdx.x; i < n; i += 4 * blockDim.x) {
    copy_async<16>(tokens + i, from_tokens + i);
    copy_async<16>(tokens + i + 2, from_tokens + i + 2);
    copy_async<16>(score + i, from.score + i);
    copy_async<16>(token + i, from.token + i);
    copy_async<16>(token + i + 2, from.token + i + 2);
    copy_async<16>(prob + i, from.prob + i);
  }
}

// Waits for the thread's copies. They are waited for whatever `loaded` is; but that it is asked for
// keeps the loads that it is made of before the wait, where the compiler would not leave them.
__device__ __forceinline__ void wait_for_copies(uint32_t loaded) {
  asm volatile(
      "{\n\t"
      ".reg .pred any;\n\t"
      "setp.ne.u32 any, %0, 0;\n\t"
      "@any cp.async.wait_all;\n\t"
      "@!any cp.async.wait_all;\n\t"
      "}" ::"r"(loaded)
      : "memory");
}

// A branch as its warp leaves it for the others. The status has the EOS of the branch as well.
struct BranchWords {
  float* confidence;
  int32_t* status;
  int32_t* length;

  __device__ BranchWords(float* words, int K)
      : confidence(words),
        status(reinterpret_cast<int32_t*>(words + K)),
        length(reinterpret_cast<int32_t*>(words + 2 * K)) {}
};

constexpr int32_t kBranchEos = 1 << 30;

// The status bits of a row of logits that the round needs.
__device__ __forceinline__ int32_t row_status(uint8_t flags) {
  if (flags & confidence::kRowMissing) return kMissingRow;
  return flags & (confidence::kRowNan | confidence::kRowEmpty) ? kNonfinite : 0;
}

// Confidence and status of a branch of a sound sequence, by a warp. With kFromLogits only needed
// rows have statistics, and flags; none if `flags` is null. kKeeps is keeps_scores(config.reduce).
template <bool kFromLogits, bool kKeeps>
__device__ __forceinline__ int32_t branch_confidence(const Numbers& n, int length, float creation,
                                                     const branch::Columns& columns,
                                                     const uint8_t* flags,
                                                     const RoundConfig& config, float* scores,
                                                     float& confidence) {
  confidence = -kInf;
  if (!n.sound(length)) return kBadState;
  const int lane = lane_index();
  const int64_t mask_id = config.select.mask_id;
  branch::ScoreList<kKeeps> list(scores);
  int32_t status = 0;
  if (flags != nullptr && config.shift && n.commit_len > 0) {
    status |= row_status(flags[n.commit_len - 1]);
  }
#pragma unroll 1
  for (int base = n.first_generated(); base < length; base += 32 * kBatch) {
    bool open[kBatch];
    float score[kBatch];
    int32_t row[kBatch];
    // Columns beyond the length read the last one again: loads without branches overlap.
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int c = base + 32 * j + lane, from = min(c, length - 1);
      open[j] = columns.tokens[from] == mask_id;
      if (!kFromLogits) score[j] = columns.stats.score[max(from - columns.shift, 0)];
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int c = base + 32 * j + lane;
      open[j] = open[j] && c < length;
      row[j] = 0;
      if (c < columns.shift) {
        score[j] = columns.carried.score;
      } else if (kFromLogits && open[j] && flags != nullptr) {
        score[j] = columns.stats.score[c - columns.shift];
        row[j] = row_status(flags[c - columns.shift]);
      } else if (kFromLogits) {
        score[j] = 0.0f;
      }
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int c = base + 32 * j + lane;
      if (open[j]) {
        if (c < n.commit_len) status |= kBadState;
        // Statistics of infinite or NaN score come from rows without a usable distribution.
        if (!isfinite(score[j])) status |= kNonfinite;
        status |= row[j];
      }
      list.add(open[j], score[j]);
    }
  }
  const double reduced = list.reduce(config.reduce);
  confidence =
      length == 0 ? 1.0f : branch::blend(branch::rankable(creation), reduced, config.reduce.alpha);
  return static_cast<int32_t>(__reduce_or_sync(kWholeWarp, static_cast<unsigned>(status)));
}

struct Winner {
  int branch;
  int32_t status;  // of all live branches
};

// By a warp. Equal confidence: the lowest lookahead slot, and the anchor last.
__device__ __forceinline__ Winner find_winner(const BranchWords& words, int branches,
                                              bool force_anchor) {
  uint32_t key = 0;
  int slot = INT_MAX, status = 0;
#pragma unroll 1
  for (int k = lane_index(); k < branches; k += 32) {
    status |= words.status[k];
    const float confidence = words.confidence[k];
    // No comparison holds for a NaN: it never replaces another, and as the first it stays.
    const uint32_t own = isnan(confidence) && k == 1 ? UINT_MAX : branch::rank_key(confidence);
    const int order = k == 0 ? branches : k;
    if (own > key || (own == key && order < slot)) {
      key = own;
      slot = order;
    }
  }
  const uint32_t highest = __reduce_max_sync(kWholeWarp, key);
  slot = __reduce_min_sync(kWholeWarp, key == highest ? slot : INT_MAX);
  status = static_cast<int32_t>(__reduce_or_sync(kWholeWarp, static_cast<unsigned>(status)));
  return {force_anchor || slot == branches ? 0 : slot, status & ~kBranchEos};
}

// A sequence that is done or whose state is bad stays as it is.
__device__ inline void pass_through(const SequenceView& s, const int64_t* tokens,
                                    const BatchOutput& output, const SequenceOutput& out,
                                    int64_t mask_id, int32_t status) {
  const int K = static_cast<int>(s.K), W = static_cast<int>(s.W);
  const int slots = static_cast<int>(output.branches), window = static_cast<int>(output.window);
  const int columns = min(W, window);
#pragma unroll 1
  for (int k = warp_index(); k < slots; k += warp_count()) {
    const bool exists = k < K;
    const int64_t* from = tokens + static_cast<int64_t>(k) * W;
    int64_t* to = out.tokens + static_cast<int64_t>(k) * window;
#pragma unroll 1
    for (int c = lane_index(); c < window; c += 32) {
      to[c] = exists && c < columns ? from[c] : mask_id;
    }
    if (lane_index() == 0) {
      out.length[k] = exists ? min(max(s.length[k], 0), columns) : 0;
      out.creation[k] = exists ? s.creation[k] : 0.0f;
      out.eos[k] = exists && s.eos[k];
    }
  }
#pragma unroll 1
  for (int k = threadIdx.x; k < K; k += blockDim.x) out.confidence[k] = -kInf;
#pragma unroll 1
  for (int c = threadIdx.x; c < W; c += blockDim.x) out.committed[c] = -1;
  if (threadIdx.x != 0) return;
  *out.branches = min(max(s.branches, 1), min(K, slots));
  *out.cache_len = s.cache_len;
  *out.commit_len = s.commit_len;
  *out.prompt_len = s.prompt_len;
  *out.carry_token = s.carry_token;
  *out.carry_prob = s.carry_prob;
  *out.carry_score = s.carry_score;
  *out.done = true;
  *out.winner = 0;
  *out.filled = 0;
  *out.status = status;
}

// The next window before its blocks are opened, and step 9's questions.
struct Next {
  int cache_len, length, window;
  int commit_len;
  int block_size, last_start;  // first column of the last block
  bool full;                   // the window was too small
  bool may_open, opens_always;
  int missing;  // tokens that the last block lacks until the next may open

  // Does a branch want another block? `more` tokens of it are in the last block.
  __device__ __forceinline__ bool wants(bool eos, int more) const {
    return may_open && !eos && (opens_always || more >= missing);
  }

  __device__ __forceinline__ bool has_room() const { return length + block_size <= window; }
};

// Steps 6, 8 and 9: the next anchor and its lookahead branches, slid and extended; a warp each.
__device__ inline void write_branches(const Next& next, int slid, int live, bool eos,
                                      const branch::Columns& own, const int64_t* values,
                                      const branch::SelectSpace& space, const RoundConfig& config,
                                      const SequenceOutput& out) {
#pragma unroll 1
  for (int k = warp_index(); k < config.branches; k += warp_count()) {
    const bool is_live = k < live;
    int column = -1, length = 0;
    bool branch_eos = eos && is_live;
    float creation = k == 0 ? 1.0f : 0.0f;
    if (is_live && k > 0) {
      column = space.lookahead[k - 1];
      creation = branch::rankable(own.score(column));
      branch_eos = branch_eos || (space.eos[column / 32] >> (column % 32) & 1u);
    }
    if (is_live) {
      const int more = column >= 0 && column - slid >= next.last_start;
      length = next.length;
      if (next.wants(branch_eos, more) && next.has_room()) length += next.block_size;
    }
    int64_t* row = out.tokens + k * config.window;
    const int filled = is_live ? next.length : 0, own_column = column - slid;
#pragma unroll 1
    for (int base = lane_index(); base < next.window; base += 32 * kBatch) {
      int64_t value[kBatch];
      bool known[kBatch] = {};
      if (filled > 0) {
        // Columns beyond them read the last one again: loads without branches overlap.
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          const int c = base + 32 * j;
          const unsigned from = static_cast<unsigned>(slid + min(c, filled - 1));
          // Open columns that stay so have a value, too.
          const uint32_t left = space.eligible[from / 32] & ~space.fill[from / 32];
          value[j] = values[from];
          known[j] = c < filled && (c == own_column || (left >> (from % 32) & 1u) == 0);
        }
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int c = base + 32 * j;
        if (c < next.window) row[c] = known[j] ? value[j] : config.select.mask_id;
      }
    }
    if (lane_index() == 0) {
      out.length[k] = length;
      out.creation[k] = creation;
      out.eos[k] = branch_eos;
    }
  }
}

// By the whole CTA. With kFromLogits the statistics are those of the needed rows, if `has_rows`,
// and this kernel's grid wrote them. With kInShared the workspace is in shared memory; with kStaged
// it has copies of the tokens and statistics, too.
template <bool kFromLogits, bool kInShared, bool kStaged>
__device__ __forceinline__ void run_round(const RoundArgs& args, int64_t b, bool has_rows,
                                          char* shared) {
  static_assert(!kStaged || (kInShared && !kFromLogits));
  const RoundConfig& config = args.config;
  const SequenceView s = args.state.sequence(b);
  const branch::Memory<kInShared> memory{shared, args.memory + b * args.memory_of_sequence};
  const int K = static_cast<int>(s.K), W = static_cast<int>(s.W);
  const Numbers n{K, W, s.branches, s.cache_len, s.commit_len, s.prompt_len};
  const int warp = warp_index(), warps = warp_count();
  int32_t length = 0;
  float creation = 0;
  bool eos = false;
  auto load_branch = [&](int k) {
    if (k >= K) return;
    length = s.length[k];
    creation = s.creation[k];
    eos = s.eos[k];
  };
  load_branch(warp);

  const int64_t slots = int64_t{K} * W;
  const int64_t* tokens = s.tokens;
  ColumnStats stats{args.stats.token + b * slots, args.stats.prob + b * slots,
                    args.stats.score + b * slots};
  if constexpr (kStaged) {
    int64_t* staged_tokens = memory.template at<int64_t>(args.places.tokens);
    int64_t* staged_token = memory.template at<int64_t>(args.places.token);
    float* staged_prob = memory.template at<float>(args.places.prob);
    float* staged_score = memory.template at<float>(args.places.score);
    stage(staged_tokens, staged_token, staged_prob, staged_score, tokens, stats,
          static_cast<int>(slots));
    tokens = staged_tokens;
    stats = {staged_token, staged_prob, staged_score};
  }
  // While those are on their way.
  const branch::Division blocks_of(config.select.block_size);
  const bool sound = !s.done && n.sound();
  if constexpr (kStaged) {
    wait_for_copies(static_cast<uint32_t>(length) | __float_as_uint(creation) | eos | sound);
    __syncthreads();
  }
  auto columns_of = [&](int k) {
    using Offset = std::conditional_t<kStaged, int, int64_t>;
    const Offset at = static_cast<Offset>(k) * W;
    return branch::Columns{tokens + at,
                           {stats.token + at, stats.prob + at, stats.score + at},
                           config.shift ? 1 : 0,
                           {s.carry_token, s.carry_prob, s.carry_score}};
  };

  const BranchWords words(memory.template at<float>(args.places.branches), K);
  auto weigh_branches = [&]<bool kKeeps>() {
    float* scores = nullptr;
    if constexpr (kKeeps) {
      scores = memory.template at<float>(args.places.scores) + int64_t{warp} * W;
    }
#pragma unroll 1
    for (int k = warp;;) {
      const uint8_t* flags = has_rows ? args.flags + b * slots + int64_t{k} * W : nullptr;
      float confidence;
      const int32_t status = branch_confidence<kFromLogits, kKeeps>(
          n, length, creation, columns_of(k), flags, config, scores, confidence);
      if (lane_index() == 0) {
        words.confidence[k] = confidence;
        words.status[k] = status | (eos ? kBranchEos : 0);
        words.length[k] = length;
      }
      k += warps;
      if (k >= n.branches) break;
      load_branch(k);
    }
  };
  if (sound && warp < n.branches) {
    if (branch::keeps_scores(config.reduce)) {
      weigh_branches.template operator()<true>();
    } else {
      weigh_branches.template operator()<false>();
    }
  }
  __syncthreads();
  Winner winner{0, 0};
  if (sound) winner = find_winner(words, n.branches, config.force_anchor);
  if (!sound || winner.status & kBadState) {
    pass_through(s, tokens, args.output, args.output.sequence(b), config.select.mask_id,
                 s.done ? 0 : kBadState);
    return;
  }
  int32_t status = winner.status;
  const branch::Columns own = columns_of(winner.branch);
  length = words.length[winner.branch];
  eos = words.status[winner.branch] & kBranchEos;
  const int slid = n.commit_len;
  branch::Prediction carried = own.carried;
  // The last warp: others have more to do at the end.
  const bool writes_numbers = threadIdx.x == blockDim.x - 1;
  if (config.shift && slid > 0 && writes_numbers) carried = own.prediction(slid);

  Next next{};
  next.cache_len = n.cache_len + slid;
  next.length = length - slid;
  next.window = static_cast<int>(config.window);
  next.block_size = static_cast<int>(config.select.block_size);
  const int offset = next.cache_len - n.prompt_len;  // column + offset = generated index
  const int generated = offset + next.length;
  const unsigned T = blocks_of.by;
  const unsigned last_block = generated > 0 ? blocks_of(static_cast<unsigned>(generated - 1)) : 0;
  next.last_start = static_cast<int>(last_block * T) - offset;
  next.full = next.length > next.window;
  next.opens_always = generated <= 0 || next.length == 0;

  const branch::Blocks blocks(n.cache_len, n.prompt_len, length, blocks_of);
  const branch::SelectSpace space(memory, args.places.select, W);
  int64_t* values = memory.template at<int64_t>(args.places.values);
  const int lookahead = static_cast<int>(smaller<int64_t>(config.branches - 1, W));
  const int tail = next.opens_always ? length : slid + max(next.last_start, 0);
  const branch::Selected selected = branch::select_columns(
      own, blocks, lookahead, tail, config.select, config.eos_id, space, values);

  // Step 7: leading columns of consecutive complete blocks, after the slide.
  const unsigned complete = blocks_of(static_cast<unsigned>(selected.first_open - slid + offset));
  next.commit_len = max(max(-offset, 0), static_cast<int>(complete * T) - offset);
  int live = 1 + min(selected.rest, lookahead);
  if (next.full) {
    status |= kWindowFull;
    next.length = next.window;
    next.commit_len = min(next.commit_len, next.length);
    live = 1;
  }
  const int64_t generated_blocks = generated > 0 ? int64_t{last_block} + 1 : 0;
  next.may_open = !next.full && generated_blocks < config.max_blocks;
  const int last_filled = generated - static_cast<int>(last_block * T) - selected.tail_open;
  next.missing = static_cast<int>(config.add_count) - last_filled;
  eos = eos || selected.eos;

  const SequenceOutput out = args.output.sequence(b);
  write_branches(next, slid, live, eos, own, values, space, config, out);
#pragma unroll 1
  for (int c = threadIdx.x; c < W; c += blockDim.x) out.committed[c] = c < slid ? values[c] : -1;
#pragma unroll 1
  for (int k = threadIdx.x; k < K; k += blockDim.x) {
    out.confidence[k] = k < n.branches ? words.confidence[k] : -kInf;
  }
  if (!writes_numbers) return;
  // Step 10, and the two ways in which a sequence cannot go on.
  const bool wants = next.wants(eos, 0), opened = wants && next.has_room();
  const bool stalled = selected.had_open && selected.filled == 0 && live == 1 && slid == 0 &&
                       next.commit_len == 0 && !opened;
  if (stalled) status |= kStalled;
  *out.branches = live;
  *out.cache_len = next.cache_len;
  *out.commit_len = next.commit_len;
  *out.prompt_len = n.prompt_len;
  *out.carry_token = carried.token;
  *out.carry_prob = carried.prob;
  *out.carry_score = carried.score;
  *out.done = (selected.first_open == length && !wants) || stalled || next.full;
  *out.winner = winner.branch;
  *out.filled = selected.filled;
  *out.status = status;
}

}  // namespace step
}  // namespace lopa
