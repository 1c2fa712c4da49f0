// Pre-Write: torch.ops.lopa.{kv_prewrite_, kv_prewrite_direct_, qkv_prewrite_,
// qkv_prewrite_direct_}, operands in the order of their schemas (csrc/registration.cpp), attributes
// last. `norm_eps_bits` holds a double: GE's own attributes are fp32.
#include "../../common/definition.h"

namespace ops {

class LopaKvPrewrite : public OpDef {
 public:
  explicit LopaKvPrewrite(const char* name) : OpDef(name) {
    addInput(*this, "k_window", REQUIRED, rowTypes());
    addInput(*this, "v_window", REQUIRED, rowTypes());
    addInput(*this, "k", REQUIRED, rowTypes());
    addInput(*this, "v", REQUIRED, rowTypes());
    addInput(*this, "cos_sin", OPTIONAL, always(ge::DT_FLOAT));
    addInput(*this, "cache_len", OPTIONAL, always(ge::DT_INT32));
    addOutput(*this, "k_window", rowTypes());
    addOutput(*this, "v_window", rowTypes());
    this->Attr("layer").AttrType(REQUIRED).Int();
    addConfigs(*this);
  }
};

class LopaKvPrewriteDirect : public OpDef {
 public:
  explicit LopaKvPrewriteDirect(const char* name) : OpDef(name) {
    addInput(*this, "k_window", REQUIRED, rowTypes());
    addInput(*this, "v_window", REQUIRED, rowTypes());
    addInput(*this, "k_cache", REQUIRED, rowTypes());
    addInput(*this, "v_cache", REQUIRED, rowTypes());
    addInput(*this, "k", REQUIRED, rowTypes());
    addInput(*this, "v", REQUIRED, rowTypes());
    addInput(*this, "cache_len", REQUIRED, always(ge::DT_INT32));
    addInput(*this, "commit_len", REQUIRED, always(ge::DT_INT32));
    addInput(*this, "cos_sin", OPTIONAL, always(ge::DT_FLOAT));
    addInput(*this, "status", REQUIRED, always(ge::DT_INT32));
    addOutput(*this, "k_window", rowTypes());
    addOutput(*this, "v_window", rowTypes());
    addOutput(*this, "k_cache", rowTypes());
    addOutput(*this, "v_cache", rowTypes());
    addOutput(*this, "status", always(ge::DT_INT32));
    this->Attr("layer").AttrType(REQUIRED).Int();
    addConfigs(*this);
  }
};

class LopaQkvPrewrite : public OpDef {
 public:
  explicit LopaQkvPrewrite(const char* name) : OpDef(name) {
    addInput(*this, "q", REQUIRED, rowTypes());
    addInput(*this, "k_window", REQUIRED, rowTypes());
    addInput(*this, "v_window", REQUIRED, rowTypes());
    addInput(*this, "qkv", REQUIRED, rowTypes());
    addInput(*this, "cos_sin", REQUIRED, always(ge::DT_FLOAT));
    addInput(*this, "cache_len", REQUIRED, always(ge::DT_INT32));
    addInput(*this, "q_norm", OPTIONAL, rowTypes());
    addInput(*this, "k_norm", OPTIONAL, rowTypes());
    addOutput(*this, "q", rowTypes());
    addOutput(*this, "k_window", rowTypes());
    addOutput(*this, "v_window", rowTypes());
    this->Attr("layer").AttrType(REQUIRED).Int();
    this->Attr("norm_eps_bits").AttrType(REQUIRED).Int();
    addConfigs(*this);
  }
};

class LopaQkvPrewriteDirect : public OpDef {
 public:
  explicit LopaQkvPrewriteDirect(const char* name) : OpDef(name) {
    addInput(*this, "q", REQUIRED, rowTypes());
    addInput(*this, "k_window", REQUIRED, rowTypes());
    addInput(*this, "v_window", REQUIRED, rowTypes());
    addInput(*this, "k_cache", REQUIRED, rowTypes());
    addInput(*this, "v_cache", REQUIRED, rowTypes());
    addInput(*this, "qkv", REQUIRED, rowTypes());
    addInput(*this, "cos_sin", REQUIRED, always(ge::DT_FLOAT));
    addInput(*this, "cache_len", REQUIRED, always(ge::DT_INT32));
    addInput(*this, "commit_len", REQUIRED, always(ge::DT_INT32));
    addInput(*this, "status", REQUIRED, always(ge::DT_INT32));
    addInput(*this, "q_norm", OPTIONAL, rowTypes());
    addInput(*this, "k_norm", OPTIONAL, rowTypes());
    addOutput(*this, "q", rowTypes());
    addOutput(*this, "k_window", rowTypes());
    addOutput(*this, "v_window", rowTypes());
    addOutput(*this, "k_cache", rowTypes());
    addOutput(*this, "v_cache", rowTypes());
    addOutput(*this, "status", always(ge::DT_INT32));
    this->Attr("layer").AttrType(REQUIRED).Int();
    this->Attr("norm_eps_bits").AttrType(REQUIRED).Int();
    addConfigs(*this);
  }
};

OP_ADD(LopaKvPrewrite);
OP_ADD(LopaKvPrewriteDirect);
OP_ADD(LopaQkvPrewrite);
OP_ADD(LopaQkvPrewriteDirect);

}  // namespace ops
