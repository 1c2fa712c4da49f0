// The operators of the KV cache write in place: every output has the shape and dtype of the input
// of its name.
#include <initializer_list>

#include "register/op_impl_registry.h"

namespace ops {
namespace {

// Input number `inputs[i]` of the definition is output number i.
ge::graphStatus sameShapes(gert::InferShapeContext* context, std::initializer_list<size_t> inputs) {
  size_t output = 0;
  for (size_t input : inputs) {
    const gert::Shape* from = context->GetRequiredInputShape(input);
    gert::Shape* to = context->GetOutputShape(output++);
    if (from == nullptr || to == nullptr) return ge::GRAPH_FAILED;
    *to = *from;
  }
  return ge::GRAPH_SUCCESS;
}

// `rows` outputs of the first input's dtype, then perhaps the status words.
ge::graphStatus types(gert::InferDataTypeContext* context, size_t rows, bool status) {
  for (size_t output = 0; output < rows; ++output) {
    context->SetOutputDataType(output, context->GetInputDataType(0));
  }
  if (status) context->SetOutputDataType(rows, ge::DT_INT32);
  return ge::GRAPH_SUCCESS;
}

// k_window, v_window
ge::graphStatus prewriteShapes(gert::InferShapeContext* c) { return sameShapes(c, {0, 1}); }
ge::graphStatus prewriteTypes(gert::InferDataTypeContext* c) { return types(c, 2, false); }

// k_window, v_window, k_cache, v_cache, status
ge::graphStatus directShapes(gert::InferShapeContext* c) { return sameShapes(c, {0, 1, 2, 3, 9}); }
ge::graphStatus directTypes(gert::InferDataTypeContext* c) { return types(c, 4, true); }

// q, k_window, v_window
ge::graphStatus packedShapes(gert::InferShapeContext* c) { return sameShapes(c, {0, 1, 2}); }
ge::graphStatus packedTypes(gert::InferDataTypeContext* c) { return types(c, 3, false); }

// q, k_window, v_window, k_cache, v_cache, status
ge::graphStatus packedDirectShapes(gert::InferShapeContext* c) {
  return sameShapes(c, {0, 1, 2, 3, 4, 9});
}
ge::graphStatus packedDirectTypes(gert::InferDataTypeContext* c) { return types(c, 5, true); }

// k_cache, v_cache, status
ge::graphStatus commitShapes(gert::InferShapeContext* c) { return sameShapes(c, {0, 1, 7}); }
ge::graphStatus commitTypes(gert::InferDataTypeContext* c) { return types(c, 2, true); }

}  // namespace

IMPL_OP_INFERSHAPE(LopaKvPrewrite).InferShape(prewriteShapes).InferDataType(prewriteTypes);
IMPL_OP_INFERSHAPE(LopaKvPrewriteDirect).InferShape(directShapes).InferDataType(directTypes);
IMPL_OP_INFERSHAPE(LopaQkvPrewrite).InferShape(packedShapes).InferDataType(packedTypes);
IMPL_OP_INFERSHAPE(LopaQkvPrewriteDirect)
    .InferShape(packedDirectShapes)
    .InferDataType(packedDirectTypes);
IMPL_OP_INFERSHAPE(LopaKvCommit).InferShape(commitShapes).InferDataType(commitTypes);

}  // namespace ops
