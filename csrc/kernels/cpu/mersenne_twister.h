// MT19937 (Matsumoto and Nishimura 1998, "Mersenne Twister"), the generator behind torch's random numbers on the CPU,
// in blocks for vector code. isa_random.cpp has it, once per instruction set.
#pragma once

#include <cstdint>

namespace fastlayers {

struct MersenneTwister {
  static constexpr int kWords = 624;

  std::uint32_t words[kWords];
  std::int64_t next = kWords;  // the first word that nobody has had yet; kWords where a new block is due
};

struct RandomKernels {
  // Reads a block of kWords words and writes the one that follows it behind it.
  void (*next_block)(std::uint32_t* words);

  // Makes `count` values in [0, 1) of two words each, as torch makes doubles, and sets bit i of `bits` where value i is
  // below limit * 2^-53. Reads up to 2 * kReadAhead words and writes up to 2 bytes more than that takes.
  void (*below)(const std::uint32_t* words, std::int64_t count, std::uint64_t limit, std::uint8_t* bits);
  static constexpr int kReadAhead = 16;
};

// Of the instruction set that capability() says.
const RandomKernels& random_kernels();

}  // namespace fastlayers
