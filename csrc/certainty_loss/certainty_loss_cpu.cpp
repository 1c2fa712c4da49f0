// Checks, outputs, threads and CPU registration of the certainty-forcing loss.
//
// A row is cut into groups and tiles of fixed size whose sums are merged in order, and rows are
// added up in order: no result depends on the number of threads.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "certainty_loss/certainty_loss_args.h"
#include "certainty_loss/certainty_loss_kernel.h"
#include "lopa/isa.h"

namespace lopa {
namespace {

using certainty_loss::GradientArgs;
using certainty_loss::Kernels;
using certainty_loss::kTile;
using certainty_loss::RowStatistics;
using certainty_loss::ScanArgs;
using certainty_loss::TileSums;

constexpr double kLn2 = 0.6931471805599453;
constexpr double kLog2E = 1.4426950408889634;
// What a thread takes at a time.
constexpr int64_t kGroup = 8 * kTile;

const Kernels& kernels_for(FloatType dtype) {
  static const Kernels* const table = [] {
#if defined(LOPA_X86_KERNELS)
    if (isa() == Isa::kAvx512) return certainty_loss::avx512_kernels();
    if (isa() == Isa::kAvx2) return certainty_loss::avx2_kernels();
#endif
    return certainty_loss::portable_kernels();
  }();
  return table[static_cast<int>(dtype)];
}

// Beyond these limits every weight but the maximum's is 0, or every weight is 1.
float scale_of(double temperature) {
  return static_cast<float>(std::clamp<double>(kLog2E / temperature, FLT_MIN, FLT_MAX));
}

// Sums over a part of a row, relative to `base`.
struct Partial {
  float max = -std::numeric_limits<float>::infinity();
  double base = -FLT_MAX;
  double sum = 0;
  double tempered = 0;
  double weighted = 0;
  int64_t first = 0;  // where the first tile with the maximum begins

  void rebase(double to, double scale) {
    const double distance = base - to;
    base = to;
    // Most tiles of a group have the same.
    if (distance == 0) return;
    const double factor = std::exp2(distance * scale), shift = distance * scale;
    sum *= std::exp(distance);
    weighted = factor * (weighted + (factor > 0 ? shift * tempered : 0.0));
    tempered *= factor;
  }

  void absorb(Partial other, double scale) {
    const double common = std::max(base, other.base);
    rebase(common, scale);
    other.rebase(common, scale);
    if (other.max > max) {
      max = other.max;
      first = other.first;
    }
    sum += other.sum;
    tempered += other.tempered;
    weighted += other.weighted;
  }

