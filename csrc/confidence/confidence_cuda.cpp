// Checks, outputs and CUDA registration of token_confidence and softmax_stats.
#include "confidence/confidence_cuda.h"

#include <algorithm>
#include <cfloat>
#include <tuple>

#include "confidence/confidence_launch.h"
#include "lopa/cuda_tensor.h"

namespace lopa {

using confidence::VocabularyArgs;

VocabularyArgs make_vocabulary_args(const char* op, const LogitsView& logits,
                                    const Sampling& sampling, bool all_stats, int64_t capacity) {
  constexpr double kLog2E = 1.4426950408889634;
  const ConfidenceConfig& config = sampling.config;
  VocabularyArgs args{};
  args.logits = logits;
  args.capacity = capacity;
  args.tiles = (logits.vocab + confidence::kTile - 1) / confidence::kTile;
  args.by_row = logits.rows < capacity;
  args.inverse_temperature = config.inverse_temperature();
  // Beyond these every weight but the maximum's is 0, or every weight is 1.
  args.scale =
      static_cast<float>(std::clamp<double>(kLog2E * args.inverse_temperature, FLT_MIN, FLT_MAX));
  args.all_stats = all_stats;
  args.metric = config.metric;
  args.sampled = config.temperature > 0;
  args.top_k = config.top_k > 0 ? std::min(config.top_k, logits.vocab) : logits.vocab;
  args.top_p = config.top_p;
  args.filtered = args.top_k < logits.vocab || args.top_p < 1.0;
  args.seed = sampling.seed;
  args.step = sampling.step;
  if (logits.vocab > confidence::kMostVocab) {
    fail(op, "logits", "at most " + std::to_string(confidence::kMostVocab) + " tokens",
         logits.vocab);
  }
  if (args.tiles > 0 && capacity > confidence::kMostItems / args.tiles) {
    fail(op, "rows", "at most " + std::to_string(confidence::kMostItems / args.tiles), capacity);
  }
  args.by_tiles = make_divisor(static_cast<uint32_t>(args.tiles));
  if (args.filtered && args.tiles > confidence::kMostFilterTiles) {
    fail(op, "top_k, top_p",
         "none above " + std::to_string(confidence::kMostFilterTiles * confidence::kTile) +
             " tokens",
         logits.vocab);
  }
  return args;
}

size_t partials_bytes(const VocabularyArgs& args) {
  const size_t tiles = std::min(args.capacity, args.logits.rows) * args.tiles;
  return tiles * (sizeof(confidence::Partial) + (args.wants_second() ? sizeof(float) : 0));
}

void place_partials(VocabularyArgs& args, void* memory) {
  const size_t tiles = std::min(args.capacity, args.logits.rows) * args.tiles;
  args.partials = static_cast<confidence::Partial*>(memory);
  args.second = args.wants_second() ? reinterpret_cast<float*>(args.partials + tiles) : nullptr;
}

namespace {

using Shape = std::vector<int64_t>;

#define LOPA_CONFIDENCE_PARAMETERS \
  const Tensor &logits, const OptTensor &rows, const OptTensor &seed, const OptTensor &step

// One call: the device, and the list of rows made contiguous.
class ConfidenceCall {
 public:
  ConfidenceCall(const char* op, LOPA_CONFIDENCE_PARAMETERS, const std::string& metric,
                 double temperature, std::optional<int64_t> top_k, std::optional<double> top_p,
                 bool all_stats)
      : call_(op, "logits", logits), shape_(output_shape(op, logits, rows, call_.device())) {
    const LogitsView view = make_logits_view(op, logits, call_.device());
    const Sampling sampling =
        check_sampling(op, metric, temperature, top_k, top_p, seed, step, call_.device());
    int64_t count = 1;
    for (int64_t size : shape_) count *= size;
    args_ = make_vocabulary_args(op, view, sampling, all_stats, count);
    if (rows.has_value()) {
      rows_ = as_contiguous(*rows);
      args_.rows = data<int32_t>(rows_);
    }
  }

  const Shape& shape() const { return shape_; }
  Device device() const { return call_.device(); }

