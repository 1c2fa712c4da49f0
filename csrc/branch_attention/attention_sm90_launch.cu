// Grid, tensor maps and instantiations of branch attention on Hopper.
#include <cuda.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "branch_attention/attention_sm90_kernel.cuh"
#include "branch_attention/attention_sm90_launch.h"
#include "lopa/cuda.h"

namespace lopa {
namespace {

using namespace attention;

constexpr int64_t kMaxShared = 227 * 1024;
constexpr int64_t kMaxBatch = 65535;
constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
// The largest distance of a tensor map.
constexpr int64_t kMaxStrideBytes = (int64_t{1} << 40) - 1;
constexpr int64_t kElement = 2;
constexpr double kLog2E = 1.4426950408889634;

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function; the library does not link to it, so that it loads without one.
Encode encode_function() {
  static const Encode function = [] {
    void* address = nullptr;
    cudaDriverEntryPointQueryResult found{};
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &address, 12000,
                                                cudaEnableDefault, &found),
               "cudaGetDriverEntryPointByVersion");
    if (found != cudaDriverEntryPointSuccess || address == nullptr) {
      throw std::runtime_error("branch_attention: the driver has no cuTensorMapEncodeTiled");
    }
    return reinterpret_cast<Encode>(address);
  }();
  return function;
}

struct Dimension {
  int64_t size;
  int64_t stride;  // elements
};

bool fits(const void* data, std::initializer_list<Dimension> dimensions) {
  if ((reinterpret_cast<uintptr_t>(data) & 15) != 0) return false;
  for (const Dimension& d : dimensions) {
    if (d.size > kMost) return false;
    if (d.size <= 1) continue;
    const int64_t bytes = d.stride * kElement;
    if (bytes <= 0 || bytes % 16 != 0 || bytes > kMaxStrideBytes) return false;
  }
  return true;
}

// A tensor of rows of head_dim numbers; a box is 64 numbers of `box` neighbours along the first of
// the dimensions.
CUtensorMap tensor_map(const BranchAttentionParams& p, const void* data,
                       std::initializer_list<Dimension> dimensions, int64_t box) {
  cuuint64_t sizes[5] = {static_cast<cuuint64_t>(p.head_dim)};
  cuuint64_t strides[4] = {};
  cuuint32_t boxes[5] = {kHalf};
  cuuint32_t steps[5] = {1};
  cuuint32_t rank = 1;
  for (const Dimension& d : dimensions) {
    sizes[rank] = static_cast<cuuint64_t>(std::max<int64_t>(d.size, 1));
    // The stride over one element is never taken, and may be anything.
    strides[rank - 1] = static_cast<cuuint64_t>((d.size > 1 ? d.stride : p.head_dim) * kElement);
    boxes[rank] = rank == 1 ? static_cast<cuuint32_t>(box) : 1;
    steps[rank] = 1;
    ++rank;
  }
  CUtensorMap map;
  const CUresult result =
      encode_function()(&map,
                        p.type == FloatType::kHalf ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                   : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                        rank, const_cast<void*>(data), sizes, strides, boxes, steps,
                        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("branch_attention: cuTensorMapEncodeTiled: error " +
                             std::to_string(static_cast<int>(result)));
  }
  return map;
}

CUtensorMap window_map(const BranchAttentionParams& p, const void* data,
                       const int64_t (&stride)[4]) {
  return tensor_map(p, data,
                    {{p.window, stride[2]},
                     {p.kv_heads, stride[3]},
                     {p.branches, stride[1]},
                     {p.batch, stride[0]}},
                    std::min<int64_t>(p.window, kChunk));
}

int64_t prefix_box(const BranchAttentionParams& p) {
  return p.block_table == nullptr ? kUnit : std::min<int64_t>(p.page_size, kUnit);
}

// A box may not be larger than the tensor.
int64_t prefix_rows(const BranchAttentionParams& p) {
  return std::min(p.block_table == nullptr ? p.capacity : p.page_size, prefix_box(p));
}

