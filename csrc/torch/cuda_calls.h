// What the operators on CUDA tensors have alike: from checked tensors to the arguments of kernels.
#pragma once

#include <string>

#include "../kernels/cuda/plan.h"
#include "gpu.h"
#include "tensors.h"

namespace fastlayers::cuda_ops {

// The CPU's types of the same names are one namespace further out.
using cuda::ActivationCall, cuda::BackwardArgs, cuda::ChannelSource, cuda::ChannelTarget, cuda::Device,
    cuda::DropoutArgs, cuda::Error, cuda::ForwardArgs, cuda::Keep, cuda::Plan, cuda::PooledBackwardArgs,
    cuda::PooledForwardArgs, cuda::PooledPlan, cuda::Stream;

void check(Error error, const std::string& what);
void check_input(const Tensor& input);

// What kernels count in 31 bits: groups, and runs of rows.
inline constexpr std::int64_t kCountLimit = (std::int64_t{1} << 31) - (1 << 20);
void check_size(const Shape& shape);

ActivationCall activation_call(std::int64_t kind, const std::vector<double>& params);
// What a mask means: a value per sample and channel, or the seed of a value per element.
Keep keep_of(const Tensor& input, const OptionalTensor& mask, double scale);

// The arguments of forward that have one number per channel, and how they are used.
struct ForwardChannels {
  OptionalTensor weight, bias, running_mean, running_var, num_batches_tracked;
  bool training;
  std::optional<double> momentum;
  double eps;

  void check(const Tensor& input) const;
  void set(ForwardArgs& args, const Tensor& input, const Tensor& mean, const Tensor& invstd) const;
};
// As torch: statistics of nothing are 0 and leave the running ones as they are, and the batch counts.
void forward_of_nothing(const ForwardArgs& args, Tensor mean, Tensor invstd, const Gpu& gpu);

// The same of backward.
struct BackwardChannels {
  OptionalTensor weight, bias;
  Tensor mean, invstd;
  bool training;

  void check(const Tensor& input) const;
  void set(BackwardArgs& args, const Tensor& grad_weight, const Tensor& grad_bias) const;
  // Uninitialised, for the gradient of a parameter; empty where it is not wanted.
  Tensor empty_gradient(const OptionalTensor& parameter, bool wanted) const;
};

// Runs what was planned, in workspace of torch's.
template <class Args, class AnyPlan>
void run(Error (*kernels)(const Args&, const AnyPlan&, void*, Stream), const Args& args, const AnyPlan& plan,
         std::size_t workspace_bytes, const Tensor& input, const Gpu& gpu) {
  Tensor workspace = empty_vector(input, static_cast<std::int64_t>(workspace_bytes), ScalarType::Byte);
  check(kernels(args, plan, workspace.mutable_data_ptr(), gpu.stream()), cuda::describe(plan));
}

}  // namespace fastlayers::cuda_ops
