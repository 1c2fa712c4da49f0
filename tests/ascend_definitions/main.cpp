// Prints the recorded definitions as JSON.
#include <cstdio>

#include "register/op_def_registry.h"

namespace {

using ops::OpDef;

template <typename List, typename Print>
void print_list(const char* key, const List& list, const Print& print, const char* after) {
  std::printf("\"%s\": [", key);
  bool first = true;
  for (const auto& item : list) {
    if (!first) std::printf(", ");
    first = false;
    print(item);
  }
  std::printf("]%s", after);
}

void print_parameter(const ops::OpParamDef& p) {
  std::printf("{\"name\": \"%s\", \"required\": %s, \"formats\": %zu, \"contiguous\": %s, ",
              p.name.c_str(), p.option == ops::REQUIRED ? "true" : "false",
              p.formats == p.unknown_shape_formats ? p.formats : 0,
              p.contiguous ? "true" : "false");
  print_list("types", p.types, [](ge::DataType t) { std::printf("\"%s\"", ge::name_of(t)); }, "}");
}

void print_attribute(const ops::OpAttrDef& a) {
  std::printf("{\"name\": \"%s\", \"type\": \"%s\", \"required\": %s}", a.name.c_str(),
              a.type.c_str(), a.option == ops::REQUIRED ? "true" : "false");
}

void print_definition(const OpDef& op) {
  std::printf("{\"type\": \"%s\", ", op.type.c_str());
  print_list("inputs", op.inputs, print_parameter, ", ");
  print_list("outputs", op.outputs, print_parameter, ", ");
  print_list("attributes", op.attributes, print_attribute, ", ");
  print_list(
      "configs", op.core.configs, [](const std::string& c) { std::printf("\"%s\"", c.c_str()); },
      "}");
}

}  // namespace

int main() {
  std::printf("{");
  print_list(
      "operators", ops::definitions(), [](const auto& make) { print_definition(make()); }, "}\n");
  return 0;
}
