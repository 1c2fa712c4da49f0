#include "register/op_impl_registry.h"

namespace ops {
namespace {

ge::graphStatus InferShape(gert::InferShapeContext* context) {
  const gert::Shape* q = context->GetInputShape(0);
  gert::Shape* out = context->GetOutputShape(0);
  gert::Shape* lse = context->GetOutputShape(1);
  if (q == nullptr || out == nullptr || lse == nullptr || q->GetDimNum() != 5) {
    return ge::GRAPH_FAILED;
  }
  *out = *q;
  lse->SetDimNum(4);
  lse->SetDim(0, q->GetDim(0));
  lse->SetDim(1, q->GetDim(1));
  lse->SetDim(2, q->GetDim(3));
  lse->SetDim(3, q->GetDim(2));
  return ge::GRAPH_SUCCESS;
}

ge::graphStatus InferDataType(gert::InferDataTypeContext* context) {
  context->SetOutputDataType(0, context->GetInputDataType(0));
  context->SetOutputDataType(1, ge::DT_FLOAT);
  return ge::GRAPH_SUCCESS;
}

}  // namespace

IMPL_OP_INFERSHAPE(LopaBranchAttention).InferShape(InferShape).InferDataType(InferDataType);

}  // namespace ops