  Tensor output(ScalarType dtype) const { return empty_output(shape_, dtype, device()); }

  void run(const confidence::StatsOutput& out) {
    if (args_.capacity == 0) return;
    const int64_t bytes = static_cast<int64_t>(partials_bytes(args_));
    const Tensor memory(empty_handle({bytes}, ScalarType::Byte, device()));
    place_partials(args_, memory.data_ptr());
    if (args_.logits.rows > 0) confidence::launch_vocabulary_pass(args_, call_.stream());
    confidence::launch_merge(args_, out, call_.stream());
  }

 private:
  CudaCall call_;
  Shape shape_;
  Tensor rows_;
  VocabularyArgs args_;
};

std::tuple<Tensor, Tensor, Tensor> token_confidence(LOPA_CONFIDENCE_PARAMETERS,
                                                    TextHandle metric_text, double temperature,
                                                    std::optional<int64_t> top_k,
                                                    std::optional<double> top_p) {
  const std::string metric = take_text(metric_text);
  ConfidenceCall call("token_confidence", logits, rows, seed, step, metric, temperature, top_k,
                      top_p, false);
  const Tensor token = call.output(ScalarType::Long), prob = call.output(ScalarType::Float),
               score = call.output(ScalarType::Float);
  call.run({mutable_data<int64_t>(token), mutable_data<float>(prob), mutable_data<float>(score)});
  return {token, prob, score};
}

void token_confidence_out(LOPA_CONFIDENCE_PARAMETERS, TextHandle metric_text, double temperature,
                          std::optional<int64_t> top_k, std::optional<double> top_p,
                          const Tensor& token, const Tensor& prob, const Tensor& score) {
  const char* op = "token_confidence_out";
  const std::string metric = take_text(metric_text);
  ConfidenceCall call(op, logits, rows, seed, step, metric, temperature, top_k, top_p, false);
  check_output(op, "token", token, ScalarType::Long, call.shape(), call.device());
  check_output(op, "prob", prob, ScalarType::Float, call.shape(), call.device());
  check_output(op, "score", score, ScalarType::Float, call.shape(), call.device());
  // The kernels write contiguous memory.
  const Tensor* outputs[] = {&token, &prob, &score};
  Tensor written[3];
  for (int i = 0; i < 3; ++i) {
    written[i] = outputs[i]->is_contiguous() ? *outputs[i] : call.output(outputs[i]->scalar_type());
  }
  call.run({mutable_data<int64_t>(written[0]), mutable_data<float>(written[1]),
            mutable_data<float>(written[2])});
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
  ConfidenceCall call("softmax_stats", logits, rows, seed, step, "prob", temperature, top_k, top_p,
                      true);
  const Tensor token = call.output(ScalarType::Long);
  Tensor floats[4];
  for (Tensor& tensor : floats) tensor = call.output(ScalarType::Float);
  confidence::StatsOutput out{};
  out.token = mutable_data<int64_t>(token);
  out.prob = mutable_data<float>(floats[0]);
  out.margin = mutable_data<float>(floats[1]);
  out.neg_entropy = mutable_data<float>(floats[2]);
  out.lse = mutable_data<float>(floats[3]);
  call.run(out);
  return {token, floats[0], floats[1], floats[2], floats[3]};
}

}  // namespace
}  // namespace lopa

STABLE_TORCH_LIBRARY_IMPL(lopa, CUDA, m) {
  m.impl("token_confidence", TORCH_BOX(&lopa::token_confidence));
  m.impl("token_confidence_out", TORCH_BOX(&lopa::token_confidence_out));
  m.impl("softmax_stats", TORCH_BOX(&lopa::softmax_stats));
}

STABLE_TORCH_LIBRARY_IMPL(lopa_eager, CUDA, m) {
  m.impl("token_confidence", TORCH_BOX(&lopa::token_confidence));
  m.impl("token_confidence_out", TORCH_BOX(&lopa::token_confidence_out));
  m.impl("softmax_stats", TORCH_BOX(&lopa::softmax_stats));
}
