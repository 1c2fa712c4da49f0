// branch_attention on NPUs.
#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "aclnn.h"

namespace lopa {
namespace {

#define LOPA_ATTENTION_PARAMETERS                                                        \
  const Tensor &q, const Tensor &k_cache, const Tensor &v_cache, const Tensor &k_window, \
      const Tensor &v_window, const Tensor &cache_len, const Tensor &length,             \
      const OptTensor &prompt_len, const OptTensor &block_table, TextHandle mask_text,   \
      std::optional<int64_t> block_size, std::optional<double> scale
#define LOPA_ATTENTION                                                                 \
  q, k_cache, v_cache, k_window, v_window, cache_len, length, prompt_len, block_table, \
      take_text(mask_text), block_size, scale

// One call: its arguments checked, small ones made contiguous.
class AttentionCall : public NpuCall {
 public:
  AttentionCall(const char* op, const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                const Tensor& k_window, const Tensor& v_window, const Tensor& cache_len,
                const Tensor& length, const OptTensor& prompt_len, const OptTensor& block_table,
                std::string mask, std::optional<int64_t> block_size, std::optional<double> scale)
      : NpuCall(op, "q", q), op_(op), mask_(std::move(mask)), q_(q) {
    const ScalarType dtype = q.scalar_type();
    if (dtype != ScalarType::BFloat16 && dtype != ScalarType::Half) {
      fail(op, "q", "dtype BFloat16 or Half on an NPU", dtype_name(dtype));
    }
    check_rank(op, "q", q, 5);
    check_rank(op, "k_cache", k_cache, 4);
    B_ = q.size(0), K_ = q.size(1), W_ = q.size(2), heads_ = q.size(3), D_ = q.size(4);
    const int64_t S = k_cache.size(1), Hk = k_cache.size(2);
    if (Hk < 1 || heads_ % Hk != 0) {
      fail(op, "q", "query heads a multiple of the " + std::to_string(Hk) + " KV heads", heads_);
    }
    int64_t blocks = B_;
    if (block_table.has_value()) {
      check_rank(op, "block_table", *block_table, 2);
      check_tensor(op, "block_table", *block_table, ScalarType::Int, {B_, block_table->size(1)},
                   device());
      block_table_ = as_contiguous(*block_table);
      blocks = k_cache.size(0);  // pages
    }
    check_tensor(op, "k_cache", k_cache, dtype, {blocks, S, Hk, D_}, device());
    check_tensor(op, "v_cache", v_cache, dtype, {blocks, S, Hk, D_}, device());
    check_tensor(op, "k_window", k_window, dtype, {B_, K_, W_, Hk, D_}, device());
    check_tensor(op, "v_window", v_window, dtype, {B_, K_, W_, Hk, D_}, device());
    check_tensor(op, "cache_len", cache_len, ScalarType::Int, {B_}, device());
    check_tensor(op, "length", length, ScalarType::Int, {B_, K_}, device());
    if (mask_ == "block_causal") {
      if (block_size.value_or(0) < 1) {
        fail(op, "block_size", "1 or more for the mask block_causal", block_size.value_or(0));
      }
      if (!prompt_len.has_value()) {
        fail(op, "prompt_len", "a tensor for the mask block_causal", "None");
      }
      check_tensor(op, "prompt_len", *prompt_len, ScalarType::Int, {B_}, device());
      prompt_len_ = as_contiguous(*prompt_len);
      block_size_ = *block_size;
    } else if (mask_ != "full") {
      fail(op, "mask", "full or block_causal", mask_);
    }
    scale_ = scale.value_or(1.0 / std::sqrt(static_cast<double>(D_)));
    if (!std::isfinite(scale_)) fail(op, "scale", "a finite number", scale_);
    heads_first_ = !k_cache.is_contiguous() && heads_first(k_cache) && heads_first(v_cache);
    caches_ = {k_cache, v_cache};
    windows_ = {k_window, v_window};
    cache_len_ = as_contiguous(cache_len);
    length_ = as_contiguous(length);
  }

  Tensor output() const { return empty({B_, K_, W_, heads_, D_}, q_.scalar_type()); }
  Tensor lse() const { return empty({B_, K_, heads_, W_}, ScalarType::Float); }

