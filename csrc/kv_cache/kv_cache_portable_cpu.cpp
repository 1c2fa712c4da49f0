#include "kv_cache/rotate_kernel.h"

namespace lopa {

void rotate_heads_portable(const RotateTask& task) { rotate_heads(task); }

}  // namespace lopa
