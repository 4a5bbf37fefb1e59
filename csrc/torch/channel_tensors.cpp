// Running statistics and parameters of batch normalisation around the CPU kernels.
#include "channel_tensors.h"

#include <cmath>

#include "../kernels/common/activations.h"

namespace fastlayers {
namespace {

template <class Value>
void update_running(const OptionalTensor& running, double factor, Value value) {
  if (!running) return;
  const std::int64_t stride = running->stride(0);
  with_dtype(running->scalar_type(), [&](auto element) {
    using E = decltype(element);
    auto* to = static_cast<E*>(running->mutable_data_ptr());
    for (std::int64_t c = 0; c < running->numel(); ++c)
      to[c * stride] = static_cast<E>((1 - factor) * static_cast<double>(to[c * stride]) + factor * value(c));
  });
}

void fill(const Tensor& t, double value) {
  with_dtype(t.scalar_type(), [&](auto element) {
    auto* to = static_cast<decltype(element)*>(t.mutable_data_ptr());
    for (std::int64_t i = 0; i < t.numel(); ++i) to[i] = static_cast<decltype(element)>(value);
  });
}

std::vector<double> checked_values(const char* name, const OptionalTensor& values, const Tensor& input,
                                   double missing) {
  check_channel_vector(name, values, input);
  return channel_values(values, input.size(1), missing);
}

}  // namespace

void check_batch_norm_input(const Tensor& input) {
  STD_TORCH_CHECK(input.dim() >= 2, "input should have at least 2 dimensions (N, C, ...), not ", input.dim());
  STD_TORCH_CHECK(input.is_cpu(), "input should be on the CPU");
}

ActivationSpec activation_spec(std::int64_t kind, const std::vector<double>& params) {
  check_activation(kind, params);
  return {static_cast<Activation>(kind), params.data()};
}

void RunningStatistics::check(const Tensor& input, bool training) const {
  check_channel_vector("running_mean", mean, input);
  check_channel_vector("running_var", var, input);
  STD_TORCH_CHECK(training || (mean && var), "running_mean and running_var must be defined in evaluation mode");
}

double RunningStatistics::update_factor(bool training, std::optional<double> momentum) const {
  if (!training || !mean) return 0;
  double batches = 0;
  if (num_batches_tracked) {
    STD_TORCH_CHECK(num_batches_tracked->scalar_type() == ScalarType::Long && num_batches_tracked->numel() == 1 &&
                        num_batches_tracked->is_cpu(),
                    "num_batches_tracked should be one int64 on the CPU");
    auto* count = static_cast<std::int64_t*>(num_batches_tracked->mutable_data_ptr());
    batches = static_cast<double>(++*count);
  }
  STD_TORCH_CHECK(momentum || num_batches_tracked,
                  "momentum should be a number, not None, without num_batches_tracked");
  return momentum ? *momentum : 1 / batches;
}

void RunningStatistics::load(const ForwardArgs& args) const {
  const std::int64_t channels = args.geometry.channels;
  const std::vector<double> means = channel_values(mean, channels, 0);
  const std::vector<double> variances = channel_values(var, channels, 1);
  for (std::size_t c = 0; c < means.size(); ++c) {
    args.mean[c] = means[c];
    args.invstd[c] = 1 / std::sqrt(variances[c] + args.eps);
  }
}

void RunningStatistics::update(double factor, const ForwardArgs& args) const {
  const auto count = static_cast<double>(args.geometry.count_per_channel());
  update_running(mean, factor, [&](std::int64_t c) { return args.mean[c]; });
  update_running(var, factor, [&](std::int64_t c) { return args.variance[c] * (count / (count - 1)); });
}

AffineValues::AffineValues(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias)
    : weight(checked_values("weight", weight, input, 1)), bias(checked_values("bias", bias, input, 0)) {}

ForwardChannels::ForwardChannels(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                                 const RunningStatistics& running, bool training, std::optional<double> momentum,
                                 double eps)
    : running_(running),
      training_(training),
      momentum_(momentum),
      eps_(eps),
      affine_(input, weight, bias),
      variance_(training ? affine_.weight.size() : 0) {
  running.check(input, training);
}

Tensor ForwardChannels::empty_statistics(const Tensor& input) const {
  return empty_vector(input, input.size(1), ScalarType::Double);
}

void ForwardChannels::start(ForwardArgs& args, const Tensor& mean, const Tensor& invstd) {
  factor_ = running_.update_factor(training_, momentum_);
  affine_.set(args);
  args.mean = static_cast<double*>(mean.mutable_data_ptr());
  args.invstd = static_cast<double*>(invstd.mutable_data_ptr());
  args.variance = variance_.data();
  args.training = training_;
  args.eps = eps_;
  if (!training_) running_.load(args);
}

void ForwardChannels::finish(const ForwardArgs& args) const {
  if (training_) running_.update(factor_, args);
}

void ForwardChannels::of_nothing(const Tensor& mean, const Tensor& invstd) const {
  running_.update_factor(training_, momentum_);
  fill(mean, 0);
  fill(invstd, 0);
}

BackwardChannels::BackwardChannels(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                                   const Tensor& mean, const Tensor& invstd, bool training, bool affine_grad)
    : weight_(weight),
      bias_(bias),
      mean_(mean),
      invstd_(invstd),
      training_(training),
      affine_(input, weight, bias),
      weight_sums_(affine_grad ? affine_.weight.size() : 0),
      bias_sums_(weight_sums_) {
  check_saved_statistics("mean", mean, input);
  check_saved_statistics("invstd", invstd, input);
}

void BackwardChannels::set(BackwardArgs& args) {
  affine_.set(args);
  args.mean = static_cast<const double*>(mean_.const_data_ptr());
  args.invstd = static_cast<const double*>(invstd_.const_data_ptr());
  args.training = training_;
  args.grad_weight = weight_sums_.empty() ? nullptr : weight_sums_.data();
  args.grad_bias = bias_sums_.empty() ? nullptr : bias_sums_.data();
}

Tensor BackwardChannels::gradient(const OptionalTensor& parameter, const std::vector<double>& sums) const {
  if (!parameter || sums.empty()) return empty_vector(mean_, 0, ScalarType::Double);
  Tensor grad = empty_vector(mean_, static_cast<std::int64_t>(sums.size()), parameter->scalar_type());
  with_dtype(grad.scalar_type(), [&](auto element) {
    auto* to = static_cast<decltype(element)*>(grad.mutable_data_ptr());
    for (std::size_t c = 0; c < sums.size(); ++c) to[c] = static_cast<decltype(element)>(sums[c]);
  });
  return grad;
}

}  // namespace fastlayers
