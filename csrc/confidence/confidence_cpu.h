// The vocabulary pass on the CPU, for its own operators and for `step`.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "confidence/confidence_args.h"
#include "confidence/params.h"
#include "lopa/tensor.h"

namespace lopa {

// check_sampling on the CPU, with the values of seed and step.
ConfidenceConfig make_confidence_config(const char* op, const std::string& metric,
                                        double temperature, std::optional<int64_t> top_k,
                                        std::optional<double> top_p, const OptTensor& seed,
                                        const OptTensor& step);

// Evaluates row rows[i] of `logits` into out[i]; rows[i] = -1 gives the empty result, and other
// values must lie in [0, logits.rows): the caller checks. Token, prob, nan, empty and the score of
// `config.metric` are always valid; margin, neg_entropy and lse only with `all_stats`. Threads
// inside; the result does not depend on their number.
void confidence_rows(const LogitsView& logits, const ConfidenceConfig& config, const int64_t* rows,
                     int64_t n, bool all_stats, RowStats* out);

}  // namespace lopa
