// What the definitions of the KV cache's operators share: an operand's dtype in each of the three
// dtypes of keys and values.
#pragma once

#include <vector>

#include "register/op_def_registry.h"

namespace ops {

using DataTypes = std::vector<ge::DataType>;

inline const DataTypes kRows = {ge::DT_BF16, ge::DT_FLOAT16, ge::DT_FLOAT};
inline const DataTypes kFloat = {ge::DT_FLOAT, ge::DT_FLOAT, ge::DT_FLOAT};
inline const DataTypes kInt32 = {ge::DT_INT32, ge::DT_INT32, ge::DT_INT32};
inline const std::vector<ge::Format> kPlain = {ge::FORMAT_ND, ge::FORMAT_ND, ge::FORMAT_ND};

inline void addInput(OpDef& op, const char* name, Option option, const DataTypes& types) {
  op.Input(name)
      .ParamType(option)
      .DataType(types)
      .Format(kPlain)
      .UnknownShapeFormat(kPlain)
      .AutoContiguous();
}

// An output of an input's name is that input, written in place.
inline void addOutput(OpDef& op, const char* name, const DataTypes& types) {
  op.Output(name).ParamType(REQUIRED).DataType(types).Format(kPlain).UnknownShapeFormat(kPlain);
}

inline void addConfigs(OpDef& op) {
  op.AICore().AddConfig("ascend910b");
  op.AICore().AddConfig("ascend910_93");
}

}  // namespace ops
