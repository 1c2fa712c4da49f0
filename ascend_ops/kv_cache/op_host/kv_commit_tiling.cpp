// Reads shapes for kv_cache_tiling.h's arithmetic: Commit-Winner-Cache.
#include "kv_cache_shape.h"

namespace optiling {
namespace {

ge::graphStatus commit(gert::TilingContext* context) {
  constexpr size_t kCache = 0;
  constexpr size_t kWindow = 2;
  const gert::StorageShape* cache = context->GetRequiredInputShape(kCache);
  const gert::StorageShape* window = context->GetRequiredInputShape(kWindow);
  auto* data = context->GetTilingData<lopa::KvCommitTiling>();
  if (cache == nullptr || window == nullptr || data == nullptr) return ge::GRAPH_FAILED;
  lopa::KvCacheShape shape = windowShape(context, kWindow);
  shape.capacity = cache->GetStorageShape().GetDim(2);
  if (const char* reason = lopa::refusal(shape, false)) return refuse(context, reason);
  const Cores cores = vectorCores(context);
  return launch(context, lopa::tileCommit(shape, cores.count, cores.ubBytes, *data));
}

}  // namespace

IMPL_OP_OPTILING(LopaKvCommit).Tiling(commit);

}  // namespace optiling
