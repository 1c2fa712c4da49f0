// Launchers of the KV-cache kernels, torch-free. They never wait for the device.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kv_cache/params.h"

namespace lopa {

// Pointers in the parameters are the device's. `status` (null: none) holds a word a sequence, into
// which a fault is ORed; the sequence is then not written, or its cache not.
void launch_kv_prewrite(const KvPrewriteParams& params, int32_t* status, int64_t status_stride,
                        cudaStream_t stream);
void launch_kv_commit(const KvCommitParams& params, int32_t* status, int64_t status_stride,
                      cudaStream_t stream);

}  // namespace lopa
