#include "confidence/vector_portable.h"
// The vector vocabulary comes first: the kernels are written in it.
#include <cmath>

#include "confidence/confidence_kernel_impl.h"

namespace lopa {
namespace confidence {

const Kernels* portable_kernels() { return kKernels; }

double gumbel(uint32_t bits) {
  // -log(E), E = -log(1 - v) exponentially distributed, v = (bits + 1/2) / 2^32. In the upper half
  // 1 - v is formed from the complement, which single precision resolves where it would not 1 - v.
  double e = bits < 0x80000000u ? -std::log1p(-((bits + 0.5) * 0x1p-32))
                                : -std::log(((0xffffffffu - bits) + 0.5) * 0x1p-32);
  return -std::log(e);
}

uint32_t philox(int64_t index, const uint32_t counter[3], const uint32_t key[2]) {
  uint32_t c[4] = {static_cast<uint32_t>(index >> 2), counter[0], counter[1], counter[2]};
  uint32_t k[2] = {key[0], key[1]};
  for (int round = 0; round < 10; ++round) {
    uint64_t a = uint64_t{0xD2511F53u} * c[0];
    uint64_t b = uint64_t{0xCD9E8D57u} * c[2];
    uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ c[1] ^ k[0], static_cast<uint32_t>(b),
                        static_cast<uint32_t>(a >> 32) ^ c[3] ^ k[1], static_cast<uint32_t>(a)};
    for (int i = 0; i < 4; ++i) c[i] = next[i];
    k[0] += 0x9E3779B9u;
    k[1] += 0xBB67AE85u;
  }
  return c[index & 3];
}

}  // namespace confidence
}  // namespace lopa
