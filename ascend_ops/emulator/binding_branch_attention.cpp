// branch_attention in the Python module: its kernel for both types, and its tiling.
#include <pybind11/pybind11.h>

#include "binding.h"
#include "branch_attention/op_host/branch_attention_tiling.h"
#include "emulator/launch.h"
#include "kernel_operator.h"

#define DTYPE_Q half
#define lopa_branch_attention lopa_branch_attention_fp16
#include "branch_attention/op_kernel/branch_attention.cpp"
#undef lopa_branch_attention
#undef DTYPE_Q

#define DTYPE_Q bfloat16_t
#define lopa_branch_attention lopa_branch_attention_bf16
#include "branch_attention/op_kernel/branch_attention.cpp"
#undef lopa_branch_attention
#undef DTYPE_Q

ASCEND_EMULATOR_KERNEL(lopa_branch_attention_fp16);
ASCEND_EMULATOR_KERNEL(lopa_branch_attention_bf16);

namespace {

namespace py = pybind11;

// The bytes of the tiling, those of the workspace, and what decides about the work.
py::dict Tiling(uint32_t batch, uint32_t branches, uint32_t window, uint32_t query_heads,
                uint32_t kv_heads, uint32_t head_dim, uint32_t capacity, bool heads_first,
                uint32_t table_pages, uint32_t pages, uint32_t block_size, bool block_causal,
                float scale, uint32_t cores) {
  const branch_attention::Shape shape{batch,    branches, window,      query_heads, kv_heads,
                                      head_dim, capacity, heads_first, table_pages, pages};
  if (const char* reason = branch_attention::Unsupported(shape, block_size, block_causal)) {
    throw py::value_error(reason);
  }
  BranchAttentionTiling tiling{};
  branch_attention::ComputeTiling(shape, block_causal ? block_size : 0, scale, cores, &tiling);
  py::dict result;
  result["data"] = ascend_emulator::as_bytes(tiling);
  result["workspace"] = branch_attention::WorkspaceBytes(tiling);
  result["cores"] = tiling.cores;
  result["splits"] = tiling.splits;
  result["tiles_per_head"] = tiling.tilesPerHead;
  result["jobs"] = tiling.jobs;
  return result;
}

const ascend_emulator::Binding binding([](py::module_& m) {
  m.def("branch_attention_tiling", &Tiling, py::kw_only(), py::arg("batch"), py::arg("branches"),
        py::arg("window"), py::arg("query_heads"), py::arg("kv_heads"), py::arg("head_dim"),
        py::arg("capacity"), py::arg("heads_first") = false, py::arg("table_pages") = 0,
        py::arg("pages") = 0, py::arg("block_size") = 0, py::arg("block_causal") = false,
        py::arg("scale"), py::arg("cores"));
});

}  // namespace
