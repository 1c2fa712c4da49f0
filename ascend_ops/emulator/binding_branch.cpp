// The branch room in the Python module: its kernels and their tiling.
#include <string>

#include "binding.h"
#include "branch/op_host/branch_tiling.h"
#include "branch/op_kernel/branch_confidence.cpp"
#include "branch/op_kernel/branch_step.cpp"
#include "branch/op_kernel/needed_rows.cpp"
#include "branch/op_kernel/select_positions.cpp"
#include "branch/op_kernel/spawn_branches.cpp"
#include "branch/op_kernel/step_rows.cpp"
#include "emulator/launch.h"

ASCEND_EMULATOR_KERNEL(lopa_branch_confidence);
ASCEND_EMULATOR_KERNEL(lopa_branch_step);
ASCEND_EMULATOR_KERNEL(lopa_needed_rows);
ASCEND_EMULATOR_KERNEL(lopa_select_positions);
ASCEND_EMULATOR_KERNEL(lopa_spawn_branches);
ASCEND_EMULATOR_KERNEL(lopa_step_rows);

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
         uint32_t next_window, bool has_unusable, bool shift, bool force_anchor, int64_t add_count,
         int64_t max_blocks, int64_t eos_id, const ReduceTiling& reduce,
         const SelectTiling& select) {
        refuse(lopa::step_refusal(branches, window, next_branches, next_window));
        return ascend_emulator::as_bytes(lopa::BranchStepTiling{
            batch, branches, window, next_branches, next_window, has_unusable, shift, force_anchor,
            add_count, max_blocks, eos_id, reduce, select});
      },
      py::kw_only(), py::arg("batch"), py::arg("branches"), py::arg("window"),
      py::arg("next_branches"), py::arg("next_window"), py::arg("has_unusable"), py::arg("shift"),
      py::arg("force_anchor"), py::arg("add_count"), py::arg("max_blocks"), py::arg("eos_id"),
      py::arg("reduce"), py::arg("select"));
  m.def("soft_double", [](double a, double b, const std::string& operation) {
    using lopa::branch::Double;
    const Double x = Double::OfBits(lopa::bits_of_double(a)),
                 y = Double::OfBits(lopa::bits_of_double(b));
    if (operation == "float") return static_cast<double>(x.ToFloat());
    const Double z = operation == "+" ? x.Plus(y) : operation == "*" ? x.Times(y) : x.Over(y);
    return lopa::double_of_bits(static_cast<int64_t>(z.bits));
  });
  m.def(
      "rows_tiling",
      [](uint32_t batch, uint32_t branches, uint32_t window, bool shift, bool has_given,
         int64_t mask_id, int64_t capacity) {
        return ascend_emulator::as_bytes(
            lopa::RowsTiling{batch, branches, window, shift, has_given, mask_id, capacity});
      },
      py::kw_only(), py::arg("batch"), py::arg("branches"), py::arg("window"), py::arg("shift"),
      py::arg("has_given"), py::arg("mask_id"), py::arg("capacity"));
  m.def(
      "branch_confidence_tiling",
      [](uint32_t batch, uint32_t branches, uint32_t window, bool has_branches, bool has_length,
         const ReduceTiling& reduce) {
        return ascend_emulator::as_bytes(lopa::BranchConfidenceTiling{
            batch, branches, window, has_branches, has_length, reduce});
      },
      py::kw_only(), py::arg("batch"), py::arg("branches"), py::arg("window"),
      py::arg("has_branches"), py::arg("has_length"), py::arg("reduce"));
  m.def(
      "select_positions_tiling",
      [](uint32_t batch, uint32_t window, uint32_t lookahead, const SelectTiling& select) {
        return ascend_emulator::as_bytes(
            lopa::SelectPositionsTiling{batch, window, lookahead, select});
      },
      py::kw_only(), py::arg("batch"), py::arg("window"), py::arg("lookahead"), py::arg("select"));
  m.def(
      "spawn_branches_tiling",
      [](uint32_t batch, uint32_t branches, uint32_t window, int64_t eos_id) {
        return ascend_emulator::as_bytes(
            lopa::SpawnBranchesTiling{batch, branches, window, eos_id});
      },
      py::kw_only(), py::arg("batch"), py::arg("branches"), py::arg("window"), py::arg("eos_id"));
});

}  // namespace
