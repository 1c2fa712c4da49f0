// The results of branch attention on Hopper: parts of rows to the CTAs that merge them, the merge,
// and rows to global memory.
#pragma once

#include "branch_attention/attention_sm90_consumer.cuh"

namespace lopa {
namespace attention {

// A warp's 16 rows of a tile: of each thread, sums of two rows, their maxima (of scaled scores, to
// the base 2) and their sums of probabilities.
template <typename L>
struct Sums {
  static constexpr int kOut = L::kHeadDim / 2;
  float (&out)[kOut];
  float (&top)[2];
  float (&sum)[2];
};

// Who merges a tile that several CTAs have keys of: those whose runs end in it, which are all but
// perhaps the last; its rows, by warps, are shared among them in order.
struct Merge {
  int first;    // CTA
  int parts;    // CTAs
  int members;  // of them
  int own;      // one of the parts

  template <typename L>
  __device__ __forceinline__ Merge(const Task<L>& task, const ClusterRuns& runs,
                                   const Part<L>& part, int lane)
      : first(runs.owner(part.start, lane)) {
    const int end = part.start + part.units;
    const int last = runs.owner(end - 1, lane);
    parts = last - first + 1;
    members = parts - (runs.end(last) > end);
    own = task.rank - first;
  }
  __device__ __forceinline__ int member_of(int warp, int warps) const {
    return warp * members / warps;
  }
  // Of what a member gets: a warp's rows, by one of the other parts.
  __device__ __forceinline__ int place(int warp, int warps, int member, int part) const {
    const int first_warp = (member * warps + members - 1) / members;
    return (warp - first_warp) * (parts - 1) + part - (part > member);
  }
};

template <typename L>
__device__ __forceinline__ void send(const Task<L>& task, const Merge& merge, const Place<L>& place,
                                     const Sums<L>& sums) {
  const int member = merge.member_of(place.warp, L::kWarps);
  const int slot = merge.place(place.warp, L::kWarps, member, merge.own);
  const int rank = merge.first + member;
  const uint32_t barrier = remote_address(task.barriers.parts(place.warp), rank);
  const uint32_t to =
      remote_address(task.memory + L::kSums + slot * L::kSumsBytes + place.lane * 16, rank);
#pragma unroll
  for (int i = 0; i < Sums<L>::kOut; i += 4) {
    store_remote(to + i / 4 * 512, barrier, sums.out[i], sums.out[i + 1], sums.out[i + 2],
                 sums.out[i + 3]);
  }
  if (place.lane % 4 == 0) {
    store_remote(
        remote_address(task.memory + L::kTops + slot * L::kTopsBytes + place.lane * 4, rank),
        barrier, sums.top[0], sums.sum[0], sums.top[1], sums.sum[1]);
  }
}

// Sums of one more part of the same rows; `best` is the maximum of all.
template <typename L>
__device__ __forceinline__ void add_part(const Sums<L>& sums, const float (&shift)[2],
                                         uint32_t tops, uint32_t from) {
  float x[4];
  load_shared(tops, x);
  const float weight[2] = {exp2_of(x[0] - shift[0]), exp2_of(x[2] - shift[1])};
  sums.sum[0] = fmaf(weight[0], x[1], sums.sum[0]);
  sums.sum[1] = fmaf(weight[1], x[3], sums.sum[1]);
#pragma unroll
  for (int j = 0; j < Sums<L>::kOut; j += 4) {
    load_shared(from + j / 4 * 512, x);
    sums.out[j] = fmaf(weight[0], x[0], sums.out[j]);
    sums.out[j + 1] = fmaf(weight[0], x[1], sums.out[j + 1]);
    sums.out[j + 2] = fmaf(weight[1], x[2], sums.out[j + 2]);
    sums.out[j + 3] = fmaf(weight[1], x[3], sums.out[j + 3]);
  }
}

// Of other parts whose maxima and sums lie from `tops` on, and whose sums of values from `from` on.
template <typename L>
__device__ __forceinline__ void add_parts(const Place<L>& place, const Sums<L>& sums, int others,
                                          uint32_t tops, uint32_t from) {
  tops += place.lane / 4 * 16;
  from += place.lane * 16;
  float best[2] = {sums.top[0], sums.top[1]};
#pragma unroll 1
  for (int i = 0; i < others; ++i) {
    float x[4];
    load_shared(tops + i * L::kTopsBytes, x);
    best[0] = fmaxf(best[0], x[0]);
    best[1] = fmaxf(best[1], x[2]);
  }
  // A row has seen no finite score where its best is -inf.
  const float shift[2] = {best[0] == -kInfinity ? 0 : best[0], best[1] == -kInfinity ? 0 : best[1]};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float weight = exp2_of(sums.top[r] - shift[r]);
    sums.sum[r] *= weight;
    sums.top[r] = best[r];
#pragma unroll
    for (int j = 0; j < Sums<L>::kOut; j += 4) {
      sums.out[j + 2 * r] *= weight;
      sums.out[j + 2 * r + 1] *= weight;
    }
  }
#pragma unroll 1
  for (int i = 0; i < others; ++i) {
    add_part(sums, shift, tops + i * L::kTopsBytes, from + i * L::kSumsBytes);
  }
}

// The warp's rows of all parts, into its own.
template <typename L>
__device__ __forceinline__ void receive(const Task<L>& task, const Merge& merge,
                                        const Place<L>& place, const Sums<L>& sums) {
  const int others = merge.parts - 1;
  const int slot = merge.place(place.warp, L::kWarps, merge.own, merge.own ? 0 : 1);
  const uint32_t barrier = task.barriers.parts(place.warp);
  if (place.lane == 0) barrier_expect(barrier, others * (L::kSumsBytes + L::kTopsBytes));
  barrier_wait(barrier, 0);
  add_parts(place, sums, others, task.memory + L::kTops + slot * L::kTopsBytes,
            task.memory + L::kSums + slot * L::kSumsBytes);
}

// Where two warpgroups have the same rows, the first adds the sums of the second, which come to
// where the queries were. True for the first.
template <typename L>
__device__ __forceinline__ bool join(const Task<L>& task, const Place<L>& place,
                                     const Sums<L>& sums) {
  const uint32_t tops = task.memory + L::kOtherTops + place.warp * L::kTopsBytes;
  const uint32_t to = task.memory + L::kQ + place.warp * L::kSumsBytes;
  if (place.group == 1) {
#pragma unroll
    for (int i = 0; i < Sums<L>::kOut; i += 4) {
      store_shared(to + place.lane * 16 + i / 4 * 512,
                   make_uint4(__float_as_uint(sums.out[i]), __float_as_uint(sums.out[i + 1]),
                              __float_as_uint(sums.out[i + 2]), __float_as_uint(sums.out[i + 3])));
    }
    if (place.lane % 4 == 0) {
      store_shared(tops + place.lane * 4,
                   make_uint4(__float_as_uint(sums.top[0]), __float_as_uint(sums.sum[0]),
                              __float_as_uint(sums.top[1]), __float_as_uint(sums.sum[1])));
    }
  }
  named_sync(kSumsThere, L::kConsumerThreads);
  if (place.group == 0) add_parts(place, sums, 1, tops, to);
  // Before other queries come to the same place.
  named_sync(kSumsRead, L::kConsumerThreads);
  return place.group == 0;
}

// lse is [batch, branches, query heads, window]; `value` is to the base 2.
__device__ __forceinline__ void write_lse(const Sm90Arguments& args, int batch, const Row& row,
                                          int first_head, float value) {
  const int64_t heads = static_cast<int64_t>(args.kv_heads) * args.group.value;
  const int64_t slot = static_cast<int64_t>(batch) * args.branches + row.branch;
  args.lse[(slot * heads + first_head + row.head) * args.window + row.column] =
      value * 0.69314718055994531f;
}

// A warp's rows of results, through shared memory, where its rows of Q were.
template <typename L>
__device__ __forceinline__ void write_rows(const Sm90Arguments& args, const Task<L>& task,
                                           const WarpRows& rows, const Place<L>& place,
                                           const Sums<L>& sums) {
  using T = typename L::Element;
  float factor[2];
  bool live[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    live[r] = of_lane(rows.row.visible, place.lane / 4 + 8 * r) > 0;
    factor[r] = reciprocal(sums.sum[r]);
  }
  auto word = [&](int j, int r) {
    const uint32_t x =
        pack<T>(sums.out[4 * j + 2 * r] * factor[r], sums.out[4 * j + 2 * r + 1] * factor[r]);
    return live[r] ? x : 0;
  };
  const int own = rows.row.branch >= 0 ? rows.offset(args.out_stride, task.batch) : -1;
  const Queries<L> staged(task, place);
#pragma unroll
  for (int j = 0; j < L::kPieces; j += 2) {
    store_matrices(staged.address(place.lane % 16, j + place.lane / 16), word(j, 0), word(j, 1),
                   word(j + 1, 0), word(j + 1, 1));
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < Queries<L>::kEach; ++i) {
    const int row = Queries<L>::row_of(i, place.lane), piece = Queries<L>::piece_of(place.lane);
    const int offset = of_lane(own, row);
    const uint4 x = load_shared(staged.address(row, piece));
    if (offset >= 0) {
      *reinterpret_cast<uint4*>(args.out + (static_cast<int64_t>(offset) + piece) * 16) = x;
    }
  }
  // Before the next tile's queries.
  __syncwarp();
  if (args.lse == nullptr) return;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const Row row = rows.of(place.lane / 4 + 8 * r);
    if (place.lane % 4 != 0 || row.branch < 0) continue;
    write_lse(args, task.batch, row, rows.first_head,
              row.visible > 0 ? sums.top[r] + log2f(sums.sum[r]) : -kInfinity);
  }
}

// A warp's rows of a tile without live rows.
template <typename L>
__device__ __forceinline__ void clear_rows(const Sm90Arguments& args, const Task<L>& task,
                                           const WarpRows& rows, int lane) {
  const int own = rows.row.branch >= 0 ? rows.offset(args.out_stride, task.batch) : -1;
#pragma unroll 1
  for (int i = 0; i < Queries<L>::kEach; ++i) {
    const int offset = of_lane(own, Queries<L>::row_of(i, lane));
    if (offset < 0) continue;
    const int64_t piece = static_cast<int64_t>(offset) + Queries<L>::piece_of(lane);
    *reinterpret_cast<uint4*>(args.out + piece * 16) = make_uint4(0, 0, 0, 0);
  }
  if (args.lse != nullptr && lane < 16 && rows.row.branch >= 0) {
    write_lse(args, task.batch, rows.row, rows.first_head, -kInfinity);
  }
}

}  // namespace attention
}  // namespace lopa
