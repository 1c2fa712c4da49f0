// Rows of logits to statistics: the threaded driver of the vector kernels. Every row is cut into
// tiles and groups of tiles of fixed size, and their partial results are merged in order, so that
// the result depends neither on the number of threads nor on how they share the work.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "confidence/confidence_cpu.h"
#include "confidence/confidence_kernel.h"
#include "lopa/isa.h"

namespace lopa {
namespace {

using confidence::Draw;
using confidence::kDrawTile;
using confidence::Kernels;

constexpr double kLn2 = 0.6931471805599453;
constexpr double kLog2E = 1.4426950408889634;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kGroupTiles = 4;

const Kernels& kernels_for(FloatType dtype) {
  static const Kernels* const table = [] {
#if defined(LOPA_X86_KERNELS)
    if (isa() == Isa::kAvx512) return confidence::avx512_kernels();
    if (isa() == Isa::kAvx2) return confidence::avx2_kernels();
#endif
    return confidence::portable_kernels();
  }();
  return table[static_cast<int>(dtype)];
}

// What holds for all rows of a call.
struct Plan {
  const Kernels& kernels;
  const LogitsView& logits;
  confidence::ScanOptions scan;
  confidence::DrawArgs draw;  // but for the row's maximum, threshold and counter
  int64_t tile;
  int64_t scan_tile;
  int64_t group;
  int64_t groups;
  int64_t draw_tiles;  // 0: nothing is drawn
  int64_t top_k;       // the size of the vocabulary: no limit
  double top_p;        // 1: no limit
  double inverse_temperature;
  uint64_t step;
  bool filtered;
  bool sampled;

  Plan(const LogitsView& view, const ConfidenceConfig& config, bool all_stats)
      : kernels(kernels_for(view.dtype)), logits(view), scan{}, draw{} {
    inverse_temperature = config.inverse_temperature();
    double scale = kLog2E * inverse_temperature;
    // Beyond these every weight but the maximum's is 0, or every weight is 1.
    scan.scale = static_cast<float>(std::clamp<double>(scale, FLT_MIN, FLT_MAX));
    scan.second = all_stats || config.metric == Metric::kMargin;
    scan.weighted = all_stats || config.metric == Metric::kNegEntropy;
    tile = confidence::kTileBytes / view.element_bytes();
    group = tile * kGroupTiles;
    groups = (view.vocab + group - 1) / group;
    top_k = config.top_k > 0 ? std::min(config.top_k, view.vocab) : view.vocab;
    top_p = config.top_p;
    filtered = top_k < view.vocab || top_p < 1.0;
    sampled = config.temperature > 0;
    // Where the scan already sees what may be drawn, it gives the masses of the tiles to draw from.
    scan_tile = sampled && !filtered ? kDrawTile : tile;
    draw_tiles = sampled ? (view.vocab + kDrawTile - 1) / kDrawTile : 0;
    draw.scale = scan.scale;
    draw.inverse_temperature = inverse_temperature;
    draw.key[0] = static_cast<uint32_t>(config.seed);
    draw.key[1] = static_cast<uint32_t>(config.seed >> 32);
    step = config.step;
  }

  const void* at(const void* row, int64_t i) const {
    return static_cast<const char*>(row) + i * logits.element_bytes();
  }

  // Runs function(elements, their number, index of the first) over pieces of `size` of a row.
  template <typename Function>
  void for_pieces(int64_t size, const void* row, int64_t begin, int64_t end,
                  Function function) const {
    for (int64_t i = begin; i < end; i += size) function(at(row, i), std::min(size, end - i), i);
  }

  template <typename Function>
  void for_tiles(const void* row, Function function) const {
    for_pieces(tile, row, 0, logits.vocab, function);
  }

