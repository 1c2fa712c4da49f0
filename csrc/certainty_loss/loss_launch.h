// The two passes of the loss on the GPU; torch-free.
#pragma once

#include <cuda_runtime.h>

#include "certainty_loss/loss_args.h"

namespace lopa {
namespace certainty_loss {

// The masked rows' list, the statistics of their tiles, those of the rows, their means.
void launch_loss(const LossArgs& args, cudaStream_t stream);

void launch_gradient(const GradientArgs& args, cudaStream_t stream);

}  // namespace certainty_loss
}  // namespace lopa
