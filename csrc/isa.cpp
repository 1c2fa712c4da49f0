#include "lopa/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "lopa/tensor.h"

namespace lopa {
namespace {

Isa supported() {
#if defined(LOPA_X86_KERNELS)
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("f16c");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512) return Isa::kAvx512;
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kPortable;
}

Isa chosen() {
  Isa best = supported();
  const char* wanted = std::getenv("LOPA_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return best;
  std::string name(wanted);
  Isa isa;
  if (name == "portable") {
    isa = Isa::kPortable;
  } else if (name == "avx2") {
    isa = Isa::kAvx2;
  } else if (name == "avx512") {
    isa = Isa::kAvx512;
  } else {
    throw std::runtime_error("LOPA_CPU_ISA: expected portable, avx2 or avx512, got " + name);
  }
  if (isa > best) {
    throw std::runtime_error("LOPA_CPU_ISA: this processor or build does not have " + name);
  }
  return isa;
}

}  // namespace

Isa isa() {
  static const Isa value = chosen();
  return value;
}

std::string cpu_isa() {
  static const char* names[] = {"portable", "avx2", "avx512"};
  return names[static_cast<int>(isa())];
}

}  // namespace lopa

STABLE_TORCH_LIBRARY_IMPL(lopa, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&lopa::cpu_isa));
}
