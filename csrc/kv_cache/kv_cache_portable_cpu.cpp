#include "kv_cache/rotate_kernel.h"

namespace lopa {

void rotate_heads_portable(FloatType type, const void* src, int64_t src_stride, void* dst,
                           int64_t dst_stride, int64_t heads, int64_t head_dim,
                           const float* cos_sin) {
  rotate_heads(type, src, src_stride, dst, dst_stride, heads, head_dim, cos_sin);
}

}  // namespace lopa
