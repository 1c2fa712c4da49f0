// Attention of packed rows against tiles of keys, with an online softmax; included once by the
// file of each instruction set.
//
// A task's rows are the (branch, column, query head) triples that share a KV head. A tile of keys
// is converted and packed once and then meets every row of the task: the prefix is read once for
// all branches and heads. Both products run through one register block, kRowBlock rows by kPanel
// vectors, whose chain of additions for a row does not depend on the rows beside it; so neither
// the cut into tasks nor the number of threads can change a result.
#pragma once

#include <cmath>

#include "branch_attention/branch_attention_cpu.h"
#include "lopa/simd.h"

namespace lopa {
namespace {

// 6 x 4 accumulators, 4 vectors of B and a broadcast fill 29 of AVX-512's 32 registers; 6 x 2
// leave room in the 16 of AVX2 and SSE.
#if defined(__AVX512F__)
constexpr int kPanel = 4;
#else
constexpr int kPanel = 2;
#endif

constexpr double kLog2E = 1.4426950408889634;
constexpr float kLn2 = 0.6931471805599453f;

template <int M, int N>
inline void multiply_accumulate(Vec (&acc)[M][N], const float* a, int64_t a_stride, const float* b,
                                int64_t b_stride, int64_t depth) {
  for (int64_t p = 0; p < depth; ++p) {
    Vec column[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) column[n] = load(b + p * b_stride + n * Vec::kWidth);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      Vec row = set1(a[m * a_stride + p]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) acc[m][n] = fma(row, column[n], acc[m][n]);
    }
  }
}

// scores[M, N vectors] = q[M, head_dim] k_tile[head_dim, N vectors]
template <int M, int N>
inline void score_panel(const float* q, int64_t head_dim, const float* k_tile, float* scores) {
  Vec acc[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) acc[m][n] = zero();
  }
  multiply_accumulate<M, N>(acc, q, head_dim, k_tile, kKeyTile, head_dim);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) store(scores + m * kKeyTile + n * Vec::kWidth, acc[m][n]);
  }
}

// out[M, N vectors] = decay[M] * out + probabilities[M, keys] v_tile[keys, N vectors]. The tile has
// an accumulator of its own, so that rounding grows with the tiles, not with the keys.
template <int M, int N>
inline void value_panel(const float* probabilities, int64_t keys, const float* v_tile,
                        int64_t stride, const float* decay, float* out) {
  Vec acc[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) acc[m][n] = zero();
  }
  multiply_accumulate<M, N>(acc, probabilities, kKeyTile, v_tile, stride, keys);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    Vec factor = set1(decay[m]);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      float* p = out + m * stride + n * Vec::kWidth;
      store(p, fma(load(p), factor, acc[m][n]));
    }
  }
}

struct Rows {
  float* q;
  float* out;
  float* sum;
  float* maximum;
};

struct Tiles {
  const float* k;
  const float* v;
  float* scores;
  int64_t head_dim;
  int64_t head_dim_padded;
  float scale_log2;
};

template <int M>
inline void score_panels(const Rows& rows, const Tiles& tiles, int64_t vectors) {
  for (int64_t n = 0; n < vectors; n += kPanel) {
    const float* k = tiles.k + n * Vec::kWidth;
    float* scores = tiles.scores + n * Vec::kWidth;
    int64_t rest = vectors - n;
    if (rest >= kPanel) {
      score_panel<M, kPanel>(rows.q, tiles.head_dim, k, scores);
    } else if (rest == 1) {
      score_panel<M, 1>(rows.q, tiles.head_dim, k, scores);
    } else if (rest == 2) {
      score_panel<M, 2>(rows.q, tiles.head_dim, k, scores);
    } else {
      score_panel<M, 3>(rows.q, tiles.head_dim, k, scores);
    }
  }
}

template <int M>
inline void value_panels(const Rows& rows, const Tiles& tiles, int64_t keys, const float* decay) {
  int64_t stride = tiles.head_dim_padded;
  int64_t vectors = stride / Vec::kWidth;
  for (int64_t n = 0; n < vectors; n += kPanel) {
    const float* v = tiles.v + n * Vec::kWidth;
    float* out = rows.out + n * Vec::kWidth;
    int64_t rest = vectors - n;
    if (rest >= kPanel) {
      value_panel<M, kPanel>(tiles.scores, keys, v, stride, decay, out);
    } else if (rest == 1) {
      value_panel<M, 1>(tiles.scores, keys, v, stride, decay, out);
    } else if (rest == 2) {
      value_panel<M, 2>(tiles.scores, keys, v, stride, decay, out);
    } else {
      value_panel<M, 3>(tiles.scores, keys, v, stride, decay, out);
    }
  }
}

