// The functions of kernels.h: they find the storage type. Also what is the same for all types.
#include "plan.h"
#include "pointwise.h"
#include "storage_kernels.h"

namespace fastlayers::cuda {
namespace {

template <class F>
Error with_storage(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::f32: return f(StorageKernels<f32>{});
    case Dtype::f64: return f(StorageKernels<f64>{});
    case Dtype::bf16: return f(StorageKernels<bf16>{});
    case Dtype::f16: return f(StorageKernels<f16>{});
  }
  return 1;
}

LaunchShape one_thread_for_each(std::int64_t count) {
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>((count + kPointwiseThreads - 1) / kPointwiseThreads));
  shape.block = dim3(kPointwiseThreads);
  return shape;
}

// A cumulative average needs the count of batches before its first channel is finished.
Error count_first(const ForwardArgs& args, Stream stream) {
  return args.training && args.cumulative ? count_batch(args.num_batches_tracked, stream) : 0;
}

__global__ void add_one(std::int64_t* num_batches_tracked) {
  ++*num_batches_tracked;
}

__global__ void __launch_bounds__(kPointwiseThreads)
    flat_bits_as_bools(const Shape shape, std::int64_t bytes_per_plane, const std::uint8_t* bits, bool* mask) {
  const std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= shape.batch * shape.channels * shape.spatial) return;
  std::int64_t byte = i / kGroup;
  if (bytes_per_plane) {
    const std::int64_t plane = i / shape.spatial;
    byte += plane * bytes_per_plane - plane * shape.spatial / kGroup;
  }
  mask[i] = bits[byte] >> (i % kGroup) & 1;
}

__global__ void __launch_bounds__(kPointwiseThreads) kept_as_bools(std::int64_t numel, const Keep keep, bool* mask) {
  const std::int64_t first = (std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kGroup;
  if (first >= numel) return;
  const unsigned bits = KeptElements(keep).from(first);
  for (int e = 0; e < kGroup && first + e < numel; ++e) mask[first + e] = bits >> e & 1;
}

}  // namespace

Error count_batch(std::int64_t* num_batches_tracked, Stream stream) {
  LaunchShape shape;
  shape.grid = shape.block = dim3(1);
  return launch(add_one, shape, stream, num_batches_tracked);
}

Error batch_norm_act_forward(const ForwardArgs& args, const Plan& plan, void* workspace, Stream stream) {
  if (const Error error = count_first(args, stream)) return error;
  return with_storage(args.dtype, [&](auto kernels) { return kernels.forward(args, plan, workspace, stream); });
}

Error batch_norm_act_backward(const BackwardArgs& args, const Plan& plan, void* workspace, Stream stream) {
  return with_storage(args.dtype, [&](auto kernels) { return kernels.backward(args, plan, workspace, stream); });
}

Error batch_norm_act_pool_forward(const PooledForwardArgs& args, const PooledPlan& plan, void* workspace,
                                  Stream stream) {
  if (const Error error = count_first(args, stream)) return error;
  return with_storage(args.dtype, [&](auto kernels) { return kernels.pooled_forward(args, plan, workspace, stream); });
}

Error batch_norm_act_pool_backward(const PooledBackwardArgs& args, const PooledPlan& plan, void* workspace,
                                   Stream stream) {
  return with_storage(args.dtype, [&](auto kernels) { return kernels.pooled_backward(args, plan, workspace, stream); });
}

Error dropout(const DropoutArgs& args, Stream stream) {
  return with_storage(args.dtype, [&](auto kernels) { return kernels.dropout(args, stream); });
}

Error unpack_flat_bits(const Shape& shape, const std::uint8_t* flat_bits, bool* mask, Stream stream) {
  const bool own_bytes = !shape.rows && shape.spatial % kGroup != 0;
  return launch(flat_bits_as_bools, one_thread_for_each(shape.numel()), stream, shape,
                own_bytes ? groups_per_plane(shape) : 0, flat_bits, mask);
}

Error element_mask(std::int64_t numel, const Keep& keep, bool* mask, Stream stream) {
  return launch(kept_as_bools, one_thread_for_each((numel + kGroup - 1) / kGroup), stream, numel, keep, mask);
}

#ifdef __CUDACC__

const char* error_text(Error error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

namespace {

int attribute(cudaDeviceAttr which, int index) {
  int value = 0;
  cudaDeviceGetAttribute(&value, which, index);
  return value;
}

}  // namespace

Device device(int index) {
  Device device;
  device.processors = attribute(cudaDevAttrMultiProcessorCount, index);
  device.shared_bytes = static_cast<std::size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
  device.shared_per_processor = static_cast<std::size_t>(attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, index));
  device.max_cluster = attribute(cudaDevAttrComputeCapabilityMajor, index) >= 9 ? 8 : 1;
  return device;
}

#else

const char* error_text(Error) {
  return "the emulator reports errors by exceptions";
}

// An H200's.
Device device(int) {
  return {132, 232448, 233472, 8};
}

#endif

}  // namespace fastlayers::cuda
