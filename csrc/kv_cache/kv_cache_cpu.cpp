// Pre-Write and Commit-Winner-Cache on the CPU: checks, threads, copies.
#include "kv_cache/kv_cache_cpu.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

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

template <typename View, size_t N>
View make_view(const char* op, const char* argument, const Tensor& tensor, View view,
               int64_t (View::*)[N]) {
  check_unit_stride(op, argument, tensor);
  view.data = tensor.data_ptr();
  for (size_t d = 0; d < N; ++d) view.stride[d] = tensor.stride(d);
  return view;
}

template <typename View>
View view_of(const char* op, const char* argument, const Tensor& tensor) {
  return make_view(op, argument, tensor, View{}, &View::stride);
}

KvSizes window_sizes(const char* op, const Tensor& k_window) {
  check_cpu(op, "k_window", k_window);
  check_floating(op, "k_window", k_window);
  check_rank(op, "k_window", k_window, 6);
  KvSizes sizes{};
  sizes.layers = k_window.size(0);
  sizes.batch = k_window.size(1);
  sizes.branches = k_window.size(2);
  sizes.window = k_window.size(3);
  sizes.kv_heads = k_window.size(4);
  sizes.head_dim = k_window.size(5);
  sizes.type = float_type(k_window.scalar_type());
  return sizes;
}

void check_windows(const char* op, const KvSizes& s, const Tensor& k_window,
                   const Tensor& v_window) {
  check_tensor(op, "v_window", v_window, k_window.scalar_type(),
               {s.layers, s.batch, s.branches, s.window, s.kv_heads, s.head_dim});
}

