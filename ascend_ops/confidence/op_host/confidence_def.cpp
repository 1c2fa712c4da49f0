// torch.ops.lopa.{token_confidence, softmax_stats}, operands in the order of their schemas.
#include "../../common/definition.h"

namespace ops {
namespace {

void addLogits(OpDef& op) {
  addInput(op, "logits", REQUIRED, rowTypes());
  addInput(op, "rows", OPTIONAL, always(ge::DT_INT32));
  addInput(op, "seed", OPTIONAL, always(ge::DT_INT64));
  addInput(op, "step", OPTIONAL, always(ge::DT_INT64));
}

// `<name>_bits` holds a double.
void addSampling(OpDef& op) {
  op.Attr("temperature_bits").AttrType(REQUIRED).Int();
  op.Attr("top_k").AttrType(REQUIRED).Int();
  op.Attr("top_p_bits").AttrType(REQUIRED).Int();
}

}  // namespace

// `unusable` is 1 for a row with a NaN or no finite logit, 2 where `rows` names none, else 0.
class LopaTokenConfidence : public OpDef {
 public:
  explicit LopaTokenConfidence(const char* name) : OpDef(name) {
    addLogits(*this);
    addOutput(*this, "token", always(ge::DT_INT64));
    addOutput(*this, "prob", always(ge::DT_FLOAT));
    addOutput(*this, "score", always(ge::DT_FLOAT));
    addOutput(*this, "unusable", always(ge::DT_INT32));
    this->Attr("metric").AttrType(REQUIRED).String();
    addSampling(*this);
    addConfigs(*this);
  }
};

class LopaSoftmaxStats : public OpDef {
 public:
  explicit LopaSoftmaxStats(const char* name) : OpDef(name) {
    addLogits(*this);
    addOutput(*this, "token", always(ge::DT_INT64));
    for (const char* output : {"prob", "margin", "neg_entropy", "lse"}) {
      addOutput(*this, output, always(ge::DT_FLOAT));
    }
    addSampling(*this);
    addConfigs(*this);
  }
};

OP_ADD(LopaTokenConfidence);
OP_ADD(LopaSoftmaxStats);

}  // namespace ops
