// What arrives through torch.ops for a round, checked and turned into plain structs, and what goes
// out, for the libraries of all devices. Only shapes, dtypes and devices are read: no memory.
#pragma once

#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "branch/branch_args.h"
#include "lopa/checks.h"
#include "lopa/tensor.h"
#include "step/params.h"
#include "step/settings_args.h"

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
#define LOPA_CONFIG                                                                            \
  RoundSettings {                                                                              \
    out_branches, out_window, tau_conf, tau_add, tau_act, block_size, max_new_tokens, mask_id, \
        eos_id, take_text(accept), take_text(fallback), take_text(reduction), fraction, group, \
        alpha, shift, force_anchor                                                             \
  }
#define LOPA_VOCABULARY_PARAMETERS \
  const Tensor &logits, const OptTensor &rows, const OptTensor &seed, const OptTensor &step
#define LOPA_SAMPLING_PARAMETERS \
  TextHandle metric, double temperature, std::optional<int64_t> top_k, std::optional<double> top_p
#define LOPA_SAMPLING \
  SamplingSettings { take_text(metric), temperature, top_k, top_p }
#define LOPA_VOCABULARY(sampling) \
  VocabularyTensors { logits, rows, seed, step, sampling }

namespace lopa {

// `K` and `W` are those of the state that comes in.
inline RoundConfig make_config(const char* op, const RoundSettings& s, int64_t K, int64_t W) {
  RoundConfig config;
  config.branches = s.branches.value_or(K);
  config.window = s.window.value_or(W);
  check_at_least(op, "out_branches", config.branches, 1);
  check_at_least(op, "block_size", s.block_size, 1);
  check_at_least(op, "out_window", config.window, s.block_size);
  check_at_least(op, "max_new_tokens", s.max_new_tokens, s.block_size);
  check_share(op, "tau_add", s.tau_add);
  config.select =
      make_select_config(op, s.tau_conf, s.tau_act, s.block_size, s.mask_id, s.accept, s.fallback);
  config.reduce = parse_reduction(op, s.reduction, s.fraction, s.group, s.alpha);
  config.add_count = least_count(s.tau_add, s.block_size);
  config.max_blocks = s.max_new_tokens / s.block_size;
  config.eos_id = s.eos_id;
  config.shift = s.shift;
  config.force_anchor = s.force_anchor;
  return config;
}

// Every tensor of the round is held to its dtype and shape; the failing one is named.
inline void check_owned(const char* op, const char* prefix, const char* name,
                        const OwnedTensor& tensor, ScalarType dtype,
                        std::initializer_list<int64_t> shape, Device device) {
  if (!tensor.is(device, dtype, shape)) {
    check_tensor(op, (std::string(prefix) + name).c_str(), tensor.shared(), dtype, shape, device);
  }
}

struct StateTensors {
  OwnedTensor tokens, length, creation, eos, branches, cache_len, commit_len, prompt_len,
      carry_token, carry_prob, carry_score, done;

