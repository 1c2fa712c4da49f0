// From a checked call of torch.ops.lopa to the aclnn functions of the package of custom operators:
// tensors as aclnn has them, the workspace, the current stream. Nothing waits for the device.
#pragma once

#include <bit>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <tuple>
#include <vector>

#include "acl/acl_base.h"
#include "lopa/checks.h"
#include "lopa/tensor.h"
#include "runtime.h"

struct aclTensor;
struct aclOpExecutor;

namespace lopa {

// The 64 bits of a double, for the attributes that GE would round to fp32.
inline int64_t bits_of(double value) { return std::bit_cast<int64_t>(value); }

inline aclDataType acl_type(FloatType type) {
  if (type == FloatType::kBFloat16) return ACL_BF16;
  return type == FloatType::kHalf ? ACL_FLOAT16 : ACL_FLOAT;
}

template <typename T>
constexpr aclDataType kAclType = ACL_DT_UNDEFINED;
template <>
inline constexpr aclDataType kAclType<int64_t> = ACL_INT64;
template <>
inline constexpr aclDataType kAclType<int32_t> = ACL_INT32;
template <>
inline constexpr aclDataType kAclType<float> = ACL_FLOAT;
template <>
inline constexpr aclDataType kAclType<bool> = ACL_BOOL;

// A function of the aclnn libraries; the custom operators' library is searched first.
template <typename Function>
Function aclnn_function(const std::string& name) {
  void* address = npu::find_function(name.c_str());
  if (address == nullptr) {
    throw std::runtime_error(name + ": not found; is the package of ascend_ops installed?");
  }
  return reinterpret_cast<Function>(address);
}

// Memory of the device as aclnn sees it. Null data: an optional operand that is not there.
struct Operand {
  const void* data;
  aclDataType type;
  std::vector<int64_t> shape;
  std::vector<int64_t> strides;  // of elements

  static Operand strided(const void* data, aclDataType type, std::vector<int64_t> shape,
                         std::vector<int64_t> strides) {
    return {data, type, std::move(shape), std::move(strides)};
  }

  static Operand dense(const void* data, aclDataType type, std::vector<int64_t> shape) {
    std::vector<int64_t> strides(shape.size());
    int64_t stride = 1;
    for (size_t d = shape.size(); d-- > 0;) {
      strides[d] = stride;
      stride *= shape[d] > 1 ? shape[d] : 1;
    }
    return {data, type, std::move(shape), std::move(strides)};
  }

  template <typename T>
  static Operand dense(const T* data, std::vector<int64_t> shape) {
    return dense(data, kAclType<T>, std::move(shape));
  }

  bool is_dense() const {
    int64_t stride = 1;
    for (size_t d = shape.size(); d-- > 0;) {
      if (shape[d] > 1 && strides[d] != stride) return false;
      stride *= shape[d];
    }
    return true;
  }

  aclTensor* create() const {
    if (data == nullptr) return nullptr;
    using Create = aclTensor* (*)(const int64_t* shape, uint64_t ndim, aclDataType type,
                                  const int64_t* strides, int64_t offset, aclFormat format,
                                  const int64_t* storage_shape, uint64_t storage_ndim, void* data);
    static const auto function = aclnn_function<Create>("aclCreateTensor");
    int64_t elements = 1;
    for (size_t d = 0; d < shape.size(); ++d) {
      elements = shape[d] == 0 ? 0 : elements + (shape[d] - 1) * strides[d];
      if (elements == 0) break;
    }
    return function(shape.data(), shape.size(), type, strides.data(), 0, ACL_FORMAT_ND, &elements,
                    1, const_cast<void*>(data));
  }
};

// Attributes pass as they are, operands as tensors of aclnn.
inline aclTensor* aclnn_argument(const Operand& operand) { return operand.create(); }
inline char* aclnn_argument(const char* text) { return const_cast<char*>(text); }
inline int64_t aclnn_argument(int64_t value) { return value; }
inline double aclnn_argument(double value) { return value; }
inline bool aclnn_argument(bool value) { return value; }

inline void aclnn_release(aclTensor* tensor) {
  static const auto function = aclnn_function<int (*)(const aclTensor*)>("aclDestroyTensor");
  if (tensor != nullptr) function(tensor);
}
template <typename T>
void aclnn_release(T) {}

// Makes the device of a call current while it lives.
class NpuCall {
 public:
  NpuCall(const char* op, const char* argument, const Tensor& like)
      : NpuCall(op, argument, device_of(like)) {}

  NpuCall(const char* op, const char* argument, Device device)
      : device_(checked(op, argument, device)), guard_(device.index) {}

  Device device() const { return device_; }

  Tensor empty(std::initializer_list<int64_t> shape, ScalarType dtype) const {
    return Tensor(empty_handle(shape, dtype, device_));
  }

  // Enqueues `name`(inputs, attributes, outputs): aclnn's order, in which an operand that is
  // written in place is among the inputs alone.
  template <typename... Arguments>
  void launch(const char* name, const Arguments&... arguments) const {
    using Run = int (*)(void* workspace, uint64_t bytes, aclOpExecutor*, void* stream);
    using Plan = int (*)(decltype(aclnn_argument(arguments))..., uint64_t*, aclOpExecutor**);
    const auto plan = aclnn_function<Plan>(std::string(name) + "GetWorkspaceSize");
    const auto run = aclnn_function<Run>(name);
    const auto converted = std::make_tuple(aclnn_argument(arguments)...);
    uint64_t bytes = 0;
    aclOpExecutor* executor = nullptr;
    const int planned =
        std::apply([&](auto... values) { return plan(values..., &bytes, &executor); }, converted);
    if (planned != 0) {
      std::apply([](auto... values) { (aclnn_release(values), ...); }, converted);
      fail(name, "the call", "arguments that the operator takes",
           "error " + std::to_string(planned));
    }
    // The allocator follows the stream: this memory may be given back while the call is enqueued.
    const Tensor workspace = empty({static_cast<int64_t>(bytes)}, ScalarType::Byte);
    void* memory = bytes == 0 ? nullptr : workspace.data_ptr();
    npu::enqueue(name, device_.index, [=](void* stream) -> int {
      const int status = run(memory, bytes, executor, stream);
      std::apply([](auto... values) { (aclnn_release(values), ...); }, converted);
      return status;
    });
  }

 private:
  static Device checked(const char* op, const char* argument, Device device) {
    if (device.type != aoti_torch_device_type_privateuse1()) {
      fail(op, argument, "an NPU tensor", device_string(device));
    }
    return device;
  }

  Device device_;
  npu::DeviceGuard guard_;
};

}  // namespace lopa
