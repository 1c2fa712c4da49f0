// The pass over the vocabulary as the operator TokenConfidence, for token_confidence and lopa_step.
#pragma once

#include <string>

#include "aclnn.h"
#include "confidence/confidence_args.h"

namespace lopa {

struct ConfidenceOutputs {
  Operand token, prob, score, unusable;
};

inline const char* name_of(Metric metric) {
  const char* names[] = {"prob", "margin", "neg_entropy"};
  return names[static_cast<int32_t>(metric)];
}

// The operator filters no tokens, which is said here rather than by aclnn's error.
inline void check_unfiltered(const char* op, const Sampling& sampling, int64_t vocab) {
  const ConfidenceConfig& config = sampling.config;
  if (config.top_k > 0 && config.top_k < vocab) fail(op, "top_k", "None on an NPU", config.top_k);
  if (config.top_p < 1) fail(op, "top_p", "None or 1 on an NPU", config.top_p);
}

// `logits` with all its leading dimensions: rows are counted over them.
inline Operand logits_operand(const Tensor& logits) {
  const auto sizes = logits.sizes();
  const auto strides = logits.strides();
  return Operand::strided(logits.data_ptr(), acl_type(float_type(logits.scalar_type())),
                          {sizes.begin(), sizes.end()}, {strides.begin(), strides.end()});
}

inline void launch_token_confidence(const NpuCall& call, const Tensor& logits, const Operand& rows,
                                    const Sampling& sampling, const ConfidenceOutputs& out) {
  const ConfidenceConfig& config = sampling.config;
  call.launch("aclnnLopaTokenConfidence", logits_operand(logits), rows,
              Operand::dense(sampling.seed, {1}), Operand::dense(sampling.step, {1}),
              name_of(config.metric), bits_of(config.temperature), config.top_k,
              bits_of(config.top_p), out.token, out.prob, out.score, out.unusable);
}

}  // namespace lopa
