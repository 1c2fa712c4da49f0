// Pre-Write and Commit-Winner-Cache on the CPU: faults, threads, copies.
#include "kv_cache/kv_cache_cpu.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "kv_cache/kv_cache_args.h"
#include "kv_cache/params.h"
#include "lopa/checks.h"
#include "lopa/isa.h"
#include "lopa/status.h"
#include "lopa/tensor.h"

namespace lopa {
namespace {

// A thread with less to move than this costs more to wake than it brings.
constexpr int64_t kBytesPerThread = 262144;

RotateFunction rotate_function() {
#if defined(LOPA_X86_KERNELS)
  if (isa() == Isa::kAvx512) return rotate_heads_avx512;
  if (isa() == Isa::kAvx2) return rotate_heads_avx2;
#endif
  return rotate_heads_portable;
}

// What is wrong with one sequence: a status bit, and words for the caller without a status tensor.
struct Fault {
  int32_t bit;
  std::string text;
};

using Faults = std::vector<int32_t>;

// Collects the bits of all sequences before anything is written; without `status` the first fault
// is an error.
template <typename Check>
Faults find_faults(const char* op, int64_t batch, const OptTensor& status, const Check& check) {
  Faults bits(batch, 0);
  for (int64_t b = 0; b < batch; ++b) {
    std::optional<Fault> fault = check(b);
    if (!fault.has_value()) continue;
    if (!status.has_value()) {
      throw std::runtime_error(std::string(op) + ": sequence " + std::to_string(b) + ": " +
                               fault->text);
    }
    bits[b] = fault->bit;
  }
  return bits;
}

void report_faults(const Faults& bits, const OptTensor& status) {
  if (!status.has_value()) return;
  int32_t* words = mutable_data<int32_t>(*status);
  int64_t stride = status->stride(0);
  for (size_t b = 0; b < bits.size(); ++b) words[b * stride] |= bits[b];
}

std::string text(std::initializer_list<std::string> parts) {
  std::string all;
  for (const std::string& part : parts) all += part;
  return all;
}

std::optional<Fault> commit_fault(int64_t cache_len, int64_t commit_len, const KvSizes& s) {
  if (cache_len < 0) {
    return Fault{kBadState, text({"cache_len ", std::to_string(cache_len), " is negative"})};
  }
  if (commit_len < 0 || commit_len > s.window) {
    return Fault{kBadState, text({"commit_len ", std::to_string(commit_len),
                                  " is outside the window of ", std::to_string(s.window)})};
  }
  if (cache_len + commit_len > s.capacity) {
    return Fault{kCacheFull,
                 text({"cache_len ", std::to_string(cache_len), " + commit_len ",
                       std::to_string(commit_len), " = ", std::to_string(cache_len + commit_len),
                       " exceeds the capacity ", std::to_string(s.capacity)})};
  }
  return std::nullopt;
}

std::optional<Fault> prewrite_fault(const KvPrewriteParams& p, int64_t b) {
  if (p.cache_len == nullptr) return std::nullopt;
  int64_t cache_len = p.cache_len[b];
  std::optional<Fault> fault;
  if (p.commit_len != nullptr) fault = commit_fault(cache_len, p.commit_len[b], p.sizes);
  if (fault.has_value() && fault->bit != kCacheFull) return fault;
  if (cache_len < 0) {
    return Fault{kBadState, text({"cache_len ", std::to_string(cache_len), " is negative"})};
  }
  int64_t end = cache_len + p.sizes.window;
  if (p.cos_sin != nullptr && end > p.max_position) {
    return Fault{kBadState,
                 text({"position ", std::to_string(end - 1), " (cache_len ",
                       std::to_string(cache_len), " + column ", std::to_string(p.sizes.window - 1),
                       ") exceeds the capacity of cos_sin, ", std::to_string(p.max_position),
                       " positions"})};
  }
  return fault;
}

// `heads` rows between strided places, in bytes.
void copy_heads(const char* src, int64_t src_stride, char* dst, int64_t dst_stride, int64_t heads,
                int64_t row) {
  if (src_stride == row && dst_stride == row) {
    std::memcpy(dst, src, heads * row);
    return;
  }
  for (int64_t h = 0; h < heads; ++h) std::memcpy(dst + h * dst_stride, src + h * src_stride, row);
}

class Prewrite {
 public:
  explicit Prewrite(const KvPrewriteParams& params)
      : p_(params), element_(element_size(params.sizes.type)), rotate_(rotate_function()) {}

