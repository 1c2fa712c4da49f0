// The forward pass of the loss on the GPU, but for the tiles' sums (tile_sums.cuh): the list of the
// masked rows, the merge of their tiles, and the means. All orders of summation are fixed.
#pragma once

#include "certainty_loss/tile_sums.cuh"
#include "confidence/merge_kernel.cuh"

namespace lopa {
namespace certainty_loss {

using confidence::Item;
using confidence::VocabularyArgs;

// Sum of all threads' values before this one's, by a CTA of kOneCtaThreads; `total` gets all.
__device__ inline int exclusive_sum(int value, int* total) {
  __shared__ int sums[kOneCtaThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int inclusive = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int before = __shfl_up_sync(kWholeWarp, inclusive, step);
    if (lane >= step) inclusive += before;
  }
  if (lane == 31) sums[warp] = inclusive;
  __syncthreads();
  if (warp == 0) {
    int all = sums[lane];
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int before = __shfl_up_sync(kWholeWarp, all, step);
      if (lane >= step) all += before;
    }
    sums[lane] = all;
  }
  __syncthreads();
  *total = sums[kOneCtaThreads / 32 - 1];
  return inclusive - value + (warp > 0 ? sums[warp - 1] : 0);
}

// The masked rows in order, then the others; these get their statistics here.
__global__ void __launch_bounds__(kOneCtaThreads)
    order_kernel(const __grid_constant__ LossArgs args) {
  wait_for_predecessor();
  release_successor();
  const int rows = static_cast<int>(args.vocabulary.logits.rows);
  const int each = static_cast<int>((int64_t{rows} + kOneCtaThreads - 1) / kOneCtaThreads);
  const int begin = static_cast<int>(smaller<int64_t>(int64_t{each} * threadIdx.x, rows));
  const int end = smaller(begin + each, rows);
  int mine = 0;
  for (int r = begin; r < end; ++r) mine += args.masked[r];
  int total = 0;
  int masked = exclusive_sum(mine, &total);
  int other = total + begin - masked;
  for (int r = begin; r < end; ++r) {
    if (args.masked[r]) {
      args.order[1 + masked++] = r;
    } else {
      args.order[1 + other++] = r;
      args.stats[r] = {0, 0, 0, kNoEntropy};
    }
  }
  if (threadIdx.x == 0) args.order[0] = args.counts[0] = total;
}

template <typename T, bool kSquare>
__global__ void __maxnreg__(confidence::kPassRegisters<T>)
    loss_pass_kernel(const __grid_constant__ LossArgs args, int stages) {
  extern __shared__ __align__(128) unsigned char memory[];
  confidence::BestOfRow best;
  confidence::for_each_tile<T>(
      args.vocabulary, stages, memory, [] {},
      [&](const Item<T>& item, int n, const uint4* raw, int lane) {
        loss_tile<T, kSquare>(raw, item.number * kTile, n, args.vocabulary.scale, lane,
                              best.of(item), &args.vocabulary.partials[item.partial],
                              &args.plain[item.partial]);
      });
}

__device__ inline float logit_at(const LogitsView& logits, int64_t row, int64_t index) {
  switch (logits.dtype) {
    case FloatType::kBFloat16:
      return __bfloat162float(confidence::row_pointer<__nv_bfloat16>(logits, row)[index]);
    case FloatType::kHalf:
      return __half2float(confidence::row_pointer<__half>(logits, row)[index]);
    default:
      return confidence::row_pointer<float>(logits, row)[index];
  }
}

// By one warp: the sum of exp(x - max) over a row, from its tiles'.
__device__ inline float merge_plain(const LossArgs& args, int64_t first_partial,
                                    const confidence::Partials& partials, float row_max) {
  float sum = 0;
  partials.each([&](int64_t t, const Partial& tile) {
    if (tile.max == -kInf) return;
    const float shift = confidence::tile_shift(tile, row_max, kLog2E);
    sum = fmaf(confidence::exp2_fast(shift), args.plain[first_partial + t], sum);
  });
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kWholeWarp, sum, step);
  return sum;
}

