// lopa_step, branch_step and needed_rows on the CPU: arguments, memory and the loop over sequences;
// the round itself is in sequence.h.
#include <cmath>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "branch/branch_cpu.h"
#include "confidence/confidence_cpu.h"
#include "step/sequence.h"

namespace lopa {
namespace {

// Many small tensors: see OwnedTensor. One list of the state's fields for parameters, calls and
// checks, in the order of the schema.
#define LOPA_STATE_PARAMETERS                                                        \
  TensorHandle tokens, TensorHandle length, TensorHandle creation, TensorHandle eos, \
      TensorHandle branches, TensorHandle cache_len, TensorHandle commit_len,        \
      TensorHandle prompt_len, TensorHandle carry_token, TensorHandle carry_prob,    \
      TensorHandle carry_score, TensorHandle done
#define LOPA_STATE                                                                           \
  StateTensors {                                                                             \
    tokens, length, creation, eos, branches, cache_len, commit_len, prompt_len, carry_token, \
        carry_prob, carry_score, done                                                        \
  }
#define LOPA_NEXT_PARAMETERS                                                                     \
  TensorHandle next_tokens, TensorHandle next_length, TensorHandle next_creation,                \
      TensorHandle next_eos, TensorHandle next_branches, TensorHandle next_cache_len,            \
      TensorHandle next_commit_len, TensorHandle next_prompt_len, TensorHandle next_carry_token, \
      TensorHandle next_carry_prob, TensorHandle next_carry_score, TensorHandle next_done
#define LOPA_NEXT                                                                              \
  StateTensors {                                                                               \
    next_tokens, next_length, next_creation, next_eos, next_branches, next_cache_len,          \
        next_commit_len, next_prompt_len, next_carry_token, next_carry_prob, next_carry_score, \
        next_done                                                                              \
  }
#define LOPA_RESULT_PARAMETERS                                                               \
  TensorHandle winner, TensorHandle filled, TensorHandle confidence, TensorHandle committed, \
      TensorHandle status
#define LOPA_RESULT \
  ResultTensors { winner, filled, confidence, committed, status }
#define LOPA_STATISTICS_PARAMETERS TensorHandle token, TensorHandle prob, TensorHandle score
#define LOPA_STATISTICS \
  StatisticsTensors { token, prob, score }
#define LOPA_CONFIG_PARAMETERS                                                               \
  int64_t out_branches, int64_t out_window, double tau_conf, double tau_add, double tau_act, \
      int64_t block_size, int64_t max_new_tokens, int64_t mask_id, int64_t eos_id,           \
      TextHandle accept, TextHandle fallback, TextHandle reduction, double fraction,         \
      std::optional<int64_t> group, double alpha, bool shift, bool force_anchor
#define LOPA_CONFIG                                                                          \
  make_config(op, out_branches, out_window, tau_conf, tau_add, tau_act, block_size,          \
              max_new_tokens, mask_id, eos_id, accept, fallback, reduction, fraction, group, \
              alpha, shift, force_anchor)
#define LOPA_VOCABULARY_PARAMETERS \
  const Tensor &logits, const OptTensor &rows, const OptTensor &seed, const OptTensor &step
#define LOPA_SAMPLING_PARAMETERS \
  TextHandle metric, double temperature, std::optional<int64_t> top_k, std::optional<double> top_p
#define LOPA_SAMPLING make_confidence_config(op, metric_name, temperature, top_k, top_p, seed, step)

RoundConfig make_config(const char* op, LOPA_CONFIG_PARAMETERS) {
  const std::string accept_name = take_text(accept), fallback_name = take_text(fallback),
                    reduction_name = take_text(reduction);
  check_at_least(op, "out_branches", out_branches, 1);
  check_at_least(op, "block_size", block_size, 1);
  check_at_least(op, "out_window", out_window, block_size);
  check_at_least(op, "max_new_tokens", max_new_tokens, block_size);
  check_share(op, "tau_add", tau_add);
  check_share(op, "tau_act", tau_act);
  if (std::isnan(tau_conf)) fail(op, "tau_conf", "a number", "NaN");
  RoundConfig config;
  config.select = {
      static_cast<float>(tau_conf),  least_count(tau_act, block_size), block_size, mask_id,
      parse_accept(op, accept_name), parse_fallback(op, fallback_name)};
  config.reduce = parse_reduction(op, reduction_name, fraction, group, alpha);
  config.branches = out_branches;
  config.window = out_window;
  config.add_count = least_count(tau_add, block_size);
  config.max_blocks = max_new_tokens / block_size;
  config.eos_id = eos_id;
  config.shift = shift;
  config.force_anchor = force_anchor;
  return config;
}

// Every tensor of the round is held to its dtype and shape; the failing one is named.
void check_owned(const char* op, const std::string& prefix, const char* name,
                 const OwnedTensor& tensor, ScalarType dtype,
                 std::initializer_list<int64_t> shape) {
  if (!tensor.is(kCpu, dtype, shape)) {
    check_tensor(op, (prefix + name).c_str(), tensor.shared(), dtype, shape);
  }
}

struct StateTensors {
  OwnedTensor tokens, length, creation, eos, branches, cache_len, commit_len, prompt_len,
      carry_token, carry_prob, carry_score, done;

