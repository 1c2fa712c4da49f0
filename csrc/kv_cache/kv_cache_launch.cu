// Grids and vector widths of the KV-cache kernels.
#include <algorithm>
#include <bit>
#include <limits>
#include <stdexcept>
#include <string>

#include "kv_cache/commit_kernel.cuh"
#include "kv_cache/kv_cache_launch.h"
#include "kv_cache/prewrite_kernel.cuh"
#include "lopa/cuda.h"

namespace lopa {
namespace {

using namespace kv_cache;

constexpr int64_t kMaxGridY = 65535;
// Rows of a thread where norms have more of them than threads are resident: their divisions and
// roots are shared. Without norms one row a thread is faster at all sizes.
constexpr int kNormedRows = 2;
constexpr int64_t kNormedThreads = 1024;  // resident on a multiprocessor, of one row each

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

uint32_t narrow(const char* what, int64_t value) {
  if (value > std::numeric_limits<int32_t>::max()) {
    throw std::runtime_error("kv_cache: " + std::string(what) +
                             ": expected at most 2^31 - 1, got " + std::to_string(value));
  }
  return static_cast<uint32_t>(value);
}

// `value` or the largest number that T holds.
template <typename T>
T clamped(int64_t value) {
  return static_cast<T>(std::min<int64_t>(value, std::numeric_limits<T>::max()));
}

// The bytes, up to 16, that all addresses and distances of an access are multiples of.
class Alignment {
 public:
  void add(int64_t bytes) { bits_ |= static_cast<uint64_t>(bytes); }
  void add(const void* address) { bits_ |= reinterpret_cast<uintptr_t>(address); }

  // A stride over one element is never taken.
  void add_stride(int64_t size, int64_t bytes) {
    if (size > 1) add(bytes);
  }

  void add(const KvRowsView& view, const KvSizes& s, int64_t heads, int64_t element) {
    const int64_t size[] = {s.batch, s.branches, s.window, heads};
    add(view.data);
    for (int d = 0; d < 4; ++d) add_stride(size[d], view.stride[d] * element);
  }

  void add(const KvWindowView& view, const KvSizes& s, int64_t heads, int64_t element) {
    const int64_t size[] = {s.layers, s.batch, s.branches, s.window, heads};
    add(view.data);
    for (int d = 0; d < 5; ++d) add_stride(size[d], view.stride[d] * element);
  }

  void add(const KvCacheView& view, const KvSizes& s, int64_t heads, int64_t element) {
    const int64_t size[] = {s.layers, s.batch, s.capacity, heads};
    add(view.data);
    for (int d = 0; d < 4; ++d) add_stride(size[d], view.stride[d] * element);
  }

  int64_t bytes() const { return static_cast<int64_t>(bits_ & (~bits_ + 1)); }

