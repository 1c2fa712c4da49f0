// The registry of kernels that the Python module launches by name.
#pragma once

#include <functional>
#include <map>
#include <string>
#include <utility>

#include "emulator/types.h"

namespace ascend_emulator {

struct Kernel {
  int arguments;
  std::function<void(uint8_t* const*)> call;
};

inline std::map<std::string, Kernel>& kernels() {
  static std::map<std::string, Kernel> registry;
  return registry;
}

template <typename... Arguments, size_t... I>
Kernel make_kernel(void (*function)(Arguments...), std::index_sequence<I...>) {
  static_assert((std::is_same<Arguments, uint8_t*>::value && ...), "an entry takes GM_ADDR");
  return {static_cast<int>(sizeof...(I)),
          [function](uint8_t* const* arguments) { function(arguments[I]...); }};
}

struct Registration {
  template <typename... Arguments>
  Registration(const char* name, void (*function)(Arguments...)) {
    kernels()[name] = make_kernel(function, std::index_sequence_for<Arguments...>());
  }
};

}  // namespace ascend_emulator

// At namespace scope, once for every entry.
#define ASCEND_EMULATOR_KERNEL(function) \
  static const ::ascend_emulator::Registration function##_registration(#function, &function)
