// What arrives through torch.ops for the branch room, checked and turned into plain structs, for
// the libraries of all devices. Only shapes, dtypes and devices are read: no memory.
#pragma once

#include <cmath>
#include <optional>
#include <string>
#include <tuple>

#include "branch/params.h"
#include "lopa/checks.h"
#include "lopa/tensor.h"

namespace lopa {

// `!(low <= value)` also refuses NaN.
inline void check_share(const char* op, const char* argument, double value) {
  if (!(value >= 0.0 && value <= 1.0)) fail(op, argument, "a number in [0, 1]", value);
}

inline void check_at_least(const char* op, const char* argument, int64_t value, int64_t least) {
  if (value < least) fail(op, argument, "at least " + std::to_string(least), value);
}

inline Accept parse_accept(const char* op, const std::string& name) {
  if (name == "prob") return Accept::kProb;
  if (name == "score") return Accept::kScore;
  fail(op, "accept", "prob or score", name);
}

inline Fallback parse_fallback(const char* op, const std::string& name) {
  if (name == "block") return Fallback::kBlock;
  if (name == "window") return Fallback::kWindow;
  fail(op, "fallback", "block or window", name);
}

inline ReductionConfig parse_reduction(const char* op, const std::string& name, double fraction,
                                       std::optional<int64_t> group, double alpha) {
  ReductionConfig config{Reduction::kMean, fraction, group.value_or(0), alpha};
  if (name == "bottom") {
    config.reduction = Reduction::kBottom;
  } else if (name == "group") {
    config.reduction = Reduction::kGroup;
    if (!group) fail(op, "group", "a number of columns with reduction=group", "none");
  } else if (name == "min") {
    config.reduction = Reduction::kMin;
  } else if (name != "mean") {
    fail(op, "reduction", "mean, bottom, group or min", name);
  }
  if (!(fraction > 0.0 && fraction <= 1.0)) {
    fail(op, "fraction", "a number in (0, 1]", fraction);
  }
  if (group) check_at_least(op, "group", *group, 1);
  check_share(op, "alpha", alpha);
  return config;
}

inline SelectConfig make_select_config(const char* op, double tau_conf, double tau_act,
                                       int64_t block_size, int64_t mask_id,
                                       const std::string& accept, const std::string& fallback) {
  check_at_least(op, "block_size", block_size, 1);
  check_share(op, "tau_act", tau_act);
  if (std::isnan(tau_conf)) fail(op, "tau_conf", "a number", "NaN");
  return {static_cast<float>(tau_conf), least_count(tau_act, block_size), block_size, mask_id,
          parse_accept(op, accept),     parse_fallback(op, fallback)};
}

// The operators of the room on one kind of device. `Backend` is made once a call from (op, name of
// an argument, its device), which it checks; it has device(), and confidence, select and spawn of
// (op, view) and, for the first two, a config.
template <typename Backend>
struct BranchOperators {
  static Tensor branch_confidence(const Tensor& score_in, const Tensor& open_in,
                                  const Tensor& creation_in, const OptTensor& branches_in,
                                  const OptTensor& length_in, TextHandle reduction_text,
                                  double fraction, std::optional<int64_t> group, double alpha) {
    const char* op = "branch_confidence";
    const std::string reduction = take_text(reduction_text);
    const ReductionConfig config = parse_reduction(op, reduction, fraction, group, alpha);
    Backend backend(op, "score", device_of(score_in));
    const Device device = backend.device();
    if (score_in.dim() != 3) fail(op, "score", "shape [B, K, W]", shape_string(score_in));
    const int64_t B = score_in.size(0), K = score_in.size(1), W = score_in.size(2);
    check_tensor(op, "score", score_in, ScalarType::Float, {B, K, W}, device);
    check_tensor(op, "open", open_in, ScalarType::Bool, {B, K, W}, device);
    check_tensor(op, "creation", creation_in, ScalarType::Float, {B, K}, device);
    if (branches_in) check_tensor(op, "branches", *branches_in, ScalarType::Int, {B}, device);
    if (length_in) check_tensor(op, "length", *length_in, ScalarType::Int, {B, K}, device);
    const Tensor score = as_contiguous(score_in), open = as_contiguous(open_in),
                 creation = as_contiguous(creation_in);
    OptTensor branches, length;
    if (branches_in) branches = as_contiguous(*branches_in);
    if (length_in) length = as_contiguous(*length_in);
    const Tensor out(empty_handle({B, K}, ScalarType::Float, device));
    backend.confidence(
        op,
        ConfidenceView{B, K, W, data<float>(score), data<bool>(open), data<float>(creation),
                       branches ? data<int32_t>(*branches) : nullptr,
                       length ? data<int32_t>(*length) : nullptr, mutable_data<float>(out)},
        config);
    return out;
  }

