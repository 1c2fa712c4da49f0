// branch_confidence, select_positions and spawn_branches on the CPU.
#include "branch/branch_cpu.h"

#include <cstring>
#include <tuple>

#include "branch/round.h"

namespace lopa {

Accept parse_accept(const char* op, const std::string& name) {
  if (name == "prob") return Accept::kProb;
  if (name == "score") return Accept::kScore;
  fail(op, "accept", "prob or score", name);
}

Fallback parse_fallback(const char* op, const std::string& name) {
  if (name == "block") return Fallback::kBlock;
  if (name == "window") return Fallback::kWindow;
  fail(op, "fallback", "block or window", name);
}

ReductionConfig parse_reduction(const char* op, const std::string& name, double fraction,
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

namespace {

Tensor branch_confidence(const Tensor& score_in, const Tensor& open_in, const Tensor& creation_in,
                         const OptTensor& branches_in, const OptTensor& length_in,
                         TextHandle reduction_text, double fraction, std::optional<int64_t> group,
                         double alpha) {
  const char* op = "branch_confidence";
  const std::string reduction = take_text(reduction_text);
  const ReductionConfig config = parse_reduction(op, reduction, fraction, group, alpha);
  if (score_in.dim() != 3) fail(op, "score", "shape [B, K, W]", shape_string(score_in));
  const int64_t B = score_in.size(0), K = score_in.size(1), W = score_in.size(2);
  check_tensor(op, "score", score_in, ScalarType::Float, {B, K, W});
  check_tensor(op, "open", open_in, ScalarType::Bool, {B, K, W});
  check_tensor(op, "creation", creation_in, ScalarType::Float, {B, K});
  if (branches_in) check_tensor(op, "branches", *branches_in, ScalarType::Int, {B});
  if (length_in) check_tensor(op, "length", *length_in, ScalarType::Int, {B, K});

  const Tensor score_t = as_contiguous(score_in), open_t = as_contiguous(open_in),
               creation_t = as_contiguous(creation_in);
  const Tensor branches_t = branches_in ? as_contiguous(*branches_in) : Tensor();
  const Tensor length_t = length_in ? as_contiguous(*length_in) : Tensor();
  const float* score = data<float>(score_t);
  const bool* open = data<bool>(open_t);
  const float* creation = data<float>(creation_t);
  const int32_t* branches = branches_in ? data<int32_t>(branches_t) : nullptr;
  const int32_t* length = length_in ? data<int32_t>(length_t) : nullptr;

  Tensor out = empty({B, K}, ScalarType::Float, score_in);
  float* confidence = mutable_data<float>(out);
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(W, 1));
  torch::stable::parallel_for(0, B * K, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> scores;
    for (int64_t i = begin; i < end; ++i) {
      if (branches != nullptr && i % K >= branches[i / K]) {
        confidence[i] = kNegInf;
        continue;
      }
      const int64_t columns = length != nullptr ? std::min<int64_t>(length[i], W) : W;
      if (columns <= 0) {
        confidence[i] = 1.0f;
        continue;
      }
      scores.clear();
      for (int64_t c = 0; c < columns; ++c) {
        if (open[i * W + c]) scores.push_back(rankable(score[i * W + c]));
      }
      confidence[i] = blend(creation[i], reduce_scores(scores, config), alpha);
    }
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> select_positions(
    const Tensor& token_in, const Tensor& prob_in, const Tensor& score_in, const Tensor& tokens_in,
    const Tensor& length_in, const Tensor& cache_len_in, const Tensor& prompt_len_in,
    int64_t num_lookahead, double tau_conf, double tau_act, int64_t block_size, int64_t mask_id,
    TextHandle accept_text, TextHandle fallback_text) {
  const char* op = "select_positions";
  const std::string accept = take_text(accept_text), fallback = take_text(fallback_text);
  if (tokens_in.dim() != 2) fail(op, "tokens", "shape [B, W]", shape_string(tokens_in));
  const int64_t B = tokens_in.size(0), W = tokens_in.size(1);
  check_tensor(op, "tokens", tokens_in, ScalarType::Long, {B, W});
  check_tensor(op, "token", token_in, ScalarType::Long, {B, W});
  check_tensor(op, "prob", prob_in, ScalarType::Float, {B, W});
  check_tensor(op, "score", score_in, ScalarType::Float, {B, W});
  check_tensor(op, "length", length_in, ScalarType::Int, {B});
  check_tensor(op, "cache_len", cache_len_in, ScalarType::Int, {B});
  check_tensor(op, "prompt_len", prompt_len_in, ScalarType::Int, {B});
  check_at_least(op, "lookahead", num_lookahead, 0);
  check_at_least(op, "block_size", block_size, 1);
  check_share(op, "tau_act", tau_act);
  if (std::isnan(tau_conf)) fail(op, "tau_conf", "a number", "NaN");
  const SelectConfig config{
      static_cast<float>(tau_conf), least_count(tau_act, block_size), block_size, mask_id,
      parse_accept(op, accept),     parse_fallback(op, fallback)};

  const Tensor tokens = as_contiguous(tokens_in), token = as_contiguous(token_in),
               prob = as_contiguous(prob_in), score = as_contiguous(score_in),
               length = as_contiguous(length_in), cache_len = as_contiguous(cache_len_in),
               prompt_len = as_contiguous(prompt_len_in);
  for (int64_t b = 0; b < B; ++b) {
    const int32_t n = data<int32_t>(length)[b];
    if (n < 0 || n > W) {
      fail(op, ("length of sequence " + std::to_string(b)).c_str(),
           "a number in [0, " + std::to_string(W) + "]", n);
    }
  }
  Tensor fill = empty({B, W}, ScalarType::Bool, tokens_in);
  Tensor columns = empty({B, num_lookahead}, ScalarType::Int, tokens_in);
  Tensor filled = empty({B}, ScalarType::Int, tokens_in);
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(W, 1));
  torch::stable::parallel_for(0, B, grain, [&](int64_t begin, int64_t end) {
    Selection selection;
    for (int64_t b = begin; b < end; ++b) {
      const ColumnStats stats{data<int64_t>(token) + b * W, data<float>(prob) + b * W,
                              data<float>(score) + b * W};
      selection.run(data<int64_t>(tokens) + b * W, data<int32_t>(length)[b],
                    data<int32_t>(cache_len)[b], data<int32_t>(prompt_len)[b], stats, num_lookahead,
                    config);
      bool* row = mutable_data<bool>(fill) + b * W;
      std::fill(row, row + W, false);
      for (int32_t c : selection.filled) row[c] = true;
      int32_t* out = mutable_data<int32_t>(columns) + b * num_lookahead;
      std::fill(out, out + num_lookahead, -1);
      std::copy(selection.lookahead.begin(), selection.lookahead.end(), out);
      mutable_data<int32_t>(filled)[b] = static_cast<int32_t>(selection.filled.size());
    }
  });
  return {fill, columns, filled};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> spawn_branches(
    const Tensor& tokens_in, const Tensor& eos_in, const Tensor& token_in, const Tensor& score_in,
    const Tensor& columns_in, int64_t eos_id) {
  const char* op = "spawn_branches";
  if (tokens_in.dim() != 2) fail(op, "tokens", "shape [B, W]", shape_string(tokens_in));
  const int64_t B = tokens_in.size(0), W = tokens_in.size(1);
  if (columns_in.dim() != 2) fail(op, "columns", "shape [B, K - 1]", shape_string(columns_in));
  const int64_t L = columns_in.size(1), K = L + 1;
  check_tensor(op, "tokens", tokens_in, ScalarType::Long, {B, W});
  check_tensor(op, "eos", eos_in, ScalarType::Bool, {B});
  check_tensor(op, "token", token_in, ScalarType::Long, {B, W});
  check_tensor(op, "score", score_in, ScalarType::Float, {B, W});
  check_tensor(op, "columns", columns_in, ScalarType::Int, {B, L});
  const Tensor tokens = as_contiguous(tokens_in), eos = as_contiguous(eos_in),
               token = as_contiguous(token_in), score = as_contiguous(score_in),
               columns = as_contiguous(columns_in);
  for (int64_t i = 0; i < B * L; ++i) {
    const int32_t column = data<int32_t>(columns)[i];
    if (column < -1 || column >= W) {
      fail(op, ("columns of sequence " + std::to_string(i / L)).c_str(),
           "numbers in [-1, " + std::to_string(W) + ")", column);
    }
  }
  Tensor out_tokens = empty({B, K, W}, ScalarType::Long, tokens_in);
  Tensor out_creation = empty({B, K}, ScalarType::Float, tokens_in);
  Tensor out_eos = empty({B, K}, ScalarType::Bool, tokens_in);
  Tensor out_branches = empty({B}, ScalarType::Int, tokens_in);
  for (int64_t b = 0; b < B; ++b) {
    const int64_t* anchor = data<int64_t>(tokens) + b * W;
    int32_t live = 1;
    for (int64_t k = 0; k < K; ++k) {
      int64_t* row = mutable_data<int64_t>(out_tokens) + (b * K + k) * W;
      std::memcpy(row, anchor, W * sizeof(int64_t));
      float creation = k == 0 ? 1.0f : 0.0f;
      bool has_eos = k == 0 && data<bool>(eos)[b];
      const int32_t column = k == 0 ? -1 : data<int32_t>(columns)[b * L + k - 1];
      // The first -1 ends the ranking: live slots are contiguous.
      if (column >= 0 && live == k) {
        row[column] = data<int64_t>(token)[b * W + column];
        creation = data<float>(score)[b * W + column];
        has_eos = data<bool>(eos)[b] || (eos_id >= 0 && row[column] == eos_id);
        ++live;
      }
      mutable_data<float>(out_creation)[b * K + k] = creation;
      mutable_data<bool>(out_eos)[b * K + k] = has_eos;
    }
    mutable_data<int32_t>(out_branches)[b] = live;
  }
  return {out_tokens, out_creation, out_eos, out_branches};
}

}  // namespace
}  // namespace lopa

STABLE_TORCH_LIBRARY_IMPL(lopa, CPU, m) {
  m.impl("branch_confidence", TORCH_BOX(&lopa::branch_confidence));
  m.impl("select_positions", TORCH_BOX(&lopa::select_positions));
  m.impl("spawn_branches", TORCH_BOX(&lopa::spawn_branches));
}
