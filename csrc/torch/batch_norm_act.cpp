// fastlayers::batch_norm_act_fwd and _bwd on the CPU: checks, layouts, running statistics around the kernels.
#include "batch_norm_act.h"

#include <cmath>

#include "../kernels/common/activations.h"

namespace fastlayers {
namespace {

void check_input(const Tensor& input) {
  STD_TORCH_CHECK(input.dim() >= 2, "input should have at least 2 dimensions (N, C, ...), not ", input.dim());
  STD_TORCH_CHECK(input.is_cpu(), "input should be on the CPU");
}

ActivationSpec activation_spec(std::int64_t kind, const std::vector<double>& params) {
  check_activation(kind, params);
  return {static_cast<Activation>(kind), params.data()};
}

void check_flat_bits(const Geometry& g, const OptionalTensor& bits) {
  if (!bits) return;
  STD_TORCH_CHECK(bits->scalar_type() == ScalarType::Byte && bits->numel() == g.mask_bytes() && bits->is_cpu() &&
                      bits->is_contiguous(),
                  "flat_bits should be ", g.mask_bytes(), " contiguous bytes of uint8 on the CPU");
}

void fill(const Tensor& t, double value) {
  with_dtype(t.scalar_type(), [&](auto element) {
    auto* to = static_cast<decltype(element)*>(t.mutable_data_ptr());
    for (std::int64_t i = 0; i < t.numel(); ++i) to[i] = static_cast<decltype(element)>(value);
  });
}

// Adds one to the count of batches and returns the weight of the newest: `momentum`, or for a cumulative average its
// share of all batches.
double update_factor(const OptionalTensor& num_batches_tracked, std::optional<double> momentum) {
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

// running = (1 - factor) * running + factor * value
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

void load_running_statistics(const Tensor& running_mean, const Tensor& running_var, const ForwardArgs& args) {
  const std::int64_t channels = args.geometry.channels;
  const std::vector<double> means = channel_values(running_mean, channels, 0);
  const std::vector<double> variances = channel_values(running_var, channels, 1);
  for (std::size_t c = 0; c < means.size(); ++c) {
    args.mean[c] = means[c];
    args.invstd[c] = 1 / std::sqrt(variances[c] + args.eps);
  }
}

// A gradient that was summed in double, in the dtype of its parameter.
Tensor channel_gradient(const Tensor& input, const OptionalTensor& parameter, const std::vector<double>& sums) {
  if (!parameter || sums.empty()) return empty_vector(input, 0, ScalarType::Double);
  Tensor grad = empty_vector(input, static_cast<std::int64_t>(sums.size()), parameter->scalar_type());
  with_dtype(grad.scalar_type(), [&](auto element) {
    auto* to = static_cast<decltype(element)*>(grad.mutable_data_ptr());
    for (std::size_t c = 0; c < sums.size(); ++c) to[c] = static_cast<decltype(element)>(sums[c]);
  });
  return grad;
}

}  // namespace

FourTensors batch_norm_act_fwd(Tensor input, OptionalTensor weight, OptionalTensor bias, OptionalTensor residual,
                               OptionalTensor mask, OptionalTensor running_mean, OptionalTensor running_var,
                               OptionalTensor num_batches_tracked, bool training, std::optional<double> momentum,
                               double eps, std::int64_t activation, std::vector<double> activation_params,
                               double drop_scale, bool save_flat_bits) {
  check_input(input);
  const std::int64_t channels = input.size(1);
  check_channel_vector("weight", weight, input);
  check_channel_vector("bias", bias, input);
  check_channel_vector("running_mean", running_mean, input);
  check_channel_vector("running_var", running_var, input);
  STD_TORCH_CHECK(training || (running_mean && running_var),
                  "running_mean and running_var must be defined in evaluation mode");
  if (residual) check_full_size("residual", *residual, input);

  Tensor output = empty_output(input);
  const Geometry g = geometry_of(output);
  Tensor mean = empty_vector(input, channels, ScalarType::Double);
  Tensor invstd = empty_vector(input, channels, ScalarType::Double);
  Tensor flat_bits = empty_vector(input, save_flat_bits ? g.mask_bytes() : 0, ScalarType::Byte);
  const double factor = training && running_mean ? update_factor(num_batches_tracked, momentum) : 0;
  if (input.numel() == 0) {
    // As torch: statistics of nothing leave the running ones as they are.
    fill(mean, 0);
    fill(invstd, 0);
    return {output, mean, invstd, flat_bits};
  }

  ForwardArgs args;
  args.geometry = g;
  args.activation = activation_spec(activation, activation_params);
  args.keep = keep_of(g, mask, drop_scale);
  const View input_view = as_source(g, input);
  args.input = input_view.source();
  std::optional<View> residual_view;
  args.residual = optional_source(residual_view, g, residual);
  Output out(g, output);
  args.output = out.target();
  args.flat_bits = save_flat_bits ? static_cast<std::uint8_t*>(flat_bits.mutable_data_ptr()) : nullptr;
  const std::vector<double> weights = channel_values(weight, channels, 1), biases = channel_values(bias, channels, 0);
  args.weight = weights.data();
  args.bias = biases.data();
  args.mean = static_cast<double*>(mean.mutable_data_ptr());
  args.invstd = static_cast<double*>(invstd.mutable_data_ptr());
  std::vector<double> variance(training ? weights.size() : 0);
  args.variance = variance.data();
  args.training = training;
  args.eps = eps;
  args.parallel_for = torch_parallel_for;
  if (!training) load_running_statistics(*running_mean, *running_var, args);
  kernels(storage_dtype(input)).batch_norm_act_forward(args);
  if (training) {
    const auto count = static_cast<double>(g.count_per_channel());
    update_running(running_mean, factor, [&](std::int64_t c) { return args.mean[c]; });
    update_running(running_var, factor, [&](std::int64_t c) { return args.variance[c] * (count / (count - 1)); });
  }
  return {out.finish(), mean, invstd, flat_bits};
}

FourTensors batch_norm_act_bwd(Tensor grad_output, Tensor input, OptionalTensor weight, OptionalTensor bias,
                               OptionalTensor residual, OptionalTensor flat_bits, OptionalTensor mask, Tensor mean,
                               Tensor invstd, bool training, std::int64_t activation,
                               std::vector<double> activation_params, double drop_scale, bool input_grad,
                               bool affine_grad, bool residual_grad) {
  check_input(input);
  const std::int64_t channels = input.size(1);
  check_full_size("grad_output", grad_output, input);
  if (residual) check_full_size("residual", *residual, input);
  check_channel_vector("weight", weight, input);
  check_channel_vector("bias", bias, input);
  check_saved_statistics("mean", mean, input);
  check_saved_statistics("invstd", invstd, input);

  // Its strides decide the layout even where the gradient itself is not wanted.
  Tensor grad_input = empty_output(input);
  const Geometry g = geometry_of(grad_input);
  check_flat_bits(g, flat_bits);
  const auto none = [&] { return empty_vector(input, 0, input.scalar_type()); };
  Tensor grad_residual = residual_grad ? empty_output(input) : none();
  std::vector<double> grad_weight(affine_grad ? static_cast<std::size_t>(channels) : 0), grad_bias(grad_weight);
  if (input.numel() > 0) {
    BackwardArgs args;
    args.geometry = g;
    args.activation = activation_spec(activation, activation_params);
    args.keep = keep_of(g, mask, drop_scale);
    const View grad_output_view = as_source(g, grad_output), input_view = as_source(g, input);
    args.grad_output = grad_output_view.source();
    args.input = input_view.source();
    std::optional<View> residual_view;
    args.residual = optional_source(residual_view, g, residual);
    args.flat_bits = flat_bits ? static_cast<const std::uint8_t*>(flat_bits->const_data_ptr()) : nullptr;
    std::optional<Output> input_out, residual_out;
    if (input_grad) args.grad_input = input_out.emplace(g, grad_input).target();
    if (residual_grad) args.grad_residual = residual_out.emplace(g, grad_residual).target();
    args.grad_weight = affine_grad ? grad_weight.data() : nullptr;
    args.grad_bias = affine_grad ? grad_bias.data() : nullptr;
    const std::vector<double> weights = channel_values(weight, channels, 1), biases = channel_values(bias, channels, 0);
    args.weight = weights.data();
    args.bias = biases.data();
    args.mean = static_cast<const double*>(mean.const_data_ptr());
    args.invstd = static_cast<const double*>(invstd.const_data_ptr());
    args.training = training;
    args.parallel_for = torch_parallel_for;
    kernels(storage_dtype(input)).batch_norm_act_backward(args);
    if (input_out) input_out->finish();
    if (residual_out) residual_out->finish();
  }
  return {input_grad ? grad_input : none(), channel_gradient(input, weight, grad_weight),
          channel_gradient(input, bias, grad_bias), grad_residual};
}

}  // namespace fastlayers
