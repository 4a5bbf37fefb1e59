// Kernels without channels' sums: dropout alone, and masks as bools.
#pragma once

#include "divisor.h"
#include "keep.h"

namespace fastlayers::cuda {

inline constexpr int kPointwiseThreads = 256;

// Division of positions in a tensor, in 32 bits where they fit.
struct PositionDivisor {
  std::int64_t divisor = 1;
  Divisor in_32_bits;
  bool fits = false;

  PositionDivisor() = default;
  PositionDivisor(std::int64_t d, std::int64_t numel) : divisor(d), fits(numel < (std::int64_t{1} << 31)) {
    if (fits) in_32_bits = Divisor(static_cast<std::uint32_t>(d));
  }
  FL_INLINE std::int64_t quotient(std::int64_t n) const {
    return fits ? in_32_bits.quotient(static_cast<std::uint32_t>(n)) : n / divisor;
  }
};

struct DropoutWalk {
  std::int64_t numel = 0, channels = 1;
  PositionDivisor by_channels, by_spatial;
  bool rows = false, aligned = false, whole = false;  // whole: a group is of one plane, or of 8 channels of one row
};

// Where the mask has the answer for the element at position i of memory.
__device__ __forceinline__ std::int64_t plane_of(const DropoutWalk& walk, std::int64_t i) {
  if (!walk.rows) return walk.by_spatial.quotient(i);
  const std::int64_t row = walk.by_channels.quotient(i);
  return walk.by_spatial.quotient(row) * walk.channels + (i - row * walk.channels);
}

__device__ __forceinline__ unsigned kept_of(const Keep& keep, const DropoutWalk& walk, std::int64_t first, Span valid) {
  if (keep.seed) return KeptElements(keep).from(first);
  if (walk.whole && !walk.rows) return is_kept(keep, plane_of(walk, first)) ? 0xffu : 0;
  const std::int64_t plane = walk.whole ? plane_of(walk, first) : 0;
  unsigned bits = 0;
#pragma unroll
  for (int e = 0; e < kGroup; ++e)
    if (valid.has(e) && is_kept(keep, walk.whole ? plane + e : plane_of(walk, first + e))) bits |= 1u << e;
  return bits;
}

template <class T>
__global__ void __launch_bounds__(kPointwiseThreads) dropout_groups(const DropoutArgs args, const DropoutWalk walk) {
  const std::int64_t first = (std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kGroup;
  if (first >= walk.numel) return;
  const std::int64_t left = walk.numel - first;
  const Span valid{0, static_cast<int>(left < kGroup ? left : kGroup)};
  const unsigned kept = kept_of(args.keep, walk, first, valid);
  Group<T> group = zeros<T>();
  if (kept) {
    const Group<T> x = load(static_cast<const T*>(args.input) + first, valid, walk.aligned);
    const auto scale = static_cast<Compute<T>>(args.keep.scale);
#pragma unroll
    for (int e = 0; e < kGroup; ++e) group.set(e, kept >> e & 1 ? x[e] * scale : Compute<T>(0));
  }
  store(static_cast<T*>(args.output) + first, group, valid, walk.aligned);
}

}  // namespace fastlayers::cuda
