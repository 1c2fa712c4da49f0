// branch_confidence, select_positions and spawn_branches on CUDA devices: memory, streams and
// registration.
#include "branch/branch_args.h"
#include "branch/branch_launch.h"
#include "lopa/cuda_tensor.h"

namespace lopa {
namespace {

class Cuda : public CudaCall {
 public:
  using CudaCall::CudaCall;

  void confidence(const char* op, const ConfidenceView& view, const ReductionConfig& config) const {
    check_window(op, "score", view.W);
    const auto plan = branch::plan_confidence(view, config);
    const OwnedTensor memory = allocate(plan.memory_bytes());
    branch::launch_confidence(view, config, plan, address(memory), stream());
  }

  void select(const char* op, const SelectView& view, const SelectConfig& config) const {
    check_window(op, "tokens", view.W);
    const auto plan = branch::plan_select(view);
    const OwnedTensor memory = allocate(plan.memory_bytes());
    branch::launch_select(view, config, plan, address(memory), stream());
  }

  void spawn(const char*, const SpawnView& view) const { branch::launch_spawn(view, stream()); }

 private:
  static void check_window(const char* op, const char* argument, int64_t columns) {
    if (columns > branch::kMostColumns) {
      fail(op, argument, "at most " + std::to_string(branch::kMostColumns) + " columns", columns);
    }
  }

  OwnedTensor allocate(int64_t bytes) const {
    if (bytes == 0) return OwnedTensor();
    return TensorHandle{empty_handle({bytes}, ScalarType::Byte, device())};
  }

  static void* address(const OwnedTensor& memory) {
    return memory.get() == nullptr ? nullptr : memory.data_ptr();
  }
};

using Operators = BranchOperators<Cuda>;

}  // namespace
}  // namespace lopa

STABLE_TORCH_LIBRARY_IMPL(lopa, CUDA, m) {
  m.impl("branch_confidence", TORCH_BOX(&lopa::Operators::branch_confidence));
  m.impl("select_positions", TORCH_BOX(&lopa::Operators::select_positions));
  m.impl("spawn_branches", TORCH_BOX(&lopa::Operators::spawn_branches));
}
