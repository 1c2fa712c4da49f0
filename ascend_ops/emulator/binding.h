// What an operator adds to the Python module: its tiling functions.
#pragma once

#include <pybind11/pybind11.h>

#include <functional>
#include <vector>

namespace ascend_emulator {

using Binder = std::function<void(pybind11::module_&)>;

inline std::vector<Binder>& binders() {
  static std::vector<Binder> list;
  return list;
}

struct Binding {
  explicit Binding(Binder binder) { binders().push_back(std::move(binder)); }
};

// A tiling struct as the bytes that a launch takes.
template <typename T>
pybind11::bytes as_bytes(const T& data) {
  static_assert(std::is_trivially_copyable<T>::value, "tiling data are plain structs");
  return pybind11::bytes(reinterpret_cast<const char*>(&data), sizeof(data));
}

}  // namespace ascend_emulator
