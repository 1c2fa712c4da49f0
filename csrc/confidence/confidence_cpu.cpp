// Checks, outputs and CPU registration of token_confidence and softmax_stats.
#include "confidence/confidence_cpu.h"

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "lopa/checks.h"

namespace lopa {
namespace {

// Rows are evaluated in chunks, so that the memory beside the outputs does not grow with them.
constexpr int64_t kChunkRows = 2048;

// Element i, in row-major order, of a tensor with any strides.
struct StridedElements {
  std::vector<int64_t> sizes, strides;
  bool contiguous;

  explicit StridedElements(const Tensor& tensor) : contiguous(tensor.is_contiguous()) {
    auto size = tensor.sizes();
    auto stride = tensor.strides();
    sizes.assign(size.begin(), size.end());
    strides.assign(stride.begin(), stride.end());
  }

  int64_t offset(int64_t i) const {
    if (contiguous) return i;
    int64_t offset = 0;
    for (size_t d = sizes.size(); d-- > 0;) {
      offset += (i % sizes[d]) * strides[d];
      i /= sizes[d];
    }
    return offset;
  }
};

template <typename T>
class Output {
 public:
  explicit Output(const Tensor& tensor) : data_(mutable_data<T>(tensor)), elements_(tensor) {}
  void set(int64_t i, T value) { data_[elements_.offset(i)] = value; }

 private:
  T* data_;
  StridedElements elements_;
};

Tensor empty_of_shape(const std::vector<int64_t>& shape, ScalarType dtype) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t d = shape.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(shape[d], 1);
  }
  int32_t shim_dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()),
                                                         shape.data(), strides.data(), shim_dtype,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// The rows to evaluate, in the order of the outputs.
class RowMap {
 public:
  RowMap(const char* op, const LogitsView& view, const Tensor& logits, const OptTensor& rows) {
    if (!rows.has_value()) {
      auto sizes = logits.sizes();
      shape_.assign(sizes.begin(), sizes.end() - 1);
      count_ = view.rows;
      return;
    }
    check_cpu(op, "rows", *rows);
    check_dtype(op, "rows", *rows, ScalarType::Int);
    elements_.emplace(*rows);
    indices_ = data<int32_t>(*rows);
    shape_ = elements_->sizes;
    count_ = rows->numel();
    for (int64_t i = 0; i < count_; ++i) {
      int64_t row = at(i);
      if (row < -1 || row >= view.rows) {
        fail(op, "rows", "-1 or an index below R = " + std::to_string(view.rows),
             std::to_string(row) + " at flat index " + std::to_string(i));
      }
    }
  }

  const std::vector<int64_t>& shape() const { return shape_; }
  int64_t count() const { return count_; }
  int64_t at(int64_t i) const { return elements_ ? indices_[elements_->offset(i)] : i; }

 private:
  std::vector<int64_t> shape_;
  int64_t count_ = 0;
  std::optional<StridedElements> elements_;
  const int32_t* indices_ = nullptr;
};

template <typename Write>
void evaluate(const LogitsView& view, const ConfidenceConfig& config, const RowMap& map,
              bool all_stats, Write write) {
  int64_t chunk = std::min(map.count(), kChunkRows);
  std::vector<int64_t> rows(static_cast<size_t>(chunk));
  std::vector<RowStats> stats(static_cast<size_t>(chunk));
  for (int64_t begin = 0; begin < map.count(); begin += chunk) {
    int64_t n = std::min(chunk, map.count() - begin);
    for (int64_t i = 0; i < n; ++i) rows[i] = map.at(begin + i);
    confidence_rows(view, config, rows.data(), n, all_stats, stats.data());
    for (int64_t i = 0; i < n; ++i) write(begin + i, stats[i]);
  }
}

void run_token_confidence(const LogitsView& view, const ConfidenceConfig& config, const RowMap& map,
                          const Tensor& token, const Tensor& prob, const Tensor& score) {
  Output<int64_t> tokens(token);
  Output<float> probs(prob), scores(score);
  evaluate(view, config, map, false, [&](int64_t i, const RowStats& stats) {
    tokens.set(i, stats.token);
    probs.set(i, stats.prob);
    scores.set(i, stats.score(config.metric));
  });
}

std::tuple<Tensor, Tensor, Tensor> token_confidence(const Tensor& logits, const OptTensor& rows,
                                                    const OptTensor& seed, const OptTensor& step,
                                                    TextHandle metric_text, double temperature,
                                                    std::optional<int64_t> top_k,
                                                    std::optional<double> top_p) {
  const char* op = "token_confidence";
  const std::string metric = take_text(metric_text);
  LogitsView view = make_logits_view(op, logits);
  ConfidenceConfig config =
      make_confidence_config(op, metric, temperature, top_k, top_p, seed, step);
  RowMap map(op, view, logits, rows);
  Tensor token = empty_of_shape(map.shape(), ScalarType::Long);
  Tensor prob = empty_of_shape(map.shape(), ScalarType::Float);
  Tensor score = empty_of_shape(map.shape(), ScalarType::Float);
  run_token_confidence(view, config, map, token, prob, score);
  return {token, prob, score};
}

void check_output(const char* op, const char* argument, const Tensor& tensor, ScalarType dtype,
                  const std::vector<int64_t>& shape) {
  check_cpu(op, argument, tensor);
  check_dtype(op, argument, tensor, dtype);
  auto sizes = tensor.sizes();
  if (!std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end())) {
    fail(op, argument, "shape " + shape_string(shape.data(), shape.size()),
         "shape " + shape_string(tensor));
  }
}