  int64_t group_end(int64_t g) const { return std::min((g + 1) * group, logits.vocab); }
};

// Statistics of a part of a row. Its weights are 2^(x * scale - base).
struct Partial {
  float max = -kInfinity;
  float second = -kInfinity;
  double base = -std::numeric_limits<double>::infinity();
  double sum = 0;
  double weighted = 0;
  int64_t best_tile = 0;  // where the first tile of the scan with the maximum begins
  bool nan = false;
  bool finite = false;

  void absorb(Partial other) {
    nan |= other.nan;
    finite |= other.finite;
    if (other.max == -kInfinity) return;
    second = std::max({second, other.second, std::min(max, other.max)});
    if (other.max > max) {
      max = other.max;
      best_tile = other.best_tile;
    }
    double common = std::max(base, other.base);
    rebase(common);
    other.rebase(common);
    sum += other.sum;
    weighted += other.weighted;
  }

  void rebase(double new_base) {
    if (sum > 0 && base != new_base) {
      double shift = base - new_base;
      double factor = std::exp2(shift);
      weighted = factor > 0 ? factor * (weighted + shift * sum) : 0.0;
      sum *= factor;
    }
    base = new_base;
  }
};

// The sum of the weights 2^(x * scale - base) of the kept tokens of one tile of the draw.
struct TileMass {
  double sum;
  double base;
};

// Without filters this also gives the masses of the draw's tiles in the group.
Partial scan_group(const Plan& plan, const void* row, int64_t g, TileMass* masses) {
  Partial result;
  confidence::ScanOptions options = plan.scan;
  plan.for_pieces(
      plan.scan_tile, row, g * plan.group, plan.group_end(g),
      [&](const void* x, int64_t n, int64_t begin) {
        confidence::TileStats s;
        options.reference = result.max;
        plan.kernels.scan(x, n, options, &s);
        result.absorb({s.max, s.second, s.base, s.sum, s.weighted, begin, s.nan, s.finite});
        if (plan.sampled && !plan.filtered) masses[begin / kDrawTile] = {s.sum, s.base};
      });
  return result;
}

// The tokens that the filters leave: the first `count` by descending logit, then index.
struct Kept {
  float threshold = -kInfinity;
  int64_t tie_limit = std::numeric_limits<int64_t>::max();
  int64_t ties = 0;  // kept values equal to the threshold
  int64_t count = 0;
};

// Everything about a row that later phases need.
struct RowPass {
  const void* row = nullptr;
  int64_t index = 0;
  Partial total;
  Kept kept;

