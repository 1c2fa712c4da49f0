// Every schema of torch.ops.lopa, in one place. Kernels register themselves beside their code, a
// backend each; fakes are in lopa_kernels/ops/*/fake.py. Operators are functional unless their
// name ends in `_` or `_out`, and those declare what they mutate and return nothing.
#include <string>

#include "lopa/tensor.h"

namespace {

const std::string kSampling =
    "Tensor? rows=None, Tensor? seed=None, Tensor? step=None, str metric=\"prob\", "
    "float temperature=0.0, int? top_k=None, float? top_p=None";

std::string state(bool mutated) {
  const char* fields[] = {"tokens",      "length",     "creation",    "eos",
                          "branches",    "cache_len",  "commit_len",  "prompt_len",
                          "carry_token", "carry_prob", "carry_score", "done"};
  std::string text;
  char alias = 'a';
  for (const char* field : fields) {
    text += mutated ? std::string("Tensor(") + alias++ + "!) " : "Tensor ";
    text += std::string(field) + ", ";
  }
  return text;
}

// The fields of LopaConfig in the order of LopaConfig.step_args.
const std::string kConfig =
    "int out_branches, int out_window, float tau_conf, float tau_add, float tau_act, "
    "int block_size, int max_new_tokens, int mask_id, int eos_id, str accept, str fallback, "
    "str reduction, float fraction, int? group, float alpha, bool shift, bool force_anchor";

const std::string kVocabulary = ", str metric, float temperature, int? top_k, float? top_p";

const std::string kRound =
    "Tensor(n!) winner, Tensor(o!) filled, Tensor(p!) confidence, Tensor(q!) committed, "
    "Tensor(r!) status";

const std::string kNextState =
    "Tensor(a!) next_tokens, Tensor(b!) next_length, Tensor(c!) next_creation, "
    "Tensor(d!) next_eos, Tensor(e!) next_branches, Tensor(f!) next_cache_len, "
    "Tensor(g!) next_commit_len, Tensor(h!) next_prompt_len, Tensor(i!) next_carry_token, "
    "Tensor(j!) next_carry_prob, Tensor(k!) next_carry_score, Tensor(l!) next_done, ";

std::string seventeen_tensors() {
  std::string text = "(Tensor";
  for (int i = 1; i < 17; ++i) text += ", Tensor";
  return text + ")";
}

void define(torch::stable::detail::StableLibrary& m, const std::string& schema) {
  m.def(schema.c_str());
}

}  // namespace

