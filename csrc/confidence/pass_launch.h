// Grid, ring and shared memory of a kernel over tiles of logits (for_each_tile of pass_kernel.cuh).
#pragma once

#include <algorithm>

#include "confidence/pass_kernel.cuh"
#include "lopa/cuda.h"

namespace lopa {
namespace confidence {

inline size_t shared_memory_limit() {
  static int limits[kMaxDevices] = {};
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  int& limit = limits[device % kMaxDevices];
  if (limit == 0) {
    check_cuda(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
               "cudaDeviceGetAttribute");
  }
  return static_cast<size_t>(limit);
}

// A tile a warp, and as many on their way; two where the list is so short that nothing else is in
// flight. Fewer where memory ends. `own` is the kernel's first argument, the ring's stages the
// last.
template <typename T, auto kernel, typename Arguments>
void launch_over_tiles(const char* name, const VocabularyArgs& args, cudaStream_t stream,
                       const Arguments& own) {
  const auto shared_bytes = [](int stages) { return stages * kStageBytes<T> + sizeof(uint32_t); };
  const int64_t items = args.capacity * args.tiles;
  const int64_t ctas = std::min<int64_t>(multiprocessors(), std::max<int64_t>(1, items));
  int warps = kPassThreads<T> / 32;
  int stages = items <= 2 * warps * ctas ? 2 * warps : warps;
  while (stages > 1 && shared_bytes(stages) > shared_memory_limit()) stages /= 2;
  warps = std::min(warps, stages);
  const size_t shared = shared_bytes(stages);
  allow_shared_memory<kernel>(
      std::min(shared_bytes(2 * kPassThreads<T> / 32), shared_memory_limit()));
  launch(name, kernel, dim3(static_cast<unsigned>(ctas)), dim3(warps * 32), shared, stream, true,
         own, stages);
}

}  // namespace confidence
}  // namespace lopa
