// token_confidence and softmax_stats on NPUs.
#include <tuple>
#include <vector>

#include "vocabulary_npu.h"

namespace lopa {
namespace {

using Shape = std::vector<int64_t>;

#define LOPA_CONFIDENCE_PARAMETERS \
  const Tensor &logits, const OptTensor &rows, const OptTensor &seed, const OptTensor &step

// One call: its arguments checked, the list of rows made contiguous.
class ConfidenceCall : public NpuCall {
 public:
  ConfidenceCall(const char* op, LOPA_CONFIDENCE_PARAMETERS, const std::string& metric,
                 double temperature, std::optional<int64_t> top_k, std::optional<double> top_p)
      : NpuCall(op, "logits", logits),
        logits_(logits),
        shape_(output_shape(op, logits, rows, device())) {
    const LogitsView view = make_logits_view(op, logits, device());
    sampling_ = check_sampling(op, metric, temperature, top_k, top_p, seed, step, device());
    check_unfiltered(op, sampling_, view.vocab);
    if (rows.has_value()) rows_ = as_contiguous(*rows);
  }

  const Shape& shape() const { return shape_; }

  Tensor output(ScalarType dtype) const { return empty_output(shape_, dtype, device()); }

  template <typename T>
  Operand operand(const Tensor& tensor) const {
    return Operand::dense(data<T>(tensor), shape_);
  }

  bool is_empty() const {
    for (int64_t size : shape_) {
      if (size == 0) return true;
    }
    return false;
  }

  void token_confidence(const Tensor& token, const Tensor& prob, const Tensor& score) const {
    if (is_empty()) return;
    const Tensor unusable = output(ScalarType::Int);
    launch_token_confidence(*this, logits_, rows(), sampling_,
                            {operand<int64_t>(token), operand<float>(prob), operand<float>(score),
                             operand<int32_t>(unusable)});
  }

  void softmax_stats(const Tensor& token, const Tensor (&floats)[4]) const {
    if (is_empty()) return;
    const ConfidenceConfig& config = sampling_.config;
    launch("aclnnLopaSoftmaxStats", logits_operand(logits_), rows(),
           Operand::dense(sampling_.seed, {1}), Operand::dense(sampling_.step, {1}),
           bits_of(config.temperature), config.top_k, bits_of(config.top_p),
           operand<int64_t>(token), operand<float>(floats[0]), operand<float>(floats[1]),
           operand<float>(floats[2]), operand<float>(floats[3]));
  }

 private:
  Operand rows() const {
    return Operand::dense(rows_.has_value() ? data<int32_t>(*rows_) : nullptr, shape_);
  }

  Tensor logits_;
  Shape shape_;
  Sampling sampling_;
  OptTensor rows_;
};

std::tuple<Tensor, Tensor, Tensor> token_confidence(LOPA_CONFIDENCE_PARAMETERS,
                                                    TextHandle metric_text, double temperature,
                                                    std::optional<int64_t> top_k,
                                                    std::optional<double> top_p) {
  const std::string metric = take_text(metric_text);
  const ConfidenceCall call("token_confidence", logits, rows, seed, step, metric, temperature,
                            top_k, top_p);
  const Tensor token = call.output(ScalarType::Long), prob = call.output(ScalarType::Float),
               score = call.output(ScalarType::Float);
  call.token_confidence(token, prob, score);
  return {token, prob, score};
}

void token_confidence_out(LOPA_CONFIDENCE_PARAMETERS, TextHandle metric_text, double temperature,
                          std::optional<int64_t> top_k, std::optional<double> top_p,
                          const Tensor& token, const Tensor& prob, const Tensor& score) {
  const char* op = "token_confidence_out";
  const std::string metric = take_text(metric_text);
  const ConfidenceCall call(op, logits, rows, seed, step, metric, temperature, top_k, top_p);
  check_output(op, "token", token, ScalarType::Long, call.shape(), call.device());
  check_output(op, "prob", prob, ScalarType::Float, call.shape(), call.device());
  check_output(op, "score", score, ScalarType::Float, call.shape(), call.device());
  // The kernels write contiguous memory.
  const Tensor* outputs[] = {&token, &prob, &score};
  Tensor written[3];
  for (int i = 0; i < 3; ++i) {
    written[i] = outputs[i]->is_contiguous() ? *outputs[i] : call.output(outputs[i]->scalar_type());
  }
  call.token_confidence(written[0], written[1], written[2]);
  for (int i = 0; i < 3; ++i) {
    if (outputs[i]->is_contiguous()) continue;
    Tensor target = *outputs[i];
    torch::stable::copy_(target, written[i]);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> softmax_stats(LOPA_CONFIDENCE_PARAMETERS,
                                                                 double temperature,
                                                                 std::optional<int64_t> top_k,
                                                                 std::optional<double> top_p) {
  const ConfidenceCall call("softmax_stats", logits, rows, seed, step, "prob", temperature, top_k,
                            top_p);
  const Tensor token = call.output(ScalarType::Long);
  Tensor floats[4];
  for (Tensor& tensor : floats) tensor = call.output(ScalarType::Float);
  call.softmax_stats(token, floats);
  return {token, floats[0], floats[1], floats[2], floats[3]};
}

}  // namespace
}  // namespace lopa

STABLE_TORCH_LIBRARY_IMPL(lopa, PrivateUse1, m) {
  m.impl("token_confidence", TORCH_BOX(&lopa::token_confidence));
  m.impl("token_confidence_out", TORCH_BOX(&lopa::token_confidence_out));
  m.impl("softmax_stats", TORCH_BOX(&lopa::softmax_stats));
}
