// Division of integers below 2^31 by a number that is the same for all threads: a multiplication and a shift.
// Granlund and Montgomery 1994, "Division by Invariant Integers using Multiplication", section 4.
#pragma once

#include <bit>
#include <cstdint>

#include "../common/macros.h"
#include "runtime.h"

namespace fastlayers::cuda {

struct Divisor {
  std::uint32_t divisor = 1, multiplier = (1u << 31) + 1, shift = 31;

  Divisor() = default;
  // 0 < divisor < 2^31
  explicit Divisor(std::uint32_t d) : divisor(d), shift(31 + static_cast<std::uint32_t>(std::bit_width(d - 1))) {
    multiplier = static_cast<std::uint32_t>((std::uint64_t{1} << shift) / d + 1);
  }

  FL_INLINE std::uint32_t quotient(std::uint32_t n) const {
    return static_cast<std::uint32_t>(std::uint64_t{n} * multiplier >> shift);
  }
  FL_INLINE std::uint32_t remainder(std::uint32_t n, std::uint32_t quotient) const { return n - quotient * divisor; }
};

// An int from 1 on that divides as fast, for formulas that are written for plain ones.
class Factor {
 public:
  Factor(int value = 1) : divisor_(static_cast<std::uint32_t>(value)) {}
  FL_INLINE operator int() const { return static_cast<int>(divisor_.divisor); }
  // n >= 0
  friend FL_INLINE int operator/(int n, const Factor& by) {
    return static_cast<int>(by.divisor_.quotient(static_cast<std::uint32_t>(n)));
  }
  friend FL_INLINE int operator%(int n, const Factor& by) { return n - n / by * by; }

 private:
  Divisor divisor_;
};

}  // namespace fastlayers::cuda
