// The products of branch attention on Hopper: a warpgroup and its 64 rows of a tile.
#pragma once

#include "branch_attention/attention_sm90_task.cuh"

namespace lopa {
namespace attention {

// The thread's place in its warpgroup's 64 rows.
template <typename L>
struct Place {
  int group;   // warpgroup of the consumers
  int thread;  // of the warpgroup
  int warp;    // by its 16 rows of the tile
  int lane;

  __device__ Place(int group, int thread)
      : group(group),
        thread(thread),
        warp((L::kSplits ? 0 : group * 4) + thread / 32),
        lane(thread % 32) {}
};

__device__ __forceinline__ uint32_t piece_address(uint32_t tile, int half_bytes, int row,
                                                  int piece) {
  return tile + piece / 8 * half_bytes + row * kHalfBytes + (((piece % 8) ^ (row % 8)) << 4);
}

// A warp's 16 rows of a tile, from `first_row`, known to lanes 0 to 15 and again to 16 to 31.
struct WarpRows {
  Row row;
  int first_head;  // of the group

  // In pieces of 16 bytes.
  __device__ __forceinline__ int offset(const int64_t (&stride)[4], int batch) const {
    const int64_t bytes = batch * stride[0] + row.branch * stride[1] + row.column * stride[2] +
                          (first_head + row.head) * stride[3];
    return static_cast<int>(bytes >> 4);
  }
  __device__ __forceinline__ Row of(int lane) const {
    return Row{of_lane(row.branch, lane), of_lane(row.column, lane), of_lane(row.visible, lane),
               of_lane(row.head, lane)};
  }
};

// A warp's rows of Q, in shared memory: each lane copies 16 bytes of several rows.
template <typename L>
struct Queries {
  static constexpr int kEach = 16 * L::kPieces / 32;

  uint32_t at;  // of the warp's rows
  int lane;

  __device__ __forceinline__ Queries(const Task<L>& task, const Place<L>& place)
      : at(task.memory + L::kQ + place.group * L::kGroupQBytes + place.warp * 16 * kHalfBytes),
        lane(place.lane) {}

  static __device__ __forceinline__ int row_of(int i, int lane) {
    return (i * 32 + lane) / static_cast<unsigned>(L::kPieces);
  }
  static __device__ __forceinline__ int piece_of(int lane) {
    return lane % static_cast<unsigned>(L::kPieces);
  }
  __device__ __forceinline__ uint32_t address(int row, int piece) const {
    return piece_address(at, L::kRows * kHalfBytes, row, piece);
  }

  // Dead rows are 0.
  __device__ __forceinline__ void copy(const Sm90Arguments& args, int batch, const WarpRows& rows,
                                       bool live) const {
    const int own = live ? rows.offset(args.q_stride, batch) : -1;
    const char* from = args.q + piece_of(lane) * 16;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int row = row_of(i, lane);
      const int offset = of_lane(own, row);
      copy_piece(address(row, piece_of(lane)), from + static_cast<int64_t>(most(offset, 0)) * 16,
                 offset < 0 ? 0 : 16);
    }
  }

  // Until they are there, with the sign of the scale.
  __device__ __forceinline__ void await(const Sm90Arguments& args) const {
    copies_wait();
    if (args.q_and == ~0u && args.q_xor == 0) return;
#pragma unroll 1
    for (int i = 0; i < kEach; ++i) {
      const uint32_t piece = address(row_of(i, lane), piece_of(lane));
      uint4 x = load_shared(piece);
      x.x = x.x & args.q_and ^ args.q_xor;
      x.y = x.y & args.q_and ^ args.q_xor;
      x.z = x.z & args.q_and ^ args.q_xor;
      x.w = x.w & args.q_and ^ args.q_xor;
      store_shared(piece, x);
    }
  }
};

// -inf where a row does not see a key.
template <int kCount>
__device__ __forceinline__ void mask(float (&s)[kCount], const Chunk* chunks, const Row (&rows)[2],
                                     int lane) {
#pragma unroll
  for (int c = 0; c < kCount / 8; ++c) {
    const Chunk chunk = chunks[c];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int limit = limit_of(chunk, rows[r]) - 2 * (lane % 4);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float* x = &s[8 * c + 4 * i + 2 * r];
        if (8 * i >= limit) x[0] = -kInfinity;
        if (8 * i + 1 >= limit) x[1] = -kInfinity;
      }
    }
  }
}

