// Records operator definitions, for tests of what they define: the part of CANN's OpDef that
// ascend_ops/*/op_host/*_def.cpp use. main.cpp prints the records.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <string>
#include <vector>

namespace ge {

enum DataType { DT_FLOAT, DT_FLOAT16, DT_BF16, DT_INT32, DT_INT64, DT_BOOL };
enum Format { FORMAT_ND };

inline const char* name_of(DataType type) {
  const char* names[] = {"float32", "float16", "bfloat16", "int32", "int64", "bool"};
  return names[type];
}

}  // namespace ge

namespace ops {

enum Option { IGNORE, OPTIONAL, REQUIRED, DYNAMIC };

struct OpParamDef {
  std::string name;
  Option option = IGNORE;
  std::vector<ge::DataType> types;
  size_t formats = 0;
  size_t unknown_shape_formats = 0;
  bool contiguous = false;

  OpParamDef& ParamType(Option value) {
    option = value;
    return *this;
  }
  OpParamDef& DataType(std::vector<ge::DataType> value) {
    types = std::move(value);
    return *this;
  }
  OpParamDef& Format(std::vector<ge::Format> value) {
    formats = value.size();
    return *this;
  }
  OpParamDef& UnknownShapeFormat(std::vector<ge::Format> value) {
    unknown_shape_formats = value.size();
    return *this;
  }
  OpParamDef& AutoContiguous() {
    contiguous = true;
    return *this;
  }
};

struct OpAttrDef {
  std::string name;
  Option option = REQUIRED;
  std::string type;

  OpAttrDef& AttrType(Option value) {
    option = value;
    return *this;
  }
  OpAttrDef& Int() { return as("VT_INT"); }
  OpAttrDef& Int(int64_t) { return as("VT_INT"); }
  OpAttrDef& Float() { return as("VT_FLOAT"); }
  OpAttrDef& Float(float) { return as("VT_FLOAT"); }
  OpAttrDef& Bool() { return as("VT_BOOL"); }
  OpAttrDef& Bool(bool) { return as("VT_BOOL"); }
  OpAttrDef& String() { return as("VT_STRING"); }
  OpAttrDef& String(const char*) { return as("VT_STRING"); }

 private:
  OpAttrDef& as(const char* value) {
    type = value;
    return *this;
  }
};

struct OpAICoreDef {
  std::vector<std::string> configs;

  void AddConfig(const char* name) { configs.emplace_back(name); }
};

class OpDef {
 public:
  explicit OpDef(const char* type) : type(type) {}

  OpParamDef& Input(const char* name) { return add(inputs, name); }
  OpParamDef& Output(const char* name) { return add(outputs, name); }
  OpAttrDef& Attr(const char* name) { return add(attributes, name); }
  OpAICoreDef& AICore() { return core; }

  std::string type;
  // References stay valid while more are added.
  std::deque<OpParamDef> inputs;
  std::deque<OpParamDef> outputs;
  std::deque<OpAttrDef> attributes;
  OpAICoreDef core;

 private:
  template <typename T>
  static T& add(std::deque<T>& all, const char* name) {
    all.emplace_back();
    all.back().name = name;
    return all.back();
  }
};

inline std::vector<std::function<OpDef()>>& definitions() {
  static std::vector<std::function<OpDef()>> all;
  return all;
}

struct Registration {
  explicit Registration(std::function<OpDef()> make) { definitions().push_back(std::move(make)); }
};

}  // namespace ops

#define OP_ADD(Type) static const Registration registration_of_##Type([] { return Type(#Type); })