  bool empty() const { return !total.finite; }
};

float value_of_key(uint32_t key) {
  uint32_t bits = key & 0x80000000u ? key & 0x7fffffffu : ~key;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

int64_t index_after_ties(const Plan& plan, const void* row, float value, int64_t ties) {
  int64_t limit = plan.logits.vocab;
  plan.for_tiles(row, [&](const void* x, int64_t n, int64_t begin) {
    if (ties <= 0) return;
    int64_t here = plan.kernels.count_equal(x, n, value);
    if (here < ties) {
      ties -= here;
      return;
    }
    int64_t i = 0;
    for (; ties > 0; --ties) i += plan.kernels.find(plan.at(x, i), n - i, value) + 1;
    limit = begin + i;
  });
  return limit;
}

// A value that the last kept token is certain to reach, so that the selection can pass over what
// lies below. Top-p: all values below the floor together have less than half of the mass 1 - top_p.
// Top-k: the k-th largest of the maxima over disjoint parts of the row.
float selection_floor(const Plan& plan, const RowPass& pass) {
  const double vocab = static_cast<double>(plan.logits.vocab);
  float floor = -kInfinity;
  if (plan.top_p < 1.0) {
    double exponent = std::log2((1.0 - plan.top_p) * pass.total.sum / vocab) - 1.0;
    double value = pass.total.max + std::min(exponent, 0.0) / plan.scan.scale;
    floor = std::nextafter(static_cast<float>(std::max<double>(value, -FLT_MAX)), -kInfinity);
  }
  const int64_t tiles = (plan.logits.vocab + plan.tile - 1) / plan.tile;
  if (plan.top_k <= tiles * confidence::kLanes && plan.top_k < plan.logits.vocab) {
    std::vector<float> maxima(static_cast<size_t>(tiles * confidence::kLanes));
    plan.for_tiles(pass.row, [&](const void* x, int64_t n, int64_t begin) {
      plan.kernels.lane_maxima(x, n, &maxima[begin / plan.tile * confidence::kLanes]);
    });
    auto kth = maxima.begin() + (plan.top_k - 1);
    std::nth_element(maxima.begin(), kth, maxima.end(), std::greater<float>());
    floor = std::max(floor, *kth);
  }
  return floor;
}

// Radix selection of the last kept token over the sortable keys of the logits. A token is kept if
// fewer than top_k tokens come before it and their mass is at most top_p (the nucleus rule of
// Holtzman et al., arXiv 1904.09751, with the boundary token inside, as Dream's generation code has
// it); so both filters end at one place in the one order.
Kept select_kept(const Plan& plan, const RowPass& pass) {
  struct Level {
    int32_t bin_shift, prefix_shift, bits;
  };
  constexpr Level kLevels[] = {{21, 32, 11}, {10, 21, 11}, {0, 10, 10}};
  confidence::Histogram histogram;
  const double mass_limit =
      plan.top_p < 1.0 ? plan.top_p * pass.total.sum : std::numeric_limits<double>::infinity();
  const float floor = selection_floor(plan, pass);
  int64_t before = 0;
  double mass_before = 0;
  int64_t ties = 0;
  double tie_mass = 0;
  uint32_t key = 0;
  for (const Level& level : kLevels) {
    const uint32_t bins = 1u << level.bits;
    std::fill_n(histogram.count, bins, 0);
    std::fill_n(histogram.mass, bins, 0.0);
    confidence::HistogramArgs args{
        pass.total.max, plan.scan.scale, floor, level.bin_shift, level.prefix_shift, key, bins - 1};
    plan.for_tiles(pass.row, [&](const void* x, int64_t n, int64_t) {
      plan.kernels.histogram(x, n, args, &histogram);
    });
    uint32_t boundary = bins;
    for (uint32_t bin = bins; bin-- > 0;) {
      if (histogram.count[bin] == 0) continue;
      if (boundary < bins) {
        before += histogram.count[boundary];
        mass_before += histogram.mass[boundary];
      }
      boundary = bin;
      if (before + histogram.count[bin] >= plan.top_k ||
          mass_before + histogram.mass[bin] > mass_limit) {
        break;
      }
    }
    ties = histogram.count[boundary];
    tie_mass = histogram.mass[boundary];
    key = key << level.bits | boundary;
  }
  Kept kept;
  kept.threshold = value_of_key(key);
  double each = tie_mass / static_cast<double>(ties);
  double fitting = std::floor((mass_limit - mass_before) / each) + 1;
  kept.ties = std::min(ties, plan.top_k - before);
  if (fitting < static_cast<double>(kept.ties)) {
    kept.ties = std::max<int64_t>(1, static_cast<int64_t>(fitting));
  }
  kept.count = before + kept.ties;
  if (kept.ties < ties) {
    kept.tie_limit = index_after_ties(plan, pass.row, kept.threshold, kept.ties);
  }
  return kept;
}

// Replaces the sums over the row by those over its kept tokens, and gives the masses of the draw's
// tiles.
void sum_kept(const Plan& plan, RowPass* pass, TileMass* masses) {
  const Kept& kept = pass->kept;
  const confidence::AboveArgs args{pass->total.max, plan.scan.scale, kept.threshold};
  const double t = (static_cast<double>(kept.threshold) - pass->total.max) * plan.scan.scale;
  const double weight = std::exp2(t);
  double sum = 0, weighted = 0;
  int64_t ties = kept.ties;
  auto add_tile = [&](const void* x, int64_t n, int64_t begin) {
    confidence::AboveSums sums;
    plan.kernels.sum_above(x, n, args, &sums);
    int64_t here = std::min(sums.equal, ties);
    ties -= here;
    double equal = weight * static_cast<double>(here);
    sum += sums.sum + equal;
    weighted += sums.weighted + (equal > 0 ? equal * t : 0.0);
    if (plan.sampled) masses[begin / kDrawTile] = {sums.sum + equal, pass->total.base};
  };
  plan.for_pieces(kDrawTile, pass->row, 0, plan.logits.vocab, add_tile);
  pass->total.sum = sum;
  pass->total.weighted = weighted;
}

RowPass merge_row(const Plan& plan, const void* row, int64_t index, const Partial* parts,
                  TileMass* masses) {
  RowPass pass;
  pass.row = row;
  pass.index = index;
  for (int64_t g = 0; g < plan.groups; ++g) pass.total.absorb(parts[g]);
  if (pass.empty()) return pass;
  pass.total.rebase(static_cast<double>(pass.total.max) * plan.scan.scale);
  pass.kept.count = plan.logits.vocab;
  if (plan.filtered) {
    pass.kept = select_kept(plan, pass);
    sum_kept(plan, &pass, masses);
  }
  return pass;
}

Draw most_likely(const Plan& plan, const RowPass& pass) {
  const int64_t begin = pass.total.best_tile;
  const int64_t n = std::min(plan.scan_tile, plan.logits.vocab - begin);
  return {0.0, 0.0, begin + plan.kernels.find(plan.at(pass.row, begin), n, pass.total.max)};
}

confidence::DrawArgs draw_args(const Plan& plan, const RowPass& pass) {
  confidence::DrawArgs args = plan.draw;
  args.max = pass.total.max;
  args.threshold = pass.kept.threshold;
  args.tie_limit = pass.kept.tie_limit;
  uint64_t row = static_cast<uint64_t>(pass.index);
  args.counter[0] = static_cast<uint32_t>(row);
  args.counter[1] = static_cast<uint32_t>(plan.step);
  args.counter[2] = static_cast<uint32_t>(plan.step >> 32) ^ static_cast<uint32_t>(row >> 32);
  return args;
}

// The first stage of the draw. Counters of tiles have the highest bit, which no counter of a
// vocabulary index has.
int64_t draw_tile(const Plan& plan, const RowPass& pass, const confidence::DrawArgs& args,
                  const TileMass* masses) {
  if (plan.draw_tiles == 1) return 0;
  int64_t best = 0;
  double race = std::numeric_limits<double>::infinity();
  double shift = 0, factor = 1;
  uint32_t words[4];
  for (int64_t t = 0; t < plan.draw_tiles; ++t) {
    if (t % 4 == 0) {
      confidence::philox(0x80000000u | static_cast<uint32_t>(t / 4), args.counter, args.key, words);
    }
    const TileMass& mass = masses[t];
    if (!(mass.sum > 0)) continue;
    if (mass.base - pass.total.base != shift) {
      shift = mass.base - pass.total.base;
      factor = std::exp2(shift);
    }
    double candidate = confidence::exponential(words[t % 4]) / (mass.sum * factor);
    if (candidate < race) {
      race = candidate;
      best = t;
    }
  }
  return best;
}

// The Gumbel-max draw in two stages: a tile by its mass, then a token of that tile. Both are exact,
// so that together they draw a token by its weight.
Draw draw_row(const Plan& plan, const RowPass& pass, const TileMass* masses) {
  const confidence::DrawArgs args = draw_args(plan, pass);
  const int64_t begin = draw_tile(plan, pass, args, masses) * kDrawTile;
  Draw best{std::numeric_limits<double>::infinity(), 0.0, begin};
  const int64_t n = std::min(kDrawTile, plan.logits.vocab - begin);
  plan.kernels.draw(plan.at(pass.row, begin), n, begin, args, &best);
  return best;
}

RowStats empty_row(bool nan) { return {0, 0.0f, 0.0f, -kInfinity, -kInfinity, nan, true}; }

RowStats finish(const Plan& plan, const RowPass& pass, const Draw& draw) {
  const Partial& total = pass.total;
  double log_sum = std::log(total.sum);
  double gap = -kInfinity;
  if (pass.kept.count > 1 && total.second > -kInfinity) {
    gap = (static_cast<double>(total.second) - total.max) * plan.inverse_temperature;
  }
  RowStats stats;
  stats.token = draw.index;
  stats.prob = static_cast<float>(std::exp(draw.distance) / total.sum);
  stats.margin = static_cast<float>(-std::expm1(gap) / total.sum);
  stats.neg_entropy =
      static_cast<float>(std::min(0.0, kLn2 * total.weighted / total.sum - log_sum));
  // It saturates, so that -inf stays the mark of an empty row.
  stats.lse = static_cast<float>(
      std::clamp<double>(total.max * plan.inverse_temperature + log_sum, -FLT_MAX, FLT_MAX));
  stats.nan = total.nan;
  stats.empty = false;
  return stats;
}

// From the statistics of its groups to those of a row.
RowStats evaluate_merged(const Plan& plan, int64_t index, const Partial* parts, TileMass* masses) {
  RowPass pass = merge_row(plan, plan.logits.row(index), index, parts, masses);
  if (pass.empty()) return empty_row(pass.total.nan);
  Draw draw = plan.sampled ? draw_row(plan, pass, masses) : most_likely(plan, pass);
  return finish(plan, pass, draw);
}

// Few long rows: the groups of all rows are shared among the threads.
void evaluate_by_groups(const Plan& plan, const int64_t* rows, int64_t n, RowStats* out) {
  std::vector<Partial> parts(static_cast<size_t>(n * plan.groups));
  std::vector<TileMass> masses(static_cast<size_t>(n * plan.draw_tiles));
  torch::stable::parallel_for(0, n * plan.groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int64_t r = i / plan.groups;
      if (rows[r] < 0) continue;
      parts[i] = scan_group(plan, plan.logits.row(rows[r]), i % plan.groups,
                            masses.data() + r * plan.draw_tiles);
    }
  });
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      out[r] = rows[r] < 0 ? empty_row(false)
                           : evaluate_merged(plan, rows[r], parts.data() + r * plan.groups,
                                             masses.data() + r * plan.draw_tiles);
    }
  });
}

