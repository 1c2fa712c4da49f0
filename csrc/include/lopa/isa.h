// Run-time choice of the instruction set of the CPU kernels.
#pragma once

namespace lopa {

enum class Isa { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

// The best instruction set of this processor that the library holds code for; LOPA_CPU_ISA
// (portable, avx2, avx512) lowers it. Read once.
Isa isa();

}  // namespace lopa
