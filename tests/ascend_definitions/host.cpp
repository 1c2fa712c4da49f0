// Runs the host functions of an operator. Words on standard input: the type; for each input "none"
// or "in", a dtype, the number of dimensions and these; for each attribute a kind (i, f, b, s) and
// the value. Prints outputs as dtypes and dimensions, then cores, schedule mode, workspace and
// tiling.
#include "host.h"

#include <cstdio>
#include <cstdlib>
#include <iostream>

const gert::RuntimeAttrs::Value& gert::RuntimeAttrs::of(size_t i, char kind) const {
  const Value& value = values.at(i);
  if (value.kind != kind) {
    std::fprintf(stderr, "attribute %zu is read as %c and is %c\n", i, kind, value.kind);
    std::exit(3);
  }
  return value;
}

namespace {

ge::DataType type_named(const std::string& name) {
  for (int i = 0; i <= ge::DT_BOOL; ++i) {
    if (name == ge::name_of(static_cast<ge::DataType>(i))) return static_cast<ge::DataType>(i);
  }
  std::exit(4);
}

gert::Input read_input() {
  std::string word;
  std::cin >> word;
  gert::Input input{};
  input.present = word == "in";
  if (!input.present) return input;
  size_t count;
  std::cin >> word >> count;
  input.desc.type = type_named(word);
  input.shape.shape.SetDimNum(count);
  for (size_t d = 0; d < count; ++d) {
    int64_t size;
    std::cin >> size;
    input.shape.shape.SetDim(d, size);
  }
  return input;
}

gert::RuntimeAttrs::Value read_attribute() {
  gert::RuntimeAttrs::Value value{};
  std::cin >> value.kind;
  if (value.kind == 'i') std::cin >> value.integer;
  if (value.kind == 'f') std::cin >> value.real;
  if (value.kind == 'b') std::cin >> value.flag;
  if (value.kind == 's') std::cin >> value.text;
  return value;
}

const ops::OpDef definition(const std::string& type) {
  for (const auto& make : ops::definitions()) {
    ops::OpDef op = make();
    if (op.type == type) return op;
  }
  std::exit(5);
}

}  // namespace

int main() {
  std::string type;
  std::cin >> type;
  const ops::OpDef op = definition(type);
  gert::Inputs inputs;
  for (size_t i = 0; i < op.inputs.size(); ++i) inputs.all.push_back(read_input());
  gert::RuntimeAttrs attributes;
  for (size_t i = 0; i < op.attributes.size(); ++i) attributes.values.push_back(read_attribute());

  const HostFunctions& functions = host_functions().at(type);
  gert::InferShapeContext shapes{};
  shapes.in = inputs;
  shapes.attributes = attributes;
  shapes.outputs.resize(op.outputs.size());
  gert::InferDataTypeContext types{};
  types.in = inputs;
  types.outputs.resize(op.outputs.size(), ge::DT_BOOL);
  if (functions.shapes(&shapes) != ge::GRAPH_SUCCESS) return 1;
  if (functions.types(&types) != ge::GRAPH_SUCCESS) return 1;
  for (size_t i = 0; i < op.outputs.size(); ++i) {
    std::printf("%s", ge::name_of(types.outputs[i]));
    for (size_t d = 0; d < shapes.outputs[i].GetDimNum(); ++d) {
      std::printf(" %lld", static_cast<long long>(shapes.outputs[i].GetDim(d)));
    }
    std::printf("\n");
  }
  std::fflush(stdout);

  gert::TilingContext tiling{};
  tiling.in = inputs;
  tiling.attributes = attributes;
  if (functions.tiling(&tiling) != ge::GRAPH_SUCCESS) return 2;
  std::printf("%u %u %zu ", tiling.cores, tiling.together, tiling.workspace);
  for (char byte : tiling.data) std::printf("%02x", static_cast<unsigned char>(byte));
  std::printf("\n");
  return 0;
}
