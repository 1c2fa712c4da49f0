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

// The rows to evaluate, in the order of the outputs.
class RowMap {
 public:
  RowMap(const char* op, const LogitsView& view, const Tensor& logits, const OptTensor& rows)
      : shape_(output_shape(op, logits, rows, kCpu)), count_(view.rows) {
    if (!rows.has_value()) return;
    elements_.emplace(*rows);
    indices_ = data<int32_t>(*rows);
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
  int64_t count_;
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
  Tensor token = empty_output(map.shape(), ScalarType::Long, kCpu);
  Tensor prob = empty_output(map.shape(), ScalarType::Float, kCpu);
  Tensor score = empty_output(map.shape(), ScalarType::Float, kCpu);
  run_token_confidence(view, config, map, token, prob, score);
  return {token, prob, score};
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
  check_output(op, "token", token, ScalarType::Long, map.shape(), kCpu);
  check_output(op, "prob", prob, ScalarType::Float, map.shape(), kCpu);
  check_output(op, "score", score, ScalarType::Float, map.shape(), kCpu);
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
  Tensor token = empty_output(map.shape(), ScalarType::Long, kCpu);
  Tensor floats[4];
  for (Tensor& tensor : floats) tensor = empty_output(map.shape(), ScalarType::Float, kCpu);
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

}  // namespace

ConfidenceConfig make_confidence_config(const char* op, const std::string& metric,
                                        double temperature, std::optional<int64_t> top_k,
                                        std::optional<double> top_p, const OptTensor& seed,
                                        const OptTensor& step) {
  Sampling sampling = check_sampling(op, metric, temperature, top_k, top_p, seed, step, kCpu);
  if (sampling.seed != nullptr) sampling.config.seed = static_cast<uint64_t>(*sampling.seed);
  if (sampling.step != nullptr) sampling.config.step = static_cast<uint64_t>(*sampling.step);
  return sampling.config;
}

}  // namespace lopa

STABLE_TORCH_LIBRARY_IMPL(lopa, CPU, m) {
  m.impl("token_confidence", TORCH_BOX(&lopa::token_confidence));
  m.impl("token_confidence_out", TORCH_BOX(&lopa::token_confidence_out));
  m.impl("softmax_stats", TORCH_BOX(&lopa::softmax_stats));
}

STABLE_TORCH_LIBRARY_IMPL(lopa_eager, CPU, m) {
  m.impl("token_confidence", TORCH_BOX(&lopa::token_confidence));
  m.impl("token_confidence_out", TORCH_BOX(&lopa::token_confidence_out));
  m.impl("softmax_stats", TORCH_BOX(&lopa::softmax_stats));
}
