// The bridge from torch's tensors to CUDA launchers: the device that a call runs on, its stream.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "lopa/checks.h"
#include "lopa/tensor.h"

namespace lopa {

// Makes the device of `like` current while it lives, and knows that device's current stream.
class CudaCall {
 public:
  CudaCall(const char* op, const char* argument, const Tensor& like)
      : CudaCall(op, argument, device_of(like)) {}

  CudaCall(const char* op, const char* argument, Device device)
      : device_(checked(op, argument, device)), guard_(device.index) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device.index, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  Device device() const { return device_; }
  cudaStream_t stream() const { return stream_; }

 private:
  static Device checked(const char* op, const char* argument, Device device) {
    if (device.type != aoti_torch_device_type_cuda()) {
      fail(op, argument, "a CUDA tensor", device_string(device));
    }
    return device;
  }

  Device device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace lopa
