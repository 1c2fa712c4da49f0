// Reads shapes and attributes for branch_attention_tiling.h's arithmetic.
#include "branch_attention_tiling.h"

#include <cmath>

#include "../../common/tiling_context.h"

namespace optiling {
namespace {

enum Input {
  kQ,
  kKeyCache,
  kValueCache,
  kKeyWindow,
  kValueWindow,
  kCacheLen,
  kLength,
  kPromptLen,
  kBlockTable
};
enum Attribute { kMask, kBlockSize, kScale, kCacheLayout };

// nullptr, or what of the operands' shapes is not as it has to be; what is goes to `shape`.
const char* ReadShape(gert::TilingContext* context, bool headsFirst,
                      branch_attention::Shape* shape) {
  const gert::Shape* q = shapeOf(context, kQ);
  const gert::Shape* window = shapeOf(context, kKeyWindow);
  const gert::Shape* cache = shapeOf(context, kKeyCache);
  const gert::Shape* table = shapeOf(context, kBlockTable);
  if (q == nullptr || q->GetDimNum() != 5) {
    return "q: expected [B, K, W, Hq, D]";
  }
  const int64_t batch = q->GetDim(0), branches = q->GetDim(1), columns = q->GetDim(2);
  const int64_t dim = q->GetDim(4);
  const int64_t kvHeads = window != nullptr && window->GetDimNum() == 5 ? window->GetDim(3) : 0;
  for (size_t input : {kKeyWindow, kValueWindow}) {
    if (!hasShape(shapeOf(context, input), {batch, branches, columns, kvHeads, dim})) {
      return "k_window, v_window: expected [B, K, W, Hk, D] with B, K, W and D of q";
    }
  }
  if (table != nullptr && (table->GetDimNum() != 2 || table->GetDim(0) != batch)) {
    return "block_table: expected [B, P]";
  }
  const size_t positions = headsFirst ? 2 : 1;
  const int64_t capacity =
      cache != nullptr && cache->GetDimNum() == 4 ? cache->GetDim(positions) : 0;
  const int64_t caches = table == nullptr || cache == nullptr ? batch : cache->GetDim(0);
  for (size_t input : {kKeyCache, kValueCache}) {
    const gert::Shape* given = shapeOf(context, input);
    if (headsFirst ? !hasShape(given, {caches, kvHeads, capacity, dim})
                   : !hasShape(given, {caches, capacity, kvHeads, dim})) {
      return "k_cache, v_cache: expected B of q (or pages), S, Hk and D, as cache_layout orders";
    }
  }
  if (!hasShape(shapeOf(context, kCacheLen), {batch}) ||
      !hasShape(shapeOf(context, kLength), {batch, branches})) {
    return "cache_len, length: expected [B] and [B, K]";
  }
  shape->batch = static_cast<uint32_t>(batch);
  shape->branches = static_cast<uint32_t>(branches);
  shape->window = static_cast<uint32_t>(columns);
  shape->queryHeads = static_cast<uint32_t>(q->GetDim(3));
  shape->kvHeads = static_cast<uint32_t>(kvHeads);
  shape->headDim = static_cast<uint32_t>(dim);
  shape->capacity = static_cast<uint32_t>(capacity);
  shape->cacheHeadsFirst = headsFirst;
  shape->tablePages = table != nullptr ? static_cast<uint32_t>(table->GetDim(1)) : 0;
  shape->pages = table != nullptr ? static_cast<uint32_t>(caches) : 0;
  return nullptr;
}

ge::graphStatus attention(gert::TilingContext* context) {
  const Attributes attributes(context);
  const bool headsFirst = attributes.is(kCacheLayout, "BNSD");
  const bool causal = attributes.is(kMask, "block_causal");
  if (!headsFirst && !attributes.is(kCacheLayout, "BSND")) {
    return refuse(context, "cache_layout: expected BSND or BNSD");
  }
  if (!causal && !attributes.is(kMask, "full")) {
    return refuse(context, "mask: expected full or block_causal");
  }
  branch_attention::Shape shape{};
  if (const char* reason = ReadShape(context, headsFirst, &shape)) {
    return refuse(context, reason);
  }
  const int64_t blockSize = causal ? attributes.number(kBlockSize) : 0;
  if (blockSize < 0 || blockSize > INT32_MAX) {
    return refuse(context, "block_size: expected 1 to 2147483647");
  }
  if (causal && !hasShape(shapeOf(context, kPromptLen), {shape.batch})) {
    return refuse(context, "prompt_len: mask block_causal needs it, as [B]");
  }
  const char* reason =
      branch_attention::Unsupported(shape, static_cast<uint32_t>(blockSize), causal);
  auto* tiling = context->GetTilingData<BranchAttentionTiling>();
  if (reason != nullptr || tiling == nullptr) {
    return refuse(context, reason != nullptr ? reason : "no tiling data");
  }
  const float given = attributes.real(kScale);
  const float scale = given != 0 ? given : 1 / std::sqrt(static_cast<float>(shape.headDim));
  const platform_ascendc::PlatformAscendC platform(context->GetPlatformInfo());
  branch_attention::ComputeTiling(shape, static_cast<uint32_t>(blockSize), scale,
                                  platform.GetCoreNumAic(), tiling);
  return launchTogether(context, tiling->cores, branch_attention::WorkspaceBytes(*tiling));
}

}  // namespace

IMPL_OP_OPTILING(LopaBranchAttention).Tiling(attention);

}  // namespace optiling
