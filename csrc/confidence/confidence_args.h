// What arrives through torch.ops for a vocabulary pass, checked and turned into plain structs, for
// the libraries of all devices. Only shapes, strides, dtypes and devices are read: no memory.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "confidence/params.h"
#include "lopa/checks.h"
#include "lopa/tensor.h"

namespace lopa {

// "prob", "margin" or "neg_entropy".
inline Metric parse_metric(const char* op, const std::string& metric) {
  if (metric == "prob") return Metric::kProb;
  if (metric == "margin") return Metric::kMargin;
  if (metric == "neg_entropy") return Metric::kNegEntropy;
  fail(op, "metric", "one of prob, margin, neg_entropy", metric);
}

// Checks device, dtype and the stride of the vocabulary; never copies.
inline LogitsView make_logits_view(const char* op, const Tensor& logits, Device device = kCpu) {
  check_device(op, "logits", logits, device);
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

// How a call filters and draws. `config` has its seed and step still at 0: they are in memory of
// the device, at `seed` and `step` (null where the caller gave none).
struct Sampling {
  ConfidenceConfig config;
  const int64_t* seed;
  const int64_t* step;
};

inline const int64_t* counter_pointer(const char* op, const char* argument, const OptTensor& tensor,
                                      Device device) {
  if (!tensor.has_value()) return nullptr;
  check_device(op, argument, *tensor, device);
  check_dtype(op, argument, *tensor, ScalarType::Long);
  if (tensor->numel() != 1) fail(op, argument, "one element", "shape " + shape_string(*tensor));
  return data<int64_t>(*tensor);
}

// Checks the ranges, and that `seed` is there when `temperature` > 0.
inline Sampling check_sampling(const char* op, const std::string& metric, double temperature,
                               std::optional<int64_t> top_k, std::optional<double> top_p,
                               const OptTensor& seed, const OptTensor& step, Device device) {
  Sampling sampling{};
  ConfidenceConfig& config = sampling.config;
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
  sampling.seed = counter_pointer(op, "seed", seed, device);
  sampling.step = counter_pointer(op, "step", step, device);
  return sampling;
}

// The shape of the outputs: that of `rows`, whose device and dtype are checked, or the leading
// dimensions of `logits`.
inline std::vector<int64_t> output_shape(const char* op, const Tensor& logits,
                                         const OptTensor& rows, Device device) {
  if (!rows.has_value()) {
    auto sizes = logits.sizes();
    return {sizes.begin(), sizes.end() - 1};
  }
  check_device(op, "rows", *rows, device);
  check_dtype(op, "rows", *rows, ScalarType::Int);
  auto sizes = rows->sizes();
  return {sizes.begin(), sizes.end()};
}

// A contiguous tensor, uninitialised.
inline Tensor empty_output(const std::vector<int64_t>& shape, ScalarType dtype, Device device) {
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
                                                         device.type, device.index, &handle));
  return Tensor(handle);
}

// A tensor that the caller gave for an output.
inline void check_output(const char* op, const char* argument, const Tensor& tensor,
                         ScalarType dtype, const std::vector<int64_t>& shape, Device device) {
  check_device(op, argument, tensor, device);
  check_dtype(op, argument, tensor, dtype);
  auto sizes = tensor.sizes();
  if (!std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end())) {
    fail(op, argument, "shape " + shape_string(shape.data(), shape.size()),
         "shape " + shape_string(tensor));
  }
}

}  // namespace lopa
