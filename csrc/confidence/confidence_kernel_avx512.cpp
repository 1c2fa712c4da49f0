#include "confidence/vector_avx512.h"
// The vector vocabulary comes first: the kernels are written in it.
#include "confidence/confidence_kernel_impl.h"

namespace lopa {
namespace confidence {

const Kernels* avx512_kernels() { return kKernels; }

}  // namespace confidence
}  // namespace lopa
