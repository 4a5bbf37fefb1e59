// What dropout keeps: whole planes, as a mask says, or elements, by random numbers.
#pragma once

#include "philox.h"
#include "storage.h"

namespace fastlayers::cuda {

// Calls f with the mask of planes as what it consists of.
template <class F>
__device__ __forceinline__ auto with_mask(const Keep& keep, F&& f) {
  switch (keep.plane_bytes) {
    case 1: return f(static_cast<const std::uint8_t*>(keep.planes));
    case 2: return f(static_cast<const std::uint16_t*>(keep.planes));
    case 4: return f(static_cast<const std::uint32_t*>(keep.planes));
    default: return f(static_cast<const std::uint64_t*>(keep.planes));
  }
}

__device__ __forceinline__ bool is_kept(const Keep& keep, std::int64_t plane) {
  return with_mask(keep, [&](const auto* planes) { return planes[plane] != 0; });
}

// Which of 8 values are there and not zero, as bits.
template <class Word>
__device__ __forceinline__ unsigned nonzero_bits(const Word* from, Span valid, bool aligned) {
  struct alignas(8) Eight {
    Word values[kGroup];
  };
  Eight eight;
  if (aligned && valid.whole()) {
    eight = *reinterpret_cast<const Eight*>(from);
  } else {
#pragma unroll
    for (int e = 0; e < kGroup; ++e) eight.values[e] = valid.has(e) ? from[e] : Word(0);
  }
  unsigned bits = 0;
#pragma unroll
  for (int e = 0; e < kGroup; ++e) bits |= static_cast<unsigned>(eight.values[e] != 0) << e;
  return bits;
}

// Of 8 channels of a sample, of which `first` is the first plane.
__device__ __forceinline__ unsigned kept_channels(const Keep& keep, std::int64_t first, Span valid, bool aligned) {
  return with_mask(keep, [&](const auto* planes) { return nonzero_bits(planes + first, valid, aligned); });
}

// Of elements, by their numbers in the order of memory.
class KeptElements {
 public:
  explicit __device__ __forceinline__ KeptElements(const Keep& keep)
      : seed_(static_cast<std::uint64_t>(*keep.seed)), threshold_(keep_threshold(keep.scale)) {}
  // Of the 8 from `first`, a multiple of 8, on.
  __device__ __forceinline__ unsigned from(std::int64_t first) const {
    return kept_bits(seed_, threshold_, static_cast<std::uint64_t>(first));
  }

 private:
  std::uint64_t seed_, threshold_;
};

}  // namespace fastlayers::cuda
