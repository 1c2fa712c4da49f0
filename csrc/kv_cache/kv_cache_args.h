// What arrives through torch.ops for the KV cache, checked and turned into plain structs, for the
// libraries of all devices. Only shapes, strides, dtypes and devices are read: no memory.
#pragma once

#include <cstdint>
#include <limits>
#include <optional>
#include <string>

#include "kv_cache/params.h"
#include "lopa/checks.h"
#include "lopa/tensor.h"

namespace lopa {

// The operators of torch.ops.lopa on one kind of device. `Backend` is made once a call from (op,
// name of an argument, that argument), whose device it checks; it has device(), and runs
// prewrite(op, params, status) and commit(op, params, status).
template <typename Backend>
class KvCacheOperators {
 public:
  static void prewrite(Tensor k_window, Tensor v_window, int64_t layer, Tensor k, Tensor v,
                       OptTensor cos_sin, OptTensor cache_len) {
    KvCacheOperators call("kv_prewrite_", k_window);
    call.set_rows(k_window, v_window, layer, k, v);
    call.run_prewrite(cos_sin, cache_len, std::nullopt);
  }

  static void prewrite_direct(Tensor k_window, Tensor v_window, Tensor k_cache, Tensor v_cache,
                              int64_t layer, Tensor k, Tensor v, Tensor cache_len,
                              Tensor commit_len, OptTensor cos_sin, OptTensor status) {
    KvCacheOperators call("kv_prewrite_", k_window);
    call.set_rows(k_window, v_window, layer, k, v);
    call.run_prewrite(cos_sin, cache_len, Direct{k_cache, v_cache, commit_len, status});
  }

  static void packed_prewrite(Tensor q, Tensor k_window, Tensor v_window, int64_t layer, Tensor qkv,
                              Tensor cos_sin, Tensor cache_len, OptTensor q_norm, OptTensor k_norm,
                              double norm_eps) {
    KvCacheOperators call("qkv_prewrite_", k_window);
    call.set_packed_rows(q, k_window, v_window, layer, qkv);
    call.set_norms(q_norm, k_norm, norm_eps);
    call.run_prewrite(cos_sin, cache_len, std::nullopt);
  }

  static void packed_prewrite_direct(Tensor q, Tensor k_window, Tensor v_window, Tensor k_cache,
                                     Tensor v_cache, int64_t layer, Tensor qkv, Tensor cos_sin,
                                     Tensor cache_len, Tensor commit_len, OptTensor status,
                                     OptTensor q_norm, OptTensor k_norm, double norm_eps) {
    KvCacheOperators call("qkv_prewrite_", k_window);
    call.set_packed_rows(q, k_window, v_window, layer, qkv);
    call.set_norms(q_norm, k_norm, norm_eps);
    call.run_prewrite(cos_sin, cache_len, Direct{k_cache, v_cache, commit_len, status});
  }

  static void commit(Tensor k_cache, Tensor v_cache, Tensor k_window, Tensor v_window,
                     Tensor winner, Tensor cache_len, Tensor commit_len, OptTensor status) {
    KvCacheOperators call("kv_commit_", k_window);
    call.check_v_window(v_window);
    call.check_caches(k_cache, v_cache);
    KvCommitParams p{};
    p.sizes = call.sizes_;
    p.k_cache = call.view_of<KvCacheView>("k_cache", k_cache);
    p.v_cache = call.view_of<KvCacheView>("v_cache", v_cache);
    p.k_window = call.view_of<KvWindowView>("k_window", k_window);
    p.v_window = call.view_of<KvWindowView>("v_window", v_window);
    p.winner = call.lengths("winner", winner, call.winner_);
    p.cache_len = call.lengths("cache_len", cache_len, call.cache_len_);
    p.commit_len = call.lengths("commit_len", commit_len, call.commit_len_);
    call.check_status(status);
    call.backend_.commit(call.op_, p, status);
  }

