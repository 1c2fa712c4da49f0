#include "runtime.h"

#include <torch/library.h>

#include <string>
#include <vector>

#include "torch_npu/csrc/core/npu/NPUGuard.h"
#include "torch_npu/csrc/core/npu/NPUStream.h"
#include "torch_npu/csrc/framework/OpCommand.h"

// Of torch_npu's op_plugin/utils/op_api_common_base.h, which compiles only as part of torch_npu.
void* GetOpApiFuncAddr(const char* name);

namespace lopa::npu {

void* find_function(const char* name) { return GetOpApiFuncAddr(name); }

struct DeviceGuard::Guard {
  c10_npu::NPUGuard guard;
};

DeviceGuard::DeviceGuard(int32_t index)
    : guard_(new Guard{c10_npu::NPUGuard(static_cast<c10::DeviceIndex>(index))}) {}
DeviceGuard::~DeviceGuard() = default;

void enqueue(const char* name, int32_t device, const std::function<int(void*)>& run) {
  // Not the stream() that waits until all that was enqueued is launched.
  const auto current = c10_npu::getCurrentNPUStream(static_cast<c10::DeviceIndex>(device));
  void* stream = current.stream(false);
  at_npu::native::OpCommand::RunOpApiV2(name, [run, stream]() { return run(stream); });
}

namespace {

// The calls of the package that are not to be found, for lopa_kernels/_load.py.
std::vector<std::string> missing() {
  std::vector<std::string> names;
  for (const char* name :
       {"aclnnLopaTokenConfidence", "aclnnLopaSoftmaxStats", "aclnnLopaStepRows",
        "aclnnLopaNeededRows", "aclnnLopaBranchStep", "aclnnLopaBranchConfidence",
        "aclnnLopaSelectPositions", "aclnnLopaSpawnBranches", "aclnnLopaBranchAttention",
        "aclnnLopaKvPrewrite", "aclnnLopaKvPrewriteDirect", "aclnnLopaQkvPrewrite",
        "aclnnLopaQkvPrewriteDirect", "aclnnLopaKvCommit"}) {
    if (find_function(name) == nullptr) names.emplace_back(name);
  }
  return names;
}

}  // namespace
}  // namespace lopa::npu

TORCH_LIBRARY(lopa_ascend, m) { m.def("missing() -> str[]", lopa::npu::missing); }
