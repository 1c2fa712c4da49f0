// Which rows of logits a round needs, in order, on the GPU: one launch of one CTA, or of one
// cluster of CTAs that tell each other their counts.
//
// A CTA counts its sequences' rows, a warp a branch; then each knows where its first row goes.
#pragma once

#include <cooperative_groups.h>

#include "step/round_args.h"
#include "step/sequence.cuh"

namespace lopa {
namespace step {

constexpr int kRowsThreads = 1024;
constexpr int kBranchesAtOnce = 1024;
constexpr int32_t kUnsound = INT_MIN;

// The counts of a CTA's sequences in shared memory.
struct RowCounts {
  int32_t* branch;    // rows of each branch; then, rows of the sequence before it
  int32_t* sequence;  // rows of each sequence; then, rows of the CTA's sequences before it
  bool* sound;
  int32_t* total;

  __device__ RowCounts(char* shared, int sequences, int K)
      : branch(reinterpret_cast<int32_t*>(shared)),
        sequence(branch + sequences * K),
        sound(reinterpret_cast<bool*>(sequence + sequences + 1)),
        total(sequence + sequences) {}

  static size_t bytes(int64_t sequences, int64_t K) {
    return static_cast<size_t>(sequences * K + sequences + 1) * sizeof(int32_t) + sequences;
  }
};

__device__ __forceinline__ Numbers read_numbers(const BatchView& state, int64_t b) {
  return {static_cast<int>(state.K), static_cast<int>(state.W), state.branches[b],
          state.cache_len[b],        state.commit_len[b],       state.prompt_len[b]};
}

// By a warp: the number of rows that branch k needs, kUnsound if its state is not.
__device__ __forceinline__ int32_t count_rows(const RowsArgs& args, int64_t b, int k) {
  const int lane = lane_index(), W = static_cast<int>(args.state.W);
  const int64_t branch = b * args.state.K + k;
  const int64_t* tokens = args.state.tokens + branch * W;
  // The first columns, before it is known which of them matter: one latency instead of two.
  int64_t token[kBatch];
#pragma unroll
  for (int j = 0; j < kBatch; ++j) {
    const int c = 32 * j + lane;
    token[j] = c < W ? tokens[c] : 0;
  }
  const Numbers n = read_numbers(args.state, b);
  const int length = args.state.length[branch];
  if (args.state.done[b] || !n.sound()) return kUnsound;
  if (k >= n.branches) return 0;
  if (!n.sound(length)) return kUnsound;
  // With shifted logits the last committed row becomes the carry, and column 0 has it already.
  const bool carries = args.shift && n.commit_len > 0;
  const int first = n.first_generated();
  int32_t count = 0;
  bool sound = true;
  for (int base = first / (32 * kBatch) * (32 * kBatch); base < length; base += 32 * kBatch) {
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int c = base + 32 * j + lane;
      if (base > 0) token[j] = c < length ? tokens[c] : 0;
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int c = base + 32 * j + lane;
      const bool open = c >= first && c < length && token[j] == args.mask_id;
      sound &= !(open && c < n.commit_len);
      const bool has_row = !args.shift || (c > 0 && !(carries && c == n.commit_len));
      count += open && has_row;
    }
  }
  count = __reduce_add_sync(kWholeWarp, count) + (carries ? 1 : 0);
  return __all_sync(kWholeWarp, sound) ? count : kUnsound;
}

// By the CTA: counts the rows of `sequences` sequences from b on, and returns their number.
__device__ inline int32_t count_sequences(const RowsArgs& args, int64_t b, int sequences,
                                          const RowCounts& counts) {
  const int K = static_cast<int>(args.state.K), lane = lane_index();
  __syncthreads();  // what the memory held is no longer used
  for (int i = warp_index(); i < sequences * K; i += warp_count()) {
    const int32_t count = count_rows(args, b + i / K, i % K);
    if (lane == 0) counts.branch[i] = count;
  }
  __syncthreads();
  for (int i = warp_index(); i < sequences; i += warp_count()) {
    int32_t* branch = counts.branch + i * K;
    int32_t before = 0;
    bool sound = true;
    for (int base = 0; base < K; base += 32) {
      const int k = base + lane;
      const int32_t counted = k < K ? branch[k] : 0;
      sound = sound && !__any_sync(kWholeWarp, counted == kUnsound);
      const int32_t own = max(counted, 0);
      int32_t sum = own;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int32_t left = __shfl_up_sync(kWholeWarp, sum, step);
        if (lane >= step) sum += left;
      }
      if (k < K) branch[k] = before + sum - own;
      before += __shfl_sync(kWholeWarp, sum, 31);
    }
    if (lane == 0) {
      counts.sequence[i] = sound ? before : 0;
      counts.sound[i] = sound;
    }
  }
  __syncthreads();
  if (warp_index() == 0) {
    int32_t before = 0;
    for (int base = 0; base < sequences; base += 32) {
      const int i = base + lane;
      const int32_t own = i < sequences ? counts.sequence[i] : 0;
      int32_t sum = own;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int32_t left = __shfl_up_sync(kWholeWarp, sum, step);
        if (lane >= step) sum += left;
      }
      if (i < sequences) counts.sequence[i] = before + sum - own;
      before += __shfl_sync(kWholeWarp, sum, 31);
    }
    if (lane == 0) *counts.total = before;
  }
  __syncthreads();
  return *counts.total;
}

