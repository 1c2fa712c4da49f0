// torch.ops.lopa.branch_attention_lse, operands in the order of its schema.
#include <vector>

#include "register/op_def_registry.h"

namespace ops {

// `cache_layout` names the order of the dimensions of caches, and of pools of pages: BSND,
// [B, S, Hk, D], or BNSD, [B, Hk, S, D].
class LopaBranchAttention : public OpDef {
 public:
  explicit LopaBranchAttention(const char* name) : OpDef(name) {
    const std::vector<ge::DataType> rows = {ge::DT_BF16, ge::DT_FLOAT16};
    const std::vector<ge::DataType> lengths = {ge::DT_INT32, ge::DT_INT32};
    for (const char* input : {"q", "k_cache", "v_cache", "k_window", "v_window"}) {
      AddInput(input, REQUIRED, rows);
    }
    AddInput("cache_len", REQUIRED, lengths);
    AddInput("length", REQUIRED, lengths);
    AddInput("prompt_len", OPTIONAL, lengths);
    AddInput("block_table", OPTIONAL, lengths);
    AddOutput("out", rows);
    AddOutput("lse", {ge::DT_FLOAT, ge::DT_FLOAT});
    this->Attr("mask").AttrType(OPTIONAL).String("full");
    this->Attr("block_size").AttrType(OPTIONAL).Int(0);
    // 0: D ** -0.5
    this->Attr("scale").AttrType(OPTIONAL).Float(0);
    this->Attr("cache_layout").AttrType(OPTIONAL).String("BSND");

    this->AICore().AddConfig("ascend910b");
    this->AICore().AddConfig("ascend910_93");
  }

 private:
  void AddInput(const char* name, Option option, const std::vector<ge::DataType>& types) {
    this->Input(name)
        .ParamType(option)
        .DataType(types)
        .Format({ge::FORMAT_ND, ge::FORMAT_ND})
        .UnknownShapeFormat({ge::FORMAT_ND, ge::FORMAT_ND})
        .AutoContiguous();
  }

  void AddOutput(const char* name, const std::vector<ge::DataType>& types) {
    this->Output(name)
        .ParamType(REQUIRED)
        .DataType(types)
        .Format({ge::FORMAT_ND, ge::FORMAT_ND})
        .UnknownShapeFormat({ge::FORMAT_ND, ge::FORMAT_ND});
  }
};

OP_ADD(LopaBranchAttention);

}  // namespace ops
