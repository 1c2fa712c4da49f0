// branch_attention on the CPU: checks, the cut into tasks, threads.
#include "branch_attention/branch_attention_cpu.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "lopa/checks.h"
#include "lopa/isa.h"
#include "lopa/tensor.h"

namespace lopa {
namespace {

constexpr int64_t kMaxHeadDim = 256;
// Queries and accumulators of a task are about 2 * 128 KiB: with a tile they stay in the L2 cache.
constexpr int64_t kTaskFloats = 32768;
// Fewer rows would spend a tenth of their time on packing the keys.
constexpr int64_t kMinTaskRows = 96;
constexpr int64_t kTasksPerThread = 2;
constexpr int64_t kMinPage = 16;
constexpr int64_t kMaxPage = 256;

AttentionTaskFunction task_function() {
#if defined(LOPA_X86_KERNELS)
  if (isa() == Isa::kAvx512) return branch_attention_task_avx512;
  if (isa() == Isa::kAvx2) return branch_attention_task_avx2;
#endif
  return branch_attention_task_portable;
}

template <size_t N>
void copy_strides(const char* op, const char* argument, const Tensor& tensor,
                  int64_t (&strides)[N]) {
  check_unit_stride(op, argument, tensor);
  for (size_t d = 0; d < N; ++d) strides[d] = tensor.stride(d);
}

// Tensors whose data the parameters point to.
struct Inputs {
  Tensor cache_len;
  Tensor length;
  OptTensor prompt_len;
  OptTensor block_table;
};

std::string in_sequence(int32_t value, int64_t b) {
  return std::to_string(value) + " in sequence " + std::to_string(b);
}

// The entries that hold cached positions; the others may be garbage and are never read.
void check_pages(const char* op, const BranchAttentionParams& p, int64_t b) {
  int64_t needed = (p.cache_len[b] + p.page_size - 1) / p.page_size;
  const int32_t* entries = p.block_table + b * p.table_width;
  for (int64_t i = 0; i < needed; ++i) {
    if (entries[i] < 0 || entries[i] >= p.pages) {
      fail(op, "block_table",
           "at least 0 and less than " + std::to_string(p.pages) + ", the pages of k_cache",
           in_sequence(entries[i], b) + ", entry " + std::to_string(i));
    }
  }
}

void check_lengths(const char* op, const BranchAttentionParams& p) {
  for (int64_t b = 0; b < p.batch; ++b) {
    if (p.cache_len[b] < 0 || p.cache_len[b] > p.capacity) {
      fail(op, "cache_len", "0 to " + std::to_string(p.capacity) + ", the cache's capacity",
           in_sequence(p.cache_len[b], b));
    }
    if (p.prompt_len != nullptr && p.prompt_len[b] < 0) {
      fail(op, "prompt_len", "0 or more", in_sequence(p.prompt_len[b], b));
    }
    if (p.block_table != nullptr) check_pages(op, p, b);
    for (int64_t k = 0; k < p.branches; ++k) {
      int32_t length = p.length[b * p.branches + k];
      if (length < 0 || length > p.window) {
        fail(op, "length", "0 to " + std::to_string(p.window) + ", the window",
             in_sequence(length, b) + ", branch " + std::to_string(k));
      }
    }
  }
}

void set_pages(const char* op, const Tensor& k_cache, const Tensor& block_table,
               BranchAttentionParams& p) {
  p.pages = k_cache.size(0);
  p.page_size = k_cache.size(1);
  if (p.page_size < kMinPage || p.page_size > kMaxPage || (p.page_size & (p.page_size - 1)) != 0) {
    fail(op, "k_cache",
         "pages of a power of two from " + std::to_string(kMinPage) + " to " +
             std::to_string(kMaxPage) + " positions",
         p.page_size);
  }
  check_cpu(op, "block_table", block_table);
  check_rank(op, "block_table", block_table, 2);
  p.table_width = block_table.size(1);
  check_tensor(op, "block_table", block_table, ScalarType::Int, {p.batch, p.table_width});
  p.block_table = data<int32_t>(block_table);
  p.capacity = p.table_width * p.page_size;
}

BranchAttentionParams make_params(const char* op, const Tensor& q, const Tensor& k_cache,
                                  const Tensor& v_cache, const Tensor& k_window,
                                  const Tensor& v_window, const Inputs& inputs,
                                  const std::string& mask, std::optional<int64_t> block_size,
                                  std::optional<double> scale) {
  check_cpu(op, "q", q);
  check_floating(op, "q", q);
  check_rank(op, "q", q, 5);
  check_cpu(op, "k_cache", k_cache);
  check_rank(op, "k_cache", k_cache, 4);
  BranchAttentionParams p{};
  p.batch = q.size(0);
  p.branches = q.size(1);
  p.window = q.size(2);
  p.q_heads = q.size(3);
  p.head_dim = q.size(4);
  p.capacity = k_cache.size(1);
  p.kv_heads = k_cache.size(2);
  p.type = float_type(q.scalar_type());
  ScalarType dtype = q.scalar_type();
  if (p.head_dim < 1 || p.head_dim > kMaxHeadDim) {
    fail(op, "q", "head_dim 1 to " + std::to_string(kMaxHeadDim), p.head_dim);
  }
  if (p.kv_heads < 1 || p.q_heads % p.kv_heads != 0) {
    fail(op, "q", "query heads a multiple of the " + std::to_string(p.kv_heads) + " KV heads",
         p.q_heads);
  }
  int64_t rows = p.batch;
  int64_t row_positions = p.capacity;
  if (inputs.block_table.has_value()) {
    set_pages(op, k_cache, *inputs.block_table, p);
    rows = p.pages;
    row_positions = p.page_size;
  }
  check_tensor(op, "k_cache", k_cache, dtype, {rows, row_positions, p.kv_heads, p.head_dim});
  check_tensor(op, "v_cache", v_cache, dtype, {rows, row_positions, p.kv_heads, p.head_dim});
  check_tensor(op, "k_window", k_window, dtype,
               {p.batch, p.branches, p.window, p.kv_heads, p.head_dim});
  check_tensor(op, "v_window", v_window, dtype,
               {p.batch, p.branches, p.window, p.kv_heads, p.head_dim});
  copy_strides(op, "q", q, p.q_stride);
  copy_strides(op, "k_cache", k_cache, p.k_cache_stride);
  copy_strides(op, "v_cache", v_cache, p.v_cache_stride);
  copy_strides(op, "k_window", k_window, p.k_window_stride);
  copy_strides(op, "v_window", v_window, p.v_window_stride);
  p.q = q.data_ptr();
  p.k_cache = k_cache.data_ptr();
  p.v_cache = v_cache.data_ptr();
  p.k_window = k_window.data_ptr();
  p.v_window = v_window.data_ptr();

  check_tensor(op, "cache_len", inputs.cache_len, ScalarType::Int, {p.batch});
  check_tensor(op, "length", inputs.length, ScalarType::Int, {p.batch, p.branches});
  p.cache_len = data<int32_t>(inputs.cache_len);
  p.length = data<int32_t>(inputs.length);
  if (mask == "block_causal") {
    if (!block_size.has_value() || *block_size < 1) {
      fail(op, "block_size", "1 or more for the mask block_causal",
           block_size.has_value() ? std::to_string(*block_size) : "None");
    }
    if (!inputs.prompt_len.has_value()) {
      fail(op, "prompt_len", "a tensor for the mask block_causal", "None");
    }
    check_tensor(op, "prompt_len", *inputs.prompt_len, ScalarType::Int, {p.batch});
    p.prompt_len = data<int32_t>(*inputs.prompt_len);
    p.block_size = *block_size;
  } else if (mask != "full") {
    fail(op, "mask", "full or block_causal", mask);
  }
  double value = scale.has_value() ? *scale : 1.0 / std::sqrt(static_cast<double>(p.head_dim));
  if (!std::isfinite(value)) fail(op, "scale", "a finite number", value);
  p.scale = static_cast<float>(value);
  check_lengths(op, p);
  return p;
}

// One past the last column of the block that `column` is in; blocks are counted from prompt_len,
// and the prompt is one block.
int64_t block_end(const BranchAttentionParams& p, int64_t b, int64_t column) {
  if (p.prompt_len == nullptr) return p.window;
  int64_t start = static_cast<int64_t>(p.prompt_len[b]) - p.cache_len[b];
  if (column < start) return start;
  return start + ((column - start) / p.block_size + 1) * p.block_size;
}

struct Plan {
  std::vector<AttentionSegment> segments;
  std::vector<AttentionTask> tasks;
  int64_t max_rows = 0;
};

Plan make_plan(const BranchAttentionParams& p, int64_t threads) {
  int64_t group = p.q_heads / p.kv_heads;
  int64_t all_rows = 0;
  for (int64_t i = 0; i < p.batch * p.branches; ++i) all_rows += p.length[i] * p.q_heads;
  int64_t most = std::max(kTaskFloats / round_up(p.head_dim, kMaxLanes), kMinTaskRows);
  int64_t share = (all_rows + threads * kTasksPerThread - 1) / (threads * kTasksPerThread);
  int64_t task_rows = std::min(most, std::max(kMinTaskRows, share));
  int64_t task_columns = std::max<int64_t>(task_rows / group, 1);

  Plan plan;
  for (int64_t b = 0; b < p.batch; ++b) {
    int64_t columns = 0;
    int32_t first = static_cast<int32_t>(plan.segments.size());
    auto close = [&] {
      int32_t last = static_cast<int32_t>(plan.segments.size());
      if (last == first) return;
      for (int64_t h = 0; h < p.kv_heads; ++h) {
        plan.tasks.push_back({static_cast<int32_t>(b), static_cast<int32_t>(h), first, last,
                              static_cast<int32_t>(columns * group)});
      }
      plan.max_rows = std::max(plan.max_rows, columns * group);
      first = last;
      columns = 0;
    };
    for (int64_t k = 0; k < p.branches; ++k) {
      int64_t length = p.length[b * p.branches + k];
      for (int64_t begin = 0; begin < length;) {
        int64_t visible = std::min(block_end(p, b, begin), length);
        int64_t end = std::min(visible, begin + task_columns - columns);
        plan.segments.push_back({static_cast<int32_t>(k), static_cast<int32_t>(begin),
                                 static_cast<int32_t>(end), static_cast<int32_t>(visible)});
        columns += end - begin;
        begin = end;
        if (columns == task_columns) close();
      }
    }
    close();
  }
  return plan;
}

// Rows of no query: 0, and an lse of -inf.
void clear_dead_rows(const BranchAttentionParams& p, int64_t b, int64_t k) {
  int64_t element = element_size(p.type);
  int64_t length = p.length[b * p.branches + k];
  char* base = static_cast<char*>(p.out) + (b * p.out_stride[0] + k * p.out_stride[1]) * element;
  for (int64_t c = length; c < p.window; ++c) {
    for (int64_t h = 0; h < p.q_heads; ++h) {
      std::memset(base + (c * p.out_stride[2] + h * p.out_stride[3]) * element, 0,
                  p.head_dim * element);
    }
  }
  if (p.lse == nullptr) return;
  float* lse = p.lse + (b * p.branches + k) * p.q_heads * p.window;
  for (int64_t h = 0; h < p.q_heads; ++h) {
    std::fill(lse + h * p.window + length, lse + (h + 1) * p.window, -INFINITY);
  }
}

// A buffer a thread that grows and stays: under half a megabyte at any head_dim, and its pages are
// not faulted in again at every call.
float* thread_scratch(int64_t floats) {
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<float, Free> buffer;
  thread_local int64_t capacity = 0;
  if (capacity < floats) {
    int64_t bytes = round_up(floats * static_cast<int64_t>(sizeof(float)), 64);
    buffer.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
    capacity = buffer == nullptr ? 0 : floats;
  }
  return buffer.get();
}

void run(const BranchAttentionParams& p) {
  int64_t threads = std::max<int64_t>(torch::stable::get_num_threads(), 1);
  Plan plan = make_plan(p, threads);
  int64_t tasks = static_cast<int64_t>(plan.tasks.size());
  int64_t items = tasks + p.batch * p.branches;
  if (items == 0) return;
  int64_t floats = AttentionScratch(p.head_dim, plan.max_rows).floats;
  AttentionTaskFunction function = task_function();
  // Sequences differ in length, so threads take tasks as they come; a result does not depend on
  // who computes it.
  std::atomic<int64_t> next{0};
  std::atomic<bool> out_of_memory{false};
  torch::stable::parallel_for(0, std::min(threads, items), 1, [&](int64_t, int64_t) {
    float* scratch = thread_scratch(floats);
    if (scratch == nullptr) {
      out_of_memory = true;
      return;
    }
    for (int64_t i = next++; i < items; i = next++) {
      if (i < tasks) {
        function(p, plan.segments.data(), plan.tasks[i], scratch);
      } else {
        clear_dead_rows(p, (i - tasks) / p.branches, (i - tasks) % p.branches);
      }
    }
  });
  if (out_of_memory) throw std::runtime_error("branch_attention: out of memory");
}

Inputs hold(const Tensor& cache_len, const Tensor& length, const OptTensor& prompt_len,
            const OptTensor& block_table) {
  Inputs inputs{as_contiguous(cache_len), as_contiguous(length), std::nullopt, std::nullopt};
  if (prompt_len.has_value()) inputs.prompt_len = as_contiguous(*prompt_len);
  if (block_table.has_value()) inputs.block_table = as_contiguous(*block_table);
  return inputs;
}

void set_out(BranchAttentionParams& p, const char* op, const Tensor& out) {
  copy_strides(op, "out", out, p.out_stride);
  p.out = out.data_ptr();
}

Tensor empty_out(const BranchAttentionParams& p, const Tensor& q) {
  return empty({p.batch, p.branches, p.window, p.q_heads, p.head_dim}, q.scalar_type(), q);
}

Tensor branch_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor k_window, Tensor v_window,
                        Tensor cache_len, Tensor length, OptTensor prompt_len,
                        OptTensor block_table, TextHandle mask_text,
                        std::optional<int64_t> block_size, std::optional<double> scale) {
  const char* op = "branch_attention";
  const std::string mask = take_text(mask_text);
  Inputs inputs = hold(cache_len, length, prompt_len, block_table);
  BranchAttentionParams p =
      make_params(op, q, k_cache, v_cache, k_window, v_window, inputs, mask, block_size, scale);
  Tensor out = empty_out(p, q);
  set_out(p, op, out);
  run(p);
  return out;
}

std::tuple<Tensor, Tensor> branch_attention_lse(Tensor q, Tensor k_cache, Tensor v_cache,
                                                Tensor k_window, Tensor v_window, Tensor cache_len,
                                                Tensor length, OptTensor prompt_len,
                                                OptTensor block_table, TextHandle mask_text,
                                                std::optional<int64_t> block_size,
                                                std::optional<double> scale) {
  const char* op = "branch_attention_lse";
  const std::string mask = take_text(mask_text);
  Inputs inputs = hold(cache_len, length, prompt_len, block_table);
  BranchAttentionParams p =
      make_params(op, q, k_cache, v_cache, k_window, v_window, inputs, mask, block_size, scale);
  Tensor out = empty_out(p, q);
  Tensor lse = empty({p.batch, p.branches, p.q_heads, p.window}, ScalarType::Float, q);
  set_out(p, op, out);
  p.lse = mutable_data<float>(lse);
  run(p);
  return {out, lse};
}

void branch_attention_out(Tensor q, Tensor k_cache, Tensor v_cache, Tensor k_window,
                          Tensor v_window, Tensor cache_len, Tensor length, OptTensor prompt_len,
                          OptTensor block_table, TextHandle mask_text,
                          std::optional<int64_t> block_size, std::optional<double> scale,
                          Tensor out, OptTensor lse) {
  const char* op = "branch_attention_out";
  const std::string mask = take_text(mask_text);
  Inputs inputs = hold(cache_len, length, prompt_len, block_table);
  BranchAttentionParams p =
      make_params(op, q, k_cache, v_cache, k_window, v_window, inputs, mask, block_size, scale);
  check_tensor(op, "out", out, q.scalar_type(),
               {p.batch, p.branches, p.window, p.q_heads, p.head_dim});
  set_out(p, op, out);
  if (lse.has_value()) {
    check_tensor(op, "lse", *lse, ScalarType::Float, {p.batch, p.branches, p.q_heads, p.window});
    if (!lse->is_contiguous()) fail(op, "lse", "a contiguous tensor", "strides");
    p.lse = mutable_data<float>(*lse);
  }
  run(p);
}

}  // namespace
}  // namespace lopa

STABLE_TORCH_LIBRARY_IMPL(lopa, CPU, m) {
  m.impl("branch_attention", TORCH_BOX(&lopa::branch_attention));
  m.impl("branch_attention_lse", TORCH_BOX(&lopa::branch_attention_lse));
  m.impl("branch_attention_out", TORCH_BOX(&lopa::branch_attention_out));
}
