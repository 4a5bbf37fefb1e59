// The kernels of probes.h. Each works on an array of int, whose size it may ask for.
#include "probes.h"

#include <stdexcept>

namespace fastlayers::cuda {

namespace {

__device__ int thread_in_grid() {
  return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
}
__device__ int* shared_ints() {
  return reinterpret_cast<int*>(dynamic_shared());
}

__global__ void indices_of_threads(int* data, int size) {
  const dim3 block = blockDim, grid = gridDim;
  const auto in_block = threadIdx.x + block.x * (threadIdx.y + block.y * threadIdx.z);
  const auto of_block = blockIdx.x + grid.x * (blockIdx.y + grid.y * blockIdx.z);
  const auto i = static_cast<int>(of_block * block.x * block.y * block.z + in_block);
  if (i < size) data[i] = i;
}

__global__ void sums_of_warps(int* data, int) {
  int sum = data[thread_in_grid()];
  for (int step = warpSize / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  data[thread_in_grid()] = sum;
}

__global__ void shuffles(int* data, int) {
  const int i = thread_in_grid();
  const uint4 wide = __shfl_sync(~0u, uint4{1u, 2u, 3u, threadIdx.x}, 5, 8);
  data[4 * i] = static_cast<int>(wide.w + 100 * wide.z);
  data[4 * i + 1] = __shfl_down_sync(~0u, static_cast<int>(threadIdx.x), 3, 16);
  data[4 * i + 2] = static_cast<int>(__ballot_sync(~0u, threadIdx.x % 3 == 0));
  data[4 * i + 3] = __any_sync(~0u, threadIdx.x == 9) + 2 * __all_sync(~0u, threadIdx.x < 31);
}

// The halves of each warp meet apart from each other, and one of them more often, before both meet.
__global__ void halves_of_warps(int* data, int) {
  int value = static_cast<int>(threadIdx.x);
  const bool low = threadIdx.x % warpSize < 16;
  if (low)
    for (int i = 0; i < 3; ++i) value = __shfl_xor_sync(0x0000ffffu, value, 1);
  else
    value = __shfl_xor_sync(0xffff0000u, value, 1);
  data[thread_in_grid()] = __shfl_xor_sync(~0u, value, 16);
}

__global__ void reverse_block(int* data, int) {
  int* shared = shared_ints();
  shared[threadIdx.x] = data[thread_in_grid()];
  __syncthreads();
  data[thread_in_grid()] = shared[blockDim.x - 1 - threadIdx.x];
}

__global__ void reverse_block_without_barrier(int* data, int) {
  int* shared = shared_ints();
  shared[threadIdx.x] = data[thread_in_grid()];
  data[thread_in_grid()] = shared[blockDim.x - 1 - threadIdx.x];
}

__global__ void shared_at_start(int* data, int) {
  data[thread_in_grid()] = shared_ints()[threadIdx.x];
  shared_ints()[threadIdx.x] = 0;
}

// Whoever is last leaves its number.
__global__ void last_thread(int* data, int) {
  data[0] = static_cast<int>(threadIdx.x);
}
__global__ void last_block(int* data, int) {
  data[0] = static_cast<int>(blockIdx.x);
}

// Where blocks hand on what they hold to the next in their cluster.
__device__ void hand_on(int* data, bool before, bool after) {
  int* shared = shared_ints();
  shared[threadIdx.x] = data[thread_in_grid()];
  if (before) cluster_sync();
  const int next = (cluster_rank() + 1) % cluster_size();
  data[thread_in_grid()] = cluster_peer(shared, next)[threadIdx.x];
  if (after) cluster_sync();
}
__global__ void rotate_cluster(int* data, int) {
  hand_on(data, true, true);
}
__global__ void rotate_cluster_at_once(int* data, int) {
  hand_on(data, false, true);
}
__global__ void rotate_cluster_and_leave(int* data, int) {
  hand_on(data, true, false);
}
__global__ void cluster_of_which_one_leaves(int* data, int) {
  if (cluster_rank() == 1) return;
  cluster_sync();
  data[0] = 1;
}

// Each block adds up what all blocks have written.
__global__ void sum_over_grid(int* data, int) {
  if (threadIdx.x == 0) data[blockIdx.x] = static_cast<int>(blockIdx.x) + 1;
  grid_sync();
  int sum = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) sum += data[i];
  grid_sync();
  if (threadIdx.x == 0) data[blockIdx.x] = sum;
}

__global__ void barrier_for_some(int*, int) {
  if (threadIdx.x != 7) __syncthreads();
}
__global__ void two_barriers(int*, int) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}
__global__ void lane_that_leaves(int*, int) {
  if (threadIdx.x == 3) return;
  __syncwarp();
}
__global__ void lane_at_a_barrier(int*, int) {
  if (threadIdx.x == 3)
    __syncthreads();
  else
    __syncwarp();
}
__global__ void different_masks(int*, int) {
  __syncwarp(threadIdx.x % warpSize < 16 ? ~0u : 0xffff0000u);
}
__global__ void lane_outside_its_mask(int*, int) {
  __syncwarp(1u);
}
__global__ void source_outside_its_mask(int*, int) {
  if (threadIdx.x < 16) __shfl_sync(0xffffu, 1, 20);
}
__global__ void vote_and_shuffle(int*, int) {
  if (threadIdx.x == 0)
    __ballot_sync(~0u, 1);
  else
    __shfl_sync(~0u, 1, 0);
}

__global__ void throws(int*, int) {
  __syncthreads();
  if (threadIdx.x == 5) throw std::domain_error("thrown by thread 5");
  __syncthreads();
}

// What sanitizers are for: a tail that is one too long, memory behind the block's, 16 bytes that are not at a multiple.
__global__ void tail_out_of_bounds(int* data, int size) {
  for (int i = thread_in_grid(); i <= size; i += static_cast<int>(gridDim.x * blockDim.x)) data[i] += 1;
}
__global__ void misaligned(int* data, int) {
  data[0] += static_cast<int>(__ldg(reinterpret_cast<const uint4*>(data + 1)).x);
}
__global__ void beyond_shared_memory(int* data, int) {
  shared_ints()[threadIdx.x + 1] = data[threadIdx.x];
}
// Blocks write one place each, and read another block's.
__global__ void race_between_blocks(int* data, int) {
  if (threadIdx.x != 0) return;
  data[blockIdx.x] = 1;
  data[blockIdx.x + gridDim.x] = data[(blockIdx.x + 1) % gridDim.x];
}

}  // namespace

#define PROBE(kernel) {#kernel, kernel}
const std::vector<Probe>& probes() {
  static const std::vector<Probe> all{
      PROBE(indices_of_threads),
      PROBE(sums_of_warps),
      PROBE(shuffles),
      PROBE(halves_of_warps),
      PROBE(reverse_block),
      PROBE(reverse_block_without_barrier),
      PROBE(shared_at_start),
      PROBE(last_thread),
      PROBE(last_block),
      PROBE(rotate_cluster),
      PROBE(rotate_cluster_at_once),
      PROBE(rotate_cluster_and_leave),
      PROBE(cluster_of_which_one_leaves),
      PROBE(sum_over_grid),
      PROBE(barrier_for_some),
      PROBE(two_barriers),
      PROBE(lane_that_leaves),
      PROBE(lane_at_a_barrier),
      PROBE(different_masks),
      PROBE(lane_outside_its_mask),
      PROBE(source_outside_its_mask),
      PROBE(vote_and_shuffle),
      PROBE(throws),
      PROBE(tail_out_of_bounds),
      PROBE(beyond_shared_memory),
      PROBE(misaligned),
      PROBE(race_between_blocks),
  };
  return all;
}
#undef PROBE

}  // namespace fastlayers::cuda
