// IEEE doubles in integers: the contract forms sums in double, and the scalar unit of an AI core
// has none. Round to nearest, ties to even; a NaN is the quiet one.
#pragma once

#include "branch_memory.h"

namespace lopa {
namespace branch {

class Double {
 public:
  uint64_t bits = 0;

  __aicore__ inline Double() {}
  __aicore__ inline static Double OfBits(uint64_t bits) {
    Double d;
    d.bits = bits;
    return d;
  }

  __aicore__ inline static Double OfFloat(float value) {
    union {
      float value;
      uint32_t bits;
    } word;
    word.value = value;
    const uint64_t sign = static_cast<uint64_t>(word.bits >> 31) << 63;
    int32_t exponent = static_cast<int32_t>(word.bits >> 23 & 0xFF);
    uint64_t mantissa = word.bits & 0x7FFFFFu;
    if (exponent == 0xFF) return OfBits(sign | kInfinity | mantissa << 29);
    if (exponent == 0) {
      if (mantissa == 0) return OfBits(sign);
      exponent = 1;
      while ((mantissa & 0x800000u) == 0) {
        mantissa <<= 1;
        --exponent;
      }
      mantissa &= 0x7FFFFFu;
    }
    return OfBits(sign | static_cast<uint64_t>(exponent + 1023 - 127) << 52 | mantissa << 29);
  }

  __aicore__ inline static Double OfInteger(uint32_t value) {
    if (value == 0) return Double();
    uint64_t significand = static_cast<uint64_t>(value) << 31;
    int32_t exponent = 1023 + 31;
    while ((significand & kLead) == 0) {
      significand <<= 1;
      --exponent;
    }
    return Round(0, exponent, significand);
  }

  __aicore__ inline float ToFloat() const {
    union {
      uint32_t bits;
      float value;
    } word;
    const uint32_t sign = static_cast<uint32_t>(bits >> 63) << 31;
    int32_t exponent = Exponent() - 1023 + 127;
    uint64_t significand = Significand() >> 30;  // the leading bit at 32, 9 below the last place
    if ((Significand() & ((uint64_t{1} << 30) - 1)) != 0) significand |= 1;
    if (Exponent() == 0x7FF) {
      word.bits = sign | 0x7F800000u | (Mantissa() != 0 ? 0x400000u : 0u);
      return word.value;
    }
    if (exponent <= 0) {
      significand = ShiftRight(significand, 1 - exponent);
      exponent = 1;
    }
    uint64_t rounded = significand >> 9;
    const uint64_t rest = significand & 0x1FF;
    if (rest > 0x100 || (rest == 0x100 && (rounded & 1) != 0)) ++rounded;
    rounded += static_cast<uint64_t>(exponent - 1) << 23;
    word.bits = sign | (rounded >= 0x7F800000u ? 0x7F800000u : static_cast<uint32_t>(rounded));
    return word.value;
  }

  __aicore__ inline bool IsNan() const { return Exponent() == 0x7FF && Mantissa() != 0; }
  __aicore__ inline bool IsInfinite() const { return Exponent() == 0x7FF && Mantissa() == 0; }
  __aicore__ inline bool IsZero() const { return (bits << 1) == 0; }
  __aicore__ inline Double Negated() const { return OfBits(bits ^ kSign); }

  __aicore__ inline Double Plus(const Double& other) const {
    if (IsNan() || other.IsNan()) return OfBits(kNan);
    if (IsInfinite() || other.IsInfinite()) {
      if (IsInfinite() && other.IsInfinite() && bits != other.bits) return OfBits(kNan);
      return IsInfinite() ? *this : other;
    }
    if (IsZero() || other.IsZero()) {
      if (IsZero() && other.IsZero()) return OfBits(bits & other.bits);
      return IsZero() ? other : *this;
    }
    const bool swap = (bits << 1) < (other.bits << 1);
    const Double& a = swap ? other : *this;
    const Double& b = swap ? *this : other;
    int32_t exponent = a.ScaledExponent();
    uint64_t sum = a.Significand();
    const uint64_t small = ShiftRight(b.Significand(), exponent - b.ScaledExponent());
    if ((a.bits ^ b.bits) >> 63 == 0) {
      sum += small;
      if (sum >> 63 != 0) {
        sum = ShiftRight(sum, 1);
        ++exponent;
      }
    } else {
      sum -= small;
      if (sum == 0) return Double();
      while ((sum & kLead) == 0) {
        sum <<= 1;
        --exponent;
      }
    }
    return Round(a.bits & kSign, exponent, sum);
  }

