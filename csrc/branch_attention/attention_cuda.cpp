// branch_attention on CUDA devices: checks, the stream, registration of what Python chooses from.
#include <cmath>
#include <optional>
#include <string>
#include <tuple>

#include "branch_attention/attention_sm90_launch.h"
#include "branch_attention/params.h"
#include "lopa/checks.h"
#include "lopa/cuda.h"
#include "lopa/cuda_tensor.h"

namespace lopa {
namespace {

constexpr int64_t kMaxHeadDim = 256;
constexpr int64_t kMinPage = 16;
constexpr int64_t kMaxPage = 256;
constexpr const char* kForms[] = {"branch_attention", "branch_attention_lse",
                                  "branch_attention_out"};

// Tensors as they come through torch.ops, in the order of the schemas.
struct Inputs {
  const Tensor& q;
  const Tensor& k_cache;
  const Tensor& v_cache;
  const Tensor& k_window;
  const Tensor& v_window;
  const Tensor& cache_len;
  const Tensor& length;
  const OptTensor& prompt_len;
  const OptTensor& block_table;
};

// One call: what it was given, checked, and the tensors that its parameters point into. Lengths and
// pages stay on the device: their values are held to their ranges there.
class Call {
 public:
  Call(const char* op, const Inputs& inputs, const std::string& mask,
       std::optional<int64_t> block_size, std::optional<double> scale)
      : op_(op), cuda_(op, "q", inputs.q), dtype_(inputs.q.scalar_type()) {
    set_shapes(inputs);
    set_operand("k_cache", inputs.k_cache, cache_shape(inputs), p_.k_cache, p_.k_cache_stride);
    set_operand("v_cache", inputs.v_cache, cache_shape(inputs), p_.v_cache, p_.v_cache_stride);
    set_operand("k_window", inputs.k_window, window_shape(), p_.k_window, p_.k_window_stride);
    set_operand("v_window", inputs.v_window, window_shape(), p_.v_window, p_.v_window_stride);
    set_operand("q", inputs.q, out_shape(), p_.q, p_.q_stride);
    p_.cache_len = words("cache_len", inputs.cache_len, {p_.batch}, held_[0]);
    p_.length = words("length", inputs.length, {p_.batch, p_.branches}, held_[1]);
    set_mask(inputs, mask, block_size);
    const double value =
        scale.has_value() ? *scale : 1.0 / std::sqrt(static_cast<double>(p_.head_dim));
    if (!std::isfinite(value)) fail(op_, "scale", "a finite number", value);
    p_.scale = static_cast<float>(value);
  }

  void set_out(const Tensor& out) {
    const void* data = nullptr;
    set_operand("out", out, out_shape(), data, p_.out_stride);
    p_.out = out.data_ptr();
  }

  void set_lse(const Tensor& lse) {
    check_tensor(op_, "lse", lse, ScalarType::Float, {p_.batch, p_.branches, p_.q_heads, p_.window},
                 cuda_.device());
    if (!lse.is_contiguous()) fail(op_, "lse", "a contiguous tensor", "strides");
    p_.lse = mutable_data<float>(lse);
  }

  // False where there is no kernel for it.
  bool run(AttentionCut cut) const {
    if (compute_capability() != 90 || !attention_sm90_supports(p_)) return false;
    launch_attention_sm90(p_, cut, cuda_.stream());
    return true;
  }

 private:
  struct Shape {
    int64_t sizes[5];
    size_t ndim;
  };

  Shape out_shape() const {
    return {{p_.batch, p_.branches, p_.window, p_.q_heads, p_.head_dim}, 5};
  }

  Shape window_shape() const {
    return {{p_.batch, p_.branches, p_.window, p_.kv_heads, p_.head_dim}, 5};
  }

  Shape cache_shape(const Inputs& inputs) const {
    const bool paged = inputs.block_table.has_value();
    return {
        {paged ? p_.pages : p_.batch, paged ? p_.page_size : p_.capacity, p_.kv_heads, p_.head_dim},
        4};
  }

  void set_shapes(const Inputs& inputs) {
    check_floating(op_, "q", inputs.q);
    check_rank(op_, "q", inputs.q, 5);
    check_rank(op_, "k_cache", inputs.k_cache, 4);
    p_.batch = inputs.q.size(0);
    p_.branches = inputs.q.size(1);
    p_.window = inputs.q.size(2);
    p_.q_heads = inputs.q.size(3);
    p_.head_dim = inputs.q.size(4);
    p_.capacity = inputs.k_cache.size(1);
    p_.kv_heads = inputs.k_cache.size(2);
    p_.type = float_type(dtype_);
    if (p_.head_dim < 1 || p_.head_dim > kMaxHeadDim) {
      fail(op_, "q", "head_dim 1 to " + std::to_string(kMaxHeadDim), p_.head_dim);
    }
    if (p_.kv_heads < 1 || p_.q_heads % p_.kv_heads != 0) {
      fail(op_, "q", "query heads a multiple of the " + std::to_string(p_.kv_heads) + " KV heads",
           p_.q_heads);
    }
    if (inputs.block_table.has_value()) set_pages(inputs.k_cache, *inputs.block_table);
  }

