// What operator definitions share. The dtypes of an operand are one for each combination that the
// operator has; most have three, in which the floating operands are bf16, fp16 and fp32.
#pragma once

#include <vector>

#include "register/op_def_registry.h"

namespace ops {

using DataTypes = std::vector<ge::DataType>;

inline DataTypes rowTypes() { return {ge::DT_BF16, ge::DT_FLOAT16, ge::DT_FLOAT}; }
inline DataTypes always(ge::DataType type, size_t combinations = 3) {
  return DataTypes(combinations, type);
}

inline void addInput(OpDef& op, const char* name, Option option, const DataTypes& types) {
  const std::vector<ge::Format> plain(types.size(), ge::FORMAT_ND);
  op.Input(name)
      .ParamType(option)
      .DataType(types)
      .Format(plain)
      .UnknownShapeFormat(plain)
      .AutoContiguous();
}

// An output of an input's name is that input, written in place.
inline void addOutput(OpDef& op, const char* name, const DataTypes& types) {
  const std::vector<ge::Format> plain(types.size(), ge::FORMAT_ND);
  op.Output(name).ParamType(REQUIRED).DataType(types).Format(plain).UnknownShapeFormat(plain);
}

inline void addConfigs(OpDef& op) {
  op.AICore().AddConfig("ascend910b");
  op.AICore().AddConfig("ascend910_93");
}

}  // namespace ops