  void check(const char* op, const char* prefix, int64_t B, int64_t K, int64_t W) const {
    auto check = [&](const char* name, const OwnedTensor& tensor, ScalarType dtype,
                     std::initializer_list<int64_t> shape) {
      check_owned(op, prefix, name, tensor, dtype, shape);
    };
    check("tokens", tokens, ScalarType::Long, {B, K, W});
    check("length", length, ScalarType::Int, {B, K});
    check("creation", creation, ScalarType::Float, {B, K});
    check("eos", eos, ScalarType::Bool, {B, K});
    check("branches", branches, ScalarType::Int, {B});
    check("cache_len", cache_len, ScalarType::Int, {B});
    check("commit_len", commit_len, ScalarType::Int, {B});
    check("prompt_len", prompt_len, ScalarType::Int, {B});
    check("carry_token", carry_token, ScalarType::Long, {B});
    check("carry_prob", carry_prob, ScalarType::Float, {B});
    check("carry_score", carry_score, ScalarType::Float, {B});
    check("done", done, ScalarType::Bool, {B});
  }

  template <typename F>
  void each(const F& f) {
    for (OwnedTensor* tensor :
         {&tokens, &length, &creation, &eos, &branches, &cache_len, &commit_len, &prompt_len,
          &carry_token, &carry_prob, &carry_score, &done}) {
      f(*tensor);
    }
  }
};

struct StatisticsTensors {
  OwnedTensor token, prob, score;
};

struct ResultTensors {
  OwnedTensor winner, filled, confidence, committed, status;

  void check(const char* op, int64_t B, int64_t K, int64_t W) const {
    auto check = [&](const char* name, const OwnedTensor& tensor, ScalarType dtype,
                     std::initializer_list<int64_t> shape) {
      check_owned(op, "", name, tensor, dtype, shape);
    };
    check("winner", winner, ScalarType::Int, {B});
    check("filled", filled, ScalarType::Int, {B});
    check("confidence", confidence, ScalarType::Float, {B, K});
    check("committed", committed, ScalarType::Long, {B, W});
    check("status", status, ScalarType::Int, {B});
  }

  template <typename F>
  void each(const F& f) {
    for (OwnedTensor* tensor : {&winner, &filled, &confidence, &committed, &status}) f(*tensor);
  }
};

template <size_t>
using Handle = TensorHandle;

template <size_t... I>
std::tuple<Handle<I>...> handles(std::index_sequence<I...>);

// The next state and the results, in the order of the schema.
using StepTuple = decltype(handles(std::make_index_sequence<17>()));

class Round {
 public:
  Round(const char* op, StateTensors state, const RoundConfig& config)
      : op_(op), in_(std::move(state)), config_(config) {
    const auto shape = in_.tokens.sizes();
    if (shape.size() != 3) {
      fail(op, "tokens", "shape [B, K, W]", shape_string(shape.data(), shape.size()));
    }
    B_ = shape[0];
    K_ = shape[1];
    W_ = shape[2];
    check_at_least(op, "branches of tokens", K_, 1);
    check_at_least(op, "columns of tokens", W_, 1);
    in_.check(op, "", B_, K_, W_);
  }

