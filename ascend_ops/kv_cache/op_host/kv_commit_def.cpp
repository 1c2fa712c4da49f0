// Commit-Winner-Cache: torch.ops.lopa.kv_commit_, operands in the order of its schema.
#include "kv_cache_def.h"

namespace ops {

class LopaKvCommit : public OpDef {
 public:
  explicit LopaKvCommit(const char* name) : OpDef(name) {
    addInput(*this, "k_cache", REQUIRED, kRows);
    addInput(*this, "v_cache", REQUIRED, kRows);
    addInput(*this, "k_window", REQUIRED, kRows);
    addInput(*this, "v_window", REQUIRED, kRows);
    addInput(*this, "winner", REQUIRED, kInt32);
    addInput(*this, "cache_len", REQUIRED, kInt32);
    addInput(*this, "commit_len", REQUIRED, kInt32);
    addInput(*this, "status", REQUIRED, kInt32);
    addOutput(*this, "k_cache", kRows);
    addOutput(*this, "v_cache", kRows);
    addOutput(*this, "status", kInt32);
    addConfigs(*this);
  }
};

OP_ADD(LopaKvCommit);

}  // namespace ops
