// The Python module: launches a kernel of the registry on the emulated cores.
#include "binding.h"

#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <tuple>

#include "emulator/device.h"
#include "emulator/launch.h"
#include "emulator/sync.h"

namespace py = pybind11;

namespace {

using ascend_emulator::Access;
using ascend_emulator::Counters;

// name, "in" | "out" | "inout", contiguous memory; no memory: an optional input that is absent.
using Tensor = std::tuple<std::string, std::string, std::optional<py::buffer>>;

Access access_of(const std::string& word) {
  if (word == "in") return Access::kInput;
  if (word == "out") return Access::kOutput;
  if (word == "inout") return Access::kInOut;
  throw py::value_error("access: expected 'in', 'out' or 'inout', got '" + word + "'");
}

py::dict to_dict(const Counters& c) {
  py::dict d;
  d["gm_to_local"] = c.gm_to_local;
  d["local_to_gm"] = c.local_to_gm;
  d["local_to_local"] = c.local_to_local;
  d["gm_scalar"] = c.gm_scalar;
  d["copies"] = c.copies;
  d["vector_repeats"] = c.vector_repeats;
  d["vector_instructions"] = c.vector_instructions;
  d["scalar_accesses"] = c.scalar_accesses;
  d["cube_macs"] = c.cube_macs;
  d["cube_instructions"] = c.cube_instructions;
  d["flags"] = c.flags;
  d["barriers"] = c.barriers;
  d["cross_core"] = c.cross_core;
  d["sync_all"] = c.sync_all;
  d["peak_ub"] = c.peak_ub;
  d["peak_l1"] = c.peak_l1;
  return d;
}

py::dict launch(const std::string& name, const std::vector<Tensor>& tensors,
                const std::string& tiling, uint64_t workspace, int blocks, const std::string& cores,
                uint64_t tiling_key) {
  const auto found = ascend_emulator::kernels().find(name);
  if (found == ascend_emulator::kernels().end()) throw py::key_error("no kernel '" + name + "'");
  const ascend_emulator::Kernel& kernel = found->second;
  if (kernel.arguments != static_cast<int>(tensors.size()) + 2) {
    throw py::value_error(name + ": expected " + std::to_string(kernel.arguments - 2) +
                          " tensors, got " + std::to_string(tensors.size()));
  }
  if (blocks < 1) throw py::value_error("blocks: expected at least 1");
  ascend_emulator::Launch launch;
  launch.blocks = blocks;
  launch.mixed = cores == "mixed";
  launch.cube_only = cores == "cube";
  launch.tiling_key = tiling_key;
  if (!launch.mixed && !launch.cube_only && cores != "vector") {
    throw py::value_error("cores: expected 'vector', 'cube' or 'mixed', got '" + cores + "'");
  }
  ascend_emulator::Device device(launch);

  struct Result {
    uint8_t* from;
    py::buffer_info to;
  };
  std::vector<Result> results;
  std::vector<uint8_t*> arguments;
  std::vector<const void*> given;  // the memory of each region
  for (const auto& [label, word, memory] : tensors) {
    if (!memory) {
      arguments.push_back(nullptr);
      continue;
    }
    const Access access = access_of(word);
    py::buffer_info info = memory->request(access != Access::kInput);
    const uint64_t bytes = static_cast<uint64_t>(info.size) * info.itemsize;
    ascend_emulator::Region* shared = nullptr;
    for (size_t i = 0; i < given.size(); ++i) {
      if (given[i] == info.ptr && bytes > 0) shared = device.regions[i].get();
    }
    if (shared == nullptr) {
      arguments.push_back(device.add_region(label, info.ptr, bytes, access));
      given.push_back(info.ptr);
    } else {
      // An operand in place: an output that is an input's memory.
      if (shared->bytes != bytes || shared->access != Access::kInput) {
        throw py::value_error(label + ": memory that another argument writes or has in part");
      }
      shared->access = access == Access::kInput ? access : Access::kInOut;
      arguments.push_back(shared->data);
    }
    if (access != Access::kInput) results.push_back({arguments.back(), std::move(info)});
  }
  uint8_t* user = device.add_region("workspace", nullptr, workspace, Access::kWorkspace);
  arguments.push_back(user - ascend_emulator::kSystemWorkspace);
  arguments.push_back(device.add_region("tiling", tiling.data(), tiling.size(), Access::kInput));

  device.run([&] { kernel.call(arguments.data()); });
  for (const Result& result : results) {
    std::memcpy(result.to.ptr, result.from,
                static_cast<uint64_t>(result.to.size) * result.to.itemsize);
  }
  py::dict report = to_dict(device.totals());
  py::list each;
  for (const auto& core : device.cores) {
    py::dict own = to_dict(core->counters);
    own["cube"] = core->role == ascend_emulator::Role::kCube;
    each.append(own);
  }
  report["cores"] = each;
  return report;
}

}  // namespace

PYBIND11_MODULE(lopa_ascend_emulator, m) {
  m.doc() = "AscendC kernels of lopa_kernels on emulated cores, and their tiling functions.";
  py::register_exception<ascend_emulator::Fault>(m, "Fault");
  m.def("launch", &launch, py::arg("name"), py::arg("tensors"), py::arg("tiling"), py::kw_only(),
        py::arg("workspace") = 0, py::arg("blocks") = 1, py::arg("cores") = "vector",
        py::arg("tiling_key") = 0);
  m.def("kernels", [] {
    std::vector<std::string> names;
    for (const auto& entry : ascend_emulator::kernels()) names.push_back(entry.first);
    return names;
  });
  for (const auto& bind : ascend_emulator::binders()) bind(m);
}
