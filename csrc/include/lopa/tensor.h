// The only header of the project that knows torch: aliases of the stable ABI, and the few
// operations that its own headers make slow (`empty`) or leave out.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>

namespace lopa {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;

// `torch::stable::empty` goes through the dispatcher (about 1 us a call); this does not.
inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype, const Tensor& like) {
  int64_t strides[8];
  int64_t ndim = static_cast<int64_t>(sizes.size());
  int64_t stride = 1;
  const int64_t* size = sizes.begin();
  for (int64_t d = ndim - 1; d >= 0; --d) {
    strides[d] = stride;
    stride *= size[d] > 1 ? size[d] : 1;
  }
  int32_t device_type = 0;
  int32_t device_index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  int32_t shim_dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(ndim, size, strides, shim_dtype,
                                                         device_type, device_index, &handle));
  return Tensor(handle);
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline const char* dtype_name(ScalarType dtype) { return torch::headeronly::toString(dtype); }

}  // namespace lopa