  void allocate() {
    const int64_t K = config_.branches, W = config_.window;
    auto make = [&](ScalarType dtype, std::initializer_list<int64_t> shape) {
      return OwnedTensor(TensorHandle{empty_handle(shape, dtype, kCpu)});
    };
    out_ = {make(ScalarType::Long, {B_, K, W}), make(ScalarType::Int, {B_, K}),
            make(ScalarType::Float, {B_, K}),   make(ScalarType::Bool, {B_, K}),
            make(ScalarType::Int, {B_}),        make(ScalarType::Int, {B_}),
            make(ScalarType::Int, {B_}),        make(ScalarType::Int, {B_}),
            make(ScalarType::Long, {B_}),       make(ScalarType::Float, {B_}),
            make(ScalarType::Float, {B_}),      make(ScalarType::Bool, {B_})};
    result_ = {make(ScalarType::Int, {B_}), make(ScalarType::Int, {B_}),
               make(ScalarType::Float, {B_, K_}), make(ScalarType::Long, {B_, W_}),
               make(ScalarType::Int, {B_})};
    point(out_);
  }

  void write_to(StateTensors next, ResultTensors result) {
    next.check(op_, "next_", B_, config_.branches, config_.window);
    next.each([&](OwnedTensor& tensor) { check_output(tensor); });
    out_ = std::move(next);
    take(std::move(result));
    point(out_);
  }

  // The mutated state itself must be what was passed, not a contiguous copy of it.
  void write_in_place(ResultTensors result) {
    if (config_.branches != K_ || config_.window != W_) {
      fail(op_, "out_branches, out_window",
           std::to_string(K_) + ", " + std::to_string(W_) + " for an in-place step",
           std::to_string(config_.branches) + ", " + std::to_string(config_.window));
    }
    in_.each([&](OwnedTensor& tensor) { check_output(tensor); });
    take(std::move(result));
    point(in_);
  }

  void run_from_logits(LOPA_VOCABULARY_PARAMETERS, const ConfidenceConfig& sampling) {
    const LogitsView view = make_logits_view(op_, logits);
    const int64_t slots = B_ * K_ * W_;
    Tensor map;
    if (rows) {
      check_tensor(op_, "rows", *rows, ScalarType::Int, {B_, K_, W_});
      map = as_contiguous(*rows);
    } else if (logits.dim() != 4 || logits.size(0) != B_ || logits.size(1) != K_ ||
               logits.size(2) != W_) {
      fail(op_, "logits",
           "shape [" + std::to_string(B_) + ", " + std::to_string(K_) + ", " + std::to_string(W_) +
               ", V], or rows",
           "shape " + shape_string(logits));
    }
    const int32_t* row_of = rows ? data<int32_t>(map) : nullptr;
    std::vector<int32_t> status(B_, 0);
    std::vector<int64_t> slot, row;
    for (int64_t b = 0; b < B_; ++b) {
      const SequenceView s = sequence(b);
      if (s.done || !well_formed(s, config_.select.mask_id)) continue;
      for (int64_t k = 0; k < s.branches; ++k) {
        for (int64_t c = 0; c < s.length[k]; ++c) {
          if (!needs_row(s, k, c, config_.select.mask_id, config_.shift)) continue;
          const int64_t at = (b * K_ + k) * W_ + c;
          int64_t r = row_of == nullptr ? at : row_of[at];
          if (r < 0 || r >= view.rows) {
            status[b] |= kMissingRow;
            r = -1;
          }
          slot.push_back(at);
          row.push_back(r);
        }
      }
    }
    std::vector<RowStats> stats(slot.size());
    confidence_rows(view, sampling, row.data(), static_cast<int64_t>(row.size()), false,
                    stats.data());
    std::vector<int64_t> token(slots, 0);
    std::vector<float> prob(slots, 0.0f), score(slots, kNegInf);
    for (size_t i = 0; i < slot.size(); ++i) {
      token[slot[i]] = stats[i].token;
      prob[slot[i]] = stats[i].prob;
      score[slot[i]] = stats[i].score(sampling.metric);
      if (stats[i].nan || stats[i].empty) {
        // A missing row has its own bit.
        if (row[i] >= 0) status[slot[i] / (K_ * W_)] |= kNonfinite;
      }
    }
    run({token.data(), prob.data(), score.data()}, status.data());
  }

  void run_from_stats(StatisticsTensors statistics) {
    auto& [token, prob, score] = statistics;
    check_owned(op_, "", "token", token, ScalarType::Long, {B_, K_, W_});
    check_owned(op_, "", "prob", prob, ScalarType::Float, {B_, K_, W_});
    check_owned(op_, "", "score", score, ScalarType::Float, {B_, K_, W_});
    token = as_contiguous(std::move(token));
    prob = as_contiguous(std::move(prob));
    score = as_contiguous(std::move(score));
    run({data<int64_t>(token), data<float>(prob), data<float>(score)}, nullptr);
  }

