// The vocabulary pass on CUDA tensors, for its own operators and for `step`.
#pragma once

#include "confidence/confidence_args.h"
#include "confidence/vocabulary_args.h"
#include "lopa/tensor.h"

namespace lopa {

// The arguments of a pass over at most `capacity` listed rows of `logits`, but for the list itself
// (rows, slots, count) and the memory of the partials.
confidence::VocabularyArgs make_vocabulary_args(const char* op, const LogitsView& logits,
                                                const Sampling& sampling, bool all_stats,
                                                int64_t capacity);

// Bytes of memory, 16-byte aligned, that the partials need; and where they go in it.
size_t partials_bytes(const confidence::VocabularyArgs& args);
void place_partials(confidence::VocabularyArgs& args, void* memory);

}  // namespace lopa