CUtensorMap prefix_map(const BranchAttentionParams& p, const void* data,
                       const int64_t (&stride)[3]) {
  const bool paged = p.block_table != nullptr;
  return tensor_map(p, data,
                    {{paged ? p.page_size : p.capacity, stride[1]},
                     {p.kv_heads, stride[2]},
                     {paged ? p.pages : p.batch, stride[0]}},
                    prefix_rows(p));
}

void set_byte_strides(const int64_t (&elements)[4], int64_t (&bytes)[4]) {
  for (int d = 0; d < 4; ++d) bytes[d] = elements[d] * kElement;
}

// How a call is cut.
struct Cut {
  int64_t rows;      // of a tile
  int64_t tiles;     // of rows, of a sequence and KV head
  int64_t ctas;      // of a cluster
  int64_t shared;    // tiles of a cluster
  int64_t clusters;  // of a sequence
  double time = std::numeric_limits<double>::infinity();
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Clusters of `ctas` that run at once on the current device; asked once a kernel and device.
template <typename L>
int64_t resident_clusters(int ctas) {
  static int counts[kMaxDevices][9] = {};
  if (ctas == 1) return multiprocessors();
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  int& count = counts[device % kMaxDevices][ctas];
  if (count == 0) {
    allow_shared_memory<attention_sm90_kernel<L>>(kMaxShared);
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(ctas);
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(ctas));
    config.blockDim = dim3(L::kThreads);
    config.dynamicSmemBytes = static_cast<size_t>(L::kBytes);
    config.attrs = &attribute;
    config.numAttrs = 1;
    check_cuda(cudaOccupancyMaxActiveClusters(&count, attention_sm90_kernel<L>, &config),
               "cudaOccupancyMaxActiveClusters");
    count = std::max(count, 1);
  }
  return count;
}

// How long a cut takes, by what a tile of keys, the start and the end of a CTA, a further tile of
// rows and the merge take (microseconds on one H200; only their ratios count), and no less than
// reading the prefix. It goes by the capacity, as the lengths are the device's.
template <typename L>
void choose_cut(const BranchAttentionParams& p, int ctas, AttentionCut wanted, Cut* best) {
  // The start of a CTA that follows another overlaps with others' work, in part.
  constexpr double kFirstTime = 2;
  constexpr double kStartTime = L::kCluster ? (L::kSplits ? 4 : 5.8) : (L::kSplits ? 3 : 4.4);
  constexpr double kKeysTime = L::kSplits ? 0.89 : (L::kCluster ? 1.53 : 1.42);
  constexpr double kTileTime = 4.5;
  // A cluster is started and merged the slower the larger it is.
  constexpr double kCtaTime = 0.3;
  constexpr double kBytesTime = 1 / 4.0e6;
  if (wanted.tile_rows > 0 && wanted.tile_rows != L::kRows) return;
  if (wanted.ctas > 0 && ctas != wanted.ctas) return;
  const int64_t tiles = ceil_div(p.branches * p.window * (p.q_heads / p.kv_heads), L::kRows);
  const int64_t of_sequence = tiles * p.kv_heads;
  const int64_t units = ceil_div(p.capacity, kUnit) + ceil_div(p.window, kUnit);
  const int64_t most_shared = L::kCluster ? std::min<int64_t>(of_sequence, kMostTiles) : 1;
  const int64_t resident = resident_clusters<L>(ctas);
  const double reading =
      static_cast<double>(2 * p.batch * p.capacity * p.kv_heads * p.head_dim * kElement) *
      kBytesTime;
  for (int64_t shared = 1; shared <= most_shared; ++shared) {
    if (wanted.shared > 0 && shared != std::min<int64_t>(wanted.shared, of_sequence)) continue;
    const int64_t own = ceil_div(shared * units, ctas);
    // Runs of one pair of units are mostly overhead.
    if (ctas > 1 && own < 2 && wanted.ctas == 0) break;
    const int64_t clusters = ceil_div(of_sequence, shared);
    const int64_t waves = ceil_div(clusters * p.batch, resident);
    const double parts =
        static_cast<double>(ceil_div(shared, ctas)) + (shared % ctas && shared > 1);
    const double wave = kStartTime + static_cast<double>(own) / 2 * kKeysTime +
                        (parts - 1) * kTileTime + (L::kCluster ? kCtaTime * ctas : 0);
    const double time = std::max(kFirstTime + static_cast<double>(waves) * wave, reading);
    if (time < best->time) *best = Cut{L::kRows, tiles, ctas, shared, clusters, time};
  }
}