void token_confidence_out(const Tensor& logits, const OptTensor& rows, const OptTensor& seed,
                          const OptTensor& step, TextHandle metric_text, double temperature,
                          std::optional<int64_t> top_k, std::optional<double> top_p,
                          const Tensor& token, const Tensor& prob, const Tensor& score) {
  const char* op = "token_confidence_out";
  const std::string metric = take_text(metric_text);
  LogitsView view = make_logits_view(op, logits);
  ConfidenceConfig config =
      make_confidence_config(op, metric, temperature, top_k, top_p, seed, step);
  RowMap map(op, view, logits, rows);
  check_output(op, "token", token, ScalarType::Long, map.shape());
  check_output(op, "prob", prob, ScalarType::Float, map.shape());
  check_output(op, "score", score, ScalarType::Float, map.shape());
  run_token_confidence(view, config, map, token, prob, score);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> softmax_stats(
    const Tensor& logits, const OptTensor& rows, const OptTensor& seed, const OptTensor& step,
    double temperature, std::optional<int64_t> top_k, std::optional<double> top_p) {
  const char* op = "softmax_stats";
  LogitsView view = make_logits_view(op, logits);
  ConfidenceConfig config =
      make_confidence_config(op, "prob", temperature, top_k, top_p, seed, step);
  RowMap map(op, view, logits, rows);
  Tensor token = empty_of_shape(map.shape(), ScalarType::Long);
  Tensor floats[4];
  for (Tensor& tensor : floats) tensor = empty_of_shape(map.shape(), ScalarType::Float);
  Output<int64_t> tokens(token);
  Output<float> prob(floats[0]), margin(floats[1]), neg_entropy(floats[2]), lse(floats[3]);
  evaluate(view, config, map, true, [&](int64_t i, const RowStats& stats) {
    tokens.set(i, stats.token);
    prob.set(i, stats.prob);
    margin.set(i, stats.margin);
    neg_entropy.set(i, stats.neg_entropy);
    lse.set(i, stats.lse);
  });
  return {token, floats[0], floats[1], floats[2], floats[3]};
}

uint64_t read_integer(const char* op, const char* argument, const Tensor& tensor) {
  check_cpu(op, argument, tensor);
  check_dtype(op, argument, tensor, ScalarType::Long);
  if (tensor.numel() != 1) fail(op, argument, "one element", "shape " + shape_string(tensor));
  return static_cast<uint64_t>(*data<int64_t>(tensor));
}

}  // namespace

Metric parse_metric(const char* op, const std::string& metric) {
  if (metric == "prob") return Metric::kProb;
  if (metric == "margin") return Metric::kMargin;
  if (metric == "neg_entropy") return Metric::kNegEntropy;
  fail(op, "metric", "one of prob, margin, neg_entropy", metric);
}

LogitsView make_logits_view(const char* op, const Tensor& logits) {
  check_cpu(op, "logits", logits);
  check_floating(op, "logits", logits);
  auto sizes = logits.sizes();
  auto strides = logits.strides();
  size_t leading = sizes.size();
  if (leading-- == 0 || sizes[leading] < 1) {
    fail(op, "logits", "shape [..., V] with V >= 1", "shape " + shape_string(logits));
  }
  if (sizes[leading] > 1 && strides[leading] != 1) {
    fail(op, "logits", "unit stride in the last dimension",
         "stride " + std::to_string(strides[leading]));
  }
  LogitsView view{};
  view.data = logits.data_ptr();
  view.dtype = float_type(logits.scalar_type());
  view.vocab = sizes[leading];
  view.rows = 1;
  for (size_t d = 0; d < leading; ++d) {
    view.rows *= sizes[d];
    if (sizes[d] == 1) continue;
    int32_t last = view.ndim - 1;
    if (last >= 0 && view.strides[last] == sizes[d] * strides[d]) {
      view.sizes[last] *= sizes[d];
      view.strides[last] = strides[d];
      continue;
    }
    if (view.ndim == kMaxLeadingDims) {
      fail(op, "logits", "at most 8 leading dimensions that do not merge",
           "shape " + shape_string(logits));
    }
    view.sizes[view.ndim] = sizes[d];
    view.strides[view.ndim++] = strides[d];
  }
  return view;
}

ConfidenceConfig make_confidence_config(const char* op, const std::string& metric,
                                        double temperature, std::optional<int64_t> top_k,
                                        std::optional<double> top_p, const OptTensor& seed,
                                        const OptTensor& step) {
  ConfidenceConfig config{};
  config.metric = parse_metric(op, metric);
  if (!(temperature >= 0) || !std::isfinite(temperature)) {
    fail(op, "temperature", "a finite number >= 0", temperature);
  }
  if (top_k.has_value() && *top_k < 1) fail(op, "top_k", "at least 1", *top_k);
  if (top_p.has_value() && !(*top_p > 0 && *top_p <= 1)) {
    fail(op, "top_p", "a number in (0, 1]", *top_p);
  }
  config.temperature = temperature;
  config.top_k = top_k.value_or(0);
  config.top_p = top_p.value_or(1.0);
  if (temperature > 0 && !seed.has_value()) {
    fail(op, "seed", "an int64 tensor, since temperature > 0", "None");
  }
  if (seed.has_value()) config.seed = read_integer(op, "seed", *seed);
  if (step.has_value()) config.step = read_integer(op, "step", *step);
  return config;
}

}  // namespace lopa

STABLE_TORCH_LIBRARY_IMPL(lopa, CPU, m) {
  m.impl("token_confidence", TORCH_BOX(&lopa::token_confidence));
  m.impl("token_confidence_out", TORCH_BOX(&lopa::token_confidence_out));
  m.impl("softmax_stats", TORCH_BOX(&lopa::softmax_stats));
}
