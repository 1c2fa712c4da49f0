// The part of CANN's host interface that ascend_ops/*/op_host use, with values that a test sets:
// contexts of tiling and inference, and the registrations. host.cpp drives it.
#pragma once

#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "register/op_def_registry.h"

namespace ge {

using graphStatus = uint32_t;
constexpr graphStatus GRAPH_SUCCESS = 0;
constexpr graphStatus GRAPH_FAILED = 0xFFFFFFFF;

}  // namespace ge

namespace fe {
struct PlatFormInfos {};
}  // namespace fe

namespace gert {

class Shape {
 public:
  size_t GetDimNum() const { return dims_.size(); }
  int64_t GetDim(size_t i) const { return dims_.at(i); }
  void SetDimNum(size_t count) { dims_.resize(count); }
  void SetDim(size_t i, int64_t value) { dims_.at(i) = value; }
  bool operator==(const Shape& other) const { return dims_ == other.dims_; }
  bool operator!=(const Shape& other) const { return dims_ != other.dims_; }

 private:
  std::vector<int64_t> dims_;
};

class StorageShape {
 public:
  const Shape& GetStorageShape() const { return shape; }
  const Shape& GetOriginShape() const { return shape; }
  Shape shape;
};

class CompileTimeTensorDesc {
 public:
  ge::DataType GetDataType() const { return type; }
  ge::DataType type;
};

class RuntimeAttrs {
 public:
  const int64_t* GetInt(size_t i) const { return &of(i, 'i').integer; }
  const float* GetFloat(size_t i) const { return &of(i, 'f').real; }
  const bool* GetBool(size_t i) const { return &of(i, 'b').flag; }
  const char* GetStr(size_t i) const { return of(i, 's').text.c_str(); }

  struct Value {
    char kind;
    int64_t integer;
    float real;
    bool flag;
    std::string text;
  };
  std::vector<Value> values;

 private:
  const Value& of(size_t i, char kind) const;
};

// What a call gives; an input of the definition that is absent is not `present`.
struct Input {
  bool present;
  StorageShape shape;
  CompileTimeTensorDesc desc;
};

// Number i of the definition, or of those that are there.
class Inputs {
 public:
  const Input* of_definition(size_t i) const { return all.at(i).present ? &all.at(i) : nullptr; }
  const Input* of_instance(size_t i) const {
    for (const Input& input : all) {
      if (input.present && i-- == 0) return &input;
    }
    return nullptr;
  }
  std::vector<Input> all;
};

class TilingContext {
 public:
  const StorageShape* GetRequiredInputShape(size_t i) const { return shape(in.of_definition(i)); }
  const StorageShape* GetOptionalInputShape(size_t i) const { return shape(in.of_definition(i)); }
  const StorageShape* GetInputShape(size_t i) const { return shape(in.of_instance(i)); }
  const CompileTimeTensorDesc* GetRequiredInputDesc(size_t i) const {
    return &in.of_definition(i)->desc;
  }
  const RuntimeAttrs* GetAttrs() const { return &attributes; }
  const char* GetNodeName() const { return "node"; }
  fe::PlatFormInfos* GetPlatformInfo() { return &platform; }
  template <typename T>
  T* GetTilingData() {
    data.resize(sizeof(T));
    return reinterpret_cast<T*>(data.data());
  }
  ge::graphStatus SetBlockDim(uint32_t value) {
    cores = value;
    return ge::GRAPH_SUCCESS;
  }
  ge::graphStatus SetTilingKey(uint64_t) { return ge::GRAPH_SUCCESS; }
  ge::graphStatus SetScheduleMode(uint32_t value) {
    together = value;
    return ge::GRAPH_SUCCESS;
  }
  size_t* GetWorkspaceSizes(size_t) { return &workspace; }

  Inputs in;
  RuntimeAttrs attributes;
  std::vector<char> data;
  uint32_t cores = 0, together = 0;
  size_t workspace = SIZE_MAX;

 private:
  static const StorageShape* shape(const Input* input) {
    return input == nullptr ? nullptr : &input->shape;
  }
  fe::PlatFormInfos platform;
};

class InferShapeContext {
 public:
  const Shape* GetRequiredInputShape(size_t i) const { return shape(in.of_definition(i)); }
  const Shape* GetOptionalInputShape(size_t i) const { return shape(in.of_definition(i)); }
  const Shape* GetInputShape(size_t i) const { return shape(in.of_instance(i)); }
  Shape* GetOutputShape(size_t i) { return &outputs.at(i); }
  const RuntimeAttrs* GetAttrs() const { return &attributes; }

  Inputs in;
  RuntimeAttrs attributes;
  std::vector<Shape> outputs;

 private:
  static const Shape* shape(const Input* input) {
    return input == nullptr ? nullptr : &input->shape.shape;
  }
};

class InferDataTypeContext {
 public:
  ge::DataType GetInputDataType(size_t i) const { return in.of_instance(i)->desc.type; }
  ge::graphStatus SetOutputDataType(size_t i, ge::DataType type) {
    outputs.at(i) = type;
    return ge::GRAPH_SUCCESS;
  }

  Inputs in;
  std::vector<ge::DataType> outputs;
};

}  // namespace gert

namespace platform_ascendc {

enum class CoreMemType { UB, L1, L0_A, L0_B, L0_C };

// An Ascend 910B: 20 cube cores and 40 vector cores.
class PlatformAscendC {
 public:
  explicit PlatformAscendC(fe::PlatFormInfos*) {}
  uint32_t GetCoreNumAiv() const { return 40; }
  uint32_t GetCoreNumAic() const { return 20; }
  uint64_t GetLibApiWorkSpaceSize() const { return 16 * 1024 * 1024; }
  void GetCoreMemSize(CoreMemType type, uint64_t& bytes) const {
    bytes = type == CoreMemType::UB ? 192 * 1024 : 512 * 1024;
  }
};

}  // namespace platform_ascendc

struct HostFunctions {
  ge::graphStatus (*tiling)(gert::TilingContext*) = nullptr;
  ge::graphStatus (*shapes)(gert::InferShapeContext*) = nullptr;
  ge::graphStatus (*types)(gert::InferDataTypeContext*) = nullptr;

  HostFunctions& Tiling(decltype(tiling) function) {
    tiling = function;
    return *this;
  }
  HostFunctions& InferShape(decltype(shapes) function) {
    shapes = function;
    return *this;
  }
  HostFunctions& InferDataType(decltype(types) function) {
    types = function;
    return *this;
  }
};

inline std::map<std::string, HostFunctions>& host_functions() {
  static std::map<std::string, HostFunctions> all;
  return all;
}

#define IMPL_OP_OPTILING(Type) static HostFunctions& tiling_of_##Type = host_functions()[#Type]
#define IMPL_OP_INFERSHAPE(Type) static HostFunctions& shapes_of_##Type = host_functions()[#Type]
