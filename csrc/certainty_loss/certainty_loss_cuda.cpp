// Checks, outputs and CUDA registration of the certainty-forcing loss.
#include <tuple>

#include "certainty_loss/certainty_loss_args.h"
#include "certainty_loss/loss_launch.h"
#include "confidence/confidence_cuda.h"
#include "lopa/cuda_tensor.h"

namespace lopa {
namespace {

using certainty_loss::GradientArgs;
using certainty_loss::LossArgs;
using certainty_loss::RowStatistics;
using confidence::Partial;
using confidence::VocabularyArgs;

// A pass over the rows of a list [1 + N]: their number, then they.
VocabularyArgs list_args(const char* op, const LogitsView& view, const LossOptions& options,
                         const int32_t* order) {
  Sampling sampling{};
  sampling.config.metric = Metric::kNegEntropy;
  sampling.config.temperature = options.temperature;
  sampling.config.top_p = 1.0;
  VocabularyArgs args = make_vocabulary_args(op, view, sampling, false, view.rows);
  args.count = order;
  args.slots = order + 1;
  return args;
}

bool is_square(const LossOptions& options) {
  return options.temperature == certainty_loss::kSquareTemperature;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> loss_forward(const Tensor& logits,
                                                                const Tensor& labels,
                                                                const Tensor& masked,
                                                                double temperature, double beta,
                                                                bool inplace_backward) {
  const char* op = "certainty_forcing_loss";
  const CudaCall call(op, "logits", logits);
  const Device device = call.device();
  const LogitsView view = check_loss_logits(op, logits, device);
  check_row_tensor(op, "labels", labels, ScalarType::Long, logits, device);
  check_row_tensor(op, "masked", masked, ScalarType::Bool, logits, device);
  const LossOptions options = check_loss_options(op, temperature, beta);
  if (inplace_backward) check_no_overlap(op, logits);
  const int64_t rows = view.rows;
  const Tensor label_list = as_contiguous(labels), mask_list = as_contiguous(masked);
  const Tensor loss = empty({}, ScalarType::Float, logits);
  const Tensor terms = empty({2}, ScalarType::Float, logits);
  const Tensor stats = empty({rows, 4}, ScalarType::Float, logits);
  const Tensor order = empty({rows + 1}, ScalarType::Int, logits);
  const Tensor counts = empty({2}, ScalarType::Int, logits);

  LossArgs args{};
  args.order = mutable_data<int32_t>(order);
  args.vocabulary = list_args(op, view, options, args.order);
  const int64_t tiles = rows * args.vocabulary.tiles;
  const int64_t bytes =
      tiles * static_cast<int64_t>(sizeof(Partial) + sizeof(float)) + rows * sizeof(float);
  const Tensor memory(empty_handle({bytes}, ScalarType::Byte, device));
  args.vocabulary.partials = static_cast<Partial*>(memory.data_ptr());
  args.plain = reinterpret_cast<float*>(args.vocabulary.partials + tiles);
  args.cross_entropy = args.plain + tiles;
  args.labels = data<int64_t>(label_list);
  args.masked = data<bool>(mask_list);
  args.beta = options.beta;
  args.square = is_square(options);
  args.loss = mutable_data<float>(loss);
  args.terms = mutable_data<float>(terms);
  args.stats = static_cast<RowStatistics*>(stats.data_ptr());
  args.counts = mutable_data<int32_t>(counts);
  certainty_loss::launch_loss(args, call.stream());
  return {loss, terms, stats, order, counts};
}

struct SavedTensors {
  const Tensor &grad_loss, &labels, &stats, &order, &counts;
};

LossOptions check_backward(const char* op, const LogitsView& view, const Tensor& logits,
                           const SavedTensors& saved, double temperature, double beta,
                           Device device) {
  check_row_tensor(op, "labels", saved.labels, ScalarType::Long, logits, device);
  check_saved(op, saved.grad_loss, saved.stats, saved.order, saved.counts, view.rows, device);
  return check_loss_options(op, temperature, beta);
}

void run_backward(const char* op, const LogitsView& view, const LogitsView& out,
                  const SavedTensors& saved, const LossOptions& options, const CudaCall& call) {
  const Tensor labels = as_contiguous(saved.labels), stats = as_contiguous(saved.stats),
               order = as_contiguous(saved.order), counts = as_contiguous(saved.counts);
  GradientArgs args{};
  args.vocabulary = list_args(op, view, options, data<int32_t>(order));
  // What is handed on with a tile then names its row.
  args.vocabulary.by_row = true;
  args.out = out;
  args.labels = data<int64_t>(labels);
  args.stats = static_cast<const RowStatistics*>(stats.data_ptr());
  args.counts = data<int32_t>(counts);
  args.grad_loss = data<float>(saved.grad_loss);
  args.beta = static_cast<float>(options.beta);
  args.inverse_temperature = static_cast<float>(1.0 / options.temperature);
  args.square = is_square(options);
  certainty_loss::launch_gradient(args, call.stream());
}

Tensor loss_backward(const Tensor& grad_loss, const Tensor& logits, const Tensor& labels,
                     const Tensor& stats, const Tensor& order, const Tensor& counts,
                     double temperature, double beta) {
  const char* op = "certainty_forcing_loss_backward";
  const SavedTensors saved{grad_loss, labels, stats, order, counts};
  const CudaCall call(op, "logits", logits);
  const LogitsView view = check_loss_logits(op, logits, call.device());
  const LossOptions options =
      check_backward(op, view, logits, saved, temperature, beta, call.device());
  auto sizes = logits.sizes();
  const Tensor out =
      empty_output({sizes.begin(), sizes.end()}, logits.scalar_type(), call.device());
  run_backward(op, view, make_logits_view(op, out, call.device()), saved, options, call);
  return out;
}

void loss_backward_(const Tensor& grad_loss, const Tensor& logits, const Tensor& labels,
                    const Tensor& stats, const Tensor& order, const Tensor& counts,
                    double temperature, double beta) {
  const char* op = "certainty_forcing_loss_backward_";
  const SavedTensors saved{grad_loss, labels, stats, order, counts};
  const CudaCall call(op, "logits", logits);
  const LogitsView view = check_loss_logits(op, logits, call.device());
  const LossOptions options =
      check_backward(op, view, logits, saved, temperature, beta, call.device());
  check_no_overlap(op, logits);
  run_backward(op, view, view, saved, options, call);
}

}  // namespace
}  // namespace lopa

STABLE_TORCH_LIBRARY_IMPL(lopa, CUDA, m) {
  m.impl("certainty_forcing_loss", TORCH_BOX(&lopa::loss_forward));
  m.impl("certainty_forcing_loss_backward", TORCH_BOX(&lopa::loss_backward));
  m.impl("certainty_forcing_loss_backward_", TORCH_BOX(&lopa::loss_backward_));
}
