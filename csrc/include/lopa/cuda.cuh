// Device code that several rooms share.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace lopa {

// Programmatic dependent launch: lets the next grid of the stream start, ...
__device__ __forceinline__ void release_successor() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ... which waits here until the grids before it have ended and their writes are visible. Every
// thread that touches global memory calls it first.
__device__ __forceinline__ void wait_for_predecessor() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

template <typename T>
__device__ __forceinline__ T smaller(T a, T b) {
  return b < a ? b : a;
}

}  // namespace lopa
