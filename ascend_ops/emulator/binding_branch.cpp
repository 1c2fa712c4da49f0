// The branch room in the Python module: its kernels and their tiling.
#include "binding.h"
#include "branch/op_host/branch_tiling.h"
#include "branch/op_kernel/branch_step.cpp"
#include "emulator/launch.h"
#include "kernel_operator.h"

ASCEND_EMULATOR_KERNEL(branch_step);

namespace {

namespace py = pybind11;

void refuse(const char* reason) {
  if (reason != nullptr) throw py::value_error(reason);
}

lopa::ReduceTiling reduction(uint32_t kind, double fraction, int64_t group, double alpha) {
  return lopa::tile_reduction(static_cast<lopa::BranchReduction>(kind), fraction, group, alpha);
}

const ascend_emulator::Binding binding([](py::module_& m) {
  using lopa::ReduceTiling;
  using lopa::SelectTiling;
  py::class_<ReduceTiling>(m, "Reduce")
      .def(py::init(&reduction), py::kw_only(), py::arg("reduction"), py::arg("fraction"),
           py::arg("group"), py::arg("alpha"));
  py::class_<SelectTiling>(m, "Select")
      .def(py::init([](int64_t block_size, int64_t act_count, int64_t mask_id, float tau_conf,
                       bool by_score, bool window) {
             return SelectTiling{block_size, act_count, mask_id, tau_conf, by_score, window};
           }),
           py::kw_only(), py::arg("block_size"), py::arg("act_count"), py::arg("mask_id"),
           py::arg("tau_conf"), py::arg("by_score"), py::arg("window"));
  m.def(
      "branch_step_tiling",
      [](uint32_t batch, uint32_t branches, uint32_t window, uint32_t next_branches,
         uint32_t next_window, bool has_unusable, bool has_status, bool shift, bool force_anchor,
         int64_t add_count, int64_t max_blocks, int64_t eos_id, const ReduceTiling& reduce,
         const SelectTiling& select) {
        refuse(lopa::step_refusal(branches, window, next_branches, next_window));
        return ascend_emulator::as_bytes(lopa::BranchStepTiling{
            batch, branches, window, next_branches, next_window, has_unusable, has_status, shift,
            force_anchor, add_count, max_blocks, eos_id, reduce, select});
      },
      py::kw_only(), py::arg("batch"), py::arg("branches"), py::arg("window"),
      py::arg("next_branches"), py::arg("next_window"), py::arg("has_unusable"),
      py::arg("has_status"), py::arg("shift"), py::arg("force_anchor"), py::arg("add_count"),
      py::arg("max_blocks"), py::arg("eos_id"), py::arg("reduce"), py::arg("select"));
});

}  // namespace