 private:
  struct Direct {
    const Tensor& k_cache;
    const Tensor& v_cache;
    const Tensor& commit_len;
    const OptTensor& status;
  };

  KvCacheOperators(const char* op, const Tensor& k_window)
      : op_(op), backend_(op, "k_window", k_window), dtype_(k_window.scalar_type()) {
    check_floating(op, "k_window", k_window);
    check_rank(op, "k_window", k_window, 6);
    sizes_.layers = k_window.size(0);
    sizes_.batch = k_window.size(1);
    sizes_.branches = k_window.size(2);
    sizes_.window = k_window.size(3);
    sizes_.kv_heads = k_window.size(4);
    sizes_.head_dim = k_window.size(5);
    sizes_.type = float_type(dtype_);
  }

  void check(const char* argument, const Tensor& tensor, ScalarType dtype,
             std::initializer_list<int64_t> shape) const {
    check_tensor(op_, argument, tensor, dtype, shape, backend_.device());
  }

  template <typename View>
  View view_of(const char* argument, const Tensor& tensor) const {
    check_unit_stride(op_, argument, tensor);
    View view{};
    view.data = tensor.data_ptr();
    constexpr size_t kStrides = sizeof(view.stride) / sizeof(view.stride[0]);
    for (size_t d = 0; d < kStrides; ++d) view.stride[d] = tensor.stride(d);
    return view;
  }

  void check_v_window(const Tensor& v_window) const {
    const KvSizes& s = sizes_;
    check("v_window", v_window, dtype_,
          {s.layers, s.batch, s.branches, s.window, s.kv_heads, s.head_dim});
  }

  void check_caches(const Tensor& k_cache, const Tensor& v_cache) {
    check_rank(op_, "k_cache", k_cache, 5);
    KvSizes& s = sizes_;
    s.capacity = k_cache.size(2);
    check("k_cache", k_cache, dtype_, {s.layers, s.batch, s.capacity, s.kv_heads, s.head_dim});
    check("v_cache", v_cache, dtype_, {s.layers, s.batch, s.capacity, s.kv_heads, s.head_dim});
  }

  const int32_t* lengths(const char* argument, const Tensor& tensor, OptTensor& held) const {
    check(argument, tensor, ScalarType::Int, {sizes_.batch});
    held = as_contiguous(tensor);
    return data<int32_t>(*held);
  }

  void check_status(const OptTensor& status) const {
    if (status.has_value()) check("status", *status, ScalarType::Int, {sizes_.batch});
  }

  void set_windows(const Tensor& k_window, const Tensor& v_window, int64_t layer) {
    if (layer < 0 || layer >= sizes_.layers) {
      fail(op_, "layer", "0 to " + std::to_string(sizes_.layers - 1), layer);
    }
    params_.layer = layer;
    params_.k_window = view_of<KvWindowView>("k_window", k_window);
    params_.v_window = view_of<KvWindowView>("v_window", v_window);
  }

  void set_rows(const Tensor& k_window, const Tensor& v_window, int64_t layer, const Tensor& k,
                const Tensor& v) {
    const KvSizes& s = sizes_;
    check_v_window(v_window);
    check("k", k, dtype_, {s.batch, s.branches, s.window, s.kv_heads, s.head_dim});
    check("v", v, dtype_, {s.batch, s.branches, s.window, s.kv_heads, s.head_dim});
    set_windows(k_window, v_window, layer);
    params_.k = view_of<KvRowsView>("k", k);
    params_.v = view_of<KvRowsView>("v", v);
  }

