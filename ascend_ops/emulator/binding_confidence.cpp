// The confidence room in the Python module: its kernels for every dtype, and their tiling.
#include "binding.h"
#include "confidence/op_host/confidence_tiling.h"
#include "emulator/launch.h"
#include "kernel_operator.h"

#define DTYPE_LOGITS float
#define lopa_token_confidence lopa_token_confidence_fp32
#define lopa_softmax_stats lopa_softmax_stats_fp32
#include "confidence/op_kernel/softmax_stats.cpp"
#include "confidence/op_kernel/token_confidence.cpp"
#undef DTYPE_LOGITS
#undef lopa_token_confidence
#undef lopa_softmax_stats
ASCEND_EMULATOR_KERNEL(lopa_token_confidence_fp32);
ASCEND_EMULATOR_KERNEL(lopa_softmax_stats_fp32);

#define DTYPE_LOGITS half
#define lopa_token_confidence lopa_token_confidence_fp16
#define lopa_softmax_stats lopa_softmax_stats_fp16
#include "confidence/op_kernel/softmax_stats.cpp"
#include "confidence/op_kernel/token_confidence.cpp"
#undef DTYPE_LOGITS
#undef lopa_token_confidence
#undef lopa_softmax_stats
ASCEND_EMULATOR_KERNEL(lopa_token_confidence_fp16);
ASCEND_EMULATOR_KERNEL(lopa_softmax_stats_fp16);

#define DTYPE_LOGITS bfloat16_t
#define lopa_token_confidence lopa_token_confidence_bf16
#define lopa_softmax_stats lopa_softmax_stats_bf16
#include "confidence/op_kernel/softmax_stats.cpp"
#include "confidence/op_kernel/token_confidence.cpp"
#undef DTYPE_LOGITS
#undef lopa_token_confidence
#undef lopa_softmax_stats
ASCEND_EMULATOR_KERNEL(lopa_token_confidence_bf16);
ASCEND_EMULATOR_KERNEL(lopa_softmax_stats_bf16);

namespace {

namespace py = pybind11;

py::dict tiling(uint64_t vocab, uint64_t logits_rows, uint64_t rows, bool has_rows, bool has_seed,
                bool has_step, uint32_t metric, bool all, uint32_t cores, double temperature,
                int64_t top_k, double top_p) {
  const lopa::ConfidenceShape shape{vocab, logits_rows, rows, has_rows, has_seed, has_step};
  if (const char* reason = lopa::refusal(shape, {temperature, top_k, top_p})) {
    throw py::value_error(reason);
  }
  lopa::ConfidenceTiling data{};
  const uint32_t blocks = lopa::tile_confidence(shape, static_cast<lopa::ConfidenceMetric>(metric),
                                                all, temperature, cores, &data);
  py::dict result;
  result["data"] = ascend_emulator::as_bytes(data);
  result["workspace"] = lopa::workspace_bytes(data);
  result["blocks"] = blocks;
  return result;
}

const ascend_emulator::Binding binding([](py::module_& m) {
  m.def("confidence_tiling", &tiling, py::kw_only(), py::arg("vocab"), py::arg("logits_rows"),
        py::arg("rows"), py::arg("has_rows"), py::arg("has_seed") = false,
        py::arg("has_step") = false, py::arg("metric"), py::arg("all"), py::arg("cores"),
        py::arg("temperature") = 0.0, py::arg("top_k") = 0, py::arg("top_p") = 1.0);
});

}  // namespace