  void set_pages(const Tensor& k_cache, const Tensor& block_table) {
    p_.pages = k_cache.size(0);
    p_.page_size = k_cache.size(1);
    if (p_.page_size < kMinPage || p_.page_size > kMaxPage ||
        (p_.page_size & (p_.page_size - 1)) != 0) {
      fail(op_, "k_cache",
           "pages of a power of two from " + std::to_string(kMinPage) + " to " +
               std::to_string(kMaxPage) + " positions",
           p_.page_size);
    }
    check_rank(op_, "block_table", block_table, 2);
    p_.table_width = block_table.size(1);
    p_.block_table = words("block_table", block_table, {p_.batch, p_.table_width}, held_[3]);
    p_.capacity = p_.table_width * p_.page_size;
  }

  template <size_t N>
  void set_operand(const char* argument, const Tensor& tensor, const Shape& shape,
                   const void*& data, int64_t (&strides)[N]) {
    check_device(op_, argument, tensor, cuda_.device());
    check_dtype(op_, argument, tensor, dtype_);
    bool same = tensor.dim() == static_cast<int64_t>(shape.ndim);
    for (size_t d = 0; same && d < shape.ndim; ++d) same = tensor.size(d) == shape.sizes[d];
    if (!same) {
      fail(op_, argument, "shape " + shape_string(shape.sizes, shape.ndim),
           "shape " + shape_string(tensor));
    }
    check_unit_stride(op_, argument, tensor);
    for (size_t d = 0; d < N; ++d) strides[d] = tensor.stride(d);
    data = tensor.data_ptr();
  }

  const int32_t* words(const char* argument, const Tensor& tensor,
                       std::initializer_list<int64_t> shape, OptTensor& held) {
    check_tensor(op_, argument, tensor, ScalarType::Int, shape, cuda_.device());
    held = as_contiguous(tensor);
    return data<int32_t>(*held);
  }

  void set_mask(const Inputs& inputs, const std::string& mask, std::optional<int64_t> block_size) {
    if (mask == "full") return;
    if (mask != "block_causal") fail(op_, "mask", "full or block_causal", mask);
    if (!block_size.has_value() || *block_size < 1) {
      fail(op_, "block_size", "1 or more for the mask block_causal",
           block_size.has_value() ? std::to_string(*block_size) : "None");
    }
    if (!inputs.prompt_len.has_value()) {
      fail(op_, "prompt_len", "a tensor for the mask block_causal", "None");
    }
    p_.prompt_len = words("prompt_len", *inputs.prompt_len, {p_.batch}, held_[2]);
    p_.block_size = *block_size;
  }

  const char* op_;
  CudaCall cuda_;
  ScalarType dtype_;
  BranchAttentionParams p_{};
  OptTensor held_[4];
};

bool branch_attention_out(Tensor q, Tensor k_cache, Tensor v_cache, Tensor k_window,
                          Tensor v_window, Tensor cache_len, Tensor length, OptTensor prompt_len,
                          OptTensor block_table, TextHandle mask_text,
                          std::optional<int64_t> block_size, std::optional<double> scale,
                          int64_t form, int64_t ctas, int64_t shared, int64_t tile_rows, Tensor out,
                          OptTensor lse) {
  const std::string mask = take_text(mask_text);
  Call call(kForms[form > 0 && form < 3 ? form : 0],
            {q, k_cache, v_cache, k_window, v_window, cache_len, length, prompt_len, block_table},
            mask, block_size, scale);
  call.set_out(out);
  if (lse.has_value()) call.set_lse(*lse);
  return call.run({static_cast<int>(ctas), static_cast<int>(shared), static_cast<int>(tile_rows)});
}

}  // namespace
}  // namespace lopa

// What lopa::branch_attention calls on CUDA devices (lopa_kernels/ops/branch_attention/cuda.py).
// False: nothing was launched, as there is no kernel for it. `form` is the operator that errors are
// about; the cut is for tests and measurements.
STABLE_TORCH_LIBRARY(lopa_cuda, m) {
  m.def(
      "branch_attention_out(Tensor q, Tensor k_cache, Tensor v_cache, Tensor k_window, "
      "Tensor v_window, Tensor cache_len, Tensor length, Tensor? prompt_len, Tensor? block_table, "
      "str mask, int? block_size, float? scale, int form, int ctas, int shared, int tile_rows, *, "
      "Tensor(a!) out, Tensor(b!)? lse) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(lopa_cuda, CUDA, m) {
  m.impl("branch_attention_out", TORCH_BOX(&lopa::branch_attention_out));
}
