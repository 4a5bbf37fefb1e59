// fastlayers::batch_norm_act_fwd and _bwd on the CPU: checks, layouts, running statistics around the kernels.
#include "batch_norm_act.h"

#include "channel_tensors.h"

namespace fastlayers {
namespace {

void check_flat_bits(const Geometry& g, const OptionalTensor& bits) {
  if (!bits) return;
  STD_TORCH_CHECK(bits->scalar_type() == ScalarType::Byte && bits->numel() == g.mask_bytes() && bits->is_cpu() &&
                      bits->is_contiguous(),
                  "flat_bits should be ", g.mask_bytes(), " contiguous bytes of uint8 on the CPU");
}

}  // namespace

FourTensors batch_norm_act_fwd(Tensor input, OptionalTensor weight, OptionalTensor bias, OptionalTensor residual,
                               OptionalTensor mask, OptionalTensor running_mean, OptionalTensor running_var,
                               OptionalTensor num_batches_tracked, bool training, std::optional<double> momentum,
                               double eps, std::int64_t activation, std::vector<double> activation_params,
                               double drop_scale, bool save_flat_bits) {
  check_batch_norm_input(input);
  ForwardChannels channels(input, weight, bias, {running_mean, running_var, num_batches_tracked}, training, momentum,
                           eps);
  if (residual) check_full_size("residual", *residual, input);

  Tensor output = empty_output(input);
  const Geometry g = geometry_of(output);
  Tensor mean = channels.empty_statistics(input), invstd = channels.empty_statistics(input);
  Tensor flat_bits = empty_vector(input, save_flat_bits ? g.mask_bytes() : 0, ScalarType::Byte);
  if (input.numel() == 0) {
    channels.of_nothing(mean, invstd);
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
  args.parallel_for = torch_parallel_for;
  channels.start(args, mean, invstd);
  kernels(storage_dtype(input)).batch_norm_act_forward(args);
  channels.finish(args);
  return {out.finish(), mean, invstd, flat_bits};
}

FourTensors batch_norm_act_bwd(Tensor grad_output, Tensor input, OptionalTensor weight, OptionalTensor bias,
                               OptionalTensor residual, OptionalTensor flat_bits, OptionalTensor mask, Tensor mean,
                               Tensor invstd, bool training, std::int64_t activation,
                               std::vector<double> activation_params, double drop_scale, bool input_grad,
                               bool affine_grad, bool residual_grad) {
  check_batch_norm_input(input);
  check_full_size("grad_output", grad_output, input);
  if (residual) check_full_size("residual", *residual, input);
  BackwardChannels channels(input, weight, bias, mean, invstd, training, affine_grad);

  // Its strides decide the layout even where the gradient itself is not wanted.
  Tensor grad_input = empty_output(input);
  const Geometry g = geometry_of(grad_input);
  check_flat_bits(g, flat_bits);
  const auto none = [&] { return empty_vector(input, 0, input.scalar_type()); };
  Tensor grad_residual = residual_grad ? empty_output(input) : none();
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
    channels.set(args);
    args.parallel_for = torch_parallel_for;
    kernels(storage_dtype(input)).batch_norm_act_backward(args);
    if (input_out) input_out->finish();
    if (residual_out) residual_out->finish();
  }
  return {input_grad ? grad_input : none(), channels.grad_weight(), channels.grad_bias(), grad_residual};
}

}  // namespace fastlayers
