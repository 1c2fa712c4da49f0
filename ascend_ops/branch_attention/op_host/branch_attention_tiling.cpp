#include "branch_attention_tiling.h"

#include <cmath>
#include <cstdio>
#include <cstring>

#include "register/op_def_registry.h"
#include "tiling/platform/platform_ascendc.h"

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

ge::graphStatus Refuse(const char* argument, const char* expected) {
  std::fprintf(stderr, "branch_attention: %s: %s\n", argument, expected);
  return ge::GRAPH_FAILED;
}

bool Equal(const gert::Shape& shape, std::initializer_list<int64_t> expected) {
  if (shape.GetDimNum() != expected.size()) {
    return false;
  }
  size_t i = 0;
  for (int64_t dim : expected) {
    if (shape.GetDim(i++) != dim) {
      return false;
    }
  }
  return true;
}

}  // namespace

static ge::graphStatus BranchAttentionTilingFunc(gert::TilingContext* context) {
  for (size_t i = kQ; i <= kLength; ++i) {
    if (context->GetInputShape(i) == nullptr) {
      return Refuse("inputs", "all but prompt_len are needed");
    }
  }
  const gert::Shape& q = context->GetInputShape(kQ)->GetStorageShape();
  const gert::Shape& cache = context->GetInputShape(kKeyCache)->GetStorageShape();
  const gert::Shape& window = context->GetInputShape(kKeyWindow)->GetStorageShape();
  const gert::RuntimeAttrs* attributes = context->GetAttrs();
  const float given = *attributes->GetFloat(kScale);
  const char* mask = attributes->GetStr(kMask);
  const int64_t blockSize = *attributes->GetInt(kBlockSize);
  const char* layout = attributes->GetStr(kCacheLayout);

  if (q.GetDimNum() != 5) {
    return Refuse("q", "expected [B, K, W, Hq, D]");
  }
  if (window.GetDimNum() != 5 || window.GetDim(3) <= 0 ||
      !Equal(window, {q.GetDim(0), q.GetDim(1), q.GetDim(2), window.GetDim(3), q.GetDim(4)})) {
    return Refuse("k_window", "expected [B, K, W, Hk, D] of q's B, K, W and D");
  }
  const bool headsFirst = std::strcmp(layout, "BNSD") == 0;
  if (!headsFirst && std::strcmp(layout, "BSND") != 0) {
    return Refuse("cache_layout", "expected BSND or BNSD");
  }
  const size_t positions = headsFirst ? 2 : 1;
  const size_t heads = headsFirst ? 1 : 2;
  const gert::StorageShape* table = context->GetOptionalInputShape(kBlockTable);
  const bool paged = table != nullptr;
  if (paged && (table->GetStorageShape().GetDimNum() != 2 ||
                table->GetStorageShape().GetDim(0) != q.GetDim(0) ||
                table->GetStorageShape().GetDim(1) <= 0)) {
    return Refuse("block_table", "expected [B, P] with a page at least");
  }
  if (cache.GetDimNum() != 4 || (!paged && cache.GetDim(0) != q.GetDim(0)) ||
      cache.GetDim(heads) != window.GetDim(3) || cache.GetDim(3) != q.GetDim(4)) {
    return Refuse("k_cache",
                  "expected B of q (or pages), Hk and D of k_window, as cache_layout orders");
  }
  if (context->GetInputShape(kValueCache)->GetStorageShape() != cache) {
    return Refuse("v_cache", "expected the shape of k_cache");
  }
  if (context->GetInputShape(kValueWindow)->GetStorageShape() != window) {
    return Refuse("v_window", "expected the shape of k_window");
  }
  if (!Equal(context->GetInputShape(kCacheLen)->GetStorageShape(), {q.GetDim(0)})) {
    return Refuse("cache_len", "expected [B]");
  }
  if (!Equal(context->GetInputShape(kLength)->GetStorageShape(), {q.GetDim(0), q.GetDim(1)})) {
    return Refuse("length", "expected [B, K]");
  }
  const bool causal = std::strcmp(mask, "block_causal") == 0;
  if (!causal && std::strcmp(mask, "full") != 0) {
    return Refuse("mask", "expected full or block_causal");
  }
  if (causal) {
    const gert::StorageShape* promptLen = context->GetOptionalInputShape(kPromptLen);
    if (promptLen == nullptr || !Equal(promptLen->GetStorageShape(), {q.GetDim(0)})) {
      return Refuse("prompt_len", "mask block_causal needs it, as [B]");
    }
    if (blockSize <= 0 || blockSize > INT32_MAX) {
      return Refuse("block_size", "mask block_causal needs a positive one");
    }
  }

  branch_attention::Shape shape{};
  shape.batch = static_cast<uint32_t>(q.GetDim(0));
  shape.branches = static_cast<uint32_t>(q.GetDim(1));
  shape.window = static_cast<uint32_t>(q.GetDim(2));
  shape.queryHeads = static_cast<uint32_t>(q.GetDim(3));
  shape.kvHeads = static_cast<uint32_t>(window.GetDim(3));
  shape.headDim = static_cast<uint32_t>(q.GetDim(4));
  shape.capacity = static_cast<uint32_t>(cache.GetDim(positions));
  shape.cacheHeadsFirst = headsFirst;
  shape.tablePages = paged ? static_cast<uint32_t>(table->GetStorageShape().GetDim(1)) : 0;
  shape.pages = paged ? static_cast<uint32_t>(cache.GetDim(0)) : 0;
  const float scale = given == 0 ? 1 / std::sqrt(static_cast<float>(shape.headDim)) : given;
  const uint32_t causalBlock = causal ? static_cast<uint32_t>(blockSize) : 0;
  if (const char* what = branch_attention::Unsupported(shape, causalBlock, causal)) {
    return Refuse("shape", what);
  }

  const auto platform = platform_ascendc::PlatformAscendC(context->GetPlatformInfo());
  auto* tiling = context->GetTilingData<BranchAttentionTiling>();
  branch_attention::ComputeTiling(shape, causalBlock, scale, platform.GetCoreNumAic(), tiling);
  context->SetBlockDim(tiling->cores);
  context->SetTilingKey(0);
  // The merge of split tiles meets at SyncAll, so that all cores have to run at once.
  context->SetScheduleMode(1);
  context->GetWorkspaceSizes(1)[0] =
      platform.GetLibApiWorkSpaceSize() + branch_attention::WorkspaceBytes(*tiling);
  return ge::GRAPH_SUCCESS;
}

IMPL_OP_OPTILING(LopaBranchAttention).Tiling(BranchAttentionTilingFunc);

}  // namespace optiling