// M rows against the first `keys` keys of the packed tile. Scores become exp2 of their distance
// to the running maximum, which is kept in units of log2; older sums decay when it grows.
template <int M>
inline void row_block(const Rows& rows, const Tiles& tiles, int64_t keys) {
  int64_t vectors = (keys + Vec::kWidth - 1) / Vec::kWidth;
  int64_t tail = keys - (vectors - 1) * Vec::kWidth;
  Vec minus_infinity = set1(-INFINITY);
  score_panels<M>(rows, tiles, vectors);

  alignas(64) float decay[kMaxLanes] = {};
  for (int m = 0; m < M; ++m) {
    float* scores = tiles.scores + m * kKeyTile;
    Vec best = keep_first(load(scores + (vectors - 1) * Vec::kWidth), tail, minus_infinity);
    for (int64_t n = 0; n + 1 < vectors; ++n) best = max(load(scores + n * Vec::kWidth), best);
    float tile_maximum = reduce_max(best) * tiles.scale_log2;
    float old_maximum = rows.maximum[m];
    float new_maximum = tile_maximum > old_maximum ? tile_maximum : old_maximum;
    rows.maximum[m] = new_maximum;
    decay[m] = old_maximum - new_maximum;
  }
  for (int m = 0; m < kMaxLanes; m += Vec::kWidth) {
    store(decay + m, exp2_bounded(load(decay + m)));
  }

  Vec scale = set1(tiles.scale_log2);
  for (int m = 0; m < M; ++m) {
    float* scores = tiles.scores + m * kKeyTile;
    Vec shift = set1(-rows.maximum[m]);
    Vec sum = load(rows.sum + m * kMaxLanes) * set1(decay[m]);
    for (int64_t n = 0; n < vectors; ++n) {
      Vec p = exp2_bounded(fma(load(scores + n * Vec::kWidth), scale, shift));
      if (n + 1 == vectors) p = keep_first(p, tail, zero());
      store(scores + n * Vec::kWidth, p);
      sum = sum + p;
    }
    store(rows.sum + m * kMaxLanes, sum);
  }
  value_panels<M>(rows, tiles, keys, decay);
}

inline void attend_rows(const Rows& rows, int64_t count, const Tiles& tiles, int64_t keys) {
  int64_t row = 0;
  auto at = [&](int64_t r) {
    return Rows{rows.q + r * tiles.head_dim, rows.out + r * tiles.head_dim_padded,
                rows.sum + r * kMaxLanes, rows.maximum + r};
  };
  for (; row + kRowBlock <= count; row += kRowBlock) row_block<kRowBlock>(at(row), tiles, keys);
  for (; row + 2 <= count; row += 2) row_block<2>(at(row), tiles, keys);
  if (row < count) row_block<1>(at(row), tiles, keys);
}