void evaluate_by_rows(const Plan& plan, const int64_t* rows, int64_t n, RowStats* out) {
  const int64_t grain = std::max<int64_t>(1, plan.group / plan.logits.vocab);
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    std::vector<Partial> parts(static_cast<size_t>(plan.groups));
    std::vector<TileMass> masses(static_cast<size_t>(plan.draw_tiles));
    for (int64_t i = begin; i < end; ++i) {
      if (rows[i] < 0) {
        out[i] = empty_row(false);
        continue;
      }
      const void* row = plan.logits.row(rows[i]);
      for (int64_t g = 0; g < plan.groups; ++g) {
        parts[g] = scan_group(plan, row, g, masses.data());
      }
      out[i] = evaluate_merged(plan, rows[i], parts.data(), masses.data());
    }
  });
}

}  // namespace

void confidence_rows(const LogitsView& logits, const ConfidenceConfig& config, const int64_t* rows,
                     int64_t n, bool all_stats, RowStats* out) {
  if (n == 0) return;
  const Plan plan(logits, config, all_stats);
  const int64_t threads = torch::stable::get_num_threads();
  if (threads > 1 && plan.groups > 1 && n < 4 * threads) {
    evaluate_by_groups(plan, rows, n, out);
    return;
  }
  evaluate_by_rows(plan, rows, n, out);
}

}  // namespace lopa
