// Dropout masks of the numbers that torch's bernoulli_ would draw next.
#pragma once

#include "kernels.h"
#include "mersenne_twister.h"

namespace fastlayers {

// Each draws one number per element, in the order of memory, and keeps an element with a probability in [0, 1].

// One byte per element, 0 or 1.
void draw_bytes(MersenneTwister& twister, double keep_probability, std::int64_t count, std::uint8_t* bytes);
// The bit mask of a tensor whose planes or rows lie one after the other without gaps.
void draw_bits(MersenneTwister& twister, double keep_probability, const Geometry& geometry, std::uint8_t* bits);

}  // namespace fastlayers
