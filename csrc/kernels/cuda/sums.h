// Sums over the threads of a block and the blocks of a cluster, always in the same order: two doubles for each channel.
#pragma once

#include "../common/batch_norm.h"
#include "launch_limits.h"
#include "runtime.h"

namespace fastlayers::cuda {

// What is summed over a channel. Forward: deviations from an origin, and their squares. Backward: gradients, and their
// products with deviations from the mean.
struct Pair {
  double first = 0, second = 0;
  __device__ __forceinline__ void add(const Pair& other) {
    first += other.first;
    second += other.second;
  }
};
static_assert(sizeof(Pair) == kPairBytes);

__device__ __forceinline__ Pair warp_sum(Pair sum) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const double first = __shfl_xor_sync(0xffffffffu, sum.first, offset);
    const double second = __shfl_xor_sync(0xffffffffu, sum.second, offset);
    sum.add({first, second});
  }
  return sum;
}

// The sum over a block, whose size is a multiple of 32, in every thread. `scratch` has room for a Pair per warp.
__device__ __forceinline__ Pair block_sum(Pair sum, Pair* scratch) {
  sum = warp_sum(sum);
  const int warps = static_cast<int>(blockDim.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  __syncthreads();  // whoever still reads an earlier sum from scratch
  if (lane == 0) scratch[threadIdx.x / kWarp] = sum;
  __syncthreads();
  return warp_sum(lane < warps ? scratch[lane] : Pair{});
}

// The same over all blocks of a cluster. `total` is a Pair of shared memory; the caller has to keep it, by
// cluster_sync, until all blocks have read it.
__device__ __forceinline__ Pair cluster_sum(Pair sum, Pair* scratch, Pair* total) {
  sum = block_sum(sum, scratch);
  const int blocks = cluster_size();
  if (blocks == 1) return sum;
  if (threadIdx.x == 0) *total = sum;
  cluster_sync();
  Pair all;
  for (int rank = 0; rank < blocks; ++rank) all.add(*cluster_peer(total, rank));
  return all;
}

// Sums of deviations from an origin near the data, for the moments of a channel. float tiles are summed about their own
// mean, so that no digits are lost where the mean is large beside the spread, and carried over to double; double sums
// about a common origin need no more than to be added where threads and blocks meet.
//
// A channel's origin is its first element: in double, even one far from all others costs no digits that matter, for it
// widens the spread itself.
template <class S>
class Deviations {
 public:
  __device__ __forceinline__ explicit Deviations(S first_element)
      : origin_(first_element - first_element == 0 ? static_cast<double>(first_element) : 0) {}

  // value(i) is the i-th of kCount elements, there(i) whether it counts; `count` do.
  template <int kCount, class Value, class There>
  __device__ __forceinline__ void add(int count, Value&& value, There&& there) {
    if (count == 0) return;
    S sum = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum += there(i) ? value(i) : S(0);
    const S mean = sum * (S(1) / static_cast<S>(count));
    S deviations = 0, squares = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const S d = there(i) ? value(i) - mean : S(0);
      deviations += d;
      squares += d * d;
    }
    if (mean - mean != 0) {  // infinite or NaN: an infinite mean stays one, the squares do not matter
      sums_.add({static_cast<double>(mean), static_cast<double>(mean - mean)});
      return;
    }
    const double d = deviations, n = count, shift = static_cast<double>(mean) - origin_;
    sums_.first += d + n * shift;
    sums_.second += static_cast<double>(squares) + shift * (d + d + n * shift);
  }

  __device__ __forceinline__ const Pair& sums() const { return sums_; }
  __device__ __forceinline__ double origin() const { return origin_; }

 private:
  double origin_;
  Pair sums_;
};

}  // namespace fastlayers::cuda