// A row's scores become powers of 2 below its maximum; `decay` is what older sums are multiplied
// by. True where that is not 1.
template <bool kFirst, int kCount>
__device__ __forceinline__ bool softmax(float (&s)[kCount], float (&top)[2], float (&sum)[2],
                                        float (&decay)[2], float scale) {
  bool decays = false;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    // Two chains, for the latency.
    float a = fmaxf(s[2 * r], s[2 * r + 1]), b = fmaxf(s[4 + 2 * r], s[4 + 2 * r + 1]);
#pragma unroll
    for (int j = 8; j < kCount; j += 8) {
      a = fmaxf(a, fmaxf(s[j + 2 * r], s[j + 2 * r + 1]));
      b = fmaxf(b, fmaxf(s[j + 4 + 2 * r], s[j + 4 + 2 * r + 1]));
    }
    float best = fmaxf(a, b);
    best = fmaxf(best, __shfl_xor_sync(~0u, best, 1));
    best = fmaxf(best, __shfl_xor_sync(~0u, best, 2));
    if constexpr (kFirst) {
      top[r] = best;
    } else {
      decay[r] = 1;
      // No difference of two -inf passes.
      if ((best - top[r]) * scale > kSlack) {
        decay[r] = exp2_of((top[r] - best) * scale);
        top[r] = best;
        decays = true;
      }
    }
    const float shift = top[r] == -kInfinity ? 0 : top[r] * scale;
    float x = 0, y = 0;
#pragma unroll
    for (int j = 0; j < kCount; j += 4) {
      s[j + 2 * r] = exp2_of(fmaf(s[j + 2 * r], scale, -shift));
      s[j + 2 * r + 1] = exp2_of(fmaf(s[j + 2 * r + 1], scale, -shift));
      x += s[j + 2 * r];
      y += s[j + 2 * r + 1];
    }
    sum[r] = kFirst ? x + y : fmaf(sum[r], decay[r], x + y);
  }
  return decays;
}

template <typename L>
struct Consumer {
  static constexpr int kOut = L::kHeadDim / 2;
  static constexpr int kQueries = L::kSplits ? L::kHeadDim / 4 : 1;
  using T = typename L::Element;

  const Sm90Arguments& args;
  const Task<L>& task;
  const TileKeys& keys;
  const Place<L>& place;
  Row (&rows)[2];
  float (&out)[kOut];
  float (&top)[2];
  float (&sum)[2];
  uint32_t (&queries)[kQueries];  // where warpgroups share rows: as the products take them
  uint32_t (&probabilities)[L::kGroupKeys / 4];
  const bool isolates;  // the tile's rows see different keys of the windows
  uint32_t& checked;    // parities of the barriers of checked values
  bool keys_ready = false;
  bool values_ready = false;
  uint32_t flags = 0;  // of the tile before

  // The warpgroup's first key of a tile.
  __device__ __forceinline__ int first_key() const { return L::kSplits ? place.group * kUnit : 0; }

  __device__ __forceinline__ void sync_readers() const {
    if constexpr (L::kSplits) {
      named_sync(barrier_of_group(place.group), kWarpgroup);
    } else {
      named_sync(kAllConsumers, L::kConsumerThreads);
    }
  }

  // Values that a warp beside the producers has to see first: those that do not exist become 0
  // there, as 0 times what lies in their place may be NaN.
  __device__ __forceinline__ bool awaits_check(uint32_t tile_flags) const {
    return (tile_flags & kMissing) != 0 || (isolates && (tile_flags & kWindows) != 0);
  }
  __device__ __forceinline__ void await_values(const Turn<L::kStages>& turn) {
    if (!values_ready) barrier_wait(task.barriers.v_full(turn.stage), turn.parity);
  }
  template <int kCount>
  __device__ __forceinline__ void await_check(uint32_t tile, const Turn<L::kStages>& turn) {
    if (!awaits_check(flags)) return;
    barrier_wait(task.barriers.v_checked(turn.stage), checked >> turn.stage & 1);
    checked ^= 1u << turn.stage;
    if (isolates && (flags & kWindows)) {
      await_values(turn);
      isolate<kCount>(*task.note(tile), turn);
    }
  }

