#include "emulator/device.h"

#include <algorithm>

namespace ascend_emulator {
namespace {

// Architecture 2201. Of UB, 256 bytes are the system's and 8 KiB are reserved for library calls
// (Select uses them); of L1, 256 bytes are the system's.
constexpr uint32_t kUbBytes = 192 * 1024 - 256 - 8 * 1024;
constexpr uint32_t kL1Bytes = 512 * 1024 - 256;

std::unique_ptr<LocalMemory> make_memory(Hardware hardware) {
  switch (hardware) {
    case Hardware::UB:
      return std::make_unique<LocalMemory>("UB", kUbBytes, 32);
    case Hardware::L1:
      return std::make_unique<LocalMemory>("L1", kL1Bytes, 32);
    case Hardware::L0A:
      return std::make_unique<LocalMemory>("L0A", 64 * 1024, 512);
    case Hardware::L0B:
      return std::make_unique<LocalMemory>("L0B", 64 * 1024, 512);
    case Hardware::L0C:
      return std::make_unique<LocalMemory>("L0C", 128 * 1024, 64);
    case Hardware::BIAS:
      return std::make_unique<LocalMemory>("the bias table", 1024, 64);
    default:
      fail("unsupported", "memory %d is not emulated", static_cast<int>(hardware));
  }
}

bool exists_on(Role role, pipe_t pipe) {
  switch (pipe) {
    case PIPE_S:
    case PIPE_MTE2:
    case PIPE_MTE3:
    case PIPE_ALL:
      return true;
    case PIPE_V:
      return role == Role::kVector;
    default:
      return role == Role::kCube;
  }
}

}  // namespace

const char* pipe_name(pipe_t pipe) {
  static const char* const names[] = {"PIPE_S",    "PIPE_V",    "PIPE_M",   "PIPE_MTE1",
                                      "PIPE_MTE2", "PIPE_MTE3", "PIPE_FIX", "PIPE_ALL"};
  return names[pipe];
}

EventPipes event_pipes(HardEvent event) {
  static const EventPipes table[] = {
      {PIPE_MTE2, PIPE_MTE1}, {PIPE_MTE1, PIPE_MTE2}, {PIPE_MTE1, PIPE_M},
      {PIPE_M, PIPE_MTE1},    {PIPE_MTE2, PIPE_V},    {PIPE_V, PIPE_MTE2},
      {PIPE_MTE3, PIPE_V},    {PIPE_V, PIPE_MTE3},    {PIPE_MTE3, PIPE_MTE1},
      {PIPE_MTE1, PIPE_MTE3}, {PIPE_MTE2, PIPE_M},    {PIPE_M, PIPE_MTE2},
      {PIPE_M, PIPE_FIX},     {PIPE_FIX, PIPE_M},     {PIPE_MTE3, PIPE_MTE2},
      {PIPE_MTE2, PIPE_MTE3}, {PIPE_S, PIPE_V},       {PIPE_V, PIPE_S},
      {PIPE_S, PIPE_MTE2},    {PIPE_MTE2, PIPE_S},    {PIPE_S, PIPE_MTE3},
      {PIPE_MTE3, PIPE_S},    {PIPE_MTE2, PIPE_FIX},  {PIPE_FIX, PIPE_MTE2},
      {PIPE_FIX, PIPE_S},     {PIPE_M, PIPE_S},       {PIPE_FIX, PIPE_MTE3},
      {PIPE_MTE1, PIPE_FIX},  {PIPE_FIX, PIPE_MTE1}};
  static_assert(sizeof(table) / sizeof(table[0]) == kEvents, "an event without pipes");
  return table[static_cast<int>(event)];
}

LocalMemory::LocalMemory(const char* name, uint32_t capacity, uint32_t alignment)
    : name(name), capacity(capacity), alignment(alignment), bytes(capacity, 0xFF), shadow(name) {}

Region::Region(std::string name, const void* values, uint64_t bytes, Access access)
    : name(std::move(name)), bytes(bytes), access(access), shadow(this->name.c_str()) {
  constexpr uint64_t kAlignment = 512;
  storage.assign(bytes + 3 * kAlignment, 0xFF);
  const uint64_t address = reinterpret_cast<uint64_t>(storage.data());
  data = storage.data() + kAlignment + (kAlignment - address % kAlignment) % kAlignment;
  if (access == Access::kInput || access == Access::kInOut) {
    if (bytes > 0) std::memcpy(data, values, bytes);
    shadow.fill(0, bytes);
  }
}

Core::Core(Device& device, int index, Role role, int block, int sub_block)
    : device(device), index(index), role(role), block(block), sub_block(sub_block) {
  for (Pipe& pipe : pipes_) pipe.known.assign(device.threads(), 0);
}

LocalMemory& Core::memory(Hardware hardware) {
  const bool vector_memory = hardware == Hardware::UB;
  if (vector_memory != (role == Role::kVector)) {
    fail("role", "a %s core has no such memory", role == Role::kVector ? "vector" : "cube");
  }
  auto& memory = memories_[static_cast<int>(hardware)];
  if (!memory) memory = make_memory(hardware);
  return *memory;
}

void Core::issue(pipe_t pipe) {
  if (!exists_on(role, pipe)) {
    fail("role", "a %s core has no %s", role == Role::kVector ? "vector" : "cube", pipe_name(pipe));
  }
  // The scalar unit sends every instruction out after what it has waited for; its own reads and
  // writes may still be under way then.
  Pipe& p = pipes_[pipe];
  if (pipe == PIPE_S || p.scalar_version == scalar_version_) return;
  const Clock scalar = p.known[thread(PIPE_S)];
  join(p.known, pipes_[PIPE_S].known);
  p.known[thread(PIPE_S)] = scalar;
  p.scalar_version = scalar_version_;
}

Actor Core::actor(pipe_t pipe) {
  issue(pipe);
  const Pipe& p = pipes_[pipe];
  // Two copies of one DMA engine may overlap in time (PipeBarrier, constraints).
  const bool in_order = pipe != PIPE_MTE2 && pipe != PIPE_MTE3;
  return {{thread(pipe), p.now}, &p.known, in_order};
}

uint8_t* Core::read(Hardware hardware, uint64_t begin, uint64_t end, pipe_t pipe) {
  LocalMemory& local = memory(hardware);
  local.shadow.read(begin, end, actor(pipe));
  return local.bytes.data() + begin;
}

uint8_t* Core::write(Hardware hardware, uint64_t begin, uint64_t end, pipe_t pipe, Write kind) {
  LocalMemory& local = memory(hardware);
  local.shadow.write(begin, end, actor(pipe), kind);
  return local.bytes.data() + begin;
}

VectorClock Core::hand_over(pipe_t pipe) {
  issue(pipe);
  Pipe& p = pipes_[pipe];
  VectorClock done = p.known;
  done[thread(pipe)] = p.now++;
  return done;
}

void Core::receive(pipe_t pipe, const VectorClock& done) {
  issue(pipe);
  join(pipes_[pipe].known, done);
  if (pipe == PIPE_S) ++scalar_version_;
}

void Core::set_flag(HardEvent event, int id) {
  const EventPipes pipes = event_pipes(event);
  if (id < 0 || id >= kEventIds) fail("flag", "event id %d is not in [0, %d)", id, kEventIds);
  Signal& flag = flags_[static_cast<int>(event)][id];
  if (queued_[static_cast<int>(event)] >> id & 1) {
    fail("flag", "SetFlag: a queue holds event id %d of %s to %s", id, pipe_name(pipes.from),
         pipe_name(pipes.to));
  }
  if (flag.set) {
    fail("flag", "SetFlag: flag %d of %s to %s is set already", id, pipe_name(pipes.from),
         pipe_name(pipes.to));
  }
  if (!exists_on(role, pipes.to)) {
    fail("role", "SetFlag: this core has no %s", pipe_name(pipes.to));
  }
  flag.done = hand_over(pipes.from);
  flag.set = true;
  ++counters.flags;
}

void Core::wait_flag(HardEvent event, int id) {
  const EventPipes pipes = event_pipes(event);
  if (id < 0 || id >= kEventIds) fail("flag", "event id %d is not in [0, %d)", id, kEventIds);
  Signal& flag = flags_[static_cast<int>(event)][id];
  if (!flag.set) {
    fail("deadlock", "WaitFlag: nothing set flag %d of %s to %s", id, pipe_name(pipes.from),
         pipe_name(pipes.to));
  }
  receive(pipes.to, flag.done);
  flag.set = false;
}

void Core::barrier(pipe_t pipe) {
  ++counters.barriers;
  if (pipe == PIPE_S)
    fail("unsupported", "PipeBarrier<PIPE_S>: the hardware orders the scalar unit");
  if (pipe != PIPE_ALL) {
    VectorClock done = hand_over(pipe);
    receive(pipe, done);
    return;
  }
  VectorClock all(device.threads(), 0);
  for (int p = 0; p < kPipes; ++p) {
    if (exists_on(role, static_cast<pipe_t>(p))) join(all, hand_over(static_cast<pipe_t>(p)));
  }
  ++scalar_version_;
  for (Pipe& p : pipes_) {
    p.known = all;
    p.scalar_version = scalar_version_;
  }
}

int Core::peek_event(HardEvent event) {
  const int e = static_cast<int>(event);
  for (int id = 0; id < kEventIds; ++id) {
    if (!((taken_[e] | queued_[e]) >> id & 1)) return id;
  }
  fail("event", "all %d event ids of %s to %s are in use", kEventIds,
       pipe_name(event_pipes(event).from), pipe_name(event_pipes(event).to));
}

int Core::take_event(HardEvent event) {
  const int id = peek_event(event);
  taken_[static_cast<int>(event)] |= 1u << id;
  return id;
}

void Core::give_event(HardEvent event, int id) {
  const int e = static_cast<int>(event);
  if (id < 0 || id >= kEventIds || !(taken_[e] >> id & 1)) {
    fail("event", "ReleaseEventID: id %d was not allocated", id);
  }
  if (flags_[e][id].set) fail("event", "ReleaseEventID: flag %d is set and not waited for", id);
  taken_[e] &= ~(1u << id);
}

int Core::signal_queue(HardEvent event, Signal& signal) {
  const int id = peek_event(event), e = static_cast<int>(event);
  if (flags_[e][id].set) {
    fail("flag", "a queue takes event id %d, which the kernel has set without AllocEventID", id);
  }
  queued_[e] |= 1u << id;
  signal.done = hand_over(event_pipes(event).from);
  signal.set = true;
  ++counters.flags;
  return id;
}

void Core::await_queue(HardEvent event, Signal& signal, int id) {
  if (!signal.set) return;
  receive(event_pipes(event).to, signal.done);
  signal.set = false;
  queued_[static_cast<int>(event)] &= ~(1u << id);
}

uint32_t Core::allocate(Hardware hardware, uint32_t bytes, bool queue) {
  LocalMemory& local = memory(hardware);
  if (bytes == 0) fail("capacity", "InitBuffer: a buffer of 0 bytes");
  bytes = (bytes + kBlock - 1) / kBlock * kBlock;
  if (buffers.size() == kMaxBuffers) {
    fail("capacity", "InitBuffer: more than %d buffers of a TPipe", kMaxBuffers);
  }
  if (bytes > local.capacity || local.allocated > local.capacity - bytes) {
    fail("capacity", "InitBuffer: %u bytes more than %u of the %u bytes of %s", bytes,
         local.allocated, local.capacity, local.name);
  }
  const uint32_t begin = local.allocated;
  local.allocated += bytes;
  local.shadow.forget(begin, begin + bytes);
  std::fill_n(local.bytes.begin() + begin, bytes, uint8_t{0xFF});
  uint64_t& peak = hardware == Hardware::UB ? counters.peak_ub : counters.peak_l1;
  if (hardware == Hardware::UB || hardware == Hardware::L1) {
    peak = std::max<uint64_t>(peak, local.allocated);
  }
  Buffer buffer{};
  buffer.hardware = hardware;
  buffer.begin = begin;
  buffer.bytes = bytes;
  buffer.queue = queue;
  buffers.push_back(std::move(buffer));
  return static_cast<uint32_t>(buffers.size() - 1);
}

void Core::reset_buffers() {
  for (const Buffer& buffer : buffers) {
    if (buffer.queue && buffer.state != BufferState::kFree) {
      const char* state = buffer.state == BufferState::kQueued      ? "enqueued and not dequeued"
                          : buffer.state == BufferState::kAllocated ? "allocated and not freed"
                                                                    : "dequeued and not freed";
      fail("leak", "a tensor at byte %u of a queue's memory is %s at the end", buffer.begin, state);
    }
  }
  barrier(PIPE_ALL);
  buffers.clear();
  queued_.fill(0);
  for (auto& memory : memories_) {
    if (memory) memory->allocated = 0;
  }
}

void Core::check_end() {
  reset_buffers();
  for (int e = 0; e < kEvents; ++e) {
    const EventPipes pipes = event_pipes(static_cast<HardEvent>(e));
    for (int id = 0; id < kEventIds; ++id) {
      if (flags_[e][id].set) {
        fail("leak", "flag %d of %s to %s is set and never waited for", id, pipe_name(pipes.from),
             pipe_name(pipes.to));
      }
    }
    if (taken_[e] != 0) {
      fail("leak", "an event id of %s to %s is allocated and never released", pipe_name(pipes.from),
           pipe_name(pipes.to));
    }
  }
}

uint8_t* Device::add_region(std::string name, const void* values, uint64_t bytes, Access access) {
  regions.push_back(std::make_unique<Region>(std::move(name), values, bytes, access));
  return regions.back()->data;
}

Region& Device::region(const void* address, uint64_t bytes, const char* verb) {
  for (size_t i = 0; i < regions.size(); ++i) {
    const size_t at = (last_region_ + i) % regions.size();
    Region& region = *regions[at];
    if (!region.holds(address)) continue;
    last_region_ = at;
    const uint64_t offset = static_cast<const uint8_t*>(address) - region.data;
    if (offset > region.bytes || bytes > region.bytes - offset) {
      fail("bounds", "%s bytes [%llu, %llu) of '%s', which has %llu", verb,
           static_cast<unsigned long long>(offset), static_cast<unsigned long long>(offset + bytes),
           region.name.c_str(), static_cast<unsigned long long>(region.bytes));
    }
    return region;
  }
  fail("bounds", "%s %llu bytes of global memory outside every tensor", verb,
       static_cast<unsigned long long>(bytes));
}

const uint8_t* Device::read_global(const void* address, uint64_t bytes, pipe_t pipe) {
  Region& from = region(address, bytes, "reads");
  const uint64_t begin = static_cast<const uint8_t*>(address) - from.data;
  const Actor actor = core().actor(pipe);
  if (from.access != Access::kInput) {
    if (pipe == PIPE_S && from.shadow.written_in_launch(begin, begin + bytes)) {
      fail("cache", "GetValue: '%s' was written in this launch, past the scalar unit's cache",
           from.name.c_str());
    }
    from.shadow.read(begin, begin + bytes, actor);
  }
  return from.data + begin;
}

uint8_t* Device::write_global(void* address, uint64_t bytes, pipe_t pipe) {
  Region& to = region(address, bytes, "writes");
  if (to.access == Access::kInput) fail("bounds", "writes input '%s'", to.name.c_str());
  const uint64_t begin = static_cast<uint8_t*>(address) - to.data;
  to.shadow.write(begin, begin + bytes, core().actor(pipe), Write::kValue);
  return to.data + begin;
}

void Device::check_outputs() const {
  for (const auto& region : regions) {
    if (region->access != Access::kOutput) continue;
    const uint64_t missing = region->shadow.first_unwritten(0, region->bytes);
    if (missing < region->bytes) {
      throw Fault("unwritten", "the kernel never wrote byte " + std::to_string(missing) +
                                   " of output '" + region->name + "'");
    }
  }
}

Counters Device::totals() const {
  Counters totals;
  for (const auto& core : cores) totals.add(core->counters);
  return totals;
}

}  // namespace ascend_emulator
