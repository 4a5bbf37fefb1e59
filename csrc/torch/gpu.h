// The GPU of a tensor, as the operators on CUDA tensors need it. The tests put an emulated one in its place.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <optional>

#include "../kernels/cuda/plan.h"
#include "tensors.h"

namespace fastlayers::cuda_ops {

// Makes the GPU of `t` the current one while it lives.
class Gpu {
 public:
  explicit Gpu(const Tensor& t);
  // The current stream of the GPU.
  cuda::Stream stream() const { return stream_; }

  // What planning has to know of the GPU of `t`.
  static const cuda::Device& sizes(const Tensor& t);

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  cuda::Stream stream_ = nullptr;
};

}  // namespace fastlayers::cuda_ops
