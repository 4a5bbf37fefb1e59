// The emulated GPU, on which CPU tensors are.
#include "torch/gpu.h"

namespace fastlayers::cuda_ops {

Gpu::Gpu(const Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu(), "input should be on the CPU, where the emulated GPU is");
}

const cuda::Device& Gpu::sizes(const Tensor&) {
  // Of a Hopper GPU, with as few processors as the emulator takes the blocks of a cooperative grid of.
  static const cuda::Device device{16, 232448, 233472, 8};
  return device;
}

}  // namespace fastlayers::cuda_ops