 private:
  uint64_t bits_ = 16;
};

Divisor checked_divisor(const char* what, int64_t value) {
  return make_divisor(narrow(what, std::max<int64_t>(value, 1)));
}

CommitSide make_side(const KvWindowView& window, const KvCacheView& cache, int64_t element) {
  CommitSide side{};
  side.window = static_cast<const char*>(window.data);
  side.cache = static_cast<char*>(cache.data);
  for (int d = 0; d < 5; ++d) side.window_stride[d] = window.stride[d] * element;
  for (int d = 0; d < 4; ++d) side.cache_stride[d] = cache.stride[d] * element;
  return side;
}

// The grid, and how its warps share the chunks: one each, as far as `chunks` of a unit go around
// and all blocks are resident. Beyond one block a multiprocessor, all have as many.
template <typename Copy>
void commit(CommitArgs args, int64_t vectors, cudaStream_t stream) {
  constexpr int64_t kWarps = kCommitThreads / 32;
  const int64_t units = std::max<int64_t>(args.units, 1);
  const int64_t chunks = int64_t{args.batch} * ceil_div(vectors, Copy::kChunk);
  const int64_t processors = multiprocessors();
  const int64_t wanted = std::max<int64_t>(ceil_div(units * chunks, kWarps), 1);
  const int64_t each = std::min<int64_t>(wanted / processors, Copy::kBlocks);
  const int64_t blocks = each > 0 ? each * processors : wanted;
  const int64_t warps = blocks * kWarps;
  args.at_once = checked_divisor("layers * heads", std::min(units, warps));
  args.parts = static_cast<uint32_t>(warps / args.at_once.value);
  const auto kernel = args.batch > 1 ? kv_commit_kernel<Copy, true> : kv_commit_kernel<Copy, false>;
  launch("kv_commit_", kernel, dim3(static_cast<unsigned>(blocks)), dim3(kCommitThreads), 0, stream,
         true, args);
}

template <typename Vector>
void commit(bool contiguous, const CommitArgs& args, int64_t vectors, cudaStream_t stream) {
  if (contiguous) return commit<RegisterCopy<Vector, true>>(args, vectors, stream);
  commit<RegisterCopy<Vector, false>>(args, vectors, stream);
}

template <typename T, int N>
void prewrite(int rows, const NormedPrewriteArgs& args, dim3 grid, cudaStream_t stream) {
  auto run = [&](const char* name, auto kernel, const auto& own) {
    launch(name, kernel, grid, dim3(kPrewriteThreads), 0, stream, true, own);
  };
  if (args.norms.q != nullptr) {
    // Narrow vectors are rare, and have one version.
    if constexpr (N * sizeof(T) == 16) {
      if (rows == kNormedRows) {
        return run("qkv_prewrite_", kv_prewrite_kernel<T, N, kNormedRows, true, NormedPrewriteArgs>,
                   args);
      }
    }
    return run("qkv_prewrite_", kv_prewrite_kernel<T, N, 1, true, NormedPrewriteArgs>, args);
  }
  const PrewriteArgs& plain = args;
  if (args.params.cos_sin != nullptr) {
    return run("kv_prewrite_", kv_prewrite_kernel<T, N, 1, true, PrewriteArgs>, plain);
  }
  run("kv_prewrite_", kv_prewrite_kernel<T, N, 1, false, PrewriteArgs>, plain);
}

template <typename T>
void prewrite(int64_t elements, int rows, const NormedPrewriteArgs& args, dim3 grid,
              cudaStream_t stream) {
  if constexpr (sizeof(T) == 2) {
    if (elements == 8) return prewrite<T, 8>(rows, args, grid, stream);
  }
  if (elements == 4) return prewrite<T, 4>(rows, args, grid, stream);
  if (elements == 2) return prewrite<T, 2>(rows, args, grid, stream);
  prewrite<T, 1>(rows, args, grid, stream);
}

// How many neighbouring elements one access takes.
int64_t prewrite_elements(const KvPrewriteParams& p) {
  const KvSizes& s = p.sizes;
  const int64_t element = element_size(s.type);
  const bool rotates = p.cos_sin != nullptr;
  Alignment alignment;
  alignment.add((rotates ? s.head_dim / 2 : s.head_dim) * element);
  alignment.add(p.k, s, s.kv_heads, element);
  alignment.add(p.v, s, s.kv_heads, element);
  alignment.add(p.k_window, s, s.kv_heads, element);
  alignment.add(p.v_window, s, s.kv_heads, element);
  if (s.q_heads > 0) {
    alignment.add(p.q, s, s.q_heads, element);
    alignment.add(p.q_out, s, s.q_heads, element);
  }
  if (p.norms.q != nullptr) {
    alignment.add(p.norms.q);
    alignment.add(p.norms.k);
  }
  if (p.commit_len != nullptr) {
    alignment.add(p.k_cache, s, s.kv_heads, element);
    alignment.add(p.v_cache, s, s.kv_heads, element);
  }
  int64_t elements = std::max<int64_t>(alignment.bytes() / element, 1);
  if (!rotates) return elements;
  Alignment table;
  table.add(p.cos_sin);
  table.add(s.head_dim / 2 * int64_t{4});
  table.add_stride(p.max_position, p.cos_sin_stride * 4);
  while (elements > 1 && table.bytes() < std::min<int64_t>(elements * 4, 16)) elements /= 2;
  return elements;
}

}  // namespace

void launch_kv_prewrite(const KvPrewriteParams& params, int32_t* status, int64_t status_stride,
                        cudaStream_t stream) {
  const KvSizes& s = params.sizes;
  const int64_t elements = prewrite_elements(params);
  const int64_t pieces = s.head_dim / elements / (params.cos_sin != nullptr ? 2 : 1);
  // The threads of a row: with norms they exchange sums, pair by pair.
  const int64_t lanes = params.norms.q == nullptr || pieces == 0
                            ? pieces
                            : static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(pieces)));
  NormedPrewriteArgs args{};
  args.params = params;
  args.norms = params.norms;
  args.pieces = narrow("head_dim", pieces);
  args.status = {status, status_stride};
  args.branches = checked_divisor("branches", s.branches);
  const int64_t slots = s.batch * args.branches.value;
  args.slots = narrow("batch * branches", slots);
  args.lanes = checked_divisor("head_dim", lanes);

  int rows = 1;
  int64_t vectors = 0;  // of a slot
  auto group = [&](int rows_of_thread) {
    rows = rows_of_thread;
    args.q_groups = narrow("heads", ceil_div(s.q_heads, rows));
    args.kv_groups = narrow("heads", ceil_div(s.kv_heads, rows));
    const int64_t groups = int64_t{args.q_groups} + 2 * int64_t{args.kv_groups};
    args.groups = checked_divisor("heads", groups);
    vectors = s.branches > 0 ? s.window * groups * lanes : 0;
  };
  group(1);
  const bool shares = params.norms.q != nullptr && elements * element_size(s.type) == 16 &&
                      lanes >= kNormedRows && lanes <= 32;
  if (shares && slots * vectors > kNormedThreads * multiprocessors()) group(kNormedRows);
  if (s.batch == 0 || (vectors == 0 && status == nullptr)) return;
  args.columns = vectors > 0 ? narrow("window", s.window) : 0;
  const int64_t parts = std::max<int64_t>(ceil_div(vectors, kPrewriteThreads), 1);
  narrow("window * heads * head_dim", parts * kPrewriteThreads);
  const dim3 grid(static_cast<unsigned>(parts),
                  static_cast<unsigned>(std::min<int64_t>(slots, kMaxGridY)));
  if (s.type == FloatType::kFloat) {
    prewrite<float>(elements, rows, args, grid, stream);
  } else if (s.type == FloatType::kHalf) {
    prewrite<Half>(elements, rows, args, grid, stream);
  } else {
    prewrite<BFloat16>(elements, rows, args, grid, stream);
  }
}

