// What the operators on CUDA tensors have alike: from checked tensors to the arguments of kernels.
#include "cuda_calls.h"

#if FASTLAYERS_HAVE_CUDA

#include "../kernels/common/activations.h"

namespace fastlayers::cuda_ops {
namespace {

ChannelSource channel_source(const OptionalTensor& t) {
  if (!t) return {};
  return {t->const_data_ptr(), storage_dtype(*t), t->stride(0)};
}
ChannelTarget channel_target(const OptionalTensor& t) {
  if (!t || t->numel() == 0) return {};
  return {t->mutable_data_ptr(), storage_dtype(*t), t->stride(0)};
}

std::int64_t* batch_counter(const OptionalTensor& num_batches_tracked, const Tensor& input) {
  if (!num_batches_tracked) return nullptr;
  check_same_device("num_batches_tracked", *num_batches_tracked, input);
  STD_TORCH_CHECK(num_batches_tracked->scalar_type() == ScalarType::Long && num_batches_tracked->numel() == 1,
                  "num_batches_tracked should be one int64");
  return static_cast<std::int64_t*>(num_batches_tracked->mutable_data_ptr());
}

}  // namespace

void check(Error error, const std::string& what) {
  STD_TORCH_CHECK(error == 0, "fastlayers: a CUDA kernel could not be launched: ", cuda::error_text(error), " (", what,
                  ")");
}

void check_input(const Tensor& input) {
  STD_TORCH_CHECK(input.dim() >= 2, "input should have at least 2 dimensions (N, C, ...), not ", input.dim());
}

void check_size(const Shape& shape) {
  const std::int64_t groups = shape.rows ? shape.count_per_channel() : shape.batch * cuda::groups_per_plane(shape);
  STD_TORCH_CHECK(groups < kCountLimit && shape.channels < kCountLimit / cuda::kMaxRowsPerRun,
                  "input should have less than ", kCountLimit,
                  shape.rows ? " positions in all its samples, not " : " groups of 8 elements in a channel, not ",
                  groups);
}

ActivationCall activation_call(std::int64_t kind, const std::vector<double>& params) {
  check_activation(kind, params);
  ActivationCall call;
  call.kind = static_cast<Activation>(kind);
  for (std::size_t i = 0; i < params.size(); ++i) call.params[i] = params[i];
  return call;
}

Keep keep_of(const Tensor& input, const OptionalTensor& mask, double scale) {
  Keep keep;
  if (!mask) return keep;
  check_same_device("mask", *mask, input);
  STD_TORCH_CHECK(mask->is_contiguous(), "mask should be contiguous");
  keep.scale = scale;
  if (mask->scalar_type() == ScalarType::Long) {
    STD_TORCH_CHECK(mask->numel() == 1, "a mask of elements should be a seed, one int64, not ", mask->numel());
    keep.seed = static_cast<const std::int64_t*>(mask->const_data_ptr());
    return keep;
  }
  STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool || mask->scalar_type() == input.scalar_type(),
                  "mask should be bool or of the dtype of input");
  STD_TORCH_CHECK(input.dim() >= 2 && mask->numel() == input.size(0) * input.size(1),
                  "mask should have an element for each sample and channel, not ", mask->numel());
  keep.planes = mask->const_data_ptr();
  keep.plane_bytes = static_cast<int>(mask->element_size());
  return keep;
}

void ForwardChannels::check(const Tensor& input) const {
  check_channel_vector("weight", weight, input);
  check_channel_vector("bias", bias, input);
  check_channel_vector("running_mean", running_mean, input);
  check_channel_vector("running_var", running_var, input);
  STD_TORCH_CHECK(training || (running_mean && running_var),
                  "running_mean and running_var must be defined in evaluation mode");
  STD_TORCH_CHECK(!(training && running_mean) || momentum || num_batches_tracked,
                  "momentum should be a number, not None, without num_batches_tracked");
}

void ForwardChannels::set(ForwardArgs& args, const Tensor& input, const Tensor& mean, const Tensor& invstd) const {
  const bool tracks = training && running_mean;
  args.weight = channel_source(weight);
  args.bias = channel_source(bias);
  args.running_mean = channel_target(running_mean);
  args.running_var = channel_target(running_var);
  args.num_batches_tracked = tracks ? batch_counter(num_batches_tracked, input) : nullptr;
  args.training = training;
  args.cumulative = tracks && !momentum;
  args.momentum = momentum.value_or(0);
  args.eps = eps;
  args.mean = static_cast<double*>(mean.mutable_data_ptr());
  args.invstd = static_cast<double*>(invstd.mutable_data_ptr());
}

void forward_of_nothing(const ForwardArgs& args, Tensor mean, Tensor invstd, const Gpu& gpu) {
  torch::stable::zero_(mean);
  torch::stable::zero_(invstd);
  if (args.num_batches_tracked) check(cuda::count_batch(args.num_batches_tracked, gpu.stream()), "counting a batch");
}

void BackwardChannels::check(const Tensor& input) const {
  check_channel_vector("weight", weight, input);
  check_channel_vector("bias", bias, input);
  check_saved_statistics("mean", mean, input);
  check_saved_statistics("invstd", invstd, input);
}

void BackwardChannels::set(BackwardArgs& args, const Tensor& grad_weight, const Tensor& grad_bias) const {
  args.grad_weight = channel_target(grad_weight);
  args.grad_bias = channel_target(grad_bias);
  args.weight = channel_source(weight);
  args.bias = channel_source(bias);
  args.mean = static_cast<const double*>(mean.const_data_ptr());
  args.invstd = static_cast<const double*>(invstd.const_data_ptr());
  args.training = training;
}

Tensor BackwardChannels::empty_gradient(const OptionalTensor& parameter, bool wanted) const {
  return wanted && parameter ? empty_vector(mean, mean.numel(), parameter->scalar_type())
                             : empty_vector(mean, 0, ScalarType::Double);
}

}  // namespace fastlayers::cuda_ops

#endif