void check_caches(const char* op, KvSizes& s, ScalarType dtype, const Tensor& k_cache,
                  const Tensor& v_cache) {
  check_rank(op, "k_cache", k_cache, 5);
  s.capacity = k_cache.size(2);
  check_tensor(op, "k_cache", k_cache, dtype,
               {s.layers, s.batch, s.capacity, s.kv_heads, s.head_dim});
  check_tensor(op, "v_cache", v_cache, dtype,
               {s.layers, s.batch, s.capacity, s.kv_heads, s.head_dim});
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
          s.kv_heads, cos_sin);
    write(row(p_.v, b, k, c), p_.v.stride[3], window(p_.v_window, b, k, c), p_.v_window.stride[4],
          s.kv_heads, nullptr);
    if (p_.q.data != nullptr) {
      write(row(p_.q, b, k, c), p_.q.stride[3], row(p_.q_out, b, k, c), p_.q_out.stride[3],
            s.q_heads, cos_sin);
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
             const float* cos_sin) const {
    if (cos_sin != nullptr) {
      rotate_(p_.sizes.type, src, src_stride, dst, dst_stride, heads, p_.sizes.head_dim, cos_sin);
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

// Small operands made contiguous, kept alive while the parameters point to them.
struct Held {
  OptTensor cache_len;
  OptTensor commit_len;
  OptTensor winner;
};

void set_layer(const char* op, KvPrewriteParams& p, int64_t layer) {
  if (layer < 0 || layer >= p.sizes.layers) {
    fail(op, "layer", "0 to " + std::to_string(p.sizes.layers - 1), layer);
  }
  p.layer = layer;
}

const int32_t* lengths(const char* op, const char* argument, const Tensor& tensor, int64_t batch,
                       OptTensor& held) {
  check_tensor(op, argument, tensor, ScalarType::Int, {batch});
  held = contiguous(tensor);
  return data<int32_t>(*held);
}

void check_status(const char* op, const OptTensor& status, int64_t batch) {
  if (status.has_value()) check_tensor(op, "status", *status, ScalarType::Int, {batch});
}

void set_rotation(const char* op, KvPrewriteParams& p, const OptTensor& cos_sin,
                  const OptTensor& cache_len, Held& held) {
  if (cache_len.has_value()) {
    p.cache_len = lengths(op, "cache_len", *cache_len, p.sizes.batch, held.cache_len);
  }
  if (!cos_sin.has_value()) return;
  if (!cache_len.has_value()) fail(op, "cache_len", "a tensor, since cos_sin is given", "None");
  if (p.sizes.head_dim % 2 != 0) {
    fail(op, "cos_sin", "None, since the head dimension is odd", p.sizes.head_dim);
  }
  check_rank(op, "cos_sin", *cos_sin, 2);
  p.max_position = cos_sin->size(0);
  check_tensor(op, "cos_sin", *cos_sin, ScalarType::Float, {p.max_position, p.sizes.head_dim});
  check_unit_stride(op, "cos_sin", *cos_sin);
  p.cos_sin = data<float>(*cos_sin);
  p.cos_sin_stride = cos_sin->stride(0);
}

struct Direct {
  const Tensor& k_cache;
  const Tensor& v_cache;
  const Tensor& commit_len;
  const OptTensor& status;
};

void set_direct(const char* op, KvPrewriteParams& p, ScalarType dtype, const Direct& direct,
                Held& held) {
  check_caches(op, p.sizes, dtype, direct.k_cache, direct.v_cache);
  p.k_cache = view_of<KvCacheView>(op, "k_cache", direct.k_cache);
  p.v_cache = view_of<KvCacheView>(op, "v_cache", direct.v_cache);
  p.commit_len = lengths(op, "commit_len", direct.commit_len, p.sizes.batch, held.commit_len);
  check_status(op, direct.status, p.sizes.batch);
}

void run_prewrite(const char* op, const KvPrewriteParams& p, const OptTensor& status) {
  Faults bits =
      find_faults(op, p.sizes.batch, status, [&](int64_t b) { return prewrite_fault(p, b); });
  Prewrite(p).run(bits);
  report_faults(bits, status);
}

void prewrite(const Tensor& k_window, const Tensor& v_window, int64_t layer, const Tensor& k,
              const Tensor& v, const OptTensor& cos_sin, const OptTensor& cache_len,
              const std::optional<Direct>& direct) {
  const char* op = "kv_prewrite_";
  KvPrewriteParams p{};
  Held held;
  p.sizes = window_sizes(op, k_window);
  const KvSizes& s = p.sizes;
  ScalarType dtype = k_window.scalar_type();
  check_windows(op, s, k_window, v_window);
  check_tensor(op, "k", k, dtype, {s.batch, s.branches, s.window, s.kv_heads, s.head_dim});
  check_tensor(op, "v", v, dtype, {s.batch, s.branches, s.window, s.kv_heads, s.head_dim});
  set_layer(op, p, layer);
  p.k_window = view_of<KvWindowView>(op, "k_window", k_window);
  p.v_window = view_of<KvWindowView>(op, "v_window", v_window);
  p.k = view_of<KvRowsView>(op, "k", k);
  p.v = view_of<KvRowsView>(op, "v", v);
  set_rotation(op, p, cos_sin, cache_len, held);
  if (direct.has_value()) set_direct(op, p, dtype, *direct, held);
  run_prewrite(op, p, direct.has_value() ? direct->status : OptTensor());
}

void prewrite_packed(const Tensor& q, const Tensor& k_window, const Tensor& v_window, int64_t layer,
                     const Tensor& qkv, const Tensor& cos_sin, const Tensor& cache_len,
                     const std::optional<Direct>& direct) {
  const char* op = "qkv_prewrite_";
  KvPrewriteParams p{};
  Held held;
  p.sizes = window_sizes(op, k_window);
  KvSizes& s = p.sizes;
  ScalarType dtype = k_window.scalar_type();
  check_windows(op, s, k_window, v_window);
  check_rank(op, "q", q, 5);
  s.q_heads = q.size(3);
  check_tensor(op, "q", q, dtype, {s.batch, s.branches, s.window, s.q_heads, s.head_dim});
  check_tensor(op, "qkv", qkv, dtype,
               {s.batch, s.branches, s.window, s.q_heads + 2 * s.kv_heads, s.head_dim});
  set_layer(op, p, layer);
  p.k_window = view_of<KvWindowView>(op, "k_window", k_window);
  p.v_window = view_of<KvWindowView>(op, "v_window", v_window);
  p.q_out = view_of<KvRowsView>(op, "q", q);
  p.q = view_of<KvRowsView>(op, "qkv", qkv);
  int64_t head_bytes = p.q.stride[3] * element_size(s.type);
  p.k = p.q;
  p.k.data = static_cast<char*>(p.q.data) + s.q_heads * head_bytes;
  p.v = p.q;
  p.v.data = static_cast<char*>(p.k.data) + s.kv_heads * head_bytes;
  set_rotation(op, p, cos_sin, cache_len, held);
  if (direct.has_value()) set_direct(op, p, dtype, *direct, held);
  run_prewrite(op, p, direct.has_value() ? direct->status : OptTensor());
}

void kv_prewrite_(Tensor k_window, Tensor v_window, int64_t layer, Tensor k, Tensor v,
                  OptTensor cos_sin, OptTensor cache_len) {
  prewrite(k_window, v_window, layer, k, v, cos_sin, cache_len, std::nullopt);
}

void kv_prewrite_direct_(Tensor k_window, Tensor v_window, Tensor k_cache, Tensor v_cache,
                         int64_t layer, Tensor k, Tensor v, Tensor cache_len, Tensor commit_len,
                         OptTensor cos_sin, OptTensor status) {
  Direct direct{k_cache, v_cache, commit_len, status};
  prewrite(k_window, v_window, layer, k, v, cos_sin, cache_len, direct);
}

void qkv_prewrite_(Tensor q, Tensor k_window, Tensor v_window, int64_t layer, Tensor qkv,
                   Tensor cos_sin, Tensor cache_len) {
  prewrite_packed(q, k_window, v_window, layer, qkv, cos_sin, cache_len, std::nullopt);
}

void qkv_prewrite_direct_(Tensor q, Tensor k_window, Tensor v_window, Tensor k_cache,
                          Tensor v_cache, int64_t layer, Tensor qkv, Tensor cos_sin,
                          Tensor cache_len, Tensor commit_len, OptTensor status) {
  Direct direct{k_cache, v_cache, commit_len, status};
  prewrite_packed(q, k_window, v_window, layer, qkv, cos_sin, cache_len, direct);
}

void kv_commit_(Tensor k_cache, Tensor v_cache, Tensor k_window, Tensor v_window, Tensor winner,
                Tensor cache_len, Tensor commit_len, OptTensor status) {
  const char* op = "kv_commit_";
  KvCommitParams p{};
  Held held;
  p.sizes = window_sizes(op, k_window);
  const KvSizes& s = p.sizes;
  check_windows(op, s, k_window, v_window);
  check_caches(op, p.sizes, k_window.scalar_type(), k_cache, v_cache);
  p.k_cache = view_of<KvCacheView>(op, "k_cache", k_cache);
  p.v_cache = view_of<KvCacheView>(op, "v_cache", v_cache);
  p.k_window = view_of<KvWindowView>(op, "k_window", k_window);
  p.v_window = view_of<KvWindowView>(op, "v_window", v_window);
  p.winner = lengths(op, "winner", winner, s.batch, held.winner);
  p.cache_len = lengths(op, "cache_len", cache_len, s.batch, held.cache_len);
  p.commit_len = lengths(op, "commit_len", commit_len, s.batch, held.commit_len);
  check_status(op, status, s.batch);

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

}  // namespace
}  // namespace lopa

STABLE_TORCH_LIBRARY_IMPL(lopa, CPU, m) {
  m.impl("kv_prewrite_", TORCH_BOX(&lopa::kv_prewrite_));
  m.impl("kv_prewrite_direct_", TORCH_BOX(&lopa::kv_prewrite_direct_));
  m.impl("qkv_prewrite_", TORCH_BOX(&lopa::qkv_prewrite_));
  m.impl("qkv_prewrite_direct_", TORCH_BOX(&lopa::qkv_prewrite_direct_));
  m.impl("kv_commit_", TORCH_BOX(&lopa::kv_commit_));
}
