// The one place where nvcc and the emulator of the tests differ: launching kernels, shared memory, and what the threads
// of a cluster or of a whole grid do together. Kernels include nothing else of CUDA's.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"

#ifdef __CUDACC__
// Without libcu++, of which nothing here is used: reading it takes longer than compiling a kernel.
#define _CG_LIMIT_INCLUDED_DEPENDENCIES
#include <cooperative_groups.h>
#include <cuda_runtime.h>
#else
#include "cuda_emulation.h"  // tests/cuda_emulation: dim3, uint4, threadIdx, __syncthreads, __shfl_xor_sync and so on
#endif

namespace fastlayers::cuda {

struct LaunchShape {
  dim3 grid, block;
  std::size_t shared_bytes = 0;
  int cluster = 1;  // blocks along x that share their shared memory
  bool cooperative = false;
};

#ifdef __CUDACC__

// What a block may use of shared memory without asking.
inline constexpr std::size_t kSharedBytesUnasked = 48 * 1024;

template <class... Parameters, class... Arguments>
Error launch(void (*kernel)(Parameters...), const LaunchShape& shape, Stream stream, const Arguments&... arguments) {
  if (shape.shared_bytes > kSharedBytesUnasked) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  if (shape.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim.x = static_cast<unsigned>(shape.cluster);
    attributes[config.numAttrs].val.clusterDim.y = attributes[config.numAttrs].val.clusterDim.z = 1;
    ++config.numAttrs;
  }
  if (shape.cooperative) {
    attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[config.numAttrs].val.cooperative = 1;
    ++config.numAttrs;
  }
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char fastlayers_shared[];
  return fastlayers_shared;
}

__device__ __forceinline__ void grid_sync() {
  cooperative_groups::this_grid().sync();
}

// Before compute capability 9.0 a cluster is one block.
__device__ __forceinline__ int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  return static_cast<int>(cooperative_groups::this_cluster().block_rank());
#else
  return 0;
#endif
}

__device__ __forceinline__ int cluster_size() {
#if __CUDA_ARCH__ >= 900
  return static_cast<int>(cooperative_groups::this_cluster().num_blocks());
#else
  return 1;
#endif
}

__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
#else
  __syncthreads();
#endif
}

// Where the block of that rank has what this block has at `shared`.
template <class T>
__device__ __forceinline__ T* cluster_peer(T* shared, int rank) {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(shared, rank);
#else
  return shared;
#endif
}

#else

template <class... Parameters, class... Arguments>
Error launch(void (*kernel)(Parameters...), const LaunchShape& shape, Stream, const Arguments&... arguments) {
  emulation::launch(shape.grid, shape.block, shape.shared_bytes, shape.cluster, shape.cooperative,
                    [=] { kernel(Parameters(arguments)...); });
  return 0;
}

inline unsigned char* dynamic_shared() {
  return emulation::dynamic_shared();
}
inline void grid_sync() {
  emulation::grid_sync();
}
inline int cluster_rank() {
  return emulation::cluster_rank();
}
inline int cluster_size() {
  return emulation::cluster_size();
}
inline void cluster_sync() {
  emulation::cluster_sync();
}
template <class T>
T* cluster_peer(T* shared, int rank) {
  return emulation::cluster_peer(shared, rank);
}

#endif

}  // namespace fastlayers::cuda
