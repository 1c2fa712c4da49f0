// Which policy of merge_kernel.cuh merges the rows of a call, for the kernels that contain a merge.
#pragma once

#include "confidence/filter_kernel.cuh"
#include "confidence/merge_kernel.cuh"

namespace lopa {
namespace confidence {

template <int kFilterThreads, typename Function, typename T>
void with_merge_of(const VocabularyArgs& args, const Function& function) {
  if (args.filtered) {
    function.template operator()<FilteredMerge<T, kFilterThreads>>();
  } else {
    function.template operator()<SampledMerge<T>>();
  }
}

// Calls function.operator()<Policy>(); a filter works with kFilterThreads a row.
template <int kFilterThreads, typename Function>
void with_merge(const VocabularyArgs& args, const Function& function) {
  if (!args.filtered && !args.sampled) {
    function.template operator()<GreedyMerge>();
  } else if (args.logits.dtype == FloatType::kBFloat16) {
    with_merge_of<kFilterThreads, Function, __nv_bfloat16>(args, function);
  } else if (args.logits.dtype == FloatType::kHalf) {
    with_merge_of<kFilterThreads, Function, __half>(args, function);
  } else {
    with_merge_of<kFilterThreads, Function, float>(args, function);
  }
}

}  // namespace confidence
}  // namespace lopa
