// Reads shapes and attributes for branch_tiling.h's arithmetic.
#include "branch_tiling.h"

#include <limits>

#include "../../common/tiling_context.h"

namespace optiling {
namespace {

// Attributes reduction, fraction_bits, group, alpha_bits, from number `first` on; null if all is
// well.
const char* reduction(const Attributes& attributes, size_t first, lopa::ReduceTiling& tiling) {
  const char* names[] = {"mean", "bottom", "group", "min"};
  uint32_t kind = 0;
  while (kind < 4 && !attributes.is(first, names[kind])) ++kind;
  if (kind == 4) return "reduction: expected mean, bottom, group or min";
  const double fraction = attributes.wide(first + 1), alpha = attributes.wide(first + 3);
  const int64_t group = attributes.number(first + 2);
  if (!(fraction > 0 && fraction <= 1)) return "fraction_bits: expected a number in (0, 1]";
  if (!(alpha >= 0 && alpha <= 1)) return "alpha_bits: expected a number in [0, 1]";
  if (group < 0 || (kind == lopa::kReduceGroup && group == 0)) {
    return "group: expected 1 or more with reduction group";
  }
  tiling = lopa::tile_reduction(
      static_cast<lopa::BranchReduction>(kind), fraction,
      group < std::numeric_limits<int32_t>::max() ? group : std::numeric_limits<int32_t>::max(),
      alpha);
  return nullptr;
}

const char* selection(const Attributes& attributes, size_t accept, lopa::SelectTiling& tiling) {
  tiling.by_score = attributes.is(accept, "score") ? 1 : 0;
  if (tiling.by_score == 0 && !attributes.is(accept, "prob")) {
    return "accept: expected prob or score";
  }
  tiling.window = attributes.is(accept + 1, "window") ? 1 : 0;
  if (tiling.window == 0 && !attributes.is(accept + 1, "block")) {
    return "fallback: expected block or window";
  }
  return tiling.block_size < 1 ? "block_size: expected 1 or more" : nullptr;
}

struct Sizes {
  int64_t B, K, W;
};

// Of a tensor [B, K, W], whose elements have numbers of 32 bits.
bool read(const gert::Shape* shape, Sizes& sizes) {
  if (shape == nullptr || shape->GetDimNum() != 3) return false;
  sizes = {shape->GetDim(0), shape->GetDim(1), shape->GetDim(2)};
  return sizes.B * sizes.K * sizes.W <= std::numeric_limits<int32_t>::max();
}

ge::graphStatus step(gert::TilingContext* context) {
  enum Input { kTokens = 4, kUnusable = 3 };
  enum Attribute {
    kOutBranches,
    kOutWindow,
    kTauConf,
    kAddCount,
    kActCount,
    kBlockSize,
    kMaxBlocks,
    kMaskId,
    kEosId,
    kAccept,
    kFallback,
    kReduction,
    kFractionBits,
    kGroup,
    kAlphaBits,
    kShift,
    kForceAnchor
  };
  Sizes s{};
  auto* data = context->GetTilingData<lopa::BranchStepTiling>();
  if (data == nullptr || !read(shapeOf(context, kTokens), s)) {
    return refuse(context, "tokens: expected [B, K, W], fewer than 2^31 elements");
  }
  const Attributes a(context);
  const int64_t nextK = a.number(kOutBranches), nextW = a.number(kOutWindow);
  if (const char* reason = lopa::step_refusal(s.K, s.W, nextK, nextW)) {
    return refuse(context, reason);
  }
  *data = {};
  data->batch = static_cast<uint32_t>(s.B);
  data->branches = static_cast<uint32_t>(s.K);
  data->window = static_cast<uint32_t>(s.W);
  data->next_branches = static_cast<uint32_t>(nextK);
  data->next_window = static_cast<uint32_t>(nextW);
  data->has_unusable = shapeOf(context, kUnusable) != nullptr ? 1 : 0;
  data->shift = a.flag(kShift) ? 1 : 0;
  data->force_anchor = a.flag(kForceAnchor) ? 1 : 0;
  data->add_count = a.number(kAddCount);
  data->max_blocks = a.number(kMaxBlocks);
  data->eos_id = a.number(kEosId);
  data->select.block_size = a.number(kBlockSize);
  data->select.act_count = a.number(kActCount);
  data->select.mask_id = a.number(kMaskId);
  data->select.tau_conf = a.real(kTauConf);
  const char* reason = selection(a, kAccept, data->select);
  if (reason == nullptr) reason = reduction(a, kReduction, data->reduce);
  if (reason != nullptr) return refuse(context, reason);
  return launch(context, lopa::branch_cores(data->batch, vectorCores(context).count));
}

// Fills all of RowsTiling but what one of its operators alone has; the cores to launch, or 0.
uint32_t rows(gert::TilingContext* context, lopa::RowsTiling* data) {
  Sizes s{};
  if (data == nullptr || !read(shapeOf(context, 0), s)) return 0;
  const Attributes a(context);
  *data = {};
  data->batch = static_cast<uint32_t>(s.B);
  data->branches = static_cast<uint32_t>(s.K);
  data->window = static_cast<uint32_t>(s.W);
  data->mask_id = a.number(0);
  data->shift = a.flag(1) ? 1 : 0;
  return lopa::branch_cores(data->batch, vectorCores(context).count);
}

constexpr const char* kRowsTokens = "tokens: expected [B, K, W], fewer than 2^31 elements";

ge::graphStatus stepRows(gert::TilingContext* context) {
  constexpr size_t kGivenRows = 7;
  auto* data = context->GetTilingData<lopa::RowsTiling>();
  const uint32_t cores = rows(context, data);
  if (cores == 0) return refuse(context, kRowsTokens);
  data->has_given = shapeOf(context, kGivenRows) != nullptr ? 1 : 0;
  return launch(context, cores);
}

ge::graphStatus neededRows(gert::TilingContext* context) {
  constexpr uint64_t kWorkspaceOfCore = 32;
  auto* data = context->GetTilingData<lopa::RowsTiling>();
  const uint32_t cores = rows(context, data);
  if (cores == 0) return refuse(context, kRowsTokens);
  data->capacity = Attributes(context).number(2);
  if (data->capacity < 0) return refuse(context, "capacity: expected at least 0");
  return launchTogether(context, cores, cores * kWorkspaceOfCore);
}

ge::graphStatus confidence(gert::TilingContext* context) {
  enum Input { kScore, kOpen, kCreation, kBranches, kLength };
  Sizes s{};
  auto* data = context->GetTilingData<lopa::BranchConfidenceTiling>();
  if (data == nullptr || !read(shapeOf(context, kScore), s)) {
    return refuse(context, "score: expected [B, K, W], fewer than 2^31 elements");
  }
  *data = {};
  data->batch = static_cast<uint32_t>(s.B);
  data->branches = static_cast<uint32_t>(s.K);
  data->window = static_cast<uint32_t>(s.W);
  data->has_branches = shapeOf(context, kBranches) != nullptr ? 1 : 0;
  data->has_length = shapeOf(context, kLength) != nullptr ? 1 : 0;
  if (const char* reason = reduction(Attributes(context), 0, data->reduce)) {
    return refuse(context, reason);
  }
  return launch(context, lopa::branch_cores(data->batch, vectorCores(context).count));
}

ge::graphStatus select(gert::TilingContext* context) {
  constexpr size_t kTokens = 3;
  enum Attribute { kLookahead, kTauConf, kActCount, kBlockSize, kMaskId, kAccept };
  const gert::Shape* tokens = shapeOf(context, kTokens);
  auto* data = context->GetTilingData<lopa::SelectPositionsTiling>();
  const Attributes a(context);
  if (data == nullptr || tokens == nullptr || tokens->GetDimNum() != 2) {
    return refuse(context, "tokens: expected [B, W]");
  }
  *data = {};
  data->batch = static_cast<uint32_t>(tokens->GetDim(0));
  data->window = static_cast<uint32_t>(tokens->GetDim(1));
  data->lookahead = static_cast<uint32_t>(a.number(kLookahead));
  data->select.tau_conf = a.real(kTauConf);
  data->select.act_count = a.number(kActCount);
  data->select.block_size = a.number(kBlockSize);
  data->select.mask_id = a.number(kMaskId);
  if (const char* reason = selection(a, kAccept, data->select)) return refuse(context, reason);
  return launch(context, lopa::branch_cores(data->batch, vectorCores(context).count));
}

ge::graphStatus spawn(gert::TilingContext* context) {
  constexpr size_t kColumns = 4;
  const gert::Shape* tokens = shapeOf(context, 0);
  const gert::Shape* columns = shapeOf(context, kColumns);
  auto* data = context->GetTilingData<lopa::SpawnBranchesTiling>();
  if (data == nullptr || tokens == nullptr || columns == nullptr || tokens->GetDimNum() != 2 ||
      columns->GetDimNum() != 2) {
    return refuse(context, "tokens, columns: expected [B, W] and [B, K - 1]");
  }
  *data = {};
  data->batch = static_cast<uint32_t>(tokens->GetDim(0));
  data->window = static_cast<uint32_t>(tokens->GetDim(1));
  data->branches = static_cast<uint32_t>(columns->GetDim(1)) + 1;
  data->eos_id = Attributes(context).number(0);
  return launch(context, lopa::branch_cores(data->batch, vectorCores(context).count));
}

}  // namespace

IMPL_OP_OPTILING(LopaBranchStep).Tiling(step);
IMPL_OP_OPTILING(LopaStepRows).Tiling(stepRows);
IMPL_OP_OPTILING(LopaNeededRows).Tiling(neededRows);
IMPL_OP_OPTILING(LopaBranchConfidence).Tiling(confidence);
IMPL_OP_OPTILING(LopaSelectPositions).Tiling(select);
IMPL_OP_OPTILING(LopaSpawnBranches).Tiling(spawn);

}  // namespace optiling
