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

// Keys (or values) by one warp. A lane has one chunk of a tile and one half of head_dim.
template <typename L, bool kValues>
__device__ __forceinline__ void produce(const Sm90Arguments& args, const Task<L>& task, int length,
                                        int lane) {
  const int c = lane / L::kHalves, half = lane % L::kHalves;
  const int32_t* table =
      args.block_table == nullptr
          ? nullptr
          : args.block_table + static_cast<int64_t>(task.batch) * args.table_width;
  const CUtensorMap* prefix_map = kValues ? &args.v_prefix : &args.k_prefix;
  const CUtensorMap* window_map = kValues ? &args.v_window : &args.k_window;
  const uint32_t to =
      task.memory + (kValues ? L::kV : L::kK) + half * kKeys * kHalfBytes + c * kChunk * kHalfBytes;
  Part<L> part{};
  part.set_tile(args, task, 0);
  // Where there is no choice, the first keys are asked for before it is known who will see them.
  const bool ahead = task.tiles == 1 && args.ctas_log2 == 0 && table == nullptr &&
                     task.cache_len >= kKeys && args.prefix_rows == kUnit;
  if (ahead) {
    const uint32_t full = kValues ? task.barriers.v_full(0) : task.barriers.k_full(0);
    if (lane == 0) {
      if constexpr (!kValues) task.note(0)->flags = 0;
      barrier_expect(full, L::kTileBytes);
    }
    __syncwarp();
    if (c % kChunksPerUnit == 0 && c < kChunks) {
      load_box(to, prefix_map, full, half * kHalf, c * kChunk, part.head, task.batch);
    }
  }
  const Branches branches(args.branches, args.window, length, lane);
  const Tiles tiles = tiles_of_cluster(args, task, branches, lane);
  const Runs runs(tiles, task.tiles > 1, args.ctas_log2);
  const int until = runs.end(task.rank);
  int from = runs.begin(task.rank);
  // Nobody leaves before what it has asked for is there.
  if (ahead && from >= until) {
    barrier_wait(kValues ? task.barriers.v_full(0) : task.barriers.k_full(0), 0);
  }
  int done = 0;  // units of the part
  Turn<L::kStages> turn;
#pragma unroll 1
  for (uint32_t tile = 0; from < until; ++tile, turn.next()) {
    if (done == part.keys.units()) {
      part.set_tile(args, task, tile_at(tiles, from));
      part.set_keys(task, tiles, from, until);
      done = 0;
    }
    // A single unit is a tile of its own after others, and half of one where it is all there is.
    const int rest = part.keys.units() - done;
    const int units = rest == 1 && done > 0 ? 1 : 2;
    const int unit = c / kChunksPerUnit, piece = c % kChunksPerUnit;
    const bool active = c < units * kChunksPerUnit;
    const int begin = part.keys.begin + done;
    Chunk chunk = chunk_of(part.keys, branches, task.cache_len, begin + unit, piece, begin + units);
    done += least(units, rest);
    from += least(units, rest);
    if (ahead && tile == 0) continue;
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
    const uint32_t full =
        kValues ? task.barriers.v_full(turn.stage) : task.barriers.k_full(turn.stage);
    const uint32_t empty =
        kValues ? task.barriers.v_empty(turn.stage) : task.barriers.k_empty(turn.stage);
    if constexpr (!kValues) {
      const bool whole = prefix && chunk.valid == kChunk;
      const uint32_t masked = __ballot_sync(~0u, active && !whole);
      const uint32_t missing = __ballot_sync(~0u, active && chunk.valid < kChunk);
      const uint32_t windows = __ballot_sync(~0u, active && chunk.branch >= 0);
      barrier_wait(empty, turn.parity ^ 1);
      // Whoever had this note is done with it: the keys of a later tile have been let go.
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
      const uint32_t at = to + turn.stage * L::kTileBytes;
      if (prefix) {
        load_box(at, prefix_map, full, half * kHalf, x1, part.head, x3);
      } else {
        load_box(at, window_map, full, half * kHalf, x1, part.head, chunk.branch, task.batch);
      }
    }
  }
}