template <typename L>
void launch_layout(const BranchAttentionParams& p, const Cut& cut, cudaStream_t stream) {
  constexpr auto kernel = attention_sm90_kernel<L>;
  allow_shared_memory<kernel>(kMaxShared);
  const int64_t ctas = cut.clusters * cut.ctas;
  if (ctas > kMost) {
    throw std::runtime_error("branch_attention: expected at most 2^31 - 1 CTAs, got " +
                             std::to_string(ctas));
  }
  Sm90Arguments args{};
  args.k_window = window_map(p, p.k_window, p.k_window_stride);
  args.v_window = window_map(p, p.v_window, p.v_window_stride);
  const bool prefix = p.capacity > 0 && (p.block_table == nullptr || p.pages > 0);
  args.k_prefix = prefix ? prefix_map(p, p.k_cache, p.k_cache_stride) : args.k_window;
  args.v_prefix = prefix ? prefix_map(p, p.v_cache, p.v_cache_stride) : args.v_window;
  args.q = static_cast<const char*>(p.q);
  args.out = static_cast<char*>(p.out);
  args.lse = p.lse;
  set_byte_strides(p.q_stride, args.q_stride);
  set_byte_strides(p.out_stride, args.out_stride);
  args.cache_len = p.cache_len;
  args.length = p.length;
  args.prompt_len = p.prompt_len;
  args.block_table = p.block_table;
  args.branches = static_cast<int32_t>(p.branches);
  args.window = static_cast<int32_t>(p.window);
  args.by_window = make_divisor(static_cast<uint32_t>(p.window));
  args.capacity = prefix ? static_cast<int32_t>(p.capacity) : 0;
  args.kv_heads = static_cast<int32_t>(p.kv_heads);
  args.group = make_divisor(static_cast<uint32_t>(p.q_heads / p.kv_heads));
  args.tiles = make_divisor(static_cast<uint32_t>(cut.tiles));
  args.of_sequence = static_cast<int32_t>(cut.tiles * p.kv_heads);
  args.shared = static_cast<int32_t>(cut.shared);
  args.ctas_log2 = std::countr_zero(static_cast<uint64_t>(cut.ctas));
  args.ahead = !L::kCluster && p.block_table == nullptr && p.capacity >= kKeys;
  args.block_size =
      make_divisor(static_cast<uint32_t>(std::clamp<int64_t>(p.block_size, 1, 1 << 30)));
  args.table_width = static_cast<int32_t>(p.table_width);
  args.pages = static_cast<int32_t>(p.pages);
  args.page_shift =
      p.block_table == nullptr ? 0 : std::countr_zero(static_cast<uint64_t>(p.page_size));
  args.prefix_box = static_cast<int32_t>(prefix_box(p));
  args.prefix_rows = static_cast<int32_t>(prefix_rows(p));
  args.window_rows = static_cast<int32_t>(std::min<int64_t>(p.window, kChunk));
  args.q_and = p.scale == 0 ? 0 : ~0u;
  args.q_xor = p.scale < 0 ? 0x80008000u : 0;
  args.scale_log2 = p.scale == 0 ? 1 : static_cast<float>(std::fabs(double{p.scale}) * kLog2E);

  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = static_cast<unsigned>(cut.ctas);
  attributes[1].val.clusterDim.y = 1;
  attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(ctas), static_cast<unsigned>(p.batch));
  config.blockDim = dim3(L::kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(L::kBytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = L::kCluster ? 2 : 1;
  check_cuda(cudaLaunchKernelEx(&config, kernel, args), "branch_attention");
}

// Layouts of one form of a tile: of CTAs alone, and of clusters, which have less room.
template <typename T, int kHeadDim, bool kSplits>
struct Layouts {
  using Alone = Layout<T, kHeadDim, kSplits, false, 3>;
  using Cluster = Layout<T, kHeadDim, kSplits, true, kHeadDim == 128 ? 2 : 3>;
  static_assert(Alone::kBytes <= kMaxShared && Cluster::kBytes <= kMaxShared);

  static void choose(const BranchAttentionParams& p, AttentionCut wanted, Cut* best) {
    choose_cut<Alone>(p, 1, wanted, best);
    for (int ctas = 2; ctas <= 8; ctas *= 2) choose_cut<Cluster>(p, ctas, wanted, best);
  }
  static void launch(const BranchAttentionParams& p, const Cut& cut, cudaStream_t stream) {
    if (cut.ctas == 1) return launch_layout<Alone>(p, cut, stream);
    launch_layout<Cluster>(p, cut, stream);
  }
};

template <typename T, int kHeadDim>
void launch_fastest(const BranchAttentionParams& p, AttentionCut wanted, cudaStream_t stream) {
  Cut cut{};
  Layouts<T, kHeadDim, true>::choose(p, wanted, &cut);
  Layouts<T, kHeadDim, false>::choose(p, wanted, &cut);
  if (cut.rows == 0) {
    throw std::runtime_error(
        "branch_attention: expected a cut of 1, 2, 4 or 8 CTAs, at most 31 tiles (one, of one CTA) "
        "and 64 or 128 rows a tile");
  }
  if (cut.rows == kGroupRows) return Layouts<T, kHeadDim, true>::launch(p, cut, stream);
  Layouts<T, kHeadDim, false>::launch(p, cut, stream);
}

template <typename T>
void launch_type(const BranchAttentionParams& p, AttentionCut cut, cudaStream_t stream) {
  if (p.head_dim == 128) return launch_fastest<T, 128>(p, cut, stream);
  launch_fastest<T, 64>(p, cut, stream);
}

}  // namespace