  static std::tuple<Tensor, Tensor, Tensor> select_positions(
      const Tensor& token_in, const Tensor& prob_in, const Tensor& score_in,
      const Tensor& tokens_in, const Tensor& length_in, const Tensor& cache_len_in,
      const Tensor& prompt_len_in, int64_t num_lookahead, double tau_conf, double tau_act,
      int64_t block_size, int64_t mask_id, TextHandle accept_text, TextHandle fallback_text) {
    const char* op = "select_positions";
    const std::string accept = take_text(accept_text), fallback = take_text(fallback_text);
    Backend backend(op, "tokens", device_of(tokens_in));
    const Device device = backend.device();
    if (tokens_in.dim() != 2) fail(op, "tokens", "shape [B, W]", shape_string(tokens_in));
    const int64_t B = tokens_in.size(0), W = tokens_in.size(1);
    check_tensor(op, "tokens", tokens_in, ScalarType::Long, {B, W}, device);
    check_tensor(op, "token", token_in, ScalarType::Long, {B, W}, device);
    check_tensor(op, "prob", prob_in, ScalarType::Float, {B, W}, device);
    check_tensor(op, "score", score_in, ScalarType::Float, {B, W}, device);
    check_tensor(op, "length", length_in, ScalarType::Int, {B}, device);
    check_tensor(op, "cache_len", cache_len_in, ScalarType::Int, {B}, device);
    check_tensor(op, "prompt_len", prompt_len_in, ScalarType::Int, {B}, device);
    check_at_least(op, "lookahead", num_lookahead, 0);
    const SelectConfig config =
        make_select_config(op, tau_conf, tau_act, block_size, mask_id, accept, fallback);
    const Tensor tokens = as_contiguous(tokens_in), token = as_contiguous(token_in),
                 prob = as_contiguous(prob_in), score = as_contiguous(score_in),
                 length = as_contiguous(length_in), cache_len = as_contiguous(cache_len_in),
                 prompt_len = as_contiguous(prompt_len_in);
    const Tensor fill(empty_handle({B, W}, ScalarType::Bool, device)),
        columns(empty_handle({B, num_lookahead}, ScalarType::Int, device)),
        filled(empty_handle({B}, ScalarType::Int, device));
    backend.select(op,
                   SelectView{B,
                              W,
                              num_lookahead,
                              data<int64_t>(tokens),
                              {data<int64_t>(token), data<float>(prob), data<float>(score)},
                              data<int32_t>(length),
                              data<int32_t>(cache_len),
                              data<int32_t>(prompt_len),
                              mutable_data<bool>(fill),
                              mutable_data<int32_t>(columns),
                              mutable_data<int32_t>(filled)},
                   config);
    return {fill, columns, filled};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> spawn_branches(
      const Tensor& tokens_in, const Tensor& eos_in, const Tensor& token_in, const Tensor& score_in,
      const Tensor& columns_in, int64_t eos_id) {
    const char* op = "spawn_branches";
    Backend backend(op, "tokens", device_of(tokens_in));
    const Device device = backend.device();
    if (tokens_in.dim() != 2) fail(op, "tokens", "shape [B, W]", shape_string(tokens_in));
    const int64_t B = tokens_in.size(0), W = tokens_in.size(1);
    if (columns_in.dim() != 2) fail(op, "columns", "shape [B, K - 1]", shape_string(columns_in));
    const int64_t L = columns_in.size(1), K = L + 1;
    check_tensor(op, "tokens", tokens_in, ScalarType::Long, {B, W}, device);
    check_tensor(op, "eos", eos_in, ScalarType::Bool, {B}, device);
    check_tensor(op, "token", token_in, ScalarType::Long, {B, W}, device);
    check_tensor(op, "score", score_in, ScalarType::Float, {B, W}, device);
    check_tensor(op, "columns", columns_in, ScalarType::Int, {B, L}, device);
    const Tensor tokens = as_contiguous(tokens_in), eos = as_contiguous(eos_in),
                 token = as_contiguous(token_in), score = as_contiguous(score_in),
                 columns = as_contiguous(columns_in);
    const Tensor out_tokens(empty_handle({B, K, W}, ScalarType::Long, device)),
        out_creation(empty_handle({B, K}, ScalarType::Float, device)),
        out_eos(empty_handle({B, K}, ScalarType::Bool, device)),
        out_branches(empty_handle({B}, ScalarType::Int, device));
    backend.spawn(op,
                  SpawnView{B, K, W, data<int64_t>(tokens), data<bool>(eos), data<int64_t>(token),
                            data<float>(score), data<int32_t>(columns), eos_id,
                            mutable_data<int64_t>(out_tokens), mutable_data<float>(out_creation),
                            mutable_data<bool>(out_eos), mutable_data<int32_t>(out_branches)});
    return {out_tokens, out_creation, out_eos, out_branches};
  }
};

}  // namespace lopa
