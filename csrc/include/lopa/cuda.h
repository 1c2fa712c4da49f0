// What the host side of every CUDA kernel needs, torch-free: errors, the device's size, launches.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace lopa {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears it, so that the next call does not report it again
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + ": " +
                           cudaGetErrorString(error));
}

constexpr int kMaxDevices = 64;

// Multiprocessors of the current device; asked once a device.
inline int multiprocessors() {
  static int counts[kMaxDevices] = {};
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  int& count = counts[device % kMaxDevices];
  if (count == 0) {
    check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
               "cudaDeviceGetAttribute");
  }
  return count;
}

// 10 * major + minor of the current device's compute capability; asked once a device.
inline int compute_capability() {
  static int values[kMaxDevices] = {};
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  int& value = values[device % kMaxDevices];
  if (value == 0) {
    int major = 0, minor = 0;
    check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
               "cudaDeviceGetAttribute");
    check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
               "cudaDeviceGetAttribute");
    value = 10 * major + minor;
  }
  return value;
}

// Raises a kernel's limit of dynamic shared memory, once a kernel and device. (By value: kernels of
// one signature have one type.)
template <auto kernel>
void allow_shared_memory(size_t bytes) {
  static bool raised[kMaxDevices] = {};
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  if (raised[device % kMaxDevices]) return;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(bytes)),
             "cudaFuncSetAttribute");
  raised[device % kMaxDevices] = true;
}

// A launch on `stream`. With `overlap` (programmatic dependent launch, sm_90 and later) the grid
// may start while the kernel before it runs; it must call wait_for_predecessor() of cuda.cuh before
// it reads or writes global memory that others touch.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared,
            cudaStream_t stream, bool overlap, Arguments&&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  if (overlap && compute_capability() >= 90) {
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  check_cuda(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), name);
}

}  // namespace lopa