  void set_packed_rows(const Tensor& q, const Tensor& k_window, const Tensor& v_window,
                       int64_t layer, const Tensor& qkv) {
    KvSizes& s = sizes_;
    check_v_window(v_window);
    check_rank(op_, "q", q, 5);
    s.q_heads = q.size(3);
    check("q", q, dtype_, {s.batch, s.branches, s.window, s.q_heads, s.head_dim});
    check("qkv", qkv, dtype_,
          {s.batch, s.branches, s.window, s.q_heads + 2 * s.kv_heads, s.head_dim});
    set_windows(k_window, v_window, layer);
    KvPrewriteParams& p = params_;
    p.q_out = view_of<KvRowsView>("q", q);
    p.q = view_of<KvRowsView>("qkv", qkv);
    int64_t head_bytes = p.q.stride[3] * element_size(s.type);
    p.k = p.q;
    p.k.data = static_cast<char*>(p.q.data) + s.q_heads * head_bytes;
    p.v = p.q;
    p.v.data = static_cast<char*>(p.k.data) + s.kv_heads * head_bytes;
  }

  void set_norms(const OptTensor& q_norm, const OptTensor& k_norm, double eps) {
    if (q_norm.has_value() != k_norm.has_value()) {
      const bool of_q = q_norm.has_value();
      fail(op_, of_q ? "k_norm" : "q_norm",
           std::string("a tensor, since ") + (of_q ? "q_norm" : "k_norm") + " is given", "None");
    }
    if (!q_norm.has_value()) return;
    // Negated, so that a NaN is refused too.
    if (!(eps >= 0 && eps <= std::numeric_limits<float>::max())) {
      fail(op_, "norm_eps", "a finite number, 0 or more", eps);
    }
    params_.norms = {norm("q_norm", *q_norm, q_norm_), norm("k_norm", *k_norm, k_norm_),
                     static_cast<float>(eps)};
  }

  const void* norm(const char* argument, const Tensor& weight, OptTensor& held) const {
    check(argument, weight, dtype_, {sizes_.head_dim});
    held = as_contiguous(weight);
    return held->data_ptr();
  }

  void set_rotation(const OptTensor& cos_sin, const OptTensor& cache_len) {
    KvPrewriteParams& p = params_;
    if (cache_len.has_value()) p.cache_len = lengths("cache_len", *cache_len, cache_len_);
    if (!cos_sin.has_value()) return;
    if (!cache_len.has_value()) fail(op_, "cache_len", "a tensor, since cos_sin is given", "None");
    if (sizes_.head_dim % 2 != 0) {
      fail(op_, "cos_sin", "None, since the head dimension is odd", sizes_.head_dim);
    }
    check_rank(op_, "cos_sin", *cos_sin, 2);
    p.max_position = cos_sin->size(0);
    check("cos_sin", *cos_sin, ScalarType::Float, {p.max_position, sizes_.head_dim});
    check_unit_stride(op_, "cos_sin", *cos_sin);
    p.cos_sin = data<float>(*cos_sin);
    p.cos_sin_stride = cos_sin->stride(0);
  }

  void run_prewrite(const OptTensor& cos_sin, const OptTensor& cache_len,
                    const std::optional<Direct>& direct) {
    KvPrewriteParams& p = params_;
    set_rotation(cos_sin, cache_len);
    if (direct.has_value()) {
      check_caches(direct->k_cache, direct->v_cache);
      p.k_cache = view_of<KvCacheView>("k_cache", direct->k_cache);
      p.v_cache = view_of<KvCacheView>("v_cache", direct->v_cache);
      p.commit_len = lengths("commit_len", direct->commit_len, commit_len_);
      check_status(direct->status);
    }
    p.sizes = sizes_;
    backend_.prewrite(op_, p, direct.has_value() ? direct->status : OptTensor());
  }

  const char* op_;
  Backend backend_;
  ScalarType dtype_;
  KvSizes sizes_{};
  KvPrewriteParams params_{};
  // Small operands made contiguous, kept alive while the parameters point to them.
  OptTensor winner_;
  OptTensor cache_len_;
  OptTensor commit_len_;
  OptTensor q_norm_;
  OptTensor k_norm_;
};

}  // namespace lopa
