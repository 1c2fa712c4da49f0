#include "register/op_def_registry.h"

namespace ops {

// The contract is branch_attention's of docs/operators.md. `cache_layout` names the order of the
// caches' dimensions: BSND, [B, S, Hk, D], or BNSD, [B, Hk, S, D].
class BranchAttention : public OpDef {
 public:
  explicit BranchAttention(const char* name) : OpDef(name) {
    for (const char* input : {"q", "k_cache", "v_cache", "k_window", "v_window"}) {
      this->Input(input)
          .ParamType(REQUIRED)
          .DataType({ge::DT_FLOAT16, ge::DT_BF16})
          .Format({ge::FORMAT_ND, ge::FORMAT_ND})
          .UnknownShapeFormat({ge::FORMAT_ND, ge::FORMAT_ND})
          .AutoContiguous();
    }
    this->Input("cache_len")
        .ParamType(REQUIRED)
        .DataType({ge::DT_INT32, ge::DT_INT32})
        .Format({ge::FORMAT_ND, ge::FORMAT_ND})
        .UnknownShapeFormat({ge::FORMAT_ND, ge::FORMAT_ND})
        .AutoContiguous();
    this->Input("length")
        .ParamType(REQUIRED)
        .DataType({ge::DT_INT32, ge::DT_INT32})
        .Format({ge::FORMAT_ND, ge::FORMAT_ND})
        .UnknownShapeFormat({ge::FORMAT_ND, ge::FORMAT_ND})
        .AutoContiguous();
    this->Input("prompt_len")
        .ParamType(OPTIONAL)
        .DataType({ge::DT_INT32, ge::DT_INT32})
        .Format({ge::FORMAT_ND, ge::FORMAT_ND})
        .UnknownShapeFormat({ge::FORMAT_ND, ge::FORMAT_ND})
        .AutoContiguous();
    this->Output("out")
        .ParamType(REQUIRED)
        .DataType({ge::DT_FLOAT16, ge::DT_BF16})
        .Format({ge::FORMAT_ND, ge::FORMAT_ND})
        .UnknownShapeFormat({ge::FORMAT_ND, ge::FORMAT_ND});
    this->Output("lse")
        .ParamType(REQUIRED)
        .DataType({ge::DT_FLOAT, ge::DT_FLOAT})
        .Format({ge::FORMAT_ND, ge::FORMAT_ND})
        .UnknownShapeFormat({ge::FORMAT_ND, ge::FORMAT_ND});
    this->Attr("scale").AttrType(REQUIRED).Float();
    this->Attr("mask").AttrType(OPTIONAL).String("full");
    this->Attr("block_size").AttrType(OPTIONAL).Int(0);
    this->Attr("cache_layout").AttrType(OPTIONAL).String("BSND");
    this->Attr("return_lse").AttrType(OPTIONAL).Bool(false);

    this->AICore().AddConfig("ascend910b");
    this->AICore().AddConfig("ascend910_93");
  }
};

OP_ADD(BranchAttention);

}  // namespace ops