  StepTuple result() {
    return {out_.tokens.release(),       out_.length.release(),      out_.creation.release(),
            out_.eos.release(),          out_.branches.release(),    out_.cache_len.release(),
            out_.commit_len.release(),   out_.prompt_len.release(),  out_.carry_token.release(),
            out_.carry_prob.release(),   out_.carry_score.release(), out_.done.release(),
            result_.winner.release(),    result_.filled.release(),   result_.confidence.release(),
            result_.committed.release(), result_.status.release()};
  }

 private:
  void check_output(const OwnedTensor& tensor) const {
    if (!tensor.is_contiguous()) fail(op_, "outputs", "contiguous tensors", "strided");
  }

  void take(ResultTensors result) {
    result.check(op_, B_, K_, W_);
    result.each([&](OwnedTensor& tensor) { check_output(tensor); });
    result_ = std::move(result);
  }

  // Reads every address once; a sequence's are offsets from them.
  void point(const StateTensors& next) {
    in_.each([](OwnedTensor& tensor) { tensor = as_contiguous(std::move(tensor)); });
    first_ = {K_,
              W_,
              data<int64_t>(in_.tokens),
              data<int32_t>(in_.length),
              data<float>(in_.creation),
              data<bool>(in_.eos),
              0,
              0,
              0,
              0,
              0,
              0.0f,
              0.0f,
              false};
    branches_ = data<int32_t>(in_.branches);
    cache_len_ = data<int32_t>(in_.cache_len);
    commit_len_ = data<int32_t>(in_.commit_len);
    prompt_len_ = data<int32_t>(in_.prompt_len);
    carry_token_ = data<int64_t>(in_.carry_token);
    carry_prob_ = data<float>(in_.carry_prob);
    carry_score_ = data<float>(in_.carry_score);
    done_ = data<bool>(in_.done);
    first_out_ = {mutable_data<int64_t>(next.tokens),      mutable_data<int32_t>(next.length),
                  mutable_data<float>(next.creation),      mutable_data<bool>(next.eos),
                  mutable_data<int32_t>(next.branches),    mutable_data<int32_t>(next.cache_len),
                  mutable_data<int32_t>(next.commit_len),  mutable_data<int32_t>(next.prompt_len),
                  mutable_data<int64_t>(next.carry_token), mutable_data<float>(next.carry_prob),
                  mutable_data<float>(next.carry_score),   mutable_data<bool>(next.done),
                  mutable_data<int32_t>(result_.winner),   mutable_data<int32_t>(result_.filled),
                  mutable_data<float>(result_.confidence), mutable_data<int64_t>(result_.committed),
                  mutable_data<int32_t>(result_.status)};
  }

  SequenceView sequence(int64_t b) const {
    SequenceView s = first_;
    const int64_t bk = b * K_;
    s.tokens += bk * W_;
    s.length += bk;
    s.creation += bk;
    s.eos += bk;
    s.branches = branches_[b];
    s.cache_len = cache_len_[b];
    s.commit_len = commit_len_[b];
    s.prompt_len = prompt_len_[b];
    s.carry_token = carry_token_[b];
    s.carry_prob = carry_prob_[b];
    s.carry_score = carry_score_[b];
    s.done = done_[b];
    return s;
  }

  SequenceOutput output(int64_t b) const {
    const SequenceOutput& o = first_out_;
    const int64_t bk = b * config_.branches;
    return {o.tokens + bk * config_.window,
            o.length + bk,
            o.creation + bk,
            o.eos + bk,
            o.branches + b,
            o.cache_len + b,
            o.commit_len + b,
            o.prompt_len + b,
            o.carry_token + b,
            o.carry_prob + b,
            o.carry_score + b,
            o.done + b,
            o.winner + b,
            o.filled + b,
            o.confidence + b * K_,
            o.committed + b * W_,
            o.status + b};
  }

  void run(const ColumnStats& stats, const int32_t* status) {
    // Below some tens of thousands of columns a second thread costs more than it saves.
    const int64_t grain = std::max<int64_t>(1, 32768 / (K_ * W_));
    torch::stable::parallel_for(0, B_, grain, [&](int64_t begin, int64_t end) {
      thread_local SequenceRound round;
      for (int64_t b = begin; b < end; ++b) {
        const int64_t at = b * K_ * W_;
        round.run(sequence(b), {stats.token + at, stats.prob + at, stats.score + at}, config_,
                  status == nullptr ? 0 : status[b], output(b));
      }
    });
  }

