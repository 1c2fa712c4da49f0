// The fibres of a launch.
#include <ucontext.h>

#include <exception>

#include "emulator/device.h"

namespace ascend_emulator {
namespace {

constexpr size_t kStackBytes = 256 * 1024;

Core* running = nullptr;

// Thrown into the waiting cores of a launch that has failed, so that their objects are destroyed.
struct Cancelled {};

}  // namespace

struct Device::Fibres {
  struct Fibre {
    ucontext_t context;
    std::vector<char> stack;
    const std::function<bool()>* ready = nullptr;
    bool done = false;
  };

  Fibres(Device& device, const std::function<void()>& kernel) : device(device), kernel(kernel) {}

  static void enter(unsigned high, unsigned low) {
    auto* self = reinterpret_cast<Fibres*>(uint64_t{high} << 32 | low);
    self->body();
  }

  void body() {
    try {
      kernel();
      running->check_end();
    } catch (const Cancelled&) {
    } catch (...) {
      if (!failure) failure = std::current_exception();
    }
    fibres[running->index].done = true;
    swapcontext(&fibres[running->index].context, &scheduler);
  }

  void resume(int index) {
    running = device.cores[index].get();
    swapcontext(&scheduler, &fibres[index].context);
    running = nullptr;
  }

  void start() {
    fibres.resize(device.cores.size());
    for (Fibre& fibre : fibres) {
      fibre.stack.resize(kStackBytes);
      getcontext(&fibre.context);
      fibre.context.uc_stack.ss_sp = fibre.stack.data();
      fibre.context.uc_stack.ss_size = fibre.stack.size();
      fibre.context.uc_link = nullptr;
      const uint64_t self = reinterpret_cast<uint64_t>(this);
      makecontext(&fibre.context, reinterpret_cast<void (*)()>(&Fibres::enter), 2,
                  static_cast<unsigned>(self >> 32), static_cast<unsigned>(self));
    }
  }

  void run() {
    start();
    for (;;) {
      bool progress = false, open = false;
      for (size_t i = 0; i < fibres.size(); ++i) {
        Fibre& fibre = fibres[i];
        if (fibre.done) continue;
        open = true;
        if (!failure && fibre.ready != nullptr && !(*fibre.ready)()) continue;
        // A core that never started has nothing to clean up.
        if (failure && fibre.ready == nullptr) {
          fibre.done = true;
        } else {
          resume(static_cast<int>(i));
        }
        progress = true;
      }
      if (!open) break;
      if (!progress) report_deadlock();
    }
    if (failure) std::rethrow_exception(failure);
  }

  void report_deadlock() {
    std::string text = "no core can go on:";
    for (const auto& core : device.cores) {
      if (fibres[core->index].done) continue;
      text += " core " + std::to_string(core->index) + " waits for " + core->waiting_for + ";";
    }
    failure = std::make_exception_ptr(Fault("deadlock", text));
  }

  Device& device;
  const std::function<void()>& kernel;
  std::vector<Fibre> fibres;
  ucontext_t scheduler;
  std::exception_ptr failure;
};

Device::Device(const Launch& launch) : launch(launch) {
  const int per_block = launch.mixed ? 3 : 1;
  cores.resize(static_cast<size_t>(launch.blocks) * per_block);
  for (int block = 0; block < launch.blocks; ++block) {
    for (int i = 0; i < per_block; ++i) {
      const bool cube = launch.cube_only || (launch.mixed && i == 0);
      const int index = block * per_block + i;
      cores[index] = std::make_unique<Core>(*this, index, cube ? Role::kCube : Role::kVector, block,
                                            launch.mixed && !cube ? i - 1 : 0);
    }
  }
}

Device::~Device() = default;

void Device::run(const std::function<void()>& kernel) {
  fibres_ = std::make_unique<Fibres>(*this, kernel);
  fibres_->run();
  for (const auto& check : at_end) check();
  check_outputs();
}

void Device::wait(const std::string& what, const std::function<bool()>& ready) {
  Core& self = core();
  auto& fibre = fibres_->fibres[self.index];
  self.waiting_for = what;
  while (!ready()) {
    fibre.ready = &ready;
    swapcontext(&fibre.context, &fibres_->scheduler);
    if (fibres_->failure) throw Cancelled();
  }
  fibre.ready = nullptr;
  self.waiting_for.clear();
}

void Device::sync_all(bool vector_only) {
  Core& self = core();
  if (vector_only && self.role != Role::kVector) {
    fail("role", "SyncAll<true> is for the vector cores");
  }
  ++self.counters.sync_all;
  int members = 0;
  for (const auto& other : cores) members += !vector_only || other->role == Role::kVector;
  self.barrier(PIPE_ALL);
  Meeting& meeting = meetings_[vector_only];
  if (meeting.arrived == 0) meeting.done.assign(threads(), 0);
  join(meeting.done, self.hand_over(PIPE_S));
  const uint64_t round = meeting.round;
  if (++meeting.arrived == members) {
    meeting.arrived = 0;
    ++meeting.round;
    // The next round cannot end before every core has received this one and come back.
    meeting.ended = meeting.done;
  } else {
    wait("SyncAll", [&] { return meeting.round != round; });
  }
  self.receive(PIPE_S, meeting.ended);
}

Core& core() {
  if (running == nullptr) throw Fault("outside", "AscendC code runs outside of a launch");
  return *running;
}

Core* current_core() { return running; }

std::string whereabouts() {
  if (running == nullptr) return "";
  return std::string(running->role == Role::kVector ? "vector" : "cube") + " core " +
         std::to_string(running->index) + ": ";
}

}  // namespace ascend_emulator
