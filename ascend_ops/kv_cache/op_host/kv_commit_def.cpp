// Commit-Winner-Cache: torch.ops.lopa.kv_commit_, operands in the order of its schema.
#include "../../common/definition.h"

namespace ops {

class LopaKvCommit : public OpDef {
 public:
  explicit LopaKvCommit(const char* name) : OpDef(name) {
    addInput(*this, "k_cache", REQUIRED, rowTypes());
    addInput(*this, "v_cache", REQUIRED, rowTypes());
    addInput(*this, "k_window", REQUIRED, rowTypes());
    addInput(*this, "v_window", REQUIRED, rowTypes());
    addInput(*this, "winner", REQUIRED, always(ge::DT_INT32));
    addInput(*this, "cache_len", REQUIRED, always(ge::DT_INT32));
    addInput(*this, "commit_len", REQUIRED, always(ge::DT_INT32));
    addInput(*this, "status", REQUIRED, always(ge::DT_INT32));
    addOutput(*this, "k_cache", rowTypes());
    addOutput(*this, "v_cache", rowTypes());
    addOutput(*this, "status", always(ge::DT_INT32));
    addConfigs(*this);
  }
};

OP_ADD(LopaKvCommit);

}  // namespace ops
