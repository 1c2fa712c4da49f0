// Every output has the shape of `rows`, or of the leading dimensions of `logits`.
#include "register/op_impl_registry.h"

namespace ops {
namespace {

ge::graphStatus shapes(gert::InferShapeContext* context, size_t outputs) {
  const gert::Shape* logits = context->GetRequiredInputShape(0);
  const gert::Shape* rows = context->GetOptionalInputShape(1);
  if (logits == nullptr || logits->GetDimNum() == 0) return ge::GRAPH_FAILED;
  gert::Shape shape = rows != nullptr ? *rows : *logits;
  if (rows == nullptr) shape.SetDimNum(logits->GetDimNum() - 1);
  for (size_t i = 0; i < outputs; ++i) {
    gert::Shape* output = context->GetOutputShape(i);
    if (output == nullptr) return ge::GRAPH_FAILED;
    *output = shape;
  }
  return ge::GRAPH_SUCCESS;
}

ge::graphStatus confidenceShapes(gert::InferShapeContext* c) { return shapes(c, 4); }

ge::graphStatus confidenceTypes(gert::InferDataTypeContext* context) {
  context->SetOutputDataType(0, ge::DT_INT64);
  context->SetOutputDataType(1, ge::DT_FLOAT);
  context->SetOutputDataType(2, ge::DT_FLOAT);
  context->SetOutputDataType(3, ge::DT_INT32);
  return ge::GRAPH_SUCCESS;
}

ge::graphStatus statsShapes(gert::InferShapeContext* c) { return shapes(c, 5); }

ge::graphStatus statsTypes(gert::InferDataTypeContext* context) {
  context->SetOutputDataType(0, ge::DT_INT64);
  for (size_t i = 1; i < 5; ++i) context->SetOutputDataType(i, ge::DT_FLOAT);
  return ge::GRAPH_SUCCESS;
}

}  // namespace

IMPL_OP_INFERSHAPE(LopaTokenConfidence).InferShape(confidenceShapes).InferDataType(confidenceTypes);
IMPL_OP_INFERSHAPE(LopaSoftmaxStats).InferShape(statsShapes).InferDataType(statsTypes);

}  // namespace ops
