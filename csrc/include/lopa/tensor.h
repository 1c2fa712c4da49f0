// The only header of the project that knows torch: aliases of the stable ABI, and the few
// operations that its own headers make slow (`empty`) or leave out.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "lopa/float_types.h"

namespace lopa {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;

struct Device {
  int32_t type;
  int32_t index;  // 0 on the CPU

  bool operator==(const Device&) const = default;
};

inline const Device kCpu{aoti_torch_device_type_cpu(), 0};

template <typename AnyTensor>
Device device_of(const AnyTensor& tensor) {
  Device device{};
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device.type));
  if (device.type != kCpu.type) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &device.index));
  }
  return device;
}

inline std::string device_string(Device device) {
  if (device.type == kCpu.type) return "the CPU";
  if (device.type == aoti_torch_device_type_cuda()) return "cuda:" + std::to_string(device.index);
  return "another device";
}

// `torch::stable::empty` goes through the dispatcher (about 1 us a call); this does not.
inline AtenTensorHandle empty_handle(std::initializer_list<int64_t> sizes, ScalarType dtype,
                                     Device device) {
  int64_t strides[8];
  int64_t ndim = static_cast<int64_t>(sizes.size());
  int64_t stride = 1;
  const int64_t* size = sizes.begin();
  for (int64_t d = ndim - 1; d >= 0; --d) {
    strides[d] = stride;
    stride *= size[d] > 1 ? size[d] : 1;
  }
  int32_t shim_dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(ndim, size, strides, shim_dtype,
                                                         device.type, device.index, &handle));
  return handle;
}

inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype, const Tensor& like) {
  return Tensor(empty_handle(sizes, dtype, device_of(like)));
}

// A tensor as an argument or result of a boxed kernel, owned by whoever holds it. (The shim's own
// conversions are ambiguous for a bare AtenTensorHandle.)
struct TensorHandle {
  AtenTensorHandle handle;
};

// A string argument of a boxed kernel. Where the kernel names std::string, torch::stable makes the
// string with a `new` that nothing deletes (ToImpl<std::string> of torch 2.13).
struct TextHandle {
  StringHandle handle;
};

// The characters of such an argument, which is given back with its owner.
class OwnedText {
 public:
  explicit OwnedText(TextHandle given) : handle_(given.handle) {}
  OwnedText(const OwnedText&) = delete;
  OwnedText& operator=(const OwnedText&) = delete;
  ~OwnedText() { torch_delete_string(handle_); }

  std::string_view view() const {
    size_t length = 0;
    const char* characters = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle_, &length));
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle_, &characters));
    return {characters, length};
  }

 private:
  StringHandle handle_;
};

inline std::string take_text(TextHandle text) { return std::string(OwnedText(text).view()); }

// A tensor with one owner, for operators of many small tensors: `Tensor` allocates a shared count
// for each that comes in, and that and a second handle for each that goes out. A kernel takes and
// returns TensorHandle then, and owns what it is given: the conversion comes before anything that
// can throw.
class OwnedTensor {
 public:
  OwnedTensor() = default;
  OwnedTensor(TensorHandle given) : handle_(given.handle) {}
  OwnedTensor(OwnedTensor&& other) noexcept : handle_(other.release().handle) {}
  OwnedTensor& operator=(OwnedTensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~OwnedTensor() {
    if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);
  }

  AtenTensorHandle get() const { return handle_; }

  TensorHandle release() { return {std::exchange(handle_, nullptr)}; }

  // The same tensor for what asks for a `Tensor`, such as the wording of an error.
  Tensor shared() const {
    AtenTensorHandle handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(handle_, &handle));
    return Tensor(handle);
  }

  torch::headeronly::IntHeaderOnlyArrayRef sizes() const {
    int64_t ndim = 0;
    int64_t* sizes = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle_, &ndim));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle_, &sizes));
    return {sizes, static_cast<size_t>(ndim)};
  }

  bool is(Device device, ScalarType dtype, std::initializer_list<int64_t> shape) const {
    int32_t own_dtype = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle_, &own_dtype));
    const auto own = sizes();
    return device_of(*this) == device &&
           own_dtype == torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)) &&
           std::equal(shape.begin(), shape.end(), own.begin(), own.end());
  }

  bool is_contiguous() const {
    bool contiguous = false;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(handle_, &contiguous));
    return contiguous;
  }

  void* data_ptr() const {
    void* data = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle_, &data));
    return data;
  }

 private:
  AtenTensorHandle handle_ = nullptr;
};

template <typename T, typename AnyTensor>
const T* data(const AnyTensor& tensor) {
  return static_cast<const T*>(tensor.data_ptr());
}

template <typename T, typename AnyTensor>
T* mutable_data(const AnyTensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline OwnedTensor as_contiguous(OwnedTensor tensor) {
  if (tensor.is_contiguous()) return tensor;
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_new_tensor_handle(torch::stable::contiguous(tensor.shared()).get(), &handle));
  return TensorHandle{handle};
}

inline FloatType float_type(ScalarType dtype) {
  if (dtype == ScalarType::BFloat16) return FloatType::kBFloat16;
  return dtype == ScalarType::Half ? FloatType::kHalf : FloatType::kFloat;
}

inline const char* dtype_name(ScalarType dtype) { return torch::headeronly::toString(dtype); }

}  // namespace lopa
