// Flags between cores: CrossCoreSetFlag and CrossCoreWaitFlag, architecture 2201.
//
// Each core has 16 flags, each a counter from 0 to 15. A mode says whose sets raise whose counters:
// 0, all cores of one kind raise each other's; 1, the vector cores of a block; 2, the cube core
// raises those of its vector cores, and all its vector cores together raise its own. A wait holds
// up all pipes of a core. What the setting pipes had done until then, the waiting core follows.
#pragma once

#include <deque>
#include <string>

#include "emulator/sync.h"

namespace ascend_emulator {

constexpr int kCrossCoreFlags = 16;
constexpr size_t kCrossCoreMost = 15;
// SyncAll of the hardware uses these.
constexpr int kSyncAllFirst = 11, kSyncAllLast = 14;

struct CrossCoreFlags {
  struct Flag {
    std::deque<VectorClock> raised;   // the counter, and what came with each count
    std::deque<VectorClock> offered;  // own sets that wait for those of others
    int mode = -1;
  };
  std::vector<std::array<Flag, kCrossCoreFlags>> cores;

  static CrossCoreFlags& of(Device& device) {
    if (!device.cross_core) {
      auto flags = std::make_shared<CrossCoreFlags>();
      flags->cores.resize(device.cores.size());
      device.cross_core = flags;
      device.at_end.push_back([flags] { flags->check_end(); });
    }
    return *static_cast<CrossCoreFlags*>(device.cross_core.get());
  }

  static void check_id(const char* api, int id) {
    if (id < 0 || id >= kCrossCoreFlags) {
      fail("flag", "%s: flag %d is not in [0, %d)", api, id, kCrossCoreFlags);
    }
    if (id >= kSyncAllFirst && id <= kSyncAllLast) {
      fail("flag", "%s: flags %d to %d are SyncAll's", api, kSyncAllFirst, kSyncAllLast);
    }
  }

  // The cores whose sets together raise a flag, and those whose flags they raise.
  struct Group {
    std::vector<int> setting, waiting;
  };
  static Group group(const Core& self, int mode) {
    Group result;
    for (const auto& other : self.device.cores) {
      const bool block = other->block == self.block, alike = other->role == self.role;
      if (alike && (mode == 0 || block)) result.setting.push_back(other->index);
      if (mode == 0 ? alike : block && alike == (mode == 1)) {
        result.waiting.push_back(other->index);
      }
    }
    return result;
  }

  // A flag of a core changes its mode only when nothing of the former one is under way.
  void enter_mode(Core& self, int mode, int id) {
    Flag& own = cores[self.index][id];
    if (own.mode >= 0 && own.mode != mode) {
      const Group former = group(self, own.mode);
      for (const auto* members : {&former.setting, &former.waiting}) {
        for (int index : *members) {
          const Flag& flag = cores[index][id];
          if (flag.mode == own.mode && !(flag.raised.empty() && flag.offered.empty())) {
            fail("flag", "CrossCoreSetFlag: flag %d of core %d is still in use in mode %d", id,
                 index, own.mode);
          }
        }
      }
    }
    own.mode = mode;
  }

  void set(Core& self, int mode, pipe_t pipe, int id) {
    Device& device = self.device;
    if (mode != 0 && !device.launch.mixed) {
      fail("role", "CrossCoreSetFlag: mode %d is for cube and vector cores together", mode);
    }
    if (mode == 1 && self.role == Role::kCube) {
      fail("role", "CrossCoreSetFlag: mode 1 is for vector cores");
    }
    ++self.counters.cross_core;
    enter_mode(self, mode, id);
    cores[self.index][id].offered.push_back(self.hand_over(pipe));
    const Group members = group(self, mode);
    VectorClock all(device.threads(), 0);
    for (int index : members.setting) {
      const Flag& other = cores[index][id];
      if (other.offered.empty() || other.mode != mode) return;
      join(all, other.offered.front());
    }
    for (int index : members.setting) cores[index][id].offered.pop_front();
    for (int index : members.waiting) {
      Flag& other = cores[index][id];
      if (other.raised.size() == kCrossCoreMost) {
        fail("flag", "CrossCoreSetFlag: flag %d of core %d is set more than %zu times", id, index,
             kCrossCoreMost);
      }
      if (!other.raised.empty() && other.mode != mode) {
        fail("flag", "CrossCoreSetFlag: flag %d of core %d is still in use in mode %d", id, index,
             other.mode);
      }
      other.mode = mode;
      other.raised.push_back(all);
    }
  }

  void wait(Core& self, int id) {
    Flag& own = cores[self.index][id];
    self.device.wait("CrossCoreWaitFlag(" + std::to_string(id) + ")",
                     [&own] { return !own.raised.empty(); });
    self.receive(PIPE_S, own.raised.front());
    own.raised.pop_front();
  }

  void check_end() const {
    for (size_t index = 0; index < cores.size(); ++index) {
      for (int id = 0; id < kCrossCoreFlags; ++id) {
        const Flag& flag = cores[index][id];
        if (!flag.raised.empty()) {
          throw Fault("leak", "flag " + std::to_string(id) + " of core " + std::to_string(index) +
                                  " is set and never waited for");
        }
        if (!flag.offered.empty()) {
          throw Fault("leak", "core " + std::to_string(index) + " sets flag " + std::to_string(id) +
                                  ", and others of its group never do");
        }
      }
    }
  }
};

}  // namespace ascend_emulator

namespace AscendC {

template <uint8_t modeId, pipe_t pipe>
void CrossCoreSetFlag(uint16_t flagId) {
  static_assert(modeId <= 2, "CrossCoreSetFlag: architecture 2201 has modes 0, 1 and 2");
  static_assert(pipe != PIPE_S && pipe != PIPE_ALL, "CrossCoreSetFlag: not for this pipe");
  ascend_emulator::Core& self = ascend_emulator::core();
  ascend_emulator::CrossCoreFlags::check_id("CrossCoreSetFlag", flagId);
  ascend_emulator::CrossCoreFlags::of(self.device).set(self, modeId, pipe, flagId);
}

// The template parameters are without effect on this architecture: all pipes wait.
template <uint8_t modeId = 0, pipe_t pipe = PIPE_S>
void CrossCoreWaitFlag(uint16_t flagId) {
  ascend_emulator::Core& self = ascend_emulator::core();
  ascend_emulator::CrossCoreFlags::check_id("CrossCoreWaitFlag", flagId);
  ascend_emulator::CrossCoreFlags::of(self.device).wait(self, flagId);
}

}  // namespace AscendC
