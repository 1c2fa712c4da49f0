// Cores, their memories and pipes, and the scheduler that runs a kernel on all of them.
//
// Every core is a fibre: it runs until it waits for another core (SyncAll, a cross-core flag) or
// ends. Execution is sequential and deterministic; what could run at once on the device is judged
// by the clocks of shadow.h alone.
#pragma once

#include <array>
#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "emulator/fault.h"
#include "emulator/report.h"
#include "emulator/shadow.h"
#include "emulator/types.h"

namespace ascend_emulator {

using AscendC::HardEvent;
using AscendC::Hardware;

constexpr int kPipes = 7;
constexpr int kEvents = static_cast<int>(HardEvent::MAX);
constexpr int kEventIds = 8;     // of each HardEvent, architecture 2201
constexpr int kMaxBuffers = 64;  // of a TPipe
constexpr uint32_t kBlock = 32;  // bytes of a data block
constexpr uint32_t kRepeat = 256;

const char* pipe_name(pipe_t pipe);

struct EventPipes {
  pipe_t from, to;
};
EventPipes event_pipes(HardEvent event);

enum class Role { kVector, kCube };

// A memory inside a core.
struct LocalMemory {
  LocalMemory(const char* name, uint32_t capacity, uint32_t alignment);
  const char* name;
  uint32_t capacity;   // bytes that kernels may use
  uint32_t alignment;  // of an operand's address
  uint32_t allocated = 0;
  std::vector<uint8_t> bytes;
  Shadow shadow;
};

// A flag, or the handing over of a buffer: what the setting pipe had done.
struct Signal {
  bool set = false;
  VectorClock done;
};

enum class BufferState { kFree, kAllocated, kQueued, kDequeued };

// A buffer that TPipe gave out; of a TQue, one of its several.
struct Buffer {
  Hardware hardware;
  uint32_t begin, bytes;
  bool queue;  // of a TQue: its state is followed
  BufferState state = BufferState::kFree;
  uint32_t generation = 0;
  Signal freed;  // what must have ended before the buffer is written anew
  Signal filled;
  int freed_id = -1, filled_id = -1;  // event ids that the queue holds
};

struct Pipe {
  VectorClock known;
  Clock now = 1;
  uint64_t scalar_version = 0;  // what of the scalar unit's knowledge it has
};

class Device;

class Core {
 public:
  Core(Device& device, int index, Role role, int block, int sub_block);

  Device& device;
  const int index;
  const Role role;
  const int block;      // of the launch
  const int sub_block;  // of a vector core beside its cube core
  Counters counters;
  std::vector<Buffer> buffers;
  std::string waiting_for;  // another core; empty: running
  void* tpipe = nullptr;

  LocalMemory& memory(Hardware hardware);
  // The operand [begin, end) of an instruction on `pipe`: checked, recorded, and its bytes.
  uint8_t* read(Hardware hardware, uint64_t begin, uint64_t end, pipe_t pipe);
  uint8_t* write(Hardware hardware, uint64_t begin, uint64_t end, pipe_t pipe,
                 Write kind = Write::kValue);
  Actor actor(pipe_t pipe);

  VectorClock hand_over(pipe_t pipe);  // everything that `pipe` has done until now
  void receive(pipe_t pipe, const VectorClock& done);
  void set_flag(HardEvent event, int id);
  void wait_flag(HardEvent event, int id);
  void barrier(pipe_t pipe);
  int take_event(HardEvent event);
  void give_event(HardEvent event, int id);
  int peek_event(HardEvent event);
  // What the queues do with the flags of their buffers.
  int signal_queue(HardEvent event, Signal& signal);
  void await_queue(HardEvent event, Signal& signal, int id);

  uint32_t allocate(Hardware hardware, uint32_t bytes, bool queue);
  void reset_buffers();
  void check_end();
  Pipe& pipe(pipe_t p) { return pipes_[p]; }

 private:
  void issue(pipe_t pipe);
  int thread(pipe_t pipe) const { return index * kPipes + pipe; }

  std::array<Pipe, kPipes> pipes_;
  std::array<std::unique_ptr<LocalMemory>, 8> memories_;
  std::array<std::array<Signal, kEventIds>, kEvents> flags_;
  std::array<uint8_t, kEvents> taken_{};   // event ids held by the kernel (AllocEventID)
  std::array<uint8_t, kEvents> queued_{};  // and by its queues
  uint64_t scalar_version_ = 1;
};

enum class Access { kInput, kOutput, kInOut, kWorkspace };

// A tensor of a launch in global memory.
struct Region {
  Region(std::string name, const void* values, uint64_t bytes, Access access);
  bool holds(const void* address) const {
    const auto* at = static_cast<const uint8_t*>(address);
    return at >= data && at <= data + bytes;
  }
  std::string name;
  uint64_t bytes;
  Access access;
  std::vector<uint8_t> storage;  // with a gap on either side
  uint8_t* data;
  Shadow shadow;
};

struct Launch {
  int blocks = 1;
  bool mixed = false;  // a cube core and two vector cores a block
  bool cube_only = false;
  uint64_t tiling_key = 0;
};

class Device {
 public:
  explicit Device(const Launch& launch);
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  // Copies `values` in, where the kernel may read them; the address for the kernel.
  uint8_t* add_region(std::string name, const void* values, uint64_t bytes, Access access);
  // Throws Fault, the first one that any core ran into.
  void run(const std::function<void()>& kernel);

  const Launch launch;
  std::vector<std::unique_ptr<Core>> cores;
  std::vector<std::unique_ptr<Region>> regions;

  // An access of the current core to global memory.
  const uint8_t* read_global(const void* address, uint64_t bytes, pipe_t pipe);
  uint8_t* write_global(void* address, uint64_t bytes, pipe_t pipe);
  Region& region(const void* address, uint64_t bytes, const char* verb);
  // A kernel wrote every byte of its outputs.
  void check_outputs() const;
  Counters totals() const;
  int threads() const { return static_cast<int>(cores.size()) * kPipes; }

  // Switches to other cores until `ready` holds; `what` says what for.
  void wait(const std::string& what, const std::function<bool()>& ready);
  void sync_all(bool vector_only);
  // State of cross_core.h, which defines the type.
  std::shared_ptr<void> cross_core;
  // Checks of a launch whose cores have all ended.
  std::vector<std::function<void()>> at_end;

 private:
  struct Fibres;
  struct Meeting {
    int arrived = 0;
    uint64_t round = 0;
    VectorClock done, ended;  // of the round under way, and of the one before
  };
  std::unique_ptr<Fibres> fibres_;
  Meeting meetings_[2];
  size_t last_region_ = 0;
};

// The core whose code runs; a fault outside a launch.
Core& core();
Core* current_core();

}  // namespace ascend_emulator