STABLE_TORCH_LIBRARY(lopa, m) {
  define(m, "cpu_isa() -> str");

  define(m, "token_confidence(Tensor logits, " + kSampling + ") -> (Tensor, Tensor, Tensor)");
  define(m, "token_confidence_out(Tensor logits, " + kSampling +
                ", *, Tensor(a!) token, Tensor(b!) prob, Tensor(c!) score) -> ()");
  define(m,
         "softmax_stats(Tensor logits, Tensor? rows=None, Tensor? seed=None, Tensor? step=None, "
         "float temperature=0.0, int? top_k=None, float? top_p=None) -> "
         "(Tensor, Tensor, Tensor, Tensor, Tensor)");

  define(m,
         "branch_confidence(Tensor score, Tensor open, Tensor creation, Tensor? branches=None, "
         "Tensor? length=None, str reduction=\"mean\", float fraction=1.0, int? group=None, "
         "float alpha=0.0) -> Tensor");
  define(m,
         "select_positions(Tensor token, Tensor prob, Tensor score, Tensor tokens, Tensor length, "
         "Tensor cache_len, Tensor prompt_len, int lookahead, float tau_conf, float tau_act, "
         "int block_size, int mask_id, str accept, str fallback) -> (Tensor, Tensor, Tensor)");
  define(m,
         "spawn_branches(Tensor tokens, Tensor eos, Tensor token, Tensor score, Tensor columns, "
         "int eos_id) -> (Tensor, Tensor, Tensor, Tensor)");

  const std::string vocabulary_inputs = "Tensor logits, Tensor? rows, Tensor? seed, Tensor? step, ";
  const std::string statistics_inputs = "Tensor token, Tensor prob, Tensor score, ";
  define(m, "lopa_step(" + vocabulary_inputs + state(false) + kConfig + kVocabulary + ") -> " +
                seventeen_tensors());
  define(m, "lopa_step_out(" + vocabulary_inputs + state(false) + kConfig + kVocabulary + ", *, " +
                kNextState + kRound + ") -> ()");
  define(m, "lopa_step_(" + vocabulary_inputs + state(true) + kConfig + kVocabulary + ", *, " +
                kRound + ") -> ()");
  define(m, "branch_step(" + statistics_inputs + state(false) + kConfig + ") -> " +
                seventeen_tensors());
  define(m, "branch_step_out(" + statistics_inputs + state(false) + kConfig + ", *, " + kNextState +
                kRound + ") -> ()");
  define(m, "branch_step_(" + statistics_inputs + state(true) + kConfig + ", *, " + kRound +
                ") -> ()");
  define(m,
         "needed_rows(Tensor tokens, Tensor length, Tensor branches, Tensor cache_len, "
         "Tensor commit_len, Tensor prompt_len, Tensor done, int mask_id, bool shift, "
         "int capacity) -> (Tensor, Tensor, Tensor)");

  const std::string attention_inputs =
      "Tensor q, Tensor k_cache, Tensor v_cache, Tensor k_window, Tensor v_window, "
      "Tensor cache_len, Tensor length, Tensor? prompt_len=None, Tensor? block_table=None, "
      "str mask=\"full\", int? block_size=None, float? scale=None";
  define(m, "branch_attention(" + attention_inputs + ") -> Tensor");
  define(m, "branch_attention_lse(" + attention_inputs + ") -> (Tensor, Tensor)");
  define(m, "branch_attention_out(" + attention_inputs +
                ", *, Tensor(a!) out, Tensor(b!)? lse=None) -> ()");

  define(m,
         "kv_prewrite_(Tensor(a!) k_window, Tensor(b!) v_window, int layer, Tensor k, Tensor v, "
         "Tensor? cos_sin=None, Tensor? cache_len=None) -> ()");
  define(m,
         "kv_prewrite_direct_(Tensor(a!) k_window, Tensor(b!) v_window, Tensor(c!) k_cache, "
         "Tensor(d!) v_cache, int layer, Tensor k, Tensor v, Tensor cache_len, Tensor commit_len, "
         "Tensor? cos_sin=None, Tensor(e!)? status=None) -> ()");
  const std::string norms = ", Tensor? q_norm=None, Tensor? k_norm=None, float norm_eps=1e-6";
  define(m,
         "qkv_prewrite_(Tensor(a!) q, Tensor(b!) k_window, Tensor(c!) v_window, int layer, "
         "Tensor qkv, Tensor cos_sin, Tensor cache_len" +
             norms + ") -> ()");
  define(m,
         "qkv_prewrite_direct_(Tensor(a!) q, Tensor(b!) k_window, Tensor(c!) v_window, "
         "Tensor(d!) k_cache, Tensor(e!) v_cache, int layer, Tensor qkv, Tensor cos_sin, "
         "Tensor cache_len, Tensor commit_len, Tensor(f!)? status=None" +
             norms + ") -> ()");
  define(m,
         "kv_commit_(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k_window, Tensor v_window, "
         "Tensor winner, Tensor cache_len, Tensor commit_len, Tensor(c!)? status=None) -> ()");

  define(m,
         "certainty_forcing_loss(Tensor logits, Tensor labels, Tensor masked, "
         "float temperature=0.5, float beta=2.0, bool inplace_backward=False) -> "
         "(Tensor, Tensor, Tensor, Tensor, Tensor)");
  const std::string saved =
      "Tensor labels, Tensor stats, Tensor order, Tensor counts, float temperature=0.5, "
      "float beta=2.0";
  define(m, "certainty_forcing_loss_backward(Tensor grad_loss, Tensor logits, " + saved +
                ") -> Tensor");
  define(m, "certainty_forcing_loss_backward_(Tensor grad_loss, Tensor(a!) logits, " + saved +
                ") -> ()");
}
