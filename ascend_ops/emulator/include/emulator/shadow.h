// Happens-before: vector clocks, and who last touched which bytes.
//
// A thread is one pipe of one core. Its clock advances where it hands its work on (a flag, a
// barrier), not with every instruction, so that neighbouring accesses have equal records and merge
// (the epochs of FastTrack, Flanagan and Freund, PLDI 2009).
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <vector>

namespace ascend_emulator {

using Clock = uint32_t;
using VectorClock = std::vector<Clock>;

inline void join(VectorClock& into, const VectorClock& from) {
  for (size_t i = 0; i < into.size(); ++i) into[i] = into[i] < from[i] ? from[i] : into[i];
}

struct Epoch {
  int thread = -1;  // -1: nobody in this launch
  Clock clock = 0;
  bool operator==(const Epoch& other) const {
    return thread == other.thread && clock == other.clock;
  }
};

// What a thread knows when it touches memory.
struct Actor {
  Epoch now;
  const VectorClock* known;
  bool in_order;  // the pipe executes its instructions one after another

  bool follows(const Epoch& earlier) const {
    if (earlier.thread < 0) return true;
    if (earlier.thread == now.thread && in_order) return true;
    return earlier.clock <= (*known)[earlier.thread];
  }
};

enum class Write { kValue, kGarbage };

// The shadow of one memory, byte by byte, as runs of equal records.
class Shadow {
 public:
  explicit Shadow(const char* name) : name_(name) {}

  // Bytes that hold values before the launch.
  void fill(uint64_t begin, uint64_t end);
  void read(uint64_t begin, uint64_t end, const Actor& actor);
  void write(uint64_t begin, uint64_t end, const Actor& actor, Write kind);
  // Nothing is known of these bytes any more: memory that TPipe gives out anew.
  void forget(uint64_t begin, uint64_t end);
  // The first byte in [begin, end) that nothing wrote; `end` if there is none.
  uint64_t first_unwritten(uint64_t begin, uint64_t end) const;
  bool written_in_launch(uint64_t begin, uint64_t end) const;

 private:
  struct Run {
    uint64_t end;
    bool written;
    Epoch writer;
    std::vector<Epoch> readers;  // since the last write
    bool same_record(const Run& other) const {
      return written == other.written && writer == other.writer && readers == other.readers;
    }
  };
  using Runs = std::map<uint64_t, Run>;

  Runs::iterator first_over(uint64_t begin);
  void split(uint64_t at);
  void merge_around(Runs::iterator run);
  [[noreturn]] void race(uint64_t at, const char* mine, const char* theirs, const Epoch& earlier);

  const char* name_;
  Runs runs_;
};

}  // namespace ascend_emulator
