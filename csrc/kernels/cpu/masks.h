// Packing a mask of one byte per element into bits, and back.
#pragma once

#include "kernels.h"

namespace fastlayers {

// `bytes` holds 0 or 1 for each element in the order of `geometry`'s planes or rows, without gaps.
void pack_bits(const Geometry& geometry, const std::uint8_t* bytes, std::uint8_t* bits, ParallelFor parallel_for);
void unpack_bits(const Geometry& geometry, const std::uint8_t* bits, std::uint8_t* bytes, ParallelFor parallel_for);

}  // namespace fastlayers