#if defined(__AVX2__)
inline __m256 load8(const float* p) { return _mm256_loadu_ps(p); }
inline __m256 load8(const BFloat16* p) {
  __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline __m256 load8(const Half* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

inline void transpose8(__m256 (&r)[8]) {
  __m256 t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  __m256 s[8];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    s[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    s[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    s[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    s[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2f128_ps(s[i], s[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(s[i], s[i + 4], 0x31);
  }
}
#endif

// k_tile[d][j] = src[j][d] for j < keys, 0 up to the next whole vector of keys.
template <typename T>
inline void pack_keys(const T* src, int64_t stride, int64_t keys, int64_t head_dim, float* k_tile) {
  int64_t padded = round_up(keys, kMaxLanes);
  int64_t whole = 0;
#if defined(__AVX2__)
  whole = head_dim / 8 * 8;
  for (int64_t j = 0; j < padded; j += 8) {
    for (int64_t d = 0; d < whole; d += 8) {
      __m256 block[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        block[i] = j + i < keys ? load8(src + (j + i) * stride + d) : _mm256_setzero_ps();
      }
      transpose8(block);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) _mm256_storeu_ps(k_tile + (d + i) * kKeyTile + j, block[i]);
    }
  }
#endif
  for (int64_t j = 0; j < padded; ++j) {
    for (int64_t d = whole; d < head_dim; ++d) {
      k_tile[d * kKeyTile + j] = j < keys ? to_float(src[j * stride + d]) : 0.0f;
    }
  }
}

template <typename T>
inline void pack_values(const T* src, int64_t stride, int64_t keys, int64_t head_dim,
                        int64_t head_dim_padded, float* v_tile) {
  for (int64_t j = 0; j < keys; ++j) {
    float* row = v_tile + j * head_dim_padded;
    load_row(src + j * stride, row, head_dim);
    for (int64_t d = head_dim; d < head_dim_padded; ++d) row[d] = 0.0f;
  }
}

// One tile of the prefix, [first, first + keys), from wherever its pages are. A page of kKeyTile or
// more positions holds whole tiles, a smaller one whole vectors of keys: the packed tile, and so
// every result, is the one of a cache that is not paged.
template <typename T>
inline void pack_prefix(const BranchAttentionParams& p, const AttentionTask& task, int64_t first,
                        int64_t keys, int64_t head_dim_padded, float* k_tile, float* v_tile) {
  const T* k_head = static_cast<const T*>(p.k_cache) + task.kv_head * p.k_cache_stride[2];
  const T* v_head = static_cast<const T*>(p.v_cache) + task.kv_head * p.v_cache_stride[2];
  bool paged = p.block_table != nullptr;
  int64_t step = paged && p.page_size < kKeyTile ? p.page_size : kKeyTile;
  for (int64_t done = 0; done < keys; done += step) {
    int64_t row = task.batch;
    int64_t position = first + done;
    if (paged) {
      row = p.block_table[task.batch * p.table_width + position / p.page_size];
      position &= p.page_size - 1;
    }
    int64_t count = keys - done < step ? keys - done : step;
    const T* k = k_head + row * p.k_cache_stride[0] + position * p.k_cache_stride[1];
    const T* v = v_head + row * p.v_cache_stride[0] + position * p.v_cache_stride[1];
    pack_keys(k, p.k_cache_stride[1], count, p.head_dim, k_tile + done);
    pack_values(v, p.v_cache_stride[1], count, p.head_dim, head_dim_padded,
                v_tile + done * head_dim_padded);
  }
}

template <typename T>
inline void pack_queries(const BranchAttentionParams& p, const AttentionSegment* segments,
                         const AttentionTask& task, float sign, float* packed) {
  int64_t group = p.q_heads / p.kv_heads;
  const T* base = static_cast<const T*>(p.q) + task.batch * p.q_stride[0] +
                  task.kv_head * group * p.q_stride[3];
  for (int32_t i = task.first_segment; i < task.last_segment; ++i) {
    const AttentionSegment& segment = segments[i];
    for (int64_t c = segment.begin; c < segment.end; ++c) {
      const T* column = base + segment.branch * p.q_stride[1] + c * p.q_stride[2];
      for (int64_t g = 0; g < group; ++g, packed += p.head_dim) {
        load_row(column + g * p.q_stride[3], packed, p.head_dim);
        if (sign < 0) {
          for (int64_t d = 0; d < p.head_dim; ++d) packed[d] = -packed[d];
        }
      }
    }
  }
}

template <typename T>
inline void write_row(const Rows& rows, int64_t head_dim, T* out, float* lse) {
  float sum = rows.sum[0];
  if constexpr (Vec::kWidth == kMaxLanes) {
    sum = reduce_add(load(rows.sum));
  } else {
    Vec total = load(rows.sum);
    for (int i = Vec::kWidth; i < kMaxLanes; i += Vec::kWidth) total = total + load(rows.sum + i);
    sum = reduce_add(total);
  }
  Vec divisor = set1(sum);
  int64_t d = 0;
  for (; d + Vec::kWidth <= head_dim; d += Vec::kWidth) {
    store(out + d, load(rows.out + d) / divisor);
  }
  for (; d < head_dim; ++d) from_float(rows.out[d] / sum, out + d);
  if (lse != nullptr) *lse = (rows.maximum[0] + log2f(sum)) * kLn2;
}

template <typename T>
inline void write_task(const BranchAttentionParams& p, const AttentionSegment* segments,
                       const AttentionTask& task, Rows rows, int64_t head_dim_padded) {
  int64_t group = p.q_heads / p.kv_heads;
  int64_t head = task.kv_head * group;
  T* base = static_cast<T*>(p.out) + task.batch * p.out_stride[0] + head * p.out_stride[3];
  for (int32_t i = task.first_segment; i < task.last_segment; ++i) {
    const AttentionSegment& segment = segments[i];
    float* lse = nullptr;
    if (p.lse != nullptr) {
      lse = p.lse + ((task.batch * p.branches + segment.branch) * p.q_heads + head) * p.window;
    }
    for (int64_t c = segment.begin; c < segment.end; ++c) {
      T* column = base + segment.branch * p.out_stride[1] + c * p.out_stride[2];
      for (int64_t g = 0; g < group; ++g) {
        write_row(rows, p.head_dim, column + g * p.out_stride[3],
                  lse == nullptr ? nullptr : lse + g * p.window + c);
        rows.out += head_dim_padded;
        rows.sum += kMaxLanes;
        rows.maximum += 1;
      }
    }
  }
}

template <typename T>
void run_task(const BranchAttentionParams& p, const AttentionSegment* segments,
              const AttentionTask& task, float* scratch) {
  AttentionScratch layout(p.head_dim, task.rows);
  int64_t group = p.q_heads / p.kv_heads;
  float* k_tile = scratch + layout.k_tile;
  float* v_tile = scratch + layout.v_tile;
  Rows rows{scratch + layout.q, scratch + layout.out, scratch + layout.sum,
            scratch + layout.maximum};
  // With the sign of the scale in the queries, the largest score is the largest scaled score.
  float scale_log2 = static_cast<float>(std::fabs(static_cast<double>(p.scale)) * kLog2E);
  Tiles tiles{k_tile,    v_tile, scratch + layout.scores, p.head_dim, layout.head_dim_padded,
              scale_log2};

  pack_queries<T>(p, segments, task, p.scale, rows.q);
  std::memset(rows.out, 0, sizeof(float) * task.rows * layout.head_dim_padded);
  std::memset(rows.sum, 0, sizeof(float) * task.rows * kMaxLanes);
  for (int64_t r = 0; r < task.rows; ++r) rows.maximum[r] = -INFINITY;

  int64_t prefix = p.cache_len[task.batch];
  for (int64_t first = 0; first < prefix; first += kKeyTile) {
    int64_t keys = prefix - first < kKeyTile ? prefix - first : kKeyTile;
    pack_prefix<T>(p, task, first, keys, layout.head_dim_padded, k_tile, v_tile);
    attend_rows(rows, task.rows, tiles, keys);
  }

  int64_t branch_row = 0;
  for (int32_t i = task.first_segment; i < task.last_segment;) {
    int32_t branch = segments[i].branch;
    int32_t last = i;
    int64_t branch_rows = 0;
    for (; last < task.last_segment && segments[last].branch == branch; ++last) {
      branch_rows += (segments[last].end - segments[last].begin) * group;
    }
    const T* k = static_cast<const T*>(p.k_window) + task.batch * p.k_window_stride[0] +
                 branch * p.k_window_stride[1] + task.kv_head * p.k_window_stride[3];
    const T* v = static_cast<const T*>(p.v_window) + task.batch * p.v_window_stride[0] +
                 branch * p.v_window_stride[1] + task.kv_head * p.v_window_stride[3];
    int64_t visible = segments[last - 1].visible;
    for (int64_t first = 0; first < visible; first += kKeyTile) {
      int64_t packed = visible - first < kKeyTile ? visible - first : kKeyTile;
      pack_keys(k + first * p.k_window_stride[2], p.k_window_stride[2], packed, p.head_dim, k_tile);
      pack_values(v + first * p.v_window_stride[2], p.v_window_stride[2], packed, p.head_dim,
                  layout.head_dim_padded, v_tile);
      int64_t row = branch_row;
      for (int32_t s = i; s < last; ++s) {
        int64_t count = (segments[s].end - segments[s].begin) * group;
        int64_t keys = segments[s].visible - first;
        if (keys > packed) keys = packed;
        if (keys > 0) {
          Rows here{rows.q + row * p.head_dim, rows.out + row * layout.head_dim_padded,
                    rows.sum + row * kMaxLanes, rows.maximum + row};
          attend_rows(here, count, tiles, keys);
        }
        row += count;
      }
    }
    branch_row += branch_rows;
    i = last;
  }
  write_task<T>(p, segments, task, rows, layout.head_dim_padded);
}

inline void run_task_of_type(const BranchAttentionParams& p, const AttentionSegment* segments,
                             const AttentionTask& task, float* scratch) {
  switch (p.type) {
    case FloatType::kBFloat16:
      return run_task<BFloat16>(p, segments, task, scratch);
    case FloatType::kHalf:
      return run_task<Half>(p, segments, task, scratch);
    case FloatType::kFloat:
      return run_task<float>(p, segments, task, scratch);
  }
}

}  // namespace
}  // namespace lopa
