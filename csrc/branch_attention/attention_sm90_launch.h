// Launcher of branch attention on Hopper, torch-free. It never waits for the device.
#pragma once

#include <cuda_runtime.h>

#include "branch_attention/params.h"

namespace lopa {

// Whether the kernel takes these shapes, strides and addresses: head_dim 64 or 128, bf16 or fp16,
// everything at multiples of 16 bytes. (Of the device, that it is of compute capability 9.0.)
bool attention_sm90_supports(const BranchAttentionParams& params);

// How the work is cut: CTAs of a cluster (1, 2, 4, 8), tiles of rows they share (at most 31; 1
// alone), rows of a tile. 0 chooses by the shapes. Results differ in their last bits between cuts.
struct AttentionCut {
  int ctas = 0;
  int shared = 0;
  int tile_rows = 0;  // 64 or 128
};

// Pointers in the parameters are the device's.
void launch_attention_sm90(const BranchAttentionParams& params, AttentionCut cut,
                           cudaStream_t stream);

}  // namespace lopa
