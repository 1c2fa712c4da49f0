// Branch attention on Hopper: the copy engine fills rings of K and V tiles for one warp, and
// warpgroups of 64 rows each multiply on the tensor cores.
//
// A cluster has a few tiles of rows (attention_work.h), and its CTAs equal runs of their keys. What
// several CTAs have of one tile they send to each other's shared memory and merge in a fixed order.
// Scores of a tile are formed while the values of the tile before are summed, and the softmax of
// one warpgroup runs beside the products of another (Shah et al., FlashAttention-3, arXiv
// 2407.08608).
//
// Every warp finds out for itself what there is to do, from lengths that its lanes read: nothing
// stands between the start of a kernel and its first product that need not.
#pragma once

#include "branch_attention/attention_sm90_consumer.cuh"
#include "branch_attention/attention_sm90_output.cuh"
#include "branch_attention/attention_sm90_task.cuh"
#include "lopa/cuda.cuh"

namespace lopa {
namespace attention {

// The boxes of a tile of the prefix, by one lane.
template <typename L, bool kValues>
__device__ __forceinline__ void load_prefix(const Sm90Arguments& args, const Task<L>& task,
                                            uint32_t barrier, int stage, int position, int head) {
  const CUtensorMap* map = kValues ? &args.v_prefix : &args.k_prefix;
  const uint32_t to = task.memory + (kValues ? L::kV : L::kK) + stage * L::kTileBytes;
  barrier_expect(barrier, L::kTileBytes);
#pragma unroll
  for (int i = 0; i < 2 * L::kHalves; ++i) {
    const int unit = i / L::kHalves, half = i % L::kHalves;
    load_box(to + half * kKeys * kHalfBytes + unit * kUnit * kHalfBytes, map, barrier, half * kHalf,
             position + unit * kUnit, head, task.batch);
  }
}

// Keys (or values) by one warp. A lane has one chunk of a tile and one half of head_dim.
template <typename L, bool kValues>
__device__ __forceinline__ void produce(const Sm90Arguments& args, const Task<L>& task,
                                        const Plan<L>& plan, int lane) {
  const int until = plan.runs.end(task.rank);
  int from = plan.runs.begin(task.rank);
  const int c = lane / L::kHalves, half = lane % L::kHalves;
  const int32_t* table =
      args.block_table == nullptr
          ? nullptr
          : args.block_table + static_cast<int64_t>(task.batch) * args.table_width;
  Part<L> part{};
  int done = 0;  // units of the part
  Turn<L::kStages> turn;
  if (task.vain) turn.next();
#pragma unroll 1
  for (uint32_t tile = task.vain; from < until; ++tile, turn.next()) {
    if (done == part.keys.units()) {
      part.set_tile(args, task, tile_at<L>(plan.tiles, from));
      part.set_keys(task, plan.tiles, from, until);
      done = 0;
    }
    // A single unit is a tile of its own after others, and half of one where it is all there is.
    const int rest = part.keys.units() - done;
    const int units = rest == 1 && done > 0 ? 1 : 2;
    const int begin = part.keys.begin + done;
    done += least(units, rest);
    from += least(units, rest);
    const uint32_t full =
        kValues ? task.barriers.v_full(turn.stage) : task.barriers.k_full(turn.stage);
    const uint32_t empty =
        kValues ? task.barriers.v_empty(turn.stage) : task.barriers.k_empty(turn.stage);
    if (rest >= 2 && (begin + 2) * kUnit <= task.cache_len && table == nullptr &&
        args.prefix_rows == kUnit) {
      if (lane == 0 && !(task.ahead && tile == 0)) {
        barrier_wait(empty, turn.parity ^ 1);
        // Whoever had this note is done with it: the keys of a later tile have been let go.
        if constexpr (!kValues) task.note(tile)->flags = 0;
        load_prefix<L, kValues>(args, task, full, turn.stage, begin * kUnit, part.head);
      }
      __syncwarp();
      continue;
    }
    const int unit = c / kChunksPerUnit, piece = c % kChunksPerUnit;
    const bool active = c < units * kChunksPerUnit;
    Chunk chunk =
        chunk_of(part.keys, plan.branches, task.cache_len, begin + unit, piece, begin + units);
    const bool prefix = chunk.branch == kPrefix;
    int x1 = chunk.position, x3 = task.batch;
    if (prefix && table != nullptr && chunk.valid > 0) {
      x1 = chunk.position & ((1 << args.page_shift) - 1);
      x3 = table[chunk.position >> args.page_shift];
      if (static_cast<uint32_t>(x3) >= static_cast<uint32_t>(args.pages)) chunk.valid = 0;
    }
    const bool loads =
        active && chunk.valid > 0 && (!prefix || (chunk.position & (args.prefix_box - 1)) == 0);
    const int rows = __popc(__ballot_sync(~0u, loads && prefix)) * args.prefix_rows +
                     __popc(__ballot_sync(~0u, loads && !prefix)) * args.window_rows;
    if constexpr (!kValues) {
      const bool whole = prefix && chunk.valid == kChunk;
      const uint32_t masked = __ballot_sync(~0u, active && !whole);
      const uint32_t missing = __ballot_sync(~0u, active && chunk.valid < kChunk);
      const uint32_t windows = __ballot_sync(~0u, active && chunk.branch >= 0);
      barrier_wait(empty, turn.parity ^ 1);
      Note* note = task.note(tile);
      if (active && half == 0) note->chunks[c] = chunk;
      if (lane == 0) {
        note->flags = (masked ? kMasked : 0) | (missing ? kMissing : 0) | (windows ? kWindows : 0);
      }
      __syncwarp();
    } else {
      barrier_wait(empty, turn.parity ^ 1);
    }
    if (lane == 0) barrier_expect(full, rows * kHalfBytes);
    __syncwarp();
    if (loads) {
      const uint32_t at = task.memory + (kValues ? L::kV : L::kK) + turn.stage * L::kTileBytes +
                          half * kKeys * kHalfBytes + c * kChunk * kHalfBytes;
      if (prefix) {
        load_box(at, kValues ? &args.v_prefix : &args.k_prefix, full, half * kHalf, x1, part.head,
                 x3);
      } else {
        load_box(at, kValues ? &args.v_window : &args.k_window, full, half * kHalf, x1, part.head,
                 chunk.branch, task.batch);
      }
    }
  }
}

// By one warp: values that do not exist become 0, as a probability of 0 times what lies in their
// place may be NaN; and it looks for values that are not finite where rows of a tile see different
// keys. Whoever multiplies waits for it where a tile has any of the two.
template <typename L>
__device__ __forceinline__ void check_values(const Sm90Arguments& args, const Task<L>& task,
                                             const Plan<L>& plan, int lane) {
  const int until = plan.runs.end(task.rank);
  Turn<L::kStages> turn;
  uint32_t tile = task.vain;
  if (task.vain) {
    barrier_wait(task.barriers.v_full(0), 0);
    barrier_arrive(task.barriers.v_empty(0));
    turn.next();
  }
#pragma unroll 1
  for (int from = plan.runs.begin(task.rank); from < until;) {
    Part<L> part;
    part.set_tile(args, task, tile_at<L>(plan.tiles, from));
    part.set_keys(task, plan.tiles, from, until);
    from += part.keys.units();
    const bool isolates =
        part.keys.first_branch != part.keys.last_branch || args.prompt_len != nullptr;
#pragma unroll 1
    for (int done = 0; done < part.keys.units(); ++tile, turn.next()) {
      const int units = part.keys.units() - done == 1 && done > 0 ? 1 : 2;
      const int begin = part.keys.begin + done;
      done += units;
      // All of them, in step with the consumers: the producer waits for this warp too, or a phase
      // of the barrier could pass unseen and the next of its parity be taken for it.
      barrier_wait(task.barriers.v_empty(turn.stage), turn.parity ^ 1);
      barrier_wait(task.barriers.v_full(turn.stage), turn.parity);
      const bool last = begin + units > part.keys.end;
      if ((begin + units) * kUnit <= task.cache_len && !last && args.block_table == nullptr) {
        barrier_arrive(task.barriers.v_empty(turn.stage));
        continue;
      }
      // As the producers have them; lanes 0 to 7 and again.
      const int c = lane % kChunks;
      Chunk chunk = chunk_of(part.keys, plan.branches, task.cache_len, begin + c / kChunksPerUnit,
                             c % kChunksPerUnit, begin + units);
      if (chunk.branch == kPrefix && args.block_table != nullptr && chunk.valid > 0) {
        const int page = args.block_table[static_cast<int64_t>(task.batch) * args.table_width +
                                          (chunk.position >> args.page_shift)];
        if (static_cast<uint32_t>(page) >= static_cast<uint32_t>(args.pages)) chunk.valid = 0;
      }
      const bool active = c < units * kChunksPerUnit;
      const uint32_t missing = __ballot_sync(~0u, active && chunk.valid < kChunk);
      const uint32_t windows = __ballot_sync(~0u, active && chunk.branch >= 0);
      const bool looks = isolates && windows != 0;
      const uint32_t v = task.memory + L::kV + turn.stage * L::kTileBytes;
      if (missing != 0) {
#pragma unroll 1
        for (int i = 0; i < units * kChunksPerUnit; ++i) {
          if ((missing >> i & 1) == 0) continue;
          const int valid = of_lane(chunk.valid, i);
#pragma unroll 1
          for (int j = valid * L::kPieces + lane; j < kChunk * L::kPieces; j += 32) {
            store_shared(
                piece_address(v, kKeys * kHalfBytes, i * kChunk + j / L::kPieces, j % L::kPieces),
                make_uint4(0, 0, 0, 0));
          }
        }
        __syncwarp();
      }
      bool any = false;
      if (looks) {
        Strange<typename L::Element> strange;
#pragma unroll 1
        for (int half = 0; half < L::kHalves; ++half) {
#pragma unroll 8
          for (int i = 0; i < units * kUnit * kHalfBytes; i += 512) {
            const uint4 x = load_shared(v + half * kKeys * kHalfBytes + lane * 16 + i);
            strange.add(x.x);
            strange.add(x.y);
            strange.add(x.z);
            strange.add(x.w);
          }
        }
        any = __any_sync(~0u, strange.any());
      }
      publish_to_async();
      if (lane == 0) task.note(tile)->strange = any;
      if (missing != 0 || looks) barrier_arrive(task.barriers.v_checked(turn.stage));
      barrier_arrive(task.barriers.v_empty(turn.stage));
    }
  }
}

template <typename L>
__device__ __forceinline__ WarpRows warp_rows(const Sm90Arguments& args, const Task<L>& task,
                                              const Branches& branches, const Blocks& blocks,
                                              const Part<L>& part, int warp, int lane) {
  return WarpRows{row_at(branches, blocks, args.group, part.first_row + warp * 16 + lane % 16),
                  part.head * static_cast<int>(args.group.value)};
}

// The same where every branch has its whole window, of which nothing is known yet.
template <typename L>
__device__ __forceinline__ WarpRows whole_rows(const Sm90Arguments& args, const Part<L>& part,
                                               int warp, int lane) {
  const int row = part.first_row + warp * 16 + lane % 16;
  const int column = quotient(row, args.group);
  const int branch = quotient(column, args.by_window);
  return WarpRows{Row{branch < args.branches ? branch : kNoBranch, column - branch * args.window, 0,
                      row - column * static_cast<int>(args.group.value)},
                  part.head * static_cast<int>(args.group.value)};
}

// Results of the cluster's tiles of `dead`, which have no live rows.
template <typename L>
__device__ __forceinline__ void clear_tiles(const Sm90Arguments& args, const Task<L>& task,
                                            uint32_t dead, const Place<L>& place) {
  const Branches branches(args.branches, args.window, length_of_lane(args, task.batch, place.lane),
                          place.lane);
#pragma unroll 1
  for (int i = task.rank; i < task.tiles; i += 1 << args.ctas_log2) {
    if ((dead >> i & 1) == 0) continue;
    Part<L> part;
    part.set_tile(args, task, i);
    clear_rows(args, task, warp_rows(args, task, branches, Blocks{}, part, place.warp, place.lane),
               place.lane);
  }
}

// A warp of the consumers. What it needs of the sequence is found out again for each further tile,
// as registers are few in between. `asked`: the queries of the first tile are on their way, as far
// as every branch has its whole window.
template <typename L>
__device__ __forceinline__ void consume(const Sm90Arguments& args, const Task<L>& task,
                                        const Blocks& blocks, const Plan<L>& plan, bool asked,
                                        int group, int thread) {
  // The first turn is the first warpgroup's.
  if (group == 1) named_arrive(barrier_of_turn(0), L::kConsumerThreads);
  const auto runs = plan.runs;
  int from = runs.begin(task.rank);
  const int until = runs.end(task.rank);
  const uint32_t dead = __ballot_sync(~0u, thread % 32 < task.tiles && plan.tiles.units == 0);
  uint32_t checked = 0;
  uint32_t tile = task.vain;
  Turn<L::kStages> turn;
  if (task.vain) {
    barrier_wait(task.barriers.k_full(0), 0);
    barrier_wait(task.barriers.v_full(0), 0);
    barrier_arrive(task.barriers.k_empty(0));
    barrier_arrive(task.barriers.v_empty(0));
    turn.next();
  }
  Part<L> part;
  WarpRows own;
  auto begin = [&](const Branches& branches, const Tiles& tiles, bool copies) {
    const Place<L> place(group, anew(thread));
    part.set_tile(args, task, tile_at<L>(tiles, from));
    own = warp_rows(args, task, branches, blocks, part, place.warp, place.lane);
    if (copies) {
      // After copies of the same place that turn out to be of other rows.
      copies_wait();
      Queries<L>(task, place).copy(args, task.batch, own, own.row.visible > 0);
    }
    part.set_keys(task, tiles, from, until);
    from += part.keys.units();
  };
  bool more = from < until;
  if (more) {
    begin(plan.branches, plan.tiles, !asked || !plan.branches.whole());
  } else {
    copies_wait();
  }
#pragma unroll 1
  while (more) {
    const Place<L> place(group, anew(thread));
    const Queries<L> queries(task, place);
    queries.await(args);
    uint32_t operand[Consumer<L>::kQueries];
    if constexpr (L::kSplits) {
      __syncwarp();
#pragma unroll
      for (int i = 0; i < L::kPieces / 2; ++i) {
        load_matrices(queries.address(place.lane % 16, 2 * i + place.lane / 16), &operand[4 * i]);
      }
      named_sync(kQueriesRead, L::kConsumerThreads);
    } else {
      publish_to_async();
      named_sync(barrier_of_group(group), kWarpgroup);
    }
    Row rows[2] = {own.of(place.lane / 4), own.of(place.lane / 4 + 8)};

    float out[L::kHeadDim / 2] = {};
    float top[2] = {-kInfinity, -kInfinity};
    float sum[2] = {0, 0};
    {
      uint32_t probabilities[L::kGroupKeys / 4];
      const bool isolates = part.keys.first_branch != part.keys.last_branch || blocks.causal;
      Consumer<L>{args,    task,          part.keys, Place<L>(group, anew(thread)),
                  rows,    out,           top,       sum,
                  operand, probabilities, isolates,  checked}
          .run(&tile, &turn);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
      sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
      // Of scaled scores from here on; 0 times a score is no number where that is infinite.
      top[r] = top[r] == -kInfinity ? top[r] : top[r] * args.scale_log2;
    }
    const Sums<L> sums{out, top, sum};
    const Place<L> after(group, anew(thread));
    bool writes = true;
    if constexpr (L::kSplits) {
      writes = join(task, after, sums);
    } else {
      // The other warps' products do not need the queries any more.
      named_sync(barrier_of_group(group), kWarpgroup);
    }
    if constexpr (L::kCluster) {
      if (writes && !part.whole()) {
        const Merge merge(task, runs, part, after.lane);
        writes = merge.member_of(after.warp, L::kWarps) == merge.own;
        if (writes) {
          receive(task, merge, after, sums);
        } else {
          send(task, merge, after, sums);
        }
      }
    }
    if (writes) write_rows(args, task, own, after, sums);
    if constexpr (!L::kCluster) break;
    more = from < until;
    if (more) {
      const Branches branches(args.branches, args.window,
                              length_of_lane(args, task.batch, after.lane), after.lane);
      begin(branches, tiles_of_task(args, task, branches, after.lane), true);
    }
  }
  // Where two warpgroups share rows, one writes.
  if (dead != 0 && (!L::kSplits || group == 0)) {
    clear_tiles(args, task, dead, Place<L>(group, anew(thread)));
  }
}

template <typename L>
__global__ void __launch_bounds__(L::kThreads, 1)
    attention_sm90_kernel(const __grid_constant__ Sm90Arguments args) {
// Nobody launches what is compiled for other architectures.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  Task<L> task;
  task.pointer = dynamic_shared();
  task.memory = shared_address(task.pointer);
  task.barriers.base = task.memory + L::kBarriers;
  // The same in all lanes, which the compiler cannot know of threadIdx.x.
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0);
  const int lane = threadIdx.x % 32;

