// The KV cache in the Python module: its kernels, Pre-Write's for each dtype, and their tiling.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>

#include "binding.h"
#include "emulator/launch.h"
#include "kernel_operator.h"
#include "kv_cache/op_host/kv_cache_tiling.h"
#include "kv_cache/op_kernel/kv_commit.cpp"

#define DTYPE_K_WINDOW bfloat16_t
#define lopa_kv_prewrite lopa_kv_prewrite_bf16
#define lopa_kv_prewrite_direct lopa_kv_prewrite_direct_bf16
#define lopa_qkv_prewrite lopa_qkv_prewrite_bf16
#define lopa_qkv_prewrite_direct lopa_qkv_prewrite_direct_bf16
#include "kv_cache/op_kernel/kv_prewrite.cpp"
#include "kv_cache/op_kernel/kv_prewrite_direct.cpp"
#include "kv_cache/op_kernel/qkv_prewrite.cpp"
#include "kv_cache/op_kernel/qkv_prewrite_direct.cpp"
#undef DTYPE_K_WINDOW
#undef lopa_kv_prewrite
#undef lopa_kv_prewrite_direct
#undef lopa_qkv_prewrite
#undef lopa_qkv_prewrite_direct

#define DTYPE_K_WINDOW half
#define lopa_kv_prewrite lopa_kv_prewrite_fp16
#define lopa_kv_prewrite_direct lopa_kv_prewrite_direct_fp16
#define lopa_qkv_prewrite lopa_qkv_prewrite_fp16
#define lopa_qkv_prewrite_direct lopa_qkv_prewrite_direct_fp16
#include "kv_cache/op_kernel/kv_prewrite.cpp"
#include "kv_cache/op_kernel/kv_prewrite_direct.cpp"
#include "kv_cache/op_kernel/qkv_prewrite.cpp"
#include "kv_cache/op_kernel/qkv_prewrite_direct.cpp"
#undef DTYPE_K_WINDOW
#undef lopa_kv_prewrite
#undef lopa_kv_prewrite_direct
#undef lopa_qkv_prewrite
#undef lopa_qkv_prewrite_direct

#define DTYPE_K_WINDOW float
#define lopa_kv_prewrite lopa_kv_prewrite_fp32
#define lopa_kv_prewrite_direct lopa_kv_prewrite_direct_fp32
#define lopa_qkv_prewrite lopa_qkv_prewrite_fp32
#define lopa_qkv_prewrite_direct lopa_qkv_prewrite_direct_fp32
#include "kv_cache/op_kernel/kv_prewrite.cpp"
#include "kv_cache/op_kernel/kv_prewrite_direct.cpp"
#include "kv_cache/op_kernel/qkv_prewrite.cpp"
#include "kv_cache/op_kernel/qkv_prewrite_direct.cpp"

ASCEND_EMULATOR_KERNEL(lopa_kv_commit);
ASCEND_EMULATOR_KERNEL(lopa_kv_prewrite_bf16);
ASCEND_EMULATOR_KERNEL(lopa_kv_prewrite_direct_bf16);
ASCEND_EMULATOR_KERNEL(lopa_qkv_prewrite_bf16);
ASCEND_EMULATOR_KERNEL(lopa_qkv_prewrite_direct_bf16);
ASCEND_EMULATOR_KERNEL(lopa_kv_prewrite_fp16);
ASCEND_EMULATOR_KERNEL(lopa_kv_prewrite_direct_fp16);
ASCEND_EMULATOR_KERNEL(lopa_qkv_prewrite_fp16);
ASCEND_EMULATOR_KERNEL(lopa_qkv_prewrite_direct_fp16);
ASCEND_EMULATOR_KERNEL(lopa_kv_prewrite_fp32);
ASCEND_EMULATOR_KERNEL(lopa_kv_prewrite_direct_fp32);
ASCEND_EMULATOR_KERNEL(lopa_qkv_prewrite_fp32);
ASCEND_EMULATOR_KERNEL(lopa_qkv_prewrite_direct_fp32);

namespace {

namespace py = pybind11;

lopa::KvCacheShape checked(const lopa::KvCacheShape& shape, bool packed) {
  if (const char* reason = lopa::refusal(shape, packed)) throw py::value_error(reason);
  return shape;
}

// `shape` is (layers, batch, branches, window, kv_heads, q_heads, head_dim, capacity).
using Shape = std::array<uint64_t, 8>;

lopa::KvCacheShape shape_of(const Shape& s, uint32_t element_bytes) {
  return {s[0], s[1], s[2], s[3], s[7], s[4], s[5], s[6], element_bytes, false};
}

py::dict prewrite_tiling(const Shape& shape, uint32_t element_bytes, uint32_t layer,
                         uint32_t positions, bool rotates, bool has_cache_len,
                         std::optional<double> norm_eps, uint32_t cores) {
  lopa::KvCacheShape s = checked(shape_of(shape, element_bytes), shape[5] > 0);
  s.normalises = norm_eps.has_value();
  lopa::KvPrewriteTiling tiling{};
  if (s.normalises) {
    if (const char* reason = lopa::normRefusal(*norm_eps)) throw py::value_error(reason);
    tiling.normEps = static_cast<float>(*norm_eps);
  }
  py::dict result;
  result["cores"] = lopa::tilePrewrite(s, cores, lopa::kUsableUbBytes, tiling);
  tiling.layer = layer;
  tiling.positions = positions;
  tiling.rotates = rotates;
  tiling.hasCacheLen = has_cache_len;
  result["data"] = ascend_emulator::as_bytes(tiling);
  result["columns"] = tiling.tileColumns;
  result["heads"] = tiling.tileHeads;
  return result;
}

py::dict commit_tiling(const Shape& shape, uint32_t element_bytes, uint32_t cores) {
  const lopa::KvCacheShape s = checked(shape_of(shape, element_bytes), false);
  lopa::KvCommitTiling tiling{};
  py::dict result;
  result["cores"] = lopa::tileCommit(s, cores, lopa::kUsableUbBytes, tiling);
  result["data"] = ascend_emulator::as_bytes(tiling);
  result["tile_bytes"] = tiling.tileBlocks * lopa::kBlockBytes;
  return result;
}

const ascend_emulator::Binding binding([](py::module_& m) {
  m.def("kv_prewrite_tiling", &prewrite_tiling, py::arg("shape"), py::arg("element_bytes"),
        py::kw_only(), py::arg("layer"), py::arg("positions"), py::arg("rotates"),
        py::arg("has_cache_len"), py::arg("norm_eps") = py::none(), py::arg("cores"));
  m.def("kv_commit_tiling", &commit_tiling, py::arg("shape"), py::arg("element_bytes"),
        py::kw_only(), py::arg("cores"));
});

}  // namespace