// By a warp: the rows of branch k of sequence b, if it is sound, of which `before` go before them.
__device__ __forceinline__ void write_rows(const RowsArgs& args, int64_t b, int k, bool sound,
                                           int64_t before) {
  const int lane = lane_index(), W = static_cast<int>(args.state.W);
  const int64_t branch = b * args.state.K + k;
  const int64_t* tokens = args.state.tokens + branch * W;
  const bool maps = args.slots == nullptr;
  int first = 0, length = 0, carried = -1, begin = 0;
  const int shift = args.shift ? 1 : 0;
  if (sound) {
    const Numbers n = read_numbers(args.state, b);
    if (k < n.branches) {
      first = n.first_generated();
      length = args.state.length[branch];
      if (args.shift && n.commit_len > 0) carried = n.commit_len - 1;
      begin = max(first - shift, 0);
      if (carried >= 0) begin = min(begin, carried);
    }
  }
  // The map has an entry for every column.
  if (maps) begin = 0;
  const int end = maps ? W : length;
  for (int base = begin; base < end; base += 32 * kBatch) {
    bool needed[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int row = base + 32 * j + lane, column = row + shift;
      needed[j] = (row == carried) ||
                  (column >= first && column < length && tokens[column] == args.mask_id);
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int row = base + 32 * j + lane;
      const unsigned lanes = __ballot_sync(kWholeWarp, needed[j]);
      const int64_t position = before + __popc(lanes & ((1u << lane) - 1u));
      const int64_t slot = branch * W + row;
      before += __popc(lanes);
      if (maps) {
        const bool fits = needed[j] && position < args.capacity;
        if (row < W) args.rows[slot] = fits ? static_cast<int32_t>(position) : -1;
        if (fits) args.index[position] = slot;
      } else if (needed[j]) {
        args.slots[position] = static_cast<int32_t>(slot);
      }
    }
  }
  if (!maps && k == 0 && lane == 0) args.arrivals[b] = 0;
}

// Rows of the CTAs before this one, and of all.
struct Share {
  int64_t before, all;
};

__device__ __forceinline__ Share share_counts(int32_t own, int32_t* shared) {
  Share share{0, own};
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (gridDim.x > 1) {
    namespace cg = cooperative_groups;
    const cg::cluster_group cluster = cg::this_cluster();
    if (threadIdx.x == 0) *shared = own;
    cluster.sync();
    share.all = 0;
    for (unsigned i = 0; i < gridDim.x; ++i) {
      const int32_t count = *cluster.map_shared_rank(shared, i);
      if (i < blockIdx.x) share.before += count;
      share.all += count;
    }
    // Until all have read, none may leave.
    cluster.sync();
  }
#endif
  return share;
}

// One CTA, or one cluster of CTAs, which share the sequences.
__global__ void __launch_bounds__(kRowsThreads) rows_kernel(const __grid_constant__ RowsArgs args) {
  extern __shared__ __align__(128) char shared[];
  __shared__ int32_t shared_count;
  release_successor();
  wait_for_predecessor();
  const int64_t B = args.state.B, share_of_cta = (B + gridDim.x - 1) / gridDim.x;
  const int64_t begin = smaller<int64_t>(B, blockIdx.x * share_of_cta);
  const int64_t end = smaller<int64_t>(B, begin + share_of_cta);
  const int K = static_cast<int>(args.state.K);
  const RowCounts counts(shared, args.sequences, K);
  auto sequences_from = [&](int64_t b) {
    return static_cast<int>(smaller<int64_t>(args.sequences, end - b));
  };
  int32_t count = 0;
  for (int64_t b = begin; b < end; b += args.sequences) {
    count += count_sequences(args, b, sequences_from(b), counts);
  }
  const Share share = share_counts(count, &shared_count);
  int64_t before = share.before;
  const bool counted = end - begin <= args.sequences;
  for (int64_t b = begin; b < end; b += args.sequences) {
    const int sequences = sequences_from(b);
    if (!counted) count = count_sequences(args, b, sequences, counts);
    for (int i = warp_index(); i < sequences * K; i += warp_count()) {
      const int sequence = i / K;
      write_rows(args, b + sequence, i % K, counts.sound[sequence],
                 before + counts.sequence[sequence] + counts.branch[i]);
    }
    if (args.slots != nullptr) {
      for (int i = threadIdx.x; i < sequences; i += blockDim.x) {
        args.offsets[b + i] = static_cast<int32_t>(before + counts.sequence[i]);
      }
    }
    before += count;
  }
  const bool is_last = blockIdx.x == gridDim.x - 1 && threadIdx.x == 0;
  if (is_last)
    *(args.slots != nullptr ? &args.offsets[B] : args.count) = static_cast<int32_t>(share.all);
  if (args.slots != nullptr) return;
  // Index 0 exists wherever there is a row to gather, so that a gather of all `capacity` is safe.
  for (int64_t i = share.all + blockIdx.x * blockDim.x + threadIdx.x; i < args.capacity;
       i += gridDim.x * blockDim.x) {
    args.index[i] = 0;
  }
}

}  // namespace step
}  // namespace lopa