void launch_kv_commit(const KvCommitParams& params, int32_t* status, int64_t status_stride,
                      cudaStream_t stream) {
  const KvSizes& s = params.sizes;
  const int64_t element = element_size(s.type);
  auto packed = [&](int64_t stride) { return s.kv_heads == 1 || stride == s.head_dim; };
  // The heads of a column as one row, where all four tensors have them so.
  const bool dense = packed(params.k_window.stride[4]) && packed(params.v_window.stride[4]) &&
                     packed(params.k_cache.stride[3]) && packed(params.v_cache.stride[3]);
  const int64_t rows = dense ? 1 : s.kv_heads;
  const int64_t row_bytes = (dense ? s.kv_heads : 1) * s.head_dim * element;
  Alignment alignment;
  alignment.add(row_bytes);
  alignment.add(params.k_window, s, rows, element);
  alignment.add(params.v_window, s, rows, element);
  alignment.add(params.k_cache, s, rows, element);
  alignment.add(params.v_cache, s, rows, element);
  const int64_t bytes = std::max<int64_t>(alignment.bytes(), 2);
  const int64_t pieces = row_bytes / bytes;
  const int64_t columns = s.layers * s.branches > 0 ? std::min(s.window, s.capacity) : 0;
  const int64_t vectors = columns * pieces;  // of a sequence's run
  if (s.batch == 0 || (rows * vectors == 0 && status == nullptr)) return;

  CommitArgs args{};
  args.side[0] = make_side(params.k_window, params.k_cache, element);
  args.side[1] = make_side(params.v_window, params.v_cache, element);
  args.units = rows * vectors > 0 ? narrow("layers * heads", 2 * s.layers * rows) : 0;
  args.rows = checked_divisor("heads", rows);
  if (args.units > 0) args.pieces = checked_divisor("head_dim", pieces);
  narrow("window * head_dim", vectors);
  args.batch = narrow("batch", s.batch);
  args.branches = clamped<int32_t>(s.branches);
  args.window = clamped<int32_t>(s.window);
  args.capacity = clamped<uint32_t>(s.capacity);
  args.winner = params.winner;
  args.cache_len = params.cache_len;
  args.commit_len = params.commit_len;
  args.status = {status, status_stride};
  auto follows = [&](int64_t stride) { return columns <= 1 || stride * element == row_bytes; };
  const bool contiguous = follows(params.k_window.stride[3]) &&
                          follows(params.v_window.stride[3]) && follows(params.k_cache.stride[2]) &&
                          follows(params.v_cache.stride[2]);
  switch (bytes) {
    case 16:
      return commit<uint4>(contiguous, args, vectors, stream);
    case 8:
      return commit<uint2>(contiguous, args, vectors, stream);
    case 4:
      return commit<uint32_t>(contiguous, args, vectors, stream);
    default:
      return commit<uint16_t>(contiguous, args, vectors, stream);
  }
}

}  // namespace lopa