bool attention_sm90_supports(const BranchAttentionParams& p) {
  if (p.type == FloatType::kFloat || (p.head_dim != 64 && p.head_dim != 128)) return false;
  if (p.branches > kMostBranches || p.capacity > (1 << 28) || p.window > (1 << 20)) return false;
  if (p.kv_heads < 1 || p.batch > kMaxBatch) return false;
  const int64_t group = p.q_heads / p.kv_heads;
  if (p.branches * p.window * group > (1 << 30) || group > (1 << 22)) return false;
  auto window_fits = [&](const void* data, const int64_t (&stride)[4]) {
    return fits(data, {{p.batch, stride[0]},
                       {p.branches, stride[1]},
                       {p.window, stride[2]},
                       {p.kv_heads, stride[3]}});
  };
  auto prefix_fits = [&](const void* data, const int64_t (&stride)[3]) {
    const bool paged = p.block_table != nullptr;
    if (p.capacity == 0 || (paged && p.pages == 0)) return true;
    return fits(data, {{paged ? p.pages : p.batch, stride[0]},
                       {paged ? p.page_size : p.capacity, stride[1]},
                       {p.kv_heads, stride[2]}});
  };
  // Rows of queries and results are not boxes; they need 16-byte accesses alone, whose number an
  // int holds.
  auto rows_fit = [&](const void* data, const int64_t (&stride)[4]) {
    const int64_t sizes[] = {p.batch, p.branches, p.window, p.q_heads};
    if ((reinterpret_cast<uintptr_t>(data) & 15) != 0) return false;
    int64_t last = 0;
    for (int d = 0; d < 4; ++d) {
      if (sizes[d] <= 1) continue;
      if (stride[d] < 0 || stride[d] * kElement % 16 != 0) return false;
      last += (sizes[d] - 1) * (stride[d] * kElement / 16);
    }
    return last <= kMost;
  };
  return rows_fit(p.q, p.q_stride) && rows_fit(p.out, p.out_stride) &&
         window_fits(p.k_window, p.k_window_stride) && window_fits(p.v_window, p.v_window_stride) &&
         prefix_fits(p.k_cache, p.k_cache_stride) && prefix_fits(p.v_cache, p.v_cache_stride);
}

void launch_attention_sm90(const BranchAttentionParams& params, AttentionCut cut,
                           cudaStream_t stream) {
  if (params.batch * params.branches * params.window * params.q_heads == 0) return;
  if (params.type == FloatType::kHalf) return launch_type<Half>(params, cut, stream);
  launch_type<BFloat16>(params, cut, stream);
}

}  // namespace lopa
