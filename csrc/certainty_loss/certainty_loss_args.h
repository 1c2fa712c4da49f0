// What arrives through torch.ops for the loss, checked, for the libraries of all devices. Only
// shapes, strides, dtypes and devices are read: no memory.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "certainty_loss/params.h"
#include "confidence/confidence_args.h"
#include "lopa/checks.h"
#include "lopa/tensor.h"

namespace lopa {

struct LossOptions {
  double temperature;
  double beta;
};

inline LossOptions check_loss_options(const char* op, double temperature, double beta) {
  if (!(temperature > 0) || !std::isfinite(temperature)) {
    fail(op, "temperature", "a finite number > 0", temperature);
  }
  if (!std::isfinite(beta)) fail(op, "beta", "a finite number", beta);
  return {temperature, beta};
}

inline std::vector<int64_t> leading_shape(const Tensor& logits) {
  auto sizes = logits.sizes();
  return {sizes.begin(), sizes.end() - 1};
}

// Rows are numbered in 32 bits.
inline LogitsView check_loss_logits(const char* op, const Tensor& logits, Device device) {
  const LogitsView view = make_logits_view(op, logits, device);
  if (view.rows > std::numeric_limits<int32_t>::max()) {
    fail(op, "logits", "less than 2^31 rows", view.rows);
  }
  return view;
}

// A tensor of one value a row of the logits.
inline void check_row_tensor(const char* op, const char* argument, const Tensor& tensor,
                             ScalarType dtype, const Tensor& logits, Device device) {
  check_output(op, argument, tensor, dtype, leading_shape(logits), device);
}

// Whether two elements may share memory: a gradient must not be written over another's logits.
inline void check_no_overlap(const char* op, const Tensor& logits) {
  std::vector<std::pair<int64_t, int64_t>> dimensions;  // stride, size
  for (int64_t d = 0; d < logits.dim(); ++d) {
    if (logits.size(d) == 0) return;
    if (logits.size(d) > 1) dimensions.emplace_back(logits.stride(d), logits.size(d));
  }
  std::sort(dimensions.begin(), dimensions.end());
  int64_t extent = 1;
  for (auto [stride, size] : dimensions) {
    if (stride < extent) {
      fail(op, "logits", "elements that share no memory",
           "strides " + shape_string(logits.strides().data(), logits.strides().size()));
    }
    extent = stride * size;
  }
}

// The tensors that the forward pass made.
inline void check_saved(const char* op, const Tensor& grad_loss, const Tensor& stats,
                        const Tensor& order, const Tensor& counts, int64_t rows, Device device) {
  check_tensor(op, "grad_loss", grad_loss, ScalarType::Float, {}, device);
  check_tensor(op, "stats", stats, ScalarType::Float, {rows, 4}, device);
  check_tensor(op, "order", order, ScalarType::Int, {rows + 1}, device);
  check_tensor(op, "counts", counts, ScalarType::Int, {2}, device);
}

}  // namespace lopa