  void run(const Faults& bits) const {
    const KvSizes& s = p_.sizes;
    int64_t columns = s.batch * s.branches * s.window;
    int64_t bytes = (2 * s.kv_heads + s.q_heads) * s.head_dim * element_;
    int64_t grain = std::max<int64_t>(kBytesPerThread / std::max<int64_t>(bytes, 1), 1);
    torch::stable::parallel_for(0, columns, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        int64_t b = i / (s.branches * s.window);
        column(b, i / s.window % s.branches, i % s.window, bits[b]);
      }
    });
  }

 private:
  void column(int64_t b, int64_t k, int64_t c, int32_t fault) const {
    const KvSizes& s = p_.sizes;
    if (fault == kBadState) {
      clear_queries(b, k, c);
      return;
    }
    const float* cos_sin = nullptr;
    if (p_.cos_sin != nullptr) cos_sin = p_.cos_sin + (p_.cache_len[b] + c) * p_.cos_sin_stride;
    write(row(p_.k, b, k, c), p_.k.stride[3], window(p_.k_window, b, k, c), p_.k_window.stride[4],
          s.kv_heads, cos_sin, p_.norms.k);
    write(row(p_.v, b, k, c), p_.v.stride[3], window(p_.v_window, b, k, c), p_.v_window.stride[4],
          s.kv_heads, nullptr, nullptr);
    if (p_.q.data != nullptr) {
      write(row(p_.q, b, k, c), p_.q.stride[3], row(p_.q_out, b, k, c), p_.q_out.stride[3],
            s.q_heads, cos_sin, p_.norms.q);
    }
    if (p_.commit_len == nullptr || fault != 0 || k != 0 || c >= p_.commit_len[b]) return;
    copy(window(p_.k_window, b, k, c), p_.k_window.stride[4], cache(p_.k_cache, b, c),
         p_.k_cache.stride[3]);
    copy(window(p_.v_window, b, k, c), p_.v_window.stride[4], cache(p_.v_cache, b, c),
         p_.v_cache.stride[3]);
  }

  void clear_queries(int64_t b, int64_t k, int64_t c) const {
    if (p_.q.data == nullptr) return;
    for (int64_t h = 0; h < p_.sizes.q_heads; ++h) {
      std::memset(row(p_.q_out, b, k, c) + h * p_.q_out.stride[3] * element_, 0,
                  p_.sizes.head_dim * element_);
    }
  }

  char* row(const KvRowsView& view, int64_t b, int64_t k, int64_t c) const {
    return static_cast<char*>(view.data) +
           (b * view.stride[0] + k * view.stride[1] + c * view.stride[2]) * element_;
  }

  char* window(const KvWindowView& view, int64_t b, int64_t k, int64_t c) const {
    return static_cast<char*>(view.data) + (p_.layer * view.stride[0] + b * view.stride[1] +
                                            k * view.stride[2] + c * view.stride[3]) *
                                               element_;
  }

  char* cache(const KvCacheView& view, int64_t b, int64_t c) const {
    return static_cast<char*>(view.data) + (p_.layer * view.stride[0] + b * view.stride[1] +
                                            (p_.cache_len[b] + c) * view.stride[2]) *
                                               element_;
  }

  void write(const char* src, int64_t src_stride, char* dst, int64_t dst_stride, int64_t heads,
             const float* cos_sin, const void* weight) const {
    if (cos_sin != nullptr) {
      rotate_({p_.sizes.type, src, src_stride, dst, dst_stride, heads, p_.sizes.head_dim, cos_sin,
               weight, p_.norms.eps});
    } else {
      copy_heads(src, src_stride * element_, dst, dst_stride * element_, heads,
                 p_.sizes.head_dim * element_);
    }
  }

  void copy(const char* src, int64_t src_stride, char* dst, int64_t dst_stride) const {
    copy_heads(src, src_stride * element_, dst, dst_stride * element_, p_.sizes.kv_heads,
               p_.sizes.head_dim * element_);
  }

  const KvPrewriteParams& p_;
  int64_t element_;
  RotateFunction rotate_;
};

