#include "emulator/shadow.h"

#include <algorithm>
#include <iterator>

#include "emulator/device.h"

namespace ascend_emulator {
namespace {

std::string describe(int thread) {
  const pipe_t pipe = static_cast<pipe_t>(thread % kPipes);
  return "core " + std::to_string(thread / kPipes) + " " + pipe_name(pipe);
}

}  // namespace

Shadow::Runs::iterator Shadow::first_over(uint64_t begin) {
  auto run = runs_.upper_bound(begin);
  if (run != runs_.begin()) {
    auto before = std::prev(run);
    if (before->second.end > begin) return before;
  }
  return run;
}

void Shadow::split(uint64_t at) {
  auto run = first_over(at);
  if (run == runs_.end() || run->first >= at) return;
  Run tail = run->second;
  run->second.end = at;
  runs_.emplace_hint(std::next(run), at, std::move(tail));
}

void Shadow::merge_around(Runs::iterator run) {
  auto next = std::next(run);
  if (next != runs_.end() && run->second.end == next->first &&
      run->second.same_record(next->second)) {
    run->second.end = next->second.end;
    runs_.erase(next);
  }
  if (run == runs_.begin()) return;
  auto before = std::prev(run);
  if (before->second.end == run->first && before->second.same_record(run->second)) {
    before->second.end = run->second.end;
    runs_.erase(run);
  }
}

void Shadow::race(uint64_t at, const char* mine, const char* theirs, const Epoch& earlier) {
  fail("race", "%s byte %llu of %s, which %s %s with no synchronisation in between", mine,
       static_cast<unsigned long long>(at), name_, describe(earlier.thread).c_str(), theirs);
}

void Shadow::fill(uint64_t begin, uint64_t end) {
  if (begin < end) runs_[begin] = {end, true, {}, {}};
}

void Shadow::forget(uint64_t begin, uint64_t end) {
  if (begin >= end) return;
  split(begin);
  split(end);
  runs_.erase(runs_.lower_bound(begin), runs_.lower_bound(end));
}

uint64_t Shadow::first_unwritten(uint64_t begin, uint64_t end) const {
  auto run = runs_.upper_bound(begin);
  if (run != runs_.begin()) --run;
  for (; begin < end && run != runs_.end(); ++run) {
    if (run->second.end <= begin) continue;
    if (run->first > begin || !run->second.written) return begin;
    begin = run->second.end;
  }
  return std::min(begin, end);
}

bool Shadow::written_in_launch(uint64_t begin, uint64_t end) const {
  auto run = runs_.upper_bound(begin);
  if (run != runs_.begin()) --run;
  for (; run != runs_.end() && run->first < end; ++run) {
    if (run->second.end > begin && run->second.writer.thread >= 0) return true;
  }
  return false;
}

void Shadow::read(uint64_t begin, uint64_t end, const Actor& actor) {
  if (begin >= end) return;
  bool known = true;
  uint64_t at = begin;
  for (auto run = first_over(begin); at < end; ++run) {
    if (run == runs_.end() || run->first > at || !run->second.written) {
      fail("uninitialized", "reads byte %llu of %s, which nothing wrote",
           static_cast<unsigned long long>(at), name_);
    }
    if (!actor.follows(run->second.writer)) race(at, "reads", "wrote", run->second.writer);
    const auto& readers = run->second.readers;
    known = known && std::find(readers.begin(), readers.end(), actor.now) != readers.end();
    at = run->second.end;
  }
  if (known) return;
  split(begin);
  split(end);
  for (auto run = runs_.lower_bound(begin); run != runs_.end() && run->first < end; ++run) {
    auto& readers = run->second.readers;
    auto own = std::find_if(readers.begin(), readers.end(),
                            [&](const Epoch& reader) { return reader.thread == actor.now.thread; });
    if (own == readers.end()) {
      readers.push_back(actor.now);
    } else {
      own->clock = actor.now.clock;
    }
  }
  // Reads that go on where others ended make one run.
  auto after = runs_.lower_bound(end);
  if (after != runs_.begin()) merge_around(std::prev(after));
  auto first = runs_.find(begin);
  if (first != runs_.end()) merge_around(first);
}

void Shadow::write(uint64_t begin, uint64_t end, const Actor& actor, Write kind) {
  if (begin >= end) return;
  for (auto run = first_over(begin); run != runs_.end() && run->first < end; ++run) {
    const uint64_t at = std::max(begin, run->first);
    if (!actor.follows(run->second.writer)) race(at, "writes", "wrote", run->second.writer);
    for (const Epoch& reader : run->second.readers) {
      if (!actor.follows(reader)) race(at, "writes", "read", reader);
    }
  }
  auto exact = runs_.find(begin);
  if (exact == runs_.end() || exact->second.end != end) {
    split(begin);
    split(end);
    runs_.erase(runs_.lower_bound(begin), runs_.lower_bound(end));
    exact = runs_.emplace(begin, Run{end, true, {}, {}}).first;
  }
  exact->second.written = kind == Write::kValue;
  exact->second.writer = actor.now;
  exact->second.readers.clear();
  merge_around(exact);
}

}  // namespace ascend_emulator
