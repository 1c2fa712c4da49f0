// Pre-Write and Commit-Winner-Cache on CUDA devices: streams and registration.
#include "kv_cache/kv_cache_args.h"
#include "kv_cache/kv_cache_launch.h"
#include "kv_cache/params.h"
#include "lopa/cuda_tensor.h"

namespace lopa {
namespace {

int32_t* words_of(const OptTensor& status) {
  return status.has_value() ? mutable_data<int32_t>(*status) : nullptr;
}

int64_t stride_of(const OptTensor& status) { return status.has_value() ? status->stride(0) : 0; }

// Device, stream and kernels of a call, for KvCacheOperators. A sequence that a fault drops is
// reported by its status word alone: the host never waits to know.
class Cuda : public CudaCall {
 public:
  using CudaCall::CudaCall;

  void prewrite(const char*, const KvPrewriteParams& p, const OptTensor& status) const {
    launch_kv_prewrite(p, words_of(status), stride_of(status), stream());
  }

  void commit(const char*, const KvCommitParams& p, const OptTensor& status) const {
    launch_kv_commit(p, words_of(status), stride_of(status), stream());
  }
};

using Operators = KvCacheOperators<Cuda>;

}  // namespace
}  // namespace lopa

STABLE_TORCH_LIBRARY_IMPL(lopa, CUDA, m) {
  m.impl("kv_prewrite_", TORCH_BOX(&lopa::Operators::prewrite));
  m.impl("kv_prewrite_direct_", TORCH_BOX(&lopa::Operators::prewrite_direct));
  m.impl("qkv_prewrite_", TORCH_BOX(&lopa::Operators::packed_prewrite));
  m.impl("qkv_prewrite_direct_", TORCH_BOX(&lopa::Operators::packed_prewrite_direct));
  m.impl("kv_commit_", TORCH_BOX(&lopa::Operators::commit));
}

STABLE_TORCH_LIBRARY_IMPL(lopa_eager, CUDA, m) {
  m.impl("kv_prewrite_", TORCH_BOX(&lopa::Operators::prewrite));
  m.impl("qkv_prewrite_", TORCH_BOX(&lopa::Operators::packed_prewrite));
  m.impl("kv_commit_", TORCH_BOX(&lopa::Operators::commit));
}
