// Reads the settings of a round from the arguments of an operator.
#pragma once

#include <string>

#include "branch/params.h"
#include "lopa/checks.h"

namespace lopa {

Accept parse_accept(const char* op, const std::string& name);
Fallback parse_fallback(const char* op, const std::string& name);
ReductionConfig parse_reduction(const char* op, const std::string& name, double fraction,
                                std::optional<int64_t> group, double alpha);

// `!(low <= value)` also refuses NaN.
inline void check_share(const char* op, const char* argument, double value) {
  if (!(value >= 0.0 && value <= 1.0)) fail(op, argument, "a number in [0, 1]", value);
}

inline void check_at_least(const char* op, const char* argument, int64_t value, int64_t least) {
  if (value < least) fail(op, argument, "at least " + std::to_string(least), value);
}

}  // namespace lopa
