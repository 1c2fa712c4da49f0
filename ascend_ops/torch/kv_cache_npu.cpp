// Pre-Write and Commit-Winner-Cache on NPUs.
#include "aclnn.h"
#include "kv_cache/kv_cache_args.h"
#include "kv_cache/params.h"

namespace lopa {
namespace {

// A sequence that a fault drops is reported by its status word alone: the host never waits to know.
class Npu : public NpuCall {
 public:
  using NpuCall::NpuCall;

  void prewrite(const char* op, const KvPrewriteParams& p, const OptTensor& status) const {
    const KvSizes& s = p.sizes;
    if (s.batch * s.branches * s.window == 0 || s.layers == 0) return;
    const bool packed = p.q.data != nullptr;
    const Operand k_window = written(op, "k_window", window(s, p.k_window));
    const Operand v_window = written(op, "v_window", window(s, p.v_window));
    const Operand cos_sin =
        Operand::strided(p.cos_sin, ACL_FLOAT, {p.max_position, s.head_dim}, {p.cos_sin_stride, 1});
    const Operand cache_len = words(p.cache_len, s);
    if (packed) {
      const Operand q = written(op, "q", rows(s, p.q_out, s.q_heads));
      const Operand qkv = rows(s, p.q, s.q_heads + 2 * s.kv_heads);
      const Operand q_norm = Operand::dense(p.norms.q, acl_type(s.type), {s.head_dim});
      const Operand k_norm = Operand::dense(p.norms.k, acl_type(s.type), {s.head_dim});
      if (p.norms.q != nullptr && !(p.norms.eps > 0)) {
        fail(op, "norm_eps", "a number above 0 on an NPU", p.norms.eps);
      }
      if (p.commit_len == nullptr) {
        launch("aclnnLopaQkvPrewrite", q, k_window, v_window, qkv, cos_sin, cache_len, q_norm,
               k_norm, p.layer, bits_of(p.norms.eps));
        return;
      }
      const Status words_out(*this, status, s.batch);
      launch("aclnnLopaQkvPrewriteDirect", q, k_window, v_window,
             written(op, "k_cache", cache(s, p.k_cache)),
             written(op, "v_cache", cache(s, p.v_cache)), qkv, cos_sin, cache_len,
             words(p.commit_len, s), words_out.operand(), q_norm, k_norm, p.layer,
             bits_of(p.norms.eps));
      return;
    }
    const Operand k = rows(s, p.k, s.kv_heads);
    const Operand v = rows(s, p.v, s.kv_heads);
    if (p.commit_len == nullptr) {
      launch("aclnnLopaKvPrewrite", k_window, v_window, k, v, cos_sin, cache_len, p.layer);
      return;
    }
    const Status words_out(*this, status, s.batch);
    launch("aclnnLopaKvPrewriteDirect", k_window, v_window,
           written(op, "k_cache", cache(s, p.k_cache)), written(op, "v_cache", cache(s, p.v_cache)),
           k, v, cache_len, words(p.commit_len, s), cos_sin, words_out.operand(), p.layer);
  }

  void commit(const char* op, const KvCommitParams& p, const OptTensor& status) const {
    const KvSizes& s = p.sizes;
    if (s.batch == 0 || s.layers == 0) return;
    const Status words_out(*this, status, s.batch);
    launch("aclnnLopaKvCommit", written(op, "k_cache", cache(s, p.k_cache)),
           written(op, "v_cache", cache(s, p.v_cache)), window(s, p.k_window),
           window(s, p.v_window), words(p.winner, s), words(p.cache_len, s), words(p.commit_len, s),
           words_out.operand());
  }

 private:
  // The operator's status words: the caller's, or some that nobody reads.
  class Status {
   public:
    Status(const NpuCall& call, const OptTensor& given, int64_t batch) : given_(given) {
      words_ = given.has_value() ? as_contiguous(*given) : call.empty({batch}, ScalarType::Int);
      if (!given.has_value()) torch::stable::zero_(words_);
    }
    Status(const Status&) = delete;
    Status& operator=(const Status&) = delete;
    ~Status() noexcept(false) {
      if (!given_.has_value() || given_->is_contiguous()) return;
      Tensor target = *given_;
      torch::stable::copy_(target, words_);
    }

    Operand operand() const { return Operand::dense(data<int32_t>(words_), {words_.size(0)}); }

   private:
    const OptTensor& given_;
    Tensor words_;
  };

  static Operand words(const int32_t* data, const KvSizes& s) {
    return Operand::dense(data, {s.batch});
  }

  static Operand rows(const KvSizes& s, const KvRowsView& view, int64_t heads) {
    const int64_t* t = view.stride;
    return Operand::strided(view.data, acl_type(s.type),
                            {s.batch, s.branches, s.window, heads, s.head_dim},
                            {t[0], t[1], t[2], t[3], 1});
  }

  static Operand window(const KvSizes& s, const KvWindowView& view) {
    const int64_t* t = view.stride;
    return Operand::strided(view.data, acl_type(s.type),
                            {s.layers, s.batch, s.branches, s.window, s.kv_heads, s.head_dim},
                            {t[0], t[1], t[2], t[3], t[4], 1});
  }

  static Operand cache(const KvSizes& s, const KvCacheView& view) {
    const int64_t* t = view.stride;
    return Operand::strided(view.data, acl_type(s.type),
                            {s.layers, s.batch, s.capacity, s.kv_heads, s.head_dim},
                            {t[0], t[1], t[2], t[3], 1});
  }

  // What an operator writes in place is contiguous: of a strided tensor aclnn would write a copy,
  // and copy all of it back.
  static Operand written(const char* op, const char* argument, Operand operand) {
    if (!operand.is_dense()) {
      fail(op, argument, "a contiguous tensor on an NPU",
           "strides " + shape_string(operand.strides.data(), operand.strides.size()));
    }
    return operand;
  }
};

using Operators = KvCacheOperators<Npu>;

}  // namespace
}  // namespace lopa

STABLE_TORCH_LIBRARY_IMPL(lopa, PrivateUse1, m) {
  m.impl("kv_prewrite_", TORCH_BOX(&lopa::Operators::prewrite));
  m.impl("kv_prewrite_direct_", TORCH_BOX(&lopa::Operators::prewrite_direct));
  m.impl("qkv_prewrite_", TORCH_BOX(&lopa::Operators::packed_prewrite));
  m.impl("qkv_prewrite_direct_", TORCH_BOX(&lopa::Operators::packed_prewrite_direct));
  m.impl("kv_commit_", TORCH_BOX(&lopa::Operators::commit));
}
