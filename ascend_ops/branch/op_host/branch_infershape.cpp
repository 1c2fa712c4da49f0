// Shapes follow from those of the state and from the attributes that say what comes next.
#include <initializer_list>

#include "register/op_impl_registry.h"

namespace ops {
namespace {

// -1, an unknown dimension, stays unknown.
void set(gert::Shape* shape, std::initializer_list<int64_t> sizes) {
  shape->SetDimNum(sizes.size());
  size_t d = 0;
  for (int64_t size : sizes) shape->SetDim(d++, size);
}

void setTypes(gert::InferDataTypeContext* context, std::initializer_list<ge::DataType> types) {
  size_t i = 0;
  for (ge::DataType type : types) context->SetOutputDataType(i++, type);
}

ge::graphStatus stepShapes(gert::InferShapeContext* context) {
  constexpr size_t kTokens = 4;
  const gert::Shape* tokens = context->GetRequiredInputShape(kTokens);
  if (tokens == nullptr || tokens->GetDimNum() != 3) return ge::GRAPH_FAILED;
  const int64_t B = tokens->GetDim(0), K = tokens->GetDim(1), W = tokens->GetDim(2);
  const int64_t nextK = *context->GetAttrs()->GetInt(0);
  const int64_t nextW = *context->GetAttrs()->GetInt(1);
  set(context->GetOutputShape(0), {B, nextK, nextW});
  for (size_t i = 1; i < 4; ++i) set(context->GetOutputShape(i), {B, nextK});
  for (size_t i = 4; i < 14; ++i) set(context->GetOutputShape(i), {B});
  set(context->GetOutputShape(14), {B, K});
  set(context->GetOutputShape(15), {B, W});
  set(context->GetOutputShape(16), {B});
  return ge::GRAPH_SUCCESS;
}

ge::graphStatus stepTypes(gert::InferDataTypeContext* context) {
  setTypes(context,
           {ge::DT_INT64, ge::DT_INT32, ge::DT_FLOAT, ge::DT_BOOL, ge::DT_INT32, ge::DT_INT32,
            ge::DT_INT32, ge::DT_INT32, ge::DT_INT64, ge::DT_FLOAT, ge::DT_FLOAT, ge::DT_BOOL,
            ge::DT_INT32, ge::DT_INT32, ge::DT_FLOAT, ge::DT_INT64, ge::DT_INT32});
  return ge::GRAPH_SUCCESS;
}

ge::graphStatus stepRowsShapes(gert::InferShapeContext* context) {
  const gert::Shape* tokens = context->GetRequiredInputShape(0);
  gert::Shape* wanted = context->GetOutputShape(0);
  if (tokens == nullptr || wanted == nullptr) return ge::GRAPH_FAILED;
  *wanted = *tokens;
  return ge::GRAPH_SUCCESS;
}

ge::graphStatus stepRowsTypes(gert::InferDataTypeContext* context) {
  setTypes(context, {ge::DT_INT32});
  return ge::GRAPH_SUCCESS;
}

ge::graphStatus neededRowsShapes(gert::InferShapeContext* context) {
  const gert::Shape* tokens = context->GetRequiredInputShape(0);
  if (tokens == nullptr) return ge::GRAPH_FAILED;
  set(context->GetOutputShape(0), {*context->GetAttrs()->GetInt(2)});
  *context->GetOutputShape(1) = *tokens;
  set(context->GetOutputShape(2), {1});
  return ge::GRAPH_SUCCESS;
}

ge::graphStatus neededRowsTypes(gert::InferDataTypeContext* context) {
  setTypes(context, {ge::DT_INT64, ge::DT_INT32, ge::DT_INT32});
  return ge::GRAPH_SUCCESS;
}

ge::graphStatus confidenceShapes(gert::InferShapeContext* context) {
  const gert::Shape* score = context->GetRequiredInputShape(0);
  if (score == nullptr || score->GetDimNum() != 3) return ge::GRAPH_FAILED;
  set(context->GetOutputShape(0), {score->GetDim(0), score->GetDim(1)});
  return ge::GRAPH_SUCCESS;
}

ge::graphStatus confidenceTypes(gert::InferDataTypeContext* context) {
  setTypes(context, {ge::DT_FLOAT});
  return ge::GRAPH_SUCCESS;
}

ge::graphStatus selectShapes(gert::InferShapeContext* context) {
  constexpr size_t kTokens = 3;
  const gert::Shape* tokens = context->GetRequiredInputShape(kTokens);
  if (tokens == nullptr || tokens->GetDimNum() != 2) return ge::GRAPH_FAILED;
  *context->GetOutputShape(0) = *tokens;
  set(context->GetOutputShape(1), {tokens->GetDim(0), *context->GetAttrs()->GetInt(0)});
  set(context->GetOutputShape(2), {tokens->GetDim(0)});
  return ge::GRAPH_SUCCESS;
}

ge::graphStatus selectTypes(gert::InferDataTypeContext* context) {
  setTypes(context, {ge::DT_BOOL, ge::DT_INT32, ge::DT_INT32});
  return ge::GRAPH_SUCCESS;
}

ge::graphStatus spawnShapes(gert::InferShapeContext* context) {
  constexpr size_t kColumns = 4;
  const gert::Shape* tokens = context->GetRequiredInputShape(0);
  const gert::Shape* columns = context->GetRequiredInputShape(kColumns);
  if (tokens == nullptr || columns == nullptr || tokens->GetDimNum() != 2 ||
      columns->GetDimNum() != 2) {
    return ge::GRAPH_FAILED;
  }
  const int64_t B = tokens->GetDim(0);
  const int64_t K = columns->GetDim(1) < 0 ? -1 : columns->GetDim(1) + 1;
  set(context->GetOutputShape(0), {B, K, tokens->GetDim(1)});
  set(context->GetOutputShape(1), {B, K});
  set(context->GetOutputShape(2), {B, K});
  set(context->GetOutputShape(3), {B});
  return ge::GRAPH_SUCCESS;
}

ge::graphStatus spawnTypes(gert::InferDataTypeContext* context) {
  setTypes(context, {ge::DT_INT64, ge::DT_FLOAT, ge::DT_BOOL, ge::DT_INT32});
  return ge::GRAPH_SUCCESS;
}

}  // namespace

IMPL_OP_INFERSHAPE(LopaBranchStep).InferShape(stepShapes).InferDataType(stepTypes);
IMPL_OP_INFERSHAPE(LopaStepRows).InferShape(stepRowsShapes).InferDataType(stepRowsTypes);
IMPL_OP_INFERSHAPE(LopaNeededRows).InferShape(neededRowsShapes).InferDataType(neededRowsTypes);
IMPL_OP_INFERSHAPE(LopaBranchConfidence)
    .InferShape(confidenceShapes)
    .InferDataType(confidenceTypes);
IMPL_OP_INFERSHAPE(LopaSelectPositions).InferShape(selectShapes).InferDataType(selectTypes);
IMPL_OP_INFERSHAPE(LopaSpawnBranches).InferShape(spawnShapes).InferDataType(spawnTypes);

}  // namespace ops