  // A value that is not finite would reach rows that do not see it, as 0 times it is NaN: it is
  // added to the rows that do, and becomes 0.
  template <int kCount>
  __device__ __forceinline__ void isolate(const Note& note, const Turn<L::kStages>& turn) {
    if (note.strange == 0) return;
    const uint32_t v = task.memory + L::kV + turn.stage * L::kTileBytes;
    const int first = first_key();
#pragma unroll 1
    for (int key = first; key < first + kCount; ++key) {
      const Chunk chunk = note.chunks[key / kChunk];
      const bool sees[2] = {key % kChunk < limit_of(chunk, rows[0]),
                            key % kChunk < limit_of(chunk, rows[1])};
#pragma unroll
      for (int j = 0; j < kOut / 4; ++j) {
        const uint32_t word =
            load_shared_word(piece_address(v, kKeys * kHalfBytes, key, j) + place.lane % 4 * 4);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const uint32_t bits = word >> (16 * e) & 0xffff;
          if (finite<T>(bits)) continue;
          const float x = Bits<T>::value(bits);
          if (sees[0]) out[4 * j + e] += x;
          if (sees[1]) out[4 * j + 2 + e] += x;
        }
      }
    }
    sync_readers();
#pragma unroll 1
    for (int i = place.thread; i < kCount * L::kPieces * 4; i += kWarpgroup) {
      const uint32_t address =
          piece_address(v, kKeys * kHalfBytes, first + i / 4 / L::kPieces, i / 4 % L::kPieces) +
          i % 4 * 4;
      uint32_t word = load_shared_word(address);
      if (both_finite<T>(word)) continue;
      if (!finite<T>(word)) word &= 0xffff0000;
      if (!finite<T>(word >> 16)) word &= 0xffff;
      store_shared_word(address, word);
    }
    publish_to_async();
    sync_readers();
  }

  __device__ __forceinline__ uint32_t queries_at() const {
    return uniform(descriptor(task.memory + L::kQ + place.group * kGroupRows * kHalfBytes, 16));
  }
  __device__ __forceinline__ uint32_t keys_at(int stage) const {
    return uniform(
        descriptor(task.memory + L::kK + stage * L::kTileBytes + first_key() * kHalfBytes, 16));
  }
  __device__ __forceinline__ uint32_t values_at(int stage) const {
    return uniform(
        descriptor(task.memory + L::kV + stage * L::kTileBytes + first_key() * kHalfBytes,
                   kKeys * kHalfBytes));
  }

  template <int kCount>
  __device__ __forceinline__ void issue_scores(float (&s)[kCount], uint32_t q, uint32_t k) {
#pragma unroll
    for (int i = 0; i < L::kHeadDim / 16; ++i) {
      const int half = i / 4, inside = i % 4 * 32;
      const uint32_t b = advance(k, half * kKeys * kHalfBytes + inside);
      if constexpr (L::kSplits) {
        const uint32_t* a = &queries[4 * i];
        if (i == 0) {
          scores<true>(T{}, s, a, b);
        } else {
          scores<false>(T{}, s, a, b);
        }
      } else {
        const uint32_t a = advance(q, half * L::kRows * kHalfBytes + inside);
        if (i == 0) {
          scores<true>(T{}, s, a, b);
        } else {
          scores<false>(T{}, s, a, b);
        }
      }
    }
    wgmma_commit();
  }

  template <int kKeysNow>
  __device__ __forceinline__ void issue_values(uint32_t v) {
#pragma unroll
    for (int i = 0; i < kKeysNow / 16; ++i) {
      values(T{}, out, &probabilities[4 * i], advance(v, i * 16 * kHalfBytes));
    }
    wgmma_commit();
  }

  // One tile's scores and probabilities, while the tile before (none where kFirst) is summed.
  template <int kKeysNow, bool kFirst>
  __device__ __forceinline__ void step(uint32_t tile, const Turn<L::kStages>& turn,
                                       const Turn<L::kStages>& before) {
    float s[kKeysNow / 2];
    float decay[2] = {1, 1};
    if (!keys_ready) barrier_wait(task.barriers.k_full(turn.stage), turn.parity);
    if constexpr (!kFirst) await_check<L::kGroupKeys>(tile - 1, before);
    const uint32_t q = L::kSplits ? 0 : queries_at(), k = keys_at(turn.stage);
    const uint32_t v = kFirst ? 0 : values_at(before.stage);
    named_sync(barrier_of_turn(place.group), L::kConsumerThreads);
    pin(out);
    wgmma_fence();
    issue_scores(s, q, k);
    if constexpr (!kFirst) {
      await_values(before);
      wgmma_fence();
      issue_values<L::kGroupKeys>(v);
    }
    named_arrive(barrier_of_turn(1 - place.group), L::kConsumerThreads);
    // Asked for early, as the answer takes its time.
    flags = load_shared_word(task.flags_at(tile));
    wgmma_wait<kFirst ? 0 : 1>();
    pin(s);
    barrier_arrive(task.barriers.k_empty(turn.stage));
    if (flags & kMasked) {
      mask(s, task.note(tile)->chunks + first_key() / kChunk, rows, place.lane);
    }
    const bool decays = softmax<kFirst>(s, top, sum, decay, args.scale_log2);
    pin(s);
    values_ready = barrier_done(task.barriers.v_full(turn.stage), turn.parity);
    Turn<L::kStages> next = turn;
    next.next();
    keys_ready = barrier_done(task.barriers.k_full(next.stage), next.parity);
    if constexpr (!kFirst) {
      wgmma_wait<0>();
      pin(out);
      barrier_arrive(task.barriers.v_empty(before.stage));
      if (__any_sync(~0u, decays)) {
#pragma unroll
        for (int j = 0; j < kOut; j += 4) {
          out[j] *= decay[0];
          out[j + 1] *= decay[0];
          out[j + 2] *= decay[1];
          out[j + 3] *= decay[1];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kKeysNow / 4; ++i) probabilities[i] = pack<T>(s[2 * i], s[2 * i + 1]);
  }

  template <int kKeysNow>
  __device__ __forceinline__ void last(uint32_t tile, const Turn<L::kStages>& turn) {
    await_check<kKeysNow>(tile, turn);
    await_values(turn);
    const uint32_t v = values_at(turn.stage);
    pin(out);
    wgmma_fence();
    issue_values<kKeysNow>(v);
    wgmma_wait<0>();
    pin(out);
    barrier_arrive(task.barriers.v_empty(turn.stage));
  }

  // A tile of which the warpgroup has no keys.
  __device__ __forceinline__ void pass(uint32_t tile, const Turn<L::kStages>& turn) {
    named_sync(barrier_of_turn(place.group), L::kConsumerThreads);
    named_arrive(barrier_of_turn(1 - place.group), L::kConsumerThreads);
    barrier_wait(task.barriers.k_full(turn.stage), turn.parity);
    flags = load_shared_word(task.flags_at(tile));
    if (awaits_check(flags)) {
      barrier_wait(task.barriers.v_checked(turn.stage), checked >> turn.stage & 1);
      checked ^= 1u << turn.stage;
    }
    barrier_wait(task.barriers.v_full(turn.stage), turn.parity);
    barrier_arrive(task.barriers.k_empty(turn.stage));
    barrier_arrive(task.barriers.v_empty(turn.stage));
  }

  // `tile` and `turn`: of the first tile, and then of the first of what follows.
  __device__ __forceinline__ void run(uint32_t* tile, Turn<L::kStages>* turn) {
    Turn<L::kStages> before;
    // Where warpgroups share rows, the first has the keys of a tile of one unit.
    const bool tail = keys.has_tail() && (!L::kSplits || place.group == 0);
    step<L::kGroupKeys, true>(*tile, *turn, before);
#pragma unroll 1
    for (int rest = keys.full_tiles() - 1 + (L::kSplits && tail); rest > 0; --rest) {
      before = *turn;
      turn->next();
      step<L::kGroupKeys, false>(++*tile, *turn, before);
    }
    if constexpr (L::kSplits) {
      last<L::kGroupKeys>(*tile, *turn);
      if (keys.has_tail() && !tail) {
        turn->next();
        pass(++*tile, *turn);
      }
    } else if (tail) {
      before = *turn;
      turn->next();
      step<kUnit, false>(++*tile, *turn, before);
      last<kUnit>(*tile, *turn);
    } else {
      last<L::kGroupKeys>(*tile, *turn);
    }
    turn->next();
    ++*tile;
  }
};

}  // namespace attention
}  // namespace lopa