__global__ void __launch_bounds__(kRowThreads)
    merge_rows_kernel(const __grid_constant__ LossArgs args) {
  wait_for_predecessor();
  release_successor();
  constexpr float kLn2 = static_cast<float>(confidence::kLn2);
  const VocabularyArgs& vocabulary = args.vocabulary;
  const int lane = threadIdx.x % 32;
  const int64_t listed = confidence::list_length(vocabulary);
  const int64_t warps = int64_t{gridDim.x} * (kRowThreads / 32);
  for (int64_t i = blockIdx.x * (kRowThreads / 32) + threadIdx.x / 32; i < listed; i += warps) {
    const int64_t row = confidence::listed_row(vocabulary, i);
    const int64_t first = vocabulary.first_partial(i, row);
    const confidence::Partials partials(vocabulary, first, lane);
    const confidence::RowTotal total = confidence::merge_row<float>(vocabulary, first, partials);
    const float plain = total.empty ? 0.0f : merge_plain(args, first, partials, total.max);
    if (lane != 0) continue;
    const int64_t label = args.labels[row];
    // A label outside the vocabulary, which the host cannot refuse, is as bad as a NaN.
    const bool known = label >= 0 && label < vocabulary.logits.vocab;
    if (total.nan || total.empty || !known) {
      const float nan = __int_as_float(0x7fffffff);
      args.stats[row] = {nan, nan, nan, nan};
      args.cross_entropy[i] = nan;
      continue;
    }
    const float sum = static_cast<float>(total.sum);
    const float log_sum = log1pf(plain - 1.0f), tempered = log1pf(sum - 1.0f);
    const float entropy = fmaxf(0.0f, tempered - kLn2 * total.weighted / sum);
    const bool agrees = total.argmax == label;
    args.stats[row] = {total.max, log_sum, tempered, agrees ? entropy : kNoEntropy};
    const double distance =
        static_cast<double>(logit_at(vocabulary.logits, row, label)) - total.max;
    args.cross_entropy[i] = static_cast<float>(log_sum - distance);
  }
}

struct Totals {
  double cross_entropy, entropy;
  int agreeing;

  __device__ void add(const Totals& other) {
    cross_entropy += other.cross_entropy;
    entropy += other.entropy;
    agreeing += other.agreeing;
  }
};

// The means, by one CTA: a thread adds up every 1024th row of the list, a tree the threads'.
__global__ void __launch_bounds__(kOneCtaThreads)
    means_kernel(const __grid_constant__ LossArgs args) {
  __shared__ Totals shared[kOneCtaThreads];
  wait_for_predecessor();
  release_successor();
  const int listed = static_cast<int>(confidence::list_length(args.vocabulary));
  Totals own{};
  for (int i = threadIdx.x; i < listed; i += kOneCtaThreads) {
    const float entropy = args.stats[args.vocabulary.slots[i]].entropy;
    const bool agrees = entropy >= 0;
    own.add({args.cross_entropy[i], agrees ? entropy : 0.0, agrees});
  }
  shared[threadIdx.x] = own;
  for (int half = kOneCtaThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) shared[threadIdx.x].add(shared[threadIdx.x + half]);
  }
  if (threadIdx.x != 0) return;
  Totals all = shared[0];
  if (listed > 0) all.cross_entropy /= listed;
  if (all.agreeing > 0) all.entropy /= all.agreeing;
  args.terms[0] = static_cast<float>(all.cross_entropy);
  args.terms[1] = static_cast<float>(all.entropy);
  *args.loss = static_cast<float>(all.cross_entropy + args.beta * all.entropy);
  args.counts[1] = all.agreeing;
}

}  // namespace certainty_loss
}  // namespace lopa
