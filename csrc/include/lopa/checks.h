// Checks of what arrives through torch.ops, in one wording: operator, argument, expected, got.
// The public Python functions raise ValueError and TypeError for the same mistakes earlier; these
// keep the kernels memory-safe for callers of torch.ops.lopa.
#pragma once

#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

#include "lopa/tensor.h"

namespace lopa {

template <typename Expected, typename Got>
[[noreturn]] void fail(const char* op, const char* argument, const Expected& expected,
                       const Got& got) {
  std::ostringstream message;
  message << op << ": " << argument << ": expected " << expected << ", got " << got;
  throw std::runtime_error(message.str());
}

inline std::string shape_string(const int64_t* sizes, size_t ndim) {
  std::ostringstream out;
  out << "[";
  for (size_t d = 0; d < ndim; ++d) out << (d ? ", " : "") << sizes[d];
  out << "]";
  return out.str();
}

inline std::string shape_string(const Tensor& tensor) {
  return shape_string(tensor.sizes().data(), tensor.sizes().size());
}

inline void check_device(const char* op, const char* argument, const Tensor& tensor,
                         Device device) {
  Device own = device_of(tensor);
  if (!(own == device)) {
    fail(op, argument, "a tensor on " + device_string(device), device_string(own));
  }
}

inline void check_cpu(const char* op, const char* argument, const Tensor& tensor) {
  check_device(op, argument, tensor, kCpu);
}

inline void check_dtype(const char* op, const char* argument, const Tensor& tensor,
                        ScalarType dtype) {
  if (tensor.scalar_type() != dtype) {
    fail(op, argument, std::string("dtype ") + dtype_name(dtype), dtype_name(tensor.scalar_type()));
  }
}

inline void check_floating(const char* op, const char* argument, const Tensor& tensor) {
  ScalarType dtype = tensor.scalar_type();
  if (dtype != ScalarType::BFloat16 && dtype != ScalarType::Half && dtype != ScalarType::Float) {
    fail(op, argument, "dtype BFloat16, Half or Float", dtype_name(dtype));
  }
}

inline void check_rank(const char* op, const char* argument, const Tensor& tensor, int64_t rank) {
  if (tensor.dim() != rank) {
    fail(op, argument, std::to_string(rank) + " dimensions", "shape " + shape_string(tensor));
  }
}

inline void check_unit_stride(const char* op, const char* argument, const Tensor& tensor) {
  int64_t last = tensor.dim() - 1;
  if (tensor.size(last) > 1 && tensor.stride(last) != 1) {
    fail(op, argument, "unit stride in the last dimension",
         "strides " + shape_string(tensor.strides().data(), tensor.strides().size()));
  }
}

inline void check_shape(const char* op, const char* argument, const Tensor& tensor,
                        std::initializer_list<int64_t> shape) {
  auto sizes = tensor.sizes();
  bool same = sizes.size() == shape.size();
  const int64_t* want = shape.begin();
  for (size_t d = 0; same && d < shape.size(); ++d) same = sizes[d] == want[d];
  if (!same) {
    fail(op, argument, "shape " + shape_string(want, shape.size()),
         "shape " + shape_string(tensor));
  }
}

// dtype, device and shape at once: what every small state tensor is held to.
inline void check_tensor(const char* op, const char* argument, const Tensor& tensor,
                         ScalarType dtype, std::initializer_list<int64_t> shape,
                         Device device = kCpu) {
  check_device(op, argument, tensor, device);
  check_dtype(op, argument, tensor, dtype);
  check_shape(op, argument, tensor, shape);
}

}  // namespace lopa