  // As a row's statistics have it.
  void rebase_to_max(double scale) { rebase(std::max(max, -FLT_MAX), scale); }
};

const void* advance(const LogitsView& view, const void* row, int64_t elements) {
  return static_cast<const char*>(row) + elements * view.element_bytes();
}

Partial scan_group(const LogitsView& view, const Kernels& kernels, ScanArgs args, const void* row,
                   int64_t group) {
  Partial result;
  const int64_t end = std::min((group + 1) * kGroup, view.vocab);
  for (int64_t i = group * kGroup; i < end; i += kTile) {
    TileSums sums;
    kernels.scan(advance(view, row, i), std::min(kTile, end - i), args, &sums);
    result.absorb({sums.max, sums.base, sums.sum, sums.tempered, sums.weighted, i}, args.scale);
    args.reference = sums.base;
  }
  return result;
}

// Whether the label is the first index of the row's largest value.
bool agrees(const LogitsView& view, const Kernels& kernels, const void* row, const Partial& total,
            int64_t label) {
  return kernels.at(row, label) == total.max && label / kTile == total.first / kTile &&
         !kernels.contains(advance(view, row, total.first), label - total.first, total.max);
}

struct RowTerms {
  double cross_entropy = 0;
  double entropy = 0;
  bool agrees = false;
};

RowTerms finish_row(const LogitsView& view, const Kernels& kernels, const void* row,
                    const Partial& total, int64_t label, RowStatistics* out) {
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  const bool finite = total.max >= -FLT_MAX && total.max <= FLT_MAX;
  if (!finite || std::isnan(total.sum)) {
    *out = {kNaN, kNaN, kNaN, kNaN};
    return {kNaN, 0, false};
  }
  RowTerms terms;
  const double log_sum = std::log(total.sum), tempered = std::log(total.tempered);
  terms.cross_entropy = log_sum - (static_cast<double>(kernels.at(row, label)) - total.max);
  terms.agrees = agrees(view, kernels, row, total, label);
  terms.entropy = std::max(0.0, tempered - kLn2 * total.weighted / total.tempered);
  *out = {total.max, static_cast<float>(log_sum), static_cast<float>(tempered),
          terms.agrees ? static_cast<float>(terms.entropy) : certainty_loss::kNoEntropy};
  return terms;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> loss_forward(const Tensor& logits,
                                                                const Tensor& labels,
                                                                const Tensor& masked,
                                                                double temperature, double beta,
                                                                bool inplace_backward) {
  const char* op = "certainty_forcing_loss";
  const LogitsView view = check_loss_logits(op, logits, kCpu);
  check_row_tensor(op, "labels", labels, ScalarType::Long, logits, kCpu);
  check_row_tensor(op, "masked", masked, ScalarType::Bool, logits, kCpu);
  const LossOptions options = check_loss_options(op, temperature, beta);
  if (inplace_backward) check_no_overlap(op, logits);
  const Tensor label_tensor = as_contiguous(labels), mask_tensor = as_contiguous(masked);
  const int64_t* label = data<int64_t>(label_tensor);
  const bool* mask = data<bool>(mask_tensor);
  const int64_t rows = view.rows;

  const Tensor loss = empty({}, ScalarType::Float, logits);
  const Tensor terms = empty({2}, ScalarType::Float, logits);
  const Tensor stats = empty({rows, 4}, ScalarType::Float, logits);
  const Tensor order = empty({rows + 1}, ScalarType::Int, logits);
  const Tensor counts = empty({2}, ScalarType::Int, logits);
  auto* row_stats = static_cast<RowStatistics*>(stats.data_ptr());
  int32_t* list = mutable_data<int32_t>(order) + 1;
  int64_t listed = 0;
  for (int64_t r = 0; r < rows; ++r) {
    if (!mask[r]) continue;
    if (label[r] < 0 || label[r] >= view.vocab) {
      fail(op, "labels", "an index below V = " + std::to_string(view.vocab) + " where masked",
           std::to_string(label[r]) + " at flat index " + std::to_string(r));
    }
    list[listed++] = static_cast<int32_t>(r);
  }
  for (int64_t r = 0, rest = listed; r < rows; ++r) {
    if (mask[r]) continue;
    list[rest++] = static_cast<int32_t>(r);
    row_stats[r] = {0, 0, 0, certainty_loss::kNoEntropy};
  }
  list[-1] = static_cast<int32_t>(listed);

  const Kernels& kernels = kernels_for(view.dtype);
  const ScanArgs args{scale_of(options.temperature),
                      options.temperature == certainty_loss::kSquareTemperature,
                      -std::numeric_limits<float>::infinity()};
  const int64_t groups = (view.vocab + kGroup - 1) / kGroup;
  std::vector<Partial> parts(static_cast<size_t>(listed * groups));
  std::vector<RowTerms> row_terms(static_cast<size_t>(listed));
  const int64_t grain = std::max<int64_t>(1, kGroup / view.vocab);
  torch::stable::parallel_for(0, listed * groups, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      parts[i] = scan_group(view, kernels, args, view.row(list[i / groups]), i % groups);
    }
  });
  torch::stable::parallel_for(0, listed, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Partial total = parts[i * groups];
      for (int64_t g = 1; g < groups; ++g) total.absorb(parts[i * groups + g], args.scale);
      total.rebase_to_max(args.scale);
      const int64_t r = list[i];
      row_terms[i] = finish_row(view, kernels, view.row(r), total, label[r], &row_stats[r]);
    }
  });
  double cross_entropy = 0, entropy = 0;
  int32_t agreeing = 0;
  for (const RowTerms& row : row_terms) {
    cross_entropy += row.cross_entropy;
    if (row.agrees) entropy += row.entropy;
    agreeing += row.agrees;
  }
  if (listed > 0) cross_entropy /= static_cast<double>(listed);
  if (agreeing > 0) entropy /= agreeing;
  mutable_data<float>(terms)[0] = static_cast<float>(cross_entropy);
  mutable_data<float>(terms)[1] = static_cast<float>(entropy);
  *mutable_data<float>(loss) = static_cast<float>(cross_entropy + options.beta * entropy);
  mutable_data<int32_t>(counts)[0] = static_cast<int32_t>(listed);
  mutable_data<int32_t>(counts)[1] = agreeing;
  return {loss, terms, stats, order, counts};
}

struct SavedTensors {
  const Tensor &grad_loss, &labels, &stats, &order, &counts;
};