  const char* op_;
  StateTensors in_;
  RoundConfig config_;
  int64_t B_, K_, W_;
  StateTensors out_;
  ResultTensors result_;
  SequenceView first_;
  SequenceOutput first_out_;
  const int32_t *branches_, *cache_len_, *commit_len_, *prompt_len_;
  const int64_t* carry_token_;
  const float *carry_prob_, *carry_score_;
  const bool* done_;
};

StepTuple lopa_step(LOPA_VOCABULARY_PARAMETERS, LOPA_STATE_PARAMETERS, LOPA_CONFIG_PARAMETERS,
                    LOPA_SAMPLING_PARAMETERS) {
  const char* op = "lopa_step";
  StateTensors state = LOPA_STATE;
  const std::string metric_name = take_text(metric);
  const RoundConfig config = LOPA_CONFIG;
  const ConfidenceConfig sampling = LOPA_SAMPLING;
  Round round(op, std::move(state), config);
  round.allocate();
  round.run_from_logits(logits, rows, seed, step, sampling);
  return round.result();
}

void lopa_step_out(LOPA_VOCABULARY_PARAMETERS, LOPA_STATE_PARAMETERS, LOPA_CONFIG_PARAMETERS,
                   LOPA_SAMPLING_PARAMETERS, LOPA_NEXT_PARAMETERS, LOPA_RESULT_PARAMETERS) {
  const char* op = "lopa_step_out";
  StateTensors state = LOPA_STATE, next = LOPA_NEXT;
  ResultTensors result = LOPA_RESULT;
  const std::string metric_name = take_text(metric);
  const RoundConfig config = LOPA_CONFIG;
  const ConfidenceConfig sampling = LOPA_SAMPLING;
  Round round(op, std::move(state), config);
  round.write_to(std::move(next), std::move(result));
  round.run_from_logits(logits, rows, seed, step, sampling);
}

void lopa_step_(LOPA_VOCABULARY_PARAMETERS, LOPA_STATE_PARAMETERS, LOPA_CONFIG_PARAMETERS,
                LOPA_SAMPLING_PARAMETERS, LOPA_RESULT_PARAMETERS) {
  const char* op = "lopa_step_";
  StateTensors state = LOPA_STATE;
  ResultTensors result = LOPA_RESULT;
  const std::string metric_name = take_text(metric);
  const RoundConfig config = LOPA_CONFIG;
  const ConfidenceConfig sampling = LOPA_SAMPLING;
  Round round(op, std::move(state), config);
  round.write_in_place(std::move(result));
  round.run_from_logits(logits, rows, seed, step, sampling);
}

StepTuple branch_step(LOPA_STATISTICS_PARAMETERS, LOPA_STATE_PARAMETERS, LOPA_CONFIG_PARAMETERS) {
  const char* op = "branch_step";
  StatisticsTensors statistics = LOPA_STATISTICS;
  StateTensors state = LOPA_STATE;
  const RoundConfig config = LOPA_CONFIG;
  Round round(op, std::move(state), config);
  round.allocate();
  round.run_from_stats(std::move(statistics));
  return round.result();
}

void branch_step_out(LOPA_STATISTICS_PARAMETERS, LOPA_STATE_PARAMETERS, LOPA_CONFIG_PARAMETERS,
                     LOPA_NEXT_PARAMETERS, LOPA_RESULT_PARAMETERS) {
  const char* op = "branch_step_out";
  StatisticsTensors statistics = LOPA_STATISTICS;
  StateTensors state = LOPA_STATE, next = LOPA_NEXT;
  ResultTensors result = LOPA_RESULT;
  const RoundConfig config = LOPA_CONFIG;
  Round round(op, std::move(state), config);
  round.write_to(std::move(next), std::move(result));
  round.run_from_stats(std::move(statistics));
}

void branch_step_(LOPA_STATISTICS_PARAMETERS, LOPA_STATE_PARAMETERS, LOPA_CONFIG_PARAMETERS,
                  LOPA_RESULT_PARAMETERS) {
  const char* op = "branch_step_";
  StatisticsTensors statistics = LOPA_STATISTICS;
  StateTensors state = LOPA_STATE;
  ResultTensors result = LOPA_RESULT;
  const RoundConfig config = LOPA_CONFIG;
  Round round(op, std::move(state), config);
  round.write_in_place(std::move(result));
  round.run_from_stats(std::move(statistics));
}

std::tuple<Tensor, Tensor, Tensor> needed_rows(const Tensor& tokens_in, const Tensor& length_in,
                                               const Tensor& branches_in,
                                               const Tensor& cache_len_in,
                                               const Tensor& commit_len_in,
                                               const Tensor& prompt_len_in, const Tensor& done_in,
                                               int64_t mask_id, bool shift, int64_t capacity) {
  const char* op = "needed_rows";
  if (tokens_in.dim() != 3) fail(op, "tokens", "shape [B, K, W]", shape_string(tokens_in));
  const int64_t B = tokens_in.size(0), K = tokens_in.size(1), W = tokens_in.size(2);
  check_tensor(op, "tokens", tokens_in, ScalarType::Long, {B, K, W});
  check_tensor(op, "length", length_in, ScalarType::Int, {B, K});
  check_tensor(op, "branches", branches_in, ScalarType::Int, {B});
  check_tensor(op, "cache_len", cache_len_in, ScalarType::Int, {B});
  check_tensor(op, "commit_len", commit_len_in, ScalarType::Int, {B});
  check_tensor(op, "prompt_len", prompt_len_in, ScalarType::Int, {B});
  check_tensor(op, "done", done_in, ScalarType::Bool, {B});
  check_at_least(op, "capacity", capacity, 0);
  const Tensor tokens = as_contiguous(tokens_in), length = as_contiguous(length_in),
               branches = as_contiguous(branches_in), cache_len = as_contiguous(cache_len_in),
               commit_len = as_contiguous(commit_len_in), prompt_len = as_contiguous(prompt_len_in),
               done = as_contiguous(done_in);
  Tensor index_t = empty({capacity}, ScalarType::Long, tokens_in);
  Tensor rows_t = empty({B, K, W}, ScalarType::Int, tokens_in);
  Tensor count_t = empty({1}, ScalarType::Int, tokens_in);
  int64_t* index = mutable_data<int64_t>(index_t);
  int32_t* rows = mutable_data<int32_t>(rows_t);
  std::fill(rows, rows + B * K * W, -1);
  int64_t count = 0;
  for (int64_t b = 0; b < B; ++b) {
    SequenceView s{};
    s.K = K;
    s.W = W;
    s.tokens = data<int64_t>(tokens) + b * K * W;
    s.length = data<int32_t>(length) + b * K;
    s.branches = data<int32_t>(branches)[b];
    s.cache_len = data<int32_t>(cache_len)[b];
    s.commit_len = data<int32_t>(commit_len)[b];
    s.prompt_len = data<int32_t>(prompt_len)[b];
    if (data<bool>(done)[b] || !well_formed(s, mask_id)) continue;
    for (int64_t k = 0; k < s.branches; ++k) {
      for (int64_t c = 0; c < s.length[k]; ++c) {
        if (!needs_row(s, k, c, mask_id, shift)) continue;
        if (count < capacity) {
          const int64_t at = (b * K + k) * W + c;
          index[count] = at;
          rows[at] = static_cast<int32_t>(count);
        }
        ++count;
      }
    }
  }
  // Index 0 exists wherever there is a row to gather, so that a gather of all `capacity` is safe.
  for (int64_t i = count; i < capacity; ++i) index[i] = 0;
  *mutable_data<int32_t>(count_t) = static_cast<int32_t>(count);
  return {index_t, rows_t, count_t};
}

}  // namespace
}  // namespace lopa

STABLE_TORCH_LIBRARY_IMPL(lopa, CPU, m) {
  m.impl("lopa_step", TORCH_BOX(&lopa::lopa_step));
  m.impl("lopa_step_out", TORCH_BOX(&lopa::lopa_step_out));
  m.impl("lopa_step_", TORCH_BOX(&lopa::lopa_step_));
  m.impl("branch_step", TORCH_BOX(&lopa::branch_step));
  m.impl("branch_step_out", TORCH_BOX(&lopa::branch_step_out));
  m.impl("branch_step_", TORCH_BOX(&lopa::branch_step_));
  m.impl("needed_rows", TORCH_BOX(&lopa::needed_rows));
}
