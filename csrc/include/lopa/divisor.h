// Division by a number that the host knows, without a division on the device.
#pragma once

#include <bit>
#include <cstdint>

namespace lopa {

// A number from 1 to 2^31 - 1: with s = ceil(log2 value), `multiplier` is 2^(31 + s) / value,
// rounded up, and `shift` 31 + s; exact for dividends below 2^31 (Granlund and Montgomery, Division
// by Invariant Integers using Multiplication, PLDI 1994).
struct Divisor {
  uint32_t value;
  uint32_t multiplier;
  uint32_t shift;
};

constexpr Divisor make_divisor(uint32_t value) {
  const uint32_t shift = 31 + std::bit_width(value - 1);
  const uint64_t power = uint64_t{1} << shift;
  return {value, static_cast<uint32_t>((power + value - 1) / value), shift};
}

constexpr uint32_t divide(uint32_t x, const Divisor& by) {
  return static_cast<uint32_t>((static_cast<uint64_t>(x) * by.multiplier) >> by.shift);
}

}  // namespace lopa
