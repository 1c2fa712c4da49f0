// torch.ops.lopa.branch_attention_lse, operands in the order of its schema.
#include "../../common/definition.h"

namespace ops {

// `cache_layout` names the order of the dimensions of caches, and of pools of pages: BSND,
// [B, S, Hk, D], or BNSD, [B, Hk, S, D].
class LopaBranchAttention : public OpDef {
 public:
  explicit LopaBranchAttention(const char* name) : OpDef(name) {
    const DataTypes rows = {ge::DT_BF16, ge::DT_FLOAT16};
    const DataTypes words = always(ge::DT_INT32, rows.size());
    addInput(*this, "q", REQUIRED, rows);
    addInput(*this, "k_cache", REQUIRED, rows);
    addInput(*this, "v_cache", REQUIRED, rows);
    addInput(*this, "k_window", REQUIRED, rows);
    addInput(*this, "v_window", REQUIRED, rows);
    addInput(*this, "cache_len", REQUIRED, words);
    addInput(*this, "length", REQUIRED, words);
    addInput(*this, "prompt_len", OPTIONAL, words);
    addInput(*this, "block_table", OPTIONAL, words);
    addOutput(*this, "out", rows);
    addOutput(*this, "lse", always(ge::DT_FLOAT, rows.size()));
    this->Attr("mask").AttrType(OPTIONAL).String("full");
    this->Attr("block_size").AttrType(OPTIONAL).Int(0);
    // 0: D ** -0.5
    this->Attr("scale").AttrType(OPTIONAL).Float(0);
    this->Attr("cache_layout").AttrType(OPTIONAL).String("BSND");
    addConfigs(*this);
  }
};

OP_ADD(LopaBranchAttention);

}  // namespace ops
