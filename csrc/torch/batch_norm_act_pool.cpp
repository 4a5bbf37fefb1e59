// fastlayers::batch_norm_act_pool_fwd and _bwd on the CPU: checks, layouts, running statistics around the kernels.
#include "batch_norm_act_pool.h"

#include "channel_tensors.h"

namespace fastlayers {
namespace {

void check_channel_mask(const OptionalTensor& mask) {
  if (mask)
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "mask should be bool, one for each sample and channel");
}

}  // namespace

FiveTensors batch_norm_act_pool_fwd(Tensor input, OptionalTensor weight, OptionalTensor bias, OptionalTensor mask,
                                    OptionalTensor running_mean, OptionalTensor running_var,
                                    OptionalTensor num_batches_tracked, bool training, std::optional<double> momentum,
                                    double eps, std::int64_t activation, std::vector<double> activation_params,
                                    bool monotone, double drop_scale, std::vector<std::int64_t> window, bool ceil_mode,
                                    bool save) {
  check_batch_norm_input(input);
  const Pool pool = pool_of(window, ceil_mode, input);
  ForwardChannels channels(input, weight, bias, {running_mean, running_var, num_batches_tracked}, training, momentum,
                           eps);
  check_channel_mask(mask);

  const Geometry g{shape_of_result(input)};
  Tensor output = empty_pooled(pool, g, input, input.scalar_type());
  const auto saved = [&](ScalarType dtype) {
    return save ? empty_pooled(pool, g, input, dtype) : empty_vector(input, 0, dtype);
  };
  Tensor selected = saved(input.scalar_type()), positions = saved(ScalarType::Byte);
  Tensor mean = channels.empty_statistics(input), invstd = channels.empty_statistics(input);
  if (input.numel() == 0) {
    channels.of_nothing(mean, invstd);
    return {output, mean, invstd, selected, positions};
  }

  PoolForwardArgs args;
  args.geometry = g;
  args.activation = activation_spec(activation, activation_params);
  args.keep = keep_of(g, mask, drop_scale);
  const View input_view = as_source(g, input);
  args.input = input_view.source();
  args.output.data = output.mutable_data_ptr();
  args.pool = pool;
  args.monotone = monotone;
  if (save) {
    args.selected = selected.mutable_data_ptr();
    args.positions = static_cast<std::uint8_t*>(positions.mutable_data_ptr());
  }
  args.parallel_for = torch_parallel_for;
  channels.start(args, mean, invstd);
  kernels(storage_dtype(input)).batch_norm_act_pool_forward(args);
  channels.finish(args);
  return {output, mean, invstd, selected, positions};
}

ThreeTensors batch_norm_act_pool_bwd(Tensor grad_output, Tensor input, Tensor selected, Tensor positions,
                                     OptionalTensor weight, OptionalTensor bias, OptionalTensor mask, Tensor mean,
                                     Tensor invstd, bool training, std::int64_t activation,
                                     std::vector<double> activation_params, double drop_scale,
                                     std::vector<std::int64_t> window, bool ceil_mode, bool input_grad,
                                     bool affine_grad) {
  check_batch_norm_input(input);
  const Pool pool = pool_of(window, ceil_mode, input);
  check_pooled("grad_output", grad_output, pool, input, input.scalar_type());
  check_pooled("selected", selected, pool, input, input.scalar_type());
  check_pooled("positions", positions, pool, input, ScalarType::Byte);
  BackwardChannels channels(input, weight, bias, mean, invstd, training, affine_grad);
  check_channel_mask(mask);

  const Geometry g{shape_of_result(input)};
  Tensor grad_input = input_grad ? empty_output(input) : empty_vector(input, 0, input.scalar_type());
  if (input.numel() > 0) {
    const Shape pooled{g.rows, g.batch, g.channels, pool.outputs()};
    PoolBackwardArgs args;
    args.geometry = g;
    args.activation = activation_spec(activation, activation_params);
    args.keep = keep_of(g, mask, drop_scale);
    const View grad_output_view = as_source(pooled, grad_output);
    args.grad_output = grad_output_view.source();
    std::optional<View> input_view;
    if (training) args.input = optional_source(input_view, g, input);
    const Tensor selected_in_order = in_order(pooled, selected), positions_in_order = in_order(pooled, positions);
    args.selected = selected_in_order.const_data_ptr();
    args.positions = static_cast<const std::uint8_t*>(positions_in_order.const_data_ptr());
    std::optional<Output> input_out;
    if (input_grad) args.grad_input = input_out.emplace(g, grad_input).target();
    channels.set(args);
    args.parallel_for = torch_parallel_for;
    args.pool = pool;
    kernels(storage_dtype(input)).batch_norm_act_pool_backward(args);
    if (input_out) input_out->finish();
  }
  return {grad_input, channels.grad_weight(), channels.grad_bias()};
}

}  // namespace fastlayers