  void check(const char* op, const char* prefix, int64_t B, int64_t K, int64_t W,
             Device device) const {
    auto check = [&](const char* name, const OwnedTensor& tensor, ScalarType dtype,
                     std::initializer_list<int64_t> shape) {
      check_owned(op, prefix, name, tensor, dtype, shape, device);
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

  void check(const char* op, int64_t B, int64_t K, int64_t W, Device device) const {
    auto check = [&](const char* name, const OwnedTensor& tensor, ScalarType dtype,
                     std::initializer_list<int64_t> shape) {
      check_owned(op, "", name, tensor, dtype, shape, device);
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

// What the pass over the vocabulary is given.
struct VocabularyTensors {
  const Tensor& logits;
  const OptTensor &rows, &seed, &step;
  const SamplingSettings& sampling;
};

template <size_t>
using Handle = TensorHandle;

template <size_t... I>
std::tuple<Handle<I>...> handles(std::index_sequence<I...>);

// The next state and the results, in the order of the schema.
using StepTuple = decltype(handles(std::make_index_sequence<17>()));

// The operators of a round on one kind of device. `Backend` is made once a call from (op, name of
// an argument, its device), which it checks; it has device(), and
//   run_from_stats(op, view, stats, config, output)
//   run_from_logits(op, view, vocabulary, config, output)
//   needed_rows(op, view, mask_id, shift, capacity, index, rows, count)
template <typename Backend>
class StepOperators {
 public:
  static StepTuple lopa_step(LOPA_VOCABULARY_PARAMETERS, LOPA_STATE_PARAMETERS,
                             LOPA_CONFIG_PARAMETERS, LOPA_SAMPLING_PARAMETERS) {
    StateTensors state = LOPA_STATE;
    const SamplingSettings sampling = LOPA_SAMPLING;
    return make("lopa_step", std::move(state), LOPA_CONFIG, LOPA_VOCABULARY(sampling));
  }

  static void lopa_step_out(LOPA_VOCABULARY_PARAMETERS, LOPA_STATE_PARAMETERS,
                            LOPA_CONFIG_PARAMETERS, LOPA_SAMPLING_PARAMETERS, LOPA_NEXT_PARAMETERS,
                            LOPA_RESULT_PARAMETERS) {
    StateTensors state = LOPA_STATE, next = LOPA_NEXT;
    ResultTensors result = LOPA_RESULT;
    const SamplingSettings sampling = LOPA_SAMPLING;
    write("lopa_step_out", std::move(state), LOPA_CONFIG, LOPA_VOCABULARY(sampling),
          std::move(next), std::move(result));
  }

  static void lopa_step_in_place(LOPA_VOCABULARY_PARAMETERS, LOPA_STATE_PARAMETERS,
                                 LOPA_CONFIG_PARAMETERS, LOPA_SAMPLING_PARAMETERS,
                                 LOPA_RESULT_PARAMETERS) {
    StateTensors state = LOPA_STATE;
    ResultTensors result = LOPA_RESULT;
    const SamplingSettings sampling = LOPA_SAMPLING;
    update("lopa_step_", std::move(state), LOPA_CONFIG, LOPA_VOCABULARY(sampling),
           std::move(result));
  }

  static StepTuple branch_step(LOPA_STATISTICS_PARAMETERS, LOPA_STATE_PARAMETERS,
                               LOPA_CONFIG_PARAMETERS) {
    StatisticsTensors statistics = LOPA_STATISTICS;
    StateTensors state = LOPA_STATE;
    return make("branch_step", std::move(state), LOPA_CONFIG, std::move(statistics));
  }

  static void branch_step_out(LOPA_STATISTICS_PARAMETERS, LOPA_STATE_PARAMETERS,
                              LOPA_CONFIG_PARAMETERS, LOPA_NEXT_PARAMETERS,
                              LOPA_RESULT_PARAMETERS) {
    StatisticsTensors statistics = LOPA_STATISTICS;
    StateTensors state = LOPA_STATE, next = LOPA_NEXT;
    ResultTensors result = LOPA_RESULT;
    write("branch_step_out", std::move(state), LOPA_CONFIG, std::move(statistics), std::move(next),
          std::move(result));
  }

  static void branch_step_in_place(LOPA_STATISTICS_PARAMETERS, LOPA_STATE_PARAMETERS,
                                   LOPA_CONFIG_PARAMETERS, LOPA_RESULT_PARAMETERS) {
    StatisticsTensors statistics = LOPA_STATISTICS;
    StateTensors state = LOPA_STATE;
    ResultTensors result = LOPA_RESULT;
    update("branch_step_", std::move(state), LOPA_CONFIG, std::move(statistics), std::move(result));
  }

  // The same with the settings as one text, torch.ops.lopa_eager (lopa_kernels/ops/step/eager.py).
  static StepTuple lopa_step_eager(LOPA_VOCABULARY_PARAMETERS, LOPA_STATE_PARAMETERS,
                                   TextHandle text) {
    StateTensors state = LOPA_STATE;
    const char* op = "lopa_step";
    const StepSettings& settings = settings_of(op, text);
    return make(op, std::move(state), settings.round, LOPA_VOCABULARY(settings.sampling));
  }

  static void lopa_step_out_eager(LOPA_VOCABULARY_PARAMETERS, LOPA_STATE_PARAMETERS,
                                  TextHandle text, LOPA_NEXT_PARAMETERS, LOPA_RESULT_PARAMETERS) {
    StateTensors state = LOPA_STATE, next = LOPA_NEXT;
    ResultTensors result = LOPA_RESULT;
    const char* op = "lopa_step_out";
    const StepSettings& settings = settings_of(op, text);
    write(op, std::move(state), settings.round, LOPA_VOCABULARY(settings.sampling), std::move(next),
          std::move(result));
  }

  static void lopa_step_in_place_eager(LOPA_VOCABULARY_PARAMETERS, LOPA_STATE_PARAMETERS,
                                       TextHandle text, LOPA_RESULT_PARAMETERS) {
    StateTensors state = LOPA_STATE;
    ResultTensors result = LOPA_RESULT;
    const char* op = "lopa_step_";
    const StepSettings& settings = settings_of(op, text);
    update(op, std::move(state), settings.round, LOPA_VOCABULARY(settings.sampling),
           std::move(result));
  }

  static StepTuple branch_step_eager(LOPA_STATISTICS_PARAMETERS, LOPA_STATE_PARAMETERS,
                                     TextHandle text) {
    StatisticsTensors statistics = LOPA_STATISTICS;
    StateTensors state = LOPA_STATE;
    const char* op = "branch_step";
    return make(op, std::move(state), settings_of(op, text).round, std::move(statistics));
  }

  static void branch_step_out_eager(LOPA_STATISTICS_PARAMETERS, LOPA_STATE_PARAMETERS,
                                    TextHandle text, LOPA_NEXT_PARAMETERS, LOPA_RESULT_PARAMETERS) {
    StatisticsTensors statistics = LOPA_STATISTICS;
    StateTensors state = LOPA_STATE, next = LOPA_NEXT;
    ResultTensors result = LOPA_RESULT;
    const char* op = "branch_step_out";
    write(op, std::move(state), settings_of(op, text).round, std::move(statistics), std::move(next),
          std::move(result));
  }

  static void branch_step_in_place_eager(LOPA_STATISTICS_PARAMETERS, LOPA_STATE_PARAMETERS,
                                         TextHandle text, LOPA_RESULT_PARAMETERS) {
    StatisticsTensors statistics = LOPA_STATISTICS;
    StateTensors state = LOPA_STATE;
    ResultTensors result = LOPA_RESULT;
    const char* op = "branch_step_";
    update(op, std::move(state), settings_of(op, text).round, std::move(statistics),
           std::move(result));
  }

  static std::tuple<Tensor, Tensor, Tensor> needed_rows(
      const Tensor& tokens_in, const Tensor& length_in, const Tensor& branches_in,
      const Tensor& cache_len_in, const Tensor& commit_len_in, const Tensor& prompt_len_in,
      const Tensor& done_in, int64_t mask_id, bool shift, int64_t capacity) {
    const char* op = "needed_rows";
    Backend backend(op, "tokens", device_of(tokens_in));
    const Device device = backend.device();
    if (tokens_in.dim() != 3) fail(op, "tokens", "shape [B, K, W]", shape_string(tokens_in));
    const int64_t B = tokens_in.size(0), K = tokens_in.size(1), W = tokens_in.size(2);
    check_tensor(op, "tokens", tokens_in, ScalarType::Long, {B, K, W}, device);
    check_tensor(op, "length", length_in, ScalarType::Int, {B, K}, device);
    check_tensor(op, "branches", branches_in, ScalarType::Int, {B}, device);
    check_tensor(op, "cache_len", cache_len_in, ScalarType::Int, {B}, device);
    check_tensor(op, "commit_len", commit_len_in, ScalarType::Int, {B}, device);
    check_tensor(op, "prompt_len", prompt_len_in, ScalarType::Int, {B}, device);
    check_tensor(op, "done", done_in, ScalarType::Bool, {B}, device);
    check_at_least(op, "capacity", capacity, 0);
    const Tensor tokens = as_contiguous(tokens_in), length = as_contiguous(length_in),
                 branches = as_contiguous(branches_in), cache_len = as_contiguous(cache_len_in),
                 commit_len = as_contiguous(commit_len_in),
                 prompt_len = as_contiguous(prompt_len_in), done = as_contiguous(done_in);
    BatchView view{};
    view.B = B;
    view.K = K;
    view.W = W;
    view.tokens = data<int64_t>(tokens);
    view.length = data<int32_t>(length);
    view.branches = data<int32_t>(branches);
    view.cache_len = data<int32_t>(cache_len);
    view.commit_len = data<int32_t>(commit_len);
    view.prompt_len = data<int32_t>(prompt_len);
    view.done = data<bool>(done);
    const Tensor index(empty_handle({capacity}, ScalarType::Long, device)),
        rows(empty_handle({B, K, W}, ScalarType::Int, device)),
        count(empty_handle({1}, ScalarType::Int, device));
    backend.needed_rows(op, view, mask_id, shift, capacity, mutable_data<int64_t>(index),
                        mutable_data<int32_t>(rows), mutable_data<int32_t>(count));
    return {index, rows, count};
  }

 private:
  // `Inputs` are VocabularyTensors or StatisticsTensors.
  template <typename Inputs>
  static StepTuple make(const char* op, StateTensors state, const RoundSettings& settings,
                        Inputs inputs) {
    StepOperators call(op, std::move(state), settings);
    call.allocate();
    call.run(std::move(inputs));
    return call.result();
  }

  template <typename Inputs>
  static void write(const char* op, StateTensors state, const RoundSettings& settings,
                    Inputs inputs, StateTensors next, ResultTensors result) {
    StepOperators call(op, std::move(state), settings);
    call.write_to(std::move(next), std::move(result));
    call.run(std::move(inputs));
  }

  template <typename Inputs>
  static void update(const char* op, StateTensors state, const RoundSettings& settings,
                     Inputs inputs, ResultTensors result) {
    StepOperators call(op, std::move(state), settings);
    call.write_in_place(std::move(result));
    call.run(std::move(inputs));
  }

  StepOperators(const char* op, StateTensors state, const RoundSettings& settings)
      : op_(op), backend_(op, "tokens", device_of(state.tokens)), in_(std::move(state)) {
    const auto shape = in_.tokens.sizes();
    if (shape.size() != 3) {
      fail(op, "tokens", "shape [B, K, W]", shape_string(shape.data(), shape.size()));
    }
    B_ = shape[0];
    K_ = shape[1];
    W_ = shape[2];
    check_at_least(op, "branches of tokens", K_, 1);
    check_at_least(op, "columns of tokens", W_, 1);
    config_ = make_config(op, settings, K_, W_);
    in_.check(op, "", B_, K_, W_, backend_.device());
  }

  void allocate() {
    const int64_t K = config_.branches, W = config_.window;
    auto make = [&](ScalarType dtype, std::initializer_list<int64_t> shape) {
      return OwnedTensor(TensorHandle{empty_handle(shape, dtype, backend_.device())});
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
    next.check(op_, "next_", B_, config_.branches, config_.window, backend_.device());
    next.each([&](OwnedTensor& tensor) { check_contiguous(tensor); });
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
    in_.each([&](OwnedTensor& tensor) { check_contiguous(tensor); });
    take(std::move(result));
    point(in_);
  }

  void run(const VocabularyTensors& vocabulary) {
    const Tensor& logits = vocabulary.logits;
    if (vocabulary.rows) {
      check_tensor(op_, "rows", *vocabulary.rows, ScalarType::Int, {B_, K_, W_}, backend_.device());
    } else if (logits.dim() != 4 || logits.size(0) != B_ || logits.size(1) != K_ ||
               logits.size(2) != W_) {
      fail(op_, "logits",
           "shape [" + std::to_string(B_) + ", " + std::to_string(K_) + ", " + std::to_string(W_) +
               ", V], or rows",
           "shape " + shape_string(logits));
    }
    backend_.run_from_logits(op_, view_, vocabulary, config_, output_);
  }

  void run(StatisticsTensors statistics) {
    auto& [token, prob, score] = statistics;
    const Device device = backend_.device();
    check_owned(op_, "", "token", token, ScalarType::Long, {B_, K_, W_}, device);
    check_owned(op_, "", "prob", prob, ScalarType::Float, {B_, K_, W_}, device);
    check_owned(op_, "", "score", score, ScalarType::Float, {B_, K_, W_}, device);
    token = as_contiguous(std::move(token));
    prob = as_contiguous(std::move(prob));
    score = as_contiguous(std::move(score));
    backend_.run_from_stats(op_, view_,
                            {data<int64_t>(token), data<float>(prob), data<float>(score)}, config_,
                            output_);
  }

  StepTuple result() {
    return {out_.tokens.release(),       out_.length.release(),      out_.creation.release(),
            out_.eos.release(),          out_.branches.release(),    out_.cache_len.release(),
            out_.commit_len.release(),   out_.prompt_len.release(),  out_.carry_token.release(),
            out_.carry_prob.release(),   out_.carry_score.release(), out_.done.release(),
            result_.winner.release(),    result_.filled.release(),   result_.confidence.release(),
            result_.committed.release(), result_.status.release()};
  }

  void check_contiguous(const OwnedTensor& tensor) const {
    if (!tensor.is_contiguous()) fail(op_, "outputs", "contiguous tensors", "strided");
  }

  void take(ResultTensors result) {
    result.check(op_, B_, K_, W_, backend_.device());
    result.each([&](OwnedTensor& tensor) { check_contiguous(tensor); });
    result_ = std::move(result);
  }

  // Reads every address once; a sequence's are offsets from them.
  void point(const StateTensors& next) {
    in_.each([](OwnedTensor& tensor) { tensor = as_contiguous(std::move(tensor)); });
    view_ = {B_,
             K_,
             W_,
             data<int64_t>(in_.tokens),
             data<int32_t>(in_.length),
             data<float>(in_.creation),
             data<bool>(in_.eos),
             data<int32_t>(in_.branches),
             data<int32_t>(in_.cache_len),
             data<int32_t>(in_.commit_len),
             data<int32_t>(in_.prompt_len),
             data<int64_t>(in_.carry_token),
             data<float>(in_.carry_prob),
             data<float>(in_.carry_score),
             data<bool>(in_.done)};
    output_ = {{mutable_data<int64_t>(next.tokens), mutable_data<int32_t>(next.length),
                mutable_data<float>(next.creation), mutable_data<bool>(next.eos),
                mutable_data<int32_t>(next.branches), mutable_data<int32_t>(next.cache_len),
                mutable_data<int32_t>(next.commit_len), mutable_data<int32_t>(next.prompt_len),
                mutable_data<int64_t>(next.carry_token), mutable_data<float>(next.carry_prob),
                mutable_data<float>(next.carry_score), mutable_data<bool>(next.done),
                mutable_data<int32_t>(result_.winner), mutable_data<int32_t>(result_.filled),
                mutable_data<float>(result_.confidence), mutable_data<int64_t>(result_.committed),
                mutable_data<int32_t>(result_.status)},
               config_.branches,
               config_.window,
               K_,
               W_};
  }

  const char* op_;
  Backend backend_;
  StateTensors in_;
  RoundConfig config_;
  int64_t B_, K_, W_;
  StateTensors out_;
  ResultTensors result_;
  BatchView view_;
  BatchOutput output_;
};

}  // namespace lopa