// Writes the gradient of every row of `view` into the same row of `out`.
void run_backward(const char* op, const LogitsView& view, const LogitsView& out,
                  const SavedTensors& saved, const LossOptions& options) {
  const Tensor labels = as_contiguous(saved.labels), stats = as_contiguous(saved.stats),
               order = as_contiguous(saved.order), counts = as_contiguous(saved.counts);
  const int64_t* label = data<int64_t>(labels);
  const auto* row_stats = static_cast<const RowStatistics*>(stats.data_ptr());
  const int32_t* list = data<int32_t>(order) + 1;
  const int64_t rows = view.rows, listed = list[-1];
  if (listed < 0 || listed > rows) {
    fail(op, "order", "at most N = " + std::to_string(rows) + " rows",
         std::to_string(listed) + " at flat index 0");
  }
  for (int64_t i = 0; i < rows; ++i) {
    if (list[i] >= 0 && list[i] < rows) continue;
    fail(op, "order", "rows below N = " + std::to_string(rows),
         std::to_string(list[i]) + " at flat index " + std::to_string(i + 1));
  }
  const double grad = *data<float>(saved.grad_loss);
  const double masked = data<int32_t>(counts)[0], agreeing = data<int32_t>(counts)[1];
  const double cross = masked > 0 ? grad / masked : 0.0;
  const double tilt = agreeing > 0 ? -grad * options.beta / (options.temperature * agreeing) : 0.0;
  const Kernels& kernels = kernels_for(view.dtype);
  const float scale = scale_of(options.temperature);
  const bool square = options.temperature == certainty_loss::kSquareTemperature;
  const int64_t groups = (view.vocab + kGroup - 1) / kGroup;
  const int64_t grain = std::max<int64_t>(1, kGroup / view.vocab);
  torch::stable::parallel_for(0, rows * groups, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t r = list[i / groups], first = i % groups * kGroup;
      const int64_t n = std::min(kGroup, view.vocab - first);
      void* target = const_cast<void*>(advance(out, out.row(r), first));
      if (i / groups >= listed) {
        std::memset(target, 0, static_cast<size_t>(n * view.element_bytes()));
        continue;
      }
      const RowStatistics& row = row_stats[r];
      GradientArgs args{};
      args.max = row.max;
      args.log_sum = static_cast<float>(row.log_sum * kLog2E);
      args.tempered = static_cast<float>(row.tempered * kLog2E);
      args.scale = scale;
      args.cross = static_cast<float>(cross);
      args.slope = static_cast<float>(tilt * kLn2);
      args.offset = static_cast<float>(tilt * row.entropy);
      args.entropy = row.entropy >= 0;
      args.square = square;
      args.label = label[r] - first;
      kernels.gradient(advance(view, view.row(r), first), n, args, target);
    }
  });
}

LossOptions check_backward(const char* op, const LogitsView& view, const Tensor& logits,
                           const SavedTensors& saved, double temperature, double beta) {
  check_row_tensor(op, "labels", saved.labels, ScalarType::Long, logits, kCpu);
  check_saved(op, saved.grad_loss, saved.stats, saved.order, saved.counts, view.rows, kCpu);
  return check_loss_options(op, temperature, beta);
}

Tensor loss_backward(const Tensor& grad_loss, const Tensor& logits, const Tensor& labels,
                     const Tensor& stats, const Tensor& order, const Tensor& counts,
                     double temperature, double beta) {
  const char* op = "certainty_forcing_loss_backward";
  const SavedTensors saved{grad_loss, labels, stats, order, counts};
  const LogitsView view = check_loss_logits(op, logits, kCpu);
  const LossOptions options = check_backward(op, view, logits, saved, temperature, beta);
  auto sizes = logits.sizes();
  const Tensor out = empty_output({sizes.begin(), sizes.end()}, logits.scalar_type(), kCpu);
  run_backward(op, view, make_logits_view(op, out), saved, options);
  return out;
}

void loss_backward_(const Tensor& grad_loss, const Tensor& logits, const Tensor& labels,
                    const Tensor& stats, const Tensor& order, const Tensor& counts,
                    double temperature, double beta) {
  const char* op = "certainty_forcing_loss_backward_";
  const SavedTensors saved{grad_loss, labels, stats, order, counts};
  const LogitsView view = check_loss_logits(op, logits, kCpu);
  const LossOptions options = check_backward(op, view, logits, saved, temperature, beta);
  check_no_overlap(op, logits);
  run_backward(op, view, view, saved, options);
}

}  // namespace
}  // namespace lopa

STABLE_TORCH_LIBRARY_IMPL(lopa, CPU, m) {
  m.impl("certainty_forcing_loss", TORCH_BOX(&lopa::loss_forward));
  m.impl("certainty_forcing_loss_backward", TORCH_BOX(&lopa::loss_backward));
  m.impl("certainty_forcing_loss_backward_", TORCH_BOX(&lopa::loss_backward_));
}
