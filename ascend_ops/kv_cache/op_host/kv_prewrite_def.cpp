// Pre-Write: torch.ops.lopa.{kv_prewrite_, kv_prewrite_direct_, qkv_prewrite_,
// qkv_prewrite_direct_}, operands in the order of their schemas (csrc/registration.cpp), attributes
// last.
#include "kv_cache_def.h"

namespace ops {

class LopaKvPrewrite : public OpDef {
 public:
  explicit LopaKvPrewrite(const char* name) : OpDef(name) {
    addInput(*this, "k_window", REQUIRED, kRows);
    addInput(*this, "v_window", REQUIRED, kRows);
    addInput(*this, "k", REQUIRED, kRows);
    addInput(*this, "v", REQUIRED, kRows);
    addInput(*this, "cos_sin", OPTIONAL, kFloat);
    addInput(*this, "cache_len", OPTIONAL, kInt32);
    addOutput(*this, "k_window", kRows);
    addOutput(*this, "v_window", kRows);
    this->Attr("layer").AttrType(REQUIRED).Int();
    addConfigs(*this);
  }
};

class LopaKvPrewriteDirect : public OpDef {
 public:
  explicit LopaKvPrewriteDirect(const char* name) : OpDef(name) {
    addInput(*this, "k_window", REQUIRED, kRows);
    addInput(*this, "v_window", REQUIRED, kRows);
    addInput(*this, "k_cache", REQUIRED, kRows);
    addInput(*this, "v_cache", REQUIRED, kRows);
    addInput(*this, "k", REQUIRED, kRows);
    addInput(*this, "v", REQUIRED, kRows);
    addInput(*this, "cache_len", REQUIRED, kInt32);
    addInput(*this, "commit_len", REQUIRED, kInt32);
    addInput(*this, "cos_sin", OPTIONAL, kFloat);
    addInput(*this, "status", REQUIRED, kInt32);
    addOutput(*this, "k_window", kRows);
    addOutput(*this, "v_window", kRows);
    addOutput(*this, "k_cache", kRows);
    addOutput(*this, "v_cache", kRows);
    addOutput(*this, "status", kInt32);
    this->Attr("layer").AttrType(REQUIRED).Int();
    addConfigs(*this);
  }
};

class LopaQkvPrewrite : public OpDef {
 public:
  explicit LopaQkvPrewrite(const char* name) : OpDef(name) {
    addInput(*this, "q", REQUIRED, kRows);
    addInput(*this, "k_window", REQUIRED, kRows);
    addInput(*this, "v_window", REQUIRED, kRows);
    addInput(*this, "qkv", REQUIRED, kRows);
    addInput(*this, "cos_sin", REQUIRED, kFloat);
    addInput(*this, "cache_len", REQUIRED, kInt32);
    addOutput(*this, "q", kRows);
    addOutput(*this, "k_window", kRows);
    addOutput(*this, "v_window", kRows);
    this->Attr("layer").AttrType(REQUIRED).Int();
    addConfigs(*this);
  }
};

class LopaQkvPrewriteDirect : public OpDef {
 public:
  explicit LopaQkvPrewriteDirect(const char* name) : OpDef(name) {
    addInput(*this, "q", REQUIRED, kRows);
    addInput(*this, "k_window", REQUIRED, kRows);
    addInput(*this, "v_window", REQUIRED, kRows);
    addInput(*this, "k_cache", REQUIRED, kRows);
    addInput(*this, "v_cache", REQUIRED, kRows);
    addInput(*this, "qkv", REQUIRED, kRows);
    addInput(*this, "cos_sin", REQUIRED, kFloat);
    addInput(*this, "cache_len", REQUIRED, kInt32);
    addInput(*this, "commit_len", REQUIRED, kInt32);
    addInput(*this, "status", REQUIRED, kInt32);
    addOutput(*this, "q", kRows);
    addOutput(*this, "k_window", kRows);
    addOutput(*this, "v_window", kRows);
    addOutput(*this, "k_cache", kRows);
    addOutput(*this, "v_cache", kRows);
    addOutput(*this, "status", kInt32);
    this->Attr("layer").AttrType(REQUIRED).Int();
    addConfigs(*this);
  }
};

OP_ADD(LopaKvPrewrite);
OP_ADD(LopaKvPrewriteDirect);
OP_ADD(LopaQkvPrewrite);
OP_ADD(LopaQkvPrewriteDirect);

}  // namespace ops
