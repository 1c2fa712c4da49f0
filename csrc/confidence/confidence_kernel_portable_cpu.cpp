#include "confidence/vector_portable.h"
// The vector vocabulary comes first: the kernels are written in it.
#include <cmath>

#include "confidence/confidence_kernel_impl.h"

namespace lopa {
namespace confidence {

const Kernels* portable_kernels() { return kKernels; }

double exponential(uint32_t word) {
  // -log(1 - v), v = (word + 1/2) / 2^32. In the upper half 1 - v is formed from the complement.
  return word < 0x80000000u ? -std::log1p(-((word + 0.5) * 0x1p-32))
                            : -std::log(((0xffffffffu - word) + 0.5) * 0x1p-32);
}

void philox(uint32_t first, const uint32_t counter[3], const uint32_t key[2], uint32_t words[4]) {
  uint32_t c[4] = {first, counter[0], counter[1], counter[2]};
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
  for (int i = 0; i < 4; ++i) words[i] = c[i];
}

}  // namespace confidence
}  // namespace lopa