  void check_out(const Tensor& out, const OptTensor& lse) const {
    check_tensor(op_, "out", out, q_.scalar_type(), {B_, K_, W_, heads_, D_}, device());
    if (lse.has_value()) {
      check_tensor(op_, "lse", *lse, ScalarType::Float, {B_, K_, heads_, W_}, device());
    }
  }

  // `out` and `lse` are contiguous.
  void run(const Tensor& out, const Tensor& lse) const {
    if (out.numel() == 0) return;
    launch("aclnnLopaBranchAttention", operand(q_), cache(caches_[0]), cache(caches_[1]),
           operand(windows_[0]), operand(windows_[1]), words(cache_len_), words(length_),
           optional(prompt_len_), optional(block_table_), mask_.c_str(), block_size_, scale_,
           heads_first_ ? "BNSD" : "BSND", operand(out),
           Operand::dense(data<float>(lse), {B_, K_, heads_, W_}));
  }

 private:
  // [B, S, Hk, D] as a view of contiguous [B, Hk, S, D] memory.
  static bool heads_first(const Tensor& cache) {
    const int64_t S = cache.size(1), Hk = cache.size(2), D = cache.size(3);
    return cache.stride(3) == 1 && cache.stride(1) == D && cache.stride(2) == S * D &&
           cache.stride(0) == Hk * S * D;
  }

  static Operand operand(const Tensor& tensor) {
    const auto sizes = tensor.sizes();
    const auto strides = tensor.strides();
    return Operand::strided(tensor.data_ptr(), acl_type(float_type(tensor.scalar_type())),
                            {sizes.begin(), sizes.end()}, {strides.begin(), strides.end()});
  }

  static Operand words(const Tensor& tensor) {
    const auto sizes = tensor.sizes();
    return Operand::dense(data<int32_t>(tensor), {sizes.begin(), sizes.end()});
  }

  static Operand optional(const OptTensor& tensor) {
    return tensor.has_value() ? words(*tensor) : Operand{};
  }

  Operand cache(const Tensor& tensor) const {
    if (!heads_first_) return operand(tensor);
    return Operand::dense(tensor.data_ptr(), acl_type(float_type(tensor.scalar_type())),
                          {tensor.size(0), tensor.size(2), tensor.size(1), tensor.size(3)});
  }

  const char* op_;
  std::string mask_;
  Tensor q_;
  std::vector<Tensor> caches_;
  std::vector<Tensor> windows_;
  Tensor cache_len_;
  Tensor length_;
  OptTensor prompt_len_;
  OptTensor block_table_;
  int64_t B_, K_, W_, heads_, D_;
  int64_t block_size_ = 0;
  double scale_;
  bool heads_first_;
};

Tensor branch_attention(LOPA_ATTENTION_PARAMETERS) {
  const AttentionCall call("branch_attention", LOPA_ATTENTION);
  const Tensor out = call.output();
  call.run(out, call.lse());
  return out;
}

std::tuple<Tensor, Tensor> branch_attention_lse(LOPA_ATTENTION_PARAMETERS) {
  const AttentionCall call("branch_attention", LOPA_ATTENTION);
  const Tensor out = call.output(), lse = call.lse();
  call.run(out, lse);
  return {out, lse};
}

void branch_attention_out(LOPA_ATTENTION_PARAMETERS, const Tensor& out, const OptTensor& lse) {
  const AttentionCall call("branch_attention", LOPA_ATTENTION);
  call.check_out(out, lse);
  const Tensor written = out.is_contiguous() ? out : call.output();
  const bool given = lse.has_value() && lse->is_contiguous();
  const Tensor lse_written = given ? *lse : call.lse();
  call.run(written, lse_written);
  if (!out.is_contiguous()) {
    Tensor target = out;
    torch::stable::copy_(target, written);
  }
  if (lse.has_value() && !given) {
    Tensor target = *lse;
    torch::stable::copy_(target, lse_written);
  }
}

}  // namespace
}  // namespace lopa

STABLE_TORCH_LIBRARY_IMPL(lopa, PrivateUse1, m) {
  m.impl("branch_attention", TORCH_BOX(&lopa::branch_attention));
  m.impl("branch_attention_lse", TORCH_BOX(&lopa::branch_attention_lse));
  m.impl("branch_attention_out", TORCH_BOX(&lopa::branch_attention_out));
}