void commit_columns(const KvSizes& s, const KvWindowView& from, const KvCacheView& to,
                    int64_t layer, int64_t b, int64_t winner, int64_t cache_len, int64_t columns) {
  int64_t element = element_size(s.type);
  int64_t row = s.head_dim * element;
  const char* src =
      static_cast<const char*>(from.data) +
      (layer * from.stride[0] + b * from.stride[1] + winner * from.stride[2]) * element;
  char* dst = static_cast<char*>(to.data) +
              (layer * to.stride[0] + b * to.stride[1] + cache_len * to.stride[2]) * element;
  int64_t column = s.kv_heads * row;
  bool dense = from.stride[4] == s.head_dim && to.stride[3] == s.head_dim &&
               from.stride[3] * element == column && to.stride[2] * element == column;
  if (dense) {
    std::memcpy(dst, src, columns * column);
    return;
  }
  for (int64_t c = 0; c < columns; ++c) {
    copy_heads(src + c * from.stride[3] * element, from.stride[4] * element,
               dst + c * to.stride[2] * element, to.stride[3] * element, s.kv_heads, row);
  }
}

void commit_winners(const char* op, const KvCommitParams& p, const OptTensor& status) {
  const KvSizes& s = p.sizes;
  Faults bits = find_faults(op, s.batch, status, [&](int64_t b) -> std::optional<Fault> {
    std::optional<Fault> fault = commit_fault(p.cache_len[b], p.commit_len[b], s);
    if (fault.has_value() || p.commit_len[b] == 0) return fault;
    if (p.winner[b] < 0 || p.winner[b] >= s.branches) {
      return Fault{kBadState, text({"winner ", std::to_string(p.winner[b]), " is not one of the ",
                                    std::to_string(s.branches), " branch slots"})};
    }
    return std::nullopt;
  });

  int64_t most = s.batch > 0 ? *std::max_element(p.commit_len, p.commit_len + s.batch) : 0;
  int64_t bytes = 2 * most * s.kv_heads * s.head_dim * element_size(s.type);
  int64_t grain = std::max<int64_t>(kBytesPerThread / std::max<int64_t>(bytes, 1), 1);
  torch::stable::parallel_for(0, s.layers * s.batch, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int64_t layer = i / s.batch;
      int64_t b = i % s.batch;
      if (bits[b] != 0 || p.commit_len[b] == 0) continue;
      commit_columns(s, p.k_window, p.k_cache, layer, b, p.winner[b], p.cache_len[b],
                     p.commit_len[b]);
      commit_columns(s, p.v_window, p.v_cache, layer, b, p.winner[b], p.cache_len[b],
                     p.commit_len[b]);
    }
  });
  report_faults(bits, status);
}

// Device and kernels of a call, for KvCacheOperators.
class Cpu {
 public:
  Cpu(const char* op, const char* argument, const Tensor& tensor) {
    check_cpu(op, argument, tensor);
  }

  Device device() const { return kCpu; }

  void prewrite(const char* op, const KvPrewriteParams& p, const OptTensor& status) const {
    Faults bits =
        find_faults(op, p.sizes.batch, status, [&](int64_t b) { return prewrite_fault(p, b); });
    Prewrite(p).run(bits);
    report_faults(bits, status);
  }

  void commit(const char* op, const KvCommitParams& p, const OptTensor& status) const {
    commit_winners(op, p, status);
  }
};

using Operators = KvCacheOperators<Cpu>;

}  // namespace
}  // namespace lopa

STABLE_TORCH_LIBRARY_IMPL(lopa, CPU, m) {
  m.impl("kv_prewrite_", TORCH_BOX(&lopa::Operators::prewrite));
  m.impl("kv_prewrite_direct_", TORCH_BOX(&lopa::Operators::prewrite_direct));
  m.impl("qkv_prewrite_", TORCH_BOX(&lopa::Operators::packed_prewrite));
  m.impl("qkv_prewrite_direct_", TORCH_BOX(&lopa::Operators::packed_prewrite_direct));
  m.impl("kv_commit_", TORCH_BOX(&lopa::Operators::commit));
}

STABLE_TORCH_LIBRARY_IMPL(lopa_eager, CPU, m) {
  m.impl("kv_prewrite_", TORCH_BOX(&lopa::Operators::prewrite));
  m.impl("qkv_prewrite_", TORCH_BOX(&lopa::Operators::packed_prewrite));
  m.impl("kv_commit_", TORCH_BOX(&lopa::Operators::commit));
}