// By one warp: looks for values that are not finite where rows of a tile see different keys.
template <typename L>
__device__ __forceinline__ void check_values(const Sm90Arguments& args, const Task<L>& task,
                                             int length, int lane) {
  const Branches branches(args.branches, args.window, length, lane);
  const Tiles tiles = tiles_of_cluster(args, task, branches, lane);
  const Runs runs(tiles, task.tiles > 1, args.ctas_log2);
  const int until = runs.end(task.rank);
  Turn<L::kStages> turn;
  uint32_t tile = 0;
#pragma unroll 1
  for (int from = runs.begin(task.rank); from < until;) {
    Part<L> part;
    part.set_tile(args, task, tile_at(tiles, from));
    part.set_keys(task, tiles, from, until);
    from += part.keys.units();
    const bool isolates =
        part.keys.first_branch != part.keys.last_branch || args.prompt_len != nullptr;
#pragma unroll 1
    for (int done = 0; done < part.keys.units(); ++tile, turn.next()) {
      const int units = part.keys.units() - done == 1 && done > 0 ? 1 : 2;
      done += units;
      // All of them, in step with the consumers: the producer waits for this warp too, or a phase
      // of the barrier could pass unseen and the next of its parity be taken for it.
      barrier_wait(task.barriers.v_full(turn.stage), turn.parity);
      const int end = least(part.keys.begin + done, part.keys.end);
      if (!isolates || end <= part.keys.prefix_units) {
        if (lane == 0) barrier_arrive(task.barriers.v_empty(turn.stage));
        continue;
      }
      const uint32_t v = task.memory + L::kV + turn.stage * L::kTileBytes + lane * 16;
      Strange<typename L::Element> strange;
#pragma unroll 1
      for (int half = 0; half < L::kHalves; ++half) {
#pragma unroll 8
        for (int i = 0; i < units * kUnit * kHalfBytes; i += 512) {
          const uint4 x = load_shared(v + half * kKeys * kHalfBytes + i);
          strange.add(x.x);
          strange.add(x.y);
          strange.add(x.z);
          strange.add(x.w);
        }
      }
      const bool any = __any_sync(~0u, strange.any());
      __syncwarp();
      if (lane == 0) {
        task.note(tile)->strange = any;
        barrier_arrive(task.barriers.v_checked(turn.stage));
        barrier_arrive(task.barriers.v_empty(turn.stage));
      }
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

// Results of the cluster's tiles of `dead`, which have no live rows.
template <typename L>
__device__ __forceinline__ void clear_tiles(const Sm90Arguments& args, const Task<L>& task,
                                            uint32_t dead, const Place& place) {
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

// A warp of the consumers, with what it needs of the sequence for as long as it needs it: lengths
// are read again for each tile, as registers are few in between.
template <typename L>
__device__ __forceinline__ void consume(const Sm90Arguments& args, const Task<L>& task,
                                        const Blocks& blocks, int length, int group, int thread) {
  if (Consumer<L>::kTurns && group == L::kConsumers - 1) {
    named_arrive(barrier_of_turn(0), 2 * kWarpgroup);
  }
  const bool several = task.tiles > 1;
  Runs runs{0, 0};
  int from = 0, until = 1;
  uint32_t dead = 0;  // tiles
  uint32_t checked = 0;
  uint32_t tile = 0;
  Turn<L::kStages> turn;
  bool planned = false;
#pragma unroll 1
  while (from < until) {
    const Place place(group, anew(thread));
    Part<L> part;
    if (planned) length = length_of_lane(args, task.batch, place.lane);
    const Branches branches(args.branches, args.window, length, place.lane);
    Tiles tiles{};
    int number = 0;
    auto plan = [&] {
      tiles = tiles_of_cluster(args, task, branches, place.lane);
      if (planned) return;
      planned = true;
      runs = Runs(tiles, several, args.ctas_log2);
      from = runs.begin(task.rank);
      until = runs.end(task.rank);
      dead = __ballot_sync(~0u, place.lane < task.tiles && tiles.units == 0);
    };
    if (several) {
      plan();
      if (from >= until) break;
      number = tile_at(tiles, from);
    }
    part.set_tile(args, task, number);
    const WarpRows own = warp_rows(args, task, branches, blocks, part, place.warp, place.lane);
    {
      Queries<L> queries;
      queries.load(args, task.batch, own, place.lane);
      // Where there is no choice of tiles, what there is to do is found out while the queries are
      // on their way.
      if (!several) {
        plan();
        if (from >= until) break;
      }
      part.set_keys(task, tiles, from, until);
      from += part.keys.units();
      queries.store(args, task.memory, place.warp * 16, place.lane);
    }
    publish_to_async();
    Row rows[2] = {own.of(place.lane / 4), own.of(place.lane / 4 + 8)};
    named_sync(barrier_of_group(group), kWarpgroup);

    float out[L::kHeadDim / 2] = {};
    float top[2] = {-kInfinity, -kInfinity};
    float sum[2] = {0, 0};
    {
      uint32_t probabilities[kKeys / 4];
      const bool isolates = part.keys.first_branch != part.keys.last_branch || blocks.causal;
      Consumer<L>{args,          task,     part.keys, Place(group, anew(thread)),
                  rows,          out,      top,       sum,
                  probabilities, isolates, checked}
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
    const Place after(group, anew(thread));
    // The other warps' products do not need the queries any more.
    named_sync(barrier_of_group(group), kWarpgroup);
    bool writes = true;
    if (!part.whole()) {
      const Merge merge(task, runs, part, after.lane);
      writes = merge.member_of(after.warp, L::kWarps) == merge.own;
      if (writes) {
        receive(task, merge, after, sums);
      } else {
        send(task, merge, after, sums);
      }
    }
    if (writes) write_rows(args, task, own, after, sums);
  }
  if (dead != 0) clear_tiles(args, task, dead, Place(group, anew(thread)));
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
      barrier_init(task.barriers.v_checked(stage), 1);
      barrier_init(task.barriers.k_empty(stage), 4 * L::kConsumers);
      barrier_init(task.barriers.v_empty(stage), 4 * L::kConsumers + 1);
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
  if (args.ctas_log2 > 0) cluster_arrive();
  const int cluster = blockIdx.x >> args.ctas_log2;
  task.rank = blockIdx.x - (cluster << args.ctas_log2);
  task.batch = blockIdx.y;
  task.first_tile = cluster * args.shared;
  task.tiles = least(args.shared, args.of_sequence - task.first_tile);
  wait_for_predecessor();
  release_successor();
  task.cache_len = args.cache_len[task.batch];
  const int prompt_len = args.prompt_len == nullptr ? 0 : args.prompt_len[task.batch];
  const int length = length_of_lane(args, task.batch, lane);
  // The barriers of the other CTAs are there; it costs nothing beside the loads.
  if (args.ctas_log2 > 0) cluster_wait();
  task.cache_len = clamp(task.cache_len, 0, args.capacity);

  if (warp < 4) {
    give_registers<L::kProducerRegisters>();
    if (warp == 0) produce<L, false>(args, task, length, lane);
    if (warp == 1) produce<L, true>(args, task, length, lane);
    if (warp == 2) check_values(args, task, length, lane);
  } else {
    take_registers<L::kConsumerRegisters>();
    const Blocks blocks{args.prompt_len != nullptr, args.block_size,
                        clamp(prompt_len, 0, 1 << 30) - task.cache_len};
    consume(args, task, blocks, length, warp / 4 - 1, static_cast<int>(threadIdx.x) % kWarpgroup);
  }
#endif
}

}  // namespace attention
}  // namespace lopa
