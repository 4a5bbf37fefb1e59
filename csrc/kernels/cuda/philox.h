// Random numbers for element-wise dropout: Philox4x32-10 of Salmon et al. 2011, "Parallel Random Numbers: As Easy as
// 1, 2, 3", https://doi.org/10.1145/2063384.2063405, section 4.
//
// Element i in the order of memory is kept where word i % 4 of counter i / 4 is below (1 - p) 2^32. The seed is the
// key.
#pragma once

#include <cstdint>

#include "../common/macros.h"
#include "runtime.h"

namespace fastlayers::cuda {

struct PhiloxWords {
  std::uint32_t words[4];
};

FL_INLINE PhiloxWords philox(std::uint64_t seed, std::uint64_t counter) {
  auto k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
  PhiloxWords c{{static_cast<std::uint32_t>(counter), static_cast<std::uint32_t>(counter >> 32), 0, 0}};
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = 0xD2511F53ull * c.words[0], b = 0xCD9E8D57ull * c.words[2];
    c = {{static_cast<std::uint32_t>(b >> 32) ^ c.words[1] ^ k0, static_cast<std::uint32_t>(b),
          static_cast<std::uint32_t>(a >> 32) ^ c.words[3] ^ k1, static_cast<std::uint32_t>(a)}};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

// (1 - p) 2^32, to the nearest, from 1 / (1 - p); 0 where nothing is kept.
FL_INLINE std::uint64_t keep_threshold(double scale) {
  return scale > 0 ? static_cast<std::uint64_t>(4294967296.0 / scale + 0.5) : 0;
}

// Bit j: whether element `first` + j is kept, for the 8 elements from `first`, a multiple of 8, on.
FL_INLINE unsigned kept_bits(std::uint64_t seed, std::uint64_t threshold, std::uint64_t first) {
  unsigned bits = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const PhiloxWords random = philox(seed, first / 4 + half);
#pragma unroll
    for (int j = 0; j < 4; ++j) bits |= static_cast<unsigned>(random.words[j] < threshold) << (4 * half + j);
  }
  return bits;
}

}  // namespace fastlayers::cuda
