// What the adapters need of torch_npu, without its headers: those and the stable ABI's exclude each
// other.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

namespace lopa::npu {

// A function of the aclnn libraries by its name, or null; those of installed packages of custom
// operators are searched first.
void* find_function(const char* name);

// Makes a device current while it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int32_t index);
  ~DeviceGuard();

 private:
  struct Guard;
  std::unique_ptr<Guard> guard_;
};

// Appends `run`(stream) to what the current stream of the device is to do. torch_npu calls it from
// a thread of its own; an error status raises there as those of its own operators do.
void enqueue(const char* name, int32_t device, const std::function<int(void* stream)>& run);

}  // namespace lopa::npu