  if (threadIdx.x == 0) {
    require(task.memory % 1024 == 0);
#pragma unroll
    for (int stage = 0; stage < L::kStages; ++stage) {
      barrier_init(task.barriers.k_full(stage), 1);
      barrier_init(task.barriers.v_full(stage), 1);
      barrier_init(task.barriers.v_checked(stage), 32);
      barrier_init(task.barriers.k_empty(stage), L::kConsumerThreads);
      barrier_init(task.barriers.v_empty(stage), L::kConsumerThreads + 32);
    }
#pragma unroll
    for (int i = 0; i < L::kWarps; ++i) barrier_init(task.barriers.parts(i), 1);
    barrier_inits_done();
    prefetch_map(&args.k_prefix);
    prefetch_map(&args.v_prefix);
    prefetch_map(&args.k_window);
    prefetch_map(&args.v_window);
  }
  __syncthreads();
  const int cta = static_cast<int>(blockIdx.x);
  int cluster = cta;
  if constexpr (L::kCluster) {
    cluster_arrive();
    cluster = cta >> args.ctas_log2;
  }
  task.rank = cta - (cluster << args.ctas_log2);
  task.batch = blockIdx.y;
  task.first_tile = cluster * args.shared;
  task.tiles = least(args.shared, args.of_sequence - task.first_tile);
  Part<L> part;
  part.set_tile(args, task, 0);
  const bool asked = !L::kCluster || args.shared == 1;
  const int group = warp / 4 - 1, thread = static_cast<int>(threadIdx.x) % kWarpgroup;
  const Place<L> place(group, thread);
  const WarpRows own = whole_rows(args, part, place.warp, lane);
  wait_for_predecessor();
  release_successor();
  const int length = length_of_lane(args, task.batch, lane);
  task.cache_len = args.cache_len[task.batch];
  const int prompt_len = args.prompt_len == nullptr ? 0 : args.prompt_len[task.batch];
  // Where there is no choice, queries, keys and values are asked for before the lengths are there.
  if (warp >= 4) {
    if (asked) Queries<L>(task, place).copy(args, task.batch, own, own.row.branch >= 0);
  } else if (args.ahead && lane == 0) {
    if (warp == 0) {
      task.note(0)->flags = 0;
      load_prefix<L, false>(args, task, task.barriers.k_full(0), 0, 0, part.head);
    }
    if (warp == 1) load_prefix<L, true>(args, task, task.barriers.v_full(0), 0, 0, part.head);
  }
  __syncwarp();
  // The barriers of the other CTAs are there; it costs nothing beside the loads.
  if constexpr (L::kCluster) cluster_wait();
  task.cache_len = clamp(task.cache_len, 0, args.capacity);
  const Branches branches(args.branches, args.window, length, lane);
  const Tiles tiles = tiles_of_task(args, task, branches, lane);
  const auto runs = [&] {
    if constexpr (L::kCluster) {
      return ClusterRuns(tiles, task.tiles > 1, args.ctas_log2);
    } else {
      return OneRun(tiles);
    }
  }();
  const Plan<L> plan{branches, tiles, runs};
  task.ahead = args.ahead && task.cache_len >= kKeys &&
               plan.runs.begin(task.rank) < plan.runs.end(task.rank);
  task.vain = args.ahead && !task.ahead;

  if (warp < 4) {
    give_registers<L::kProducerRegisters>();
    if (warp == 0) produce<L, false>(args, task, plan, lane);
    if (warp == 1) produce<L, true>(args, task, plan, lane);
    if (warp == 2) check_values(args, task, plan, lane);
  } else {
    take_registers<L::kConsumerRegisters>();
    const Blocks blocks{args.prompt_len != nullptr, args.block_size,
                        clamp(prompt_len, 0, 1 << 30) - task.cache_len};
    consume(args, task, blocks, plan, asked, group, thread);
  }
#endif
}

}  // namespace attention
}  // namespace lopa
