#include "certainty_loss/certainty_loss_kernel_impl.h"

namespace lopa {
namespace certainty_loss {

const Kernels* portable_kernels() { return kKernels; }

}  // namespace certainty_loss
}  // namespace lopa
