// torch.ops.lopa.{branch_step, needed_rows, branch_confidence, select_positions, spawn_branches}
// and StepRows, operands in the order of the schemas. Shares of a block arrive as the counts that
// they mean, and `<name>_bits` holds a double: GE's own attributes are fp32.
#include "../../common/definition.h"

namespace ops {
namespace {

DataTypes one(ge::DataType type) { return always(type, 1); }

void addInputs(OpDef& op, ge::DataType type, std::initializer_list<const char*> names) {
  for (const char* name : names) addInput(op, name, REQUIRED, one(type));
}

void addOutputs(OpDef& op, ge::DataType type, std::initializer_list<const char*> names) {
  for (const char* name : names) addOutput(op, name, one(type));
}

void addStatistics(OpDef& op) {
  addInputs(op, ge::DT_INT64, {"token"});
  addInputs(op, ge::DT_FLOAT, {"prob", "score"});
}

// The fields of the state that say which rows a round needs.
void addRowsState(OpDef& op) {
  addInputs(op, ge::DT_INT64, {"tokens"});
  addInputs(op, ge::DT_INT32, {"length", "branches", "cache_len", "commit_len", "prompt_len"});
  addInputs(op, ge::DT_BOOL, {"done"});
}

void addIntegers(OpDef& op, std::initializer_list<const char*> names) {
  for (const char* name : names) op.Attr(name).AttrType(REQUIRED).Int();
}

void addStrings(OpDef& op, std::initializer_list<const char*> names) {
  for (const char* name : names) op.Attr(name).AttrType(REQUIRED).String();
}

void addFlags(OpDef& op, std::initializer_list<const char*> names) {
  for (const char* name : names) op.Attr(name).AttrType(REQUIRED).Bool();
}

}  // namespace

class LopaBranchStep : public OpDef {
 public:
  explicit LopaBranchStep(const char* name) : OpDef(name) {
    addStatistics(*this);
    addInput(*this, "unusable", OPTIONAL, one(ge::DT_INT32));
    addInputs(*this, ge::DT_INT64, {"tokens"});
    addInputs(*this, ge::DT_INT32, {"length"});
    addInputs(*this, ge::DT_FLOAT, {"creation"});
    addInputs(*this, ge::DT_BOOL, {"eos"});
    addInputs(*this, ge::DT_INT32, {"branches", "cache_len", "commit_len", "prompt_len"});
    addInputs(*this, ge::DT_INT64, {"carry_token"});
    addInputs(*this, ge::DT_FLOAT, {"carry_prob", "carry_score"});
    addInputs(*this, ge::DT_BOOL, {"done"});
    addOutputs(*this, ge::DT_INT64, {"next_tokens"});
    addOutputs(*this, ge::DT_INT32, {"next_length"});
    addOutputs(*this, ge::DT_FLOAT, {"next_creation"});
    addOutputs(*this, ge::DT_BOOL, {"next_eos"});
    addOutputs(*this, ge::DT_INT32,
               {"next_branches", "next_cache_len", "next_commit_len", "next_prompt_len"});
    addOutputs(*this, ge::DT_INT64, {"next_carry_token"});
    addOutputs(*this, ge::DT_FLOAT, {"next_carry_prob", "next_carry_score"});
    addOutputs(*this, ge::DT_BOOL, {"next_done"});
    addOutputs(*this, ge::DT_INT32, {"winner", "filled"});
    addOutputs(*this, ge::DT_FLOAT, {"confidence"});
    addOutputs(*this, ge::DT_INT64, {"committed"});
    addOutputs(*this, ge::DT_INT32, {"status"});
    addIntegers(*this, {"out_branches", "out_window"});
    this->Attr("tau_conf").AttrType(REQUIRED).Float();
    addIntegers(*this, {"add_count", "act_count", "block_size", "max_blocks", "mask_id", "eos_id"});
    addStrings(*this, {"accept", "fallback", "reduction"});
    addIntegers(*this, {"fraction_bits", "group", "alpha_bits"});
    addFlags(*this, {"shift", "force_anchor"});
    addConfigs(*this);
  }
};

// The row of logits of each column that a round needs, -1 elsewhere: `given_rows`, or the columns'
// own numbers.
class LopaStepRows : public OpDef {
 public:
  explicit LopaStepRows(const char* name) : OpDef(name) {
    addRowsState(*this);
    addInput(*this, "given_rows", OPTIONAL, one(ge::DT_INT32));
    addOutputs(*this, ge::DT_INT32, {"wanted"});
    addIntegers(*this, {"mask_id"});
    addFlags(*this, {"shift"});
    addConfigs(*this);
  }
};

class LopaNeededRows : public OpDef {
 public:
  explicit LopaNeededRows(const char* name) : OpDef(name) {
    addRowsState(*this);
    addOutputs(*this, ge::DT_INT64, {"index"});
    addOutputs(*this, ge::DT_INT32, {"rows", "count"});
    addIntegers(*this, {"mask_id"});
    addFlags(*this, {"shift"});
    addIntegers(*this, {"capacity"});
    addConfigs(*this);
  }
};

class LopaBranchConfidence : public OpDef {
 public:
  explicit LopaBranchConfidence(const char* name) : OpDef(name) {
    addInputs(*this, ge::DT_FLOAT, {"score"});
    addInputs(*this, ge::DT_BOOL, {"open"});
    addInputs(*this, ge::DT_FLOAT, {"creation"});
    addInput(*this, "branches", OPTIONAL, one(ge::DT_INT32));
    addInput(*this, "length", OPTIONAL, one(ge::DT_INT32));
    addOutputs(*this, ge::DT_FLOAT, {"confidence"});
    addStrings(*this, {"reduction"});
    addIntegers(*this, {"fraction_bits", "group", "alpha_bits"});
    addConfigs(*this);
  }
};

class LopaSelectPositions : public OpDef {
 public:
  explicit LopaSelectPositions(const char* name) : OpDef(name) {
    addStatistics(*this);
    addInputs(*this, ge::DT_INT64, {"tokens"});
    addInputs(*this, ge::DT_INT32, {"length", "cache_len", "prompt_len"});
    addOutputs(*this, ge::DT_BOOL, {"fill"});
    addOutputs(*this, ge::DT_INT32, {"columns", "filled"});
    addIntegers(*this, {"lookahead"});
    this->Attr("tau_conf").AttrType(REQUIRED).Float();
    addIntegers(*this, {"act_count", "block_size", "mask_id"});
    addStrings(*this, {"accept", "fallback"});
    addConfigs(*this);
  }
};

class LopaSpawnBranches : public OpDef {
 public:
  explicit LopaSpawnBranches(const char* name) : OpDef(name) {
    addInputs(*this, ge::DT_INT64, {"tokens"});
    addInputs(*this, ge::DT_BOOL, {"eos"});
    addInputs(*this, ge::DT_INT64, {"token"});
    addInputs(*this, ge::DT_FLOAT, {"score"});
    addInputs(*this, ge::DT_INT32, {"columns"});
    addOutputs(*this, ge::DT_INT64, {"out_tokens"});
    addOutputs(*this, ge::DT_FLOAT, {"out_creation"});
    addOutputs(*this, ge::DT_BOOL, {"out_eos"});
    addOutputs(*this, ge::DT_INT32, {"out_branches"});
    addIntegers(*this, {"eos_id"});
    addConfigs(*this);
  }
};

OP_ADD(LopaBranchStep);
OP_ADD(LopaStepRows);
OP_ADD(LopaNeededRows);
OP_ADD(LopaBranchConfidence);
OP_ADD(LopaSelectPositions);
OP_ADD(LopaSpawnBranches);

}  // namespace ops
