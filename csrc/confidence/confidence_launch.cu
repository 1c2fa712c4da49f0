// Grids, shared memory and instantiations of the vocabulary pass and of the merge.
#include <algorithm>

#include "confidence/confidence_launch.h"
#include "confidence/merge_policies.h"
#include "confidence/pass_launch.h"
#include "lopa/cuda.h"

namespace lopa {
namespace confidence {
namespace {

// Registers for a place beside the pass. A filter has no room there for its shared memory.
template <typename Merge>
constexpr int kMergeCtas =
    Merge::kSharedBytes > 16 * 1024 ? 512 / Merge::kThreads
                                    : 65536 / kMergeRegisters / kMergeThreads;

template <typename Merge>
__global__ void __launch_bounds__(Merge::kThreads, kMergeCtas<Merge>)
    merge_kernel(const __grid_constant__ VocabularyArgs args, const StatsOutput out) {
  extern __shared__ __align__(128) unsigned char shared[];
  release_successor();
  Merge::merge_rows(args, out, 0, list_length(args), blockIdx.x, gridDim.x,
                    reinterpret_cast<char*>(shared));
}

template <typename T, bool kSecond, bool kWeighted>
void launch_pass(const VocabularyArgs& args, cudaStream_t stream) {
  launch_over_tiles<T, vocabulary_pass_kernel<T, kSecond, kWeighted>>("vocabulary_pass", args,
                                                                      stream, args);
}

template <typename T>
void launch_pass_of(const VocabularyArgs& args, cudaStream_t stream) {
  const bool second = args.wants_second();
  // The filters form their own sums.
  const bool weighted = args.wants_weighted() && !args.filtered;
  if (second && weighted) {
    launch_pass<T, true, true>(args, stream);
  } else if (second) {
    launch_pass<T, true, false>(args, stream);
  } else if (weighted) {
    launch_pass<T, false, true>(args, stream);
  } else {
    launch_pass<T, false, false>(args, stream);
  }
}

}  // namespace

void launch_vocabulary_pass(const VocabularyArgs& args, cudaStream_t stream) {
  switch (args.logits.dtype) {
    case FloatType::kBFloat16:
      return launch_pass_of<__nv_bfloat16>(args, stream);
    case FloatType::kHalf:
      return launch_pass_of<__half>(args, stream);
    case FloatType::kFloat:
      return launch_pass_of<float>(args, stream);
  }
}

void launch_merge(const VocabularyArgs& args, const StatsOutput& out, cudaStream_t stream) {
  const auto run = [&]<typename Merge>() {
    constexpr auto kernel = merge_kernel<Merge>;
    if (Merge::kSharedBytes > 48 * 1024) allow_shared_memory<kernel>(Merge::kSharedBytes);
    constexpr int64_t kRowsPerCta = Merge::kSharedBytes == 0 ? Merge::kThreads / 32 : 1;
    // A few waves of CTAs, which stride over the rows that are left.
    const int64_t wanted = (args.capacity + kRowsPerCta - 1) / kRowsPerCta;
    const int64_t most = int64_t{8} * multiprocessors();
    const int64_t ctas = std::clamp<int64_t>(wanted, 1, most);
    launch("merge", kernel, dim3(static_cast<unsigned>(ctas)), dim3(Merge::kThreads),
           Merge::kSharedBytes, stream, args.logits.rows > 0, args, out);
  };
  // A row is filtered sooner by more threads; rows by smaller CTAs, of which two share a
  // multiprocessor and one computes while the other waits.
  if (args.capacity <= 2 * multiprocessors()) {
    with_merge<512>(args, run);
  } else {
    with_merge<256>(args, run);
  }
}

}  // namespace confidence
}  // namespace lopa
