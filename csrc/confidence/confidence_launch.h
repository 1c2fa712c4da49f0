// The vocabulary pass and merge on the GPU, for their own operators and for `step`; torch-free.
#pragma once

#include <cuda_runtime.h>

#include "confidence/vocabulary_args.h"

namespace lopa {
namespace confidence {

// The first kernel: partials of every tile of the listed rows.
void launch_vocabulary_pass(const VocabularyArgs& args, cudaStream_t stream);

// The second: statistics of the listed rows, into `out` by slot.
void launch_merge(const VocabularyArgs& args, const StatsOutput& out, cudaStream_t stream);

}  // namespace confidence
}  // namespace lopa