  __aicore__ inline Double Times(const Double& other) const {
    const uint64_t sign = (bits ^ other.bits) & kSign;
    if (IsNan() || other.IsNan()) return OfBits(kNan);
    if (IsInfinite() || other.IsInfinite()) {
      return OfBits(IsZero() || other.IsZero() ? kNan : sign | kInfinity);
    }
    if (IsZero() || other.IsZero()) return OfBits(sign);
    int32_t exponent = ScaledExponent() + other.ScaledExponent() - 1023;
    uint64_t a = Significand(), b = other.Significand();
    Normalise(a, exponent);
    Normalise(b, exponent);
    b <<= 1;
    // The 127 bits of the product, from halves.
    const uint64_t a_high = a >> 32, a_low = a & 0xFFFFFFFFu;
    const uint64_t b_high = b >> 32, b_low = b & 0xFFFFFFFFu;
    const uint64_t low = a_low * b_low, middle = a_high * b_low + (low >> 32);
    const uint64_t cross = a_low * b_high + (middle & 0xFFFFFFFFu);
    uint64_t high = a_high * b_high + (middle >> 32) + (cross >> 32);
    uint64_t rest = cross << 32 | (low & 0xFFFFFFFFu);
    if ((high & kLead) == 0) {
      high = high << 1 | rest >> 63;
      rest <<= 1;
    } else {
      ++exponent;
    }
    return Round(sign, exponent, high | (rest != 0 ? 1 : 0));
  }

  // By a number that is not zero, not infinite and no NaN.
  __aicore__ inline Double Over(const Double& other) const {
    const uint64_t sign = (bits ^ other.bits) & kSign;
    if (IsNan()) return *this;
    if (IsInfinite()) return OfBits(sign | kInfinity);
    if (IsZero()) return OfBits(sign);
    int32_t exponent = ScaledExponent() - other.ScaledExponent() + 1023;
    uint64_t rest = Significand(), divisor = other.Significand(), quotient = 0;
    Normalise(rest, exponent);
    int32_t divisor_shift = 0;
    Normalise(divisor, divisor_shift);
    exponent -= divisor_shift;
    if (rest < divisor) {
      rest <<= 1;
      --exponent;
    }
    for (int32_t i = 0; i < 63; ++i) {
      quotient <<= 1;
      if (rest >= divisor) {
        rest -= divisor;
        quotient |= 1;
      }
      rest <<= 1;
    }
    return Round(sign, exponent, quotient | (rest != 0 ? 1 : 0));
  }

  // No comparison holds for a NaN.
  __aicore__ inline bool Less(const Double& other) const {
    if (IsNan() || other.IsNan() || (IsZero() && other.IsZero())) return false;
    return Order() < other.Order();
  }

  // The integer below a number in [0, 2^32).
  __aicore__ inline uint32_t Floor() const {
    const int32_t shift = 1023 + 62 - Exponent();
    return shift > 62 ? 0 : static_cast<uint32_t>(Significand() >> shift);
  }

 private:
  static constexpr uint64_t kSign = uint64_t{1} << 63;
  static constexpr uint64_t kInfinity = uint64_t{0x7FF} << 52;
  static constexpr uint64_t kNan = kInfinity | uint64_t{1} << 51;
  // Significands have their leading bit here: ten bits below the last place, the last for all
  // that is further below.
  static constexpr uint64_t kLead = uint64_t{1} << 62;

  __aicore__ inline int32_t Exponent() const { return static_cast<int32_t>(bits >> 52 & 0x7FF); }
  __aicore__ inline int32_t ScaledExponent() const { return Exponent() == 0 ? 1 : Exponent(); }
  __aicore__ inline uint64_t Mantissa() const { return bits & ((uint64_t{1} << 52) - 1); }
  __aicore__ inline uint64_t Significand() const {
    return (Mantissa() | (Exponent() == 0 ? 0 : uint64_t{1} << 52)) << 10;
  }
  __aicore__ inline uint64_t Order() const { return (bits & kSign) != 0 ? ~bits : bits | kSign; }

  __aicore__ inline static void Normalise(uint64_t& significand, int32_t& exponent) {
    while ((significand & kLead) == 0) {
      significand <<= 1;
      --exponent;
    }
  }

  __aicore__ inline static uint64_t ShiftRight(uint64_t value, int32_t by) {
    if (by <= 0) return value;
    if (by > 63) return value != 0 ? 1 : 0;
    const uint64_t lost = value & ((uint64_t{1} << by) - 1);
    return value >> by | (lost != 0 ? 1 : 0);
  }

  __aicore__ inline static Double Round(uint64_t sign, int32_t exponent, uint64_t significand) {
    if (exponent <= 0) {
      significand = ShiftRight(significand, 1 - exponent);
      exponent = 1;
    }
    uint64_t rounded = significand >> 10;
    const uint64_t rest = significand & 0x3FF;
    if (rest > 0x200 || (rest == 0x200 && (rounded & 1) != 0)) ++rounded;
    // The leading bit, where there is one, counts the exponent up by one.
    rounded += static_cast<uint64_t>(exponent - 1) << 52;
    return OfBits(sign | (rounded >= kInfinity ? kInfinity : rounded));
  }
};

}  // namespace branch
}  // namespace lopa
