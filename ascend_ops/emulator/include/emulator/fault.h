// What the emulator says when a kernel breaks a rule.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <stdexcept>
#include <string>

namespace ascend_emulator {

// `kind` is one word for the rule; tests match on it.
class Fault : public std::runtime_error {
 public:
  Fault(const char* kind, const std::string& message)
      : std::runtime_error("[" + std::string(kind) + "] " + message) {}
};

// Where execution stands, for messages; device.cpp knows.
std::string whereabouts();

[[noreturn]] __attribute__((format(printf, 2, 3))) inline void fail(const char* kind,
                                                                    const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  throw Fault(kind, whereabouts() + text);
}

}  // namespace ascend_emulator
