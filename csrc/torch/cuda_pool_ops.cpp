// The operators with max-pooling on CUDA tensors, as cuda_ops.cpp has the others.
#include "cuda_ops.h"

#if FASTLAYERS_HAVE_CUDA

#include "cuda_calls.h"

namespace fastlayers::cuda_ops {
namespace {

// Windows and places are counted in 31 bits, too.
void check_pool_size(const Pool& pool, const Shape& shape) {
  check_size(shape);
  check_size(pooled_shape(pool, shape));
  for (const PoolAxis& axis : {pool.height, pool.width}) {
    const std::int64_t reach = axis.input + 2 * axis.padding + axis.extent() + axis.stride;
    STD_TORCH_CHECK(reach < kCountLimit, "window and input should be less than ", kCountLimit,
                    " elements high and wide together, not ", reach);
  }
  const std::int64_t windows = shape.batch * pool.outputs();
  STD_TORCH_CHECK(windows < kCountLimit && shape.spatial < kCountLimit, "input should have less than ", kCountLimit,
                  " elements in a plane and windows in a channel, not ", shape.spatial, " and ", windows);
}

Keep channel_keep_of(const Tensor& input, const OptionalTensor& mask, double scale) {
  const Keep keep = keep_of(input, mask, scale);
  STD_TORCH_CHECK(!keep.seed, "mask should have an element for each sample and channel, not be a seed");
  return keep;
}

}  // namespace

FiveTensors batch_norm_act_pool_fwd(Tensor input, OptionalTensor weight, OptionalTensor bias, OptionalTensor mask,
                                    OptionalTensor running_mean, OptionalTensor running_var,
                                    OptionalTensor num_batches_tracked, bool training, std::optional<double> momentum,
                                    double eps, std::int64_t activation, std::vector<double> activation_params,
                                    bool monotone, double drop_scale, std::vector<std::int64_t> window, bool ceil_mode,
                                    bool save) {
  const Pool pool = pool_of(window, ceil_mode, input);
  const ForwardChannels channels{weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps};
  channels.check(input);

  const Gpu gpu(input);
  const Shape shape = shape_of_result(input);
  check_pool_size(pool, shape);
  const auto saved = [&](ScalarType dtype) {
    return save ? empty_pooled(pool, shape, input, dtype) : empty_vector(input, 0, dtype);
  };
  Tensor output = empty_pooled(pool, shape, input, input.scalar_type());
  Tensor selected = saved(input.scalar_type()), positions = saved(ScalarType::Byte);
  Tensor mean = empty_vector(input, shape.channels, ScalarType::Double);
  Tensor invstd = empty_vector(input, shape.channels, ScalarType::Double);

  PooledForwardArgs args;
  args.shape = shape;
  args.dtype = storage_dtype(input);
  args.activation = activation_call(activation, activation_params);
  args.keep = channel_keep_of(input, mask, drop_scale);
  channels.set(args, input, mean, invstd);
  if (input.numel() == 0) {
    forward_of_nothing(args, mean, invstd, gpu);
    return {output, mean, invstd, selected, positions};
  }
  const View input_view = as_source(shape, input);
  args.input = input_view.source();
  args.output.data = output.mutable_data_ptr();
  args.pool = pool;
  args.monotone = monotone;
  if (save) {
    args.selected = selected.mutable_data_ptr();
    args.positions = static_cast<std::uint8_t*>(positions.mutable_data_ptr());
  }
  const PooledPlan plan = cuda::plan_pooled_forward(args, Gpu::sizes(input));
  run(cuda::batch_norm_act_pool_forward, args, plan, plan.sums.workspace_bytes, input, gpu);
  return {output, mean, invstd, selected, positions};
}

ThreeTensors batch_norm_act_pool_bwd(Tensor grad_output, Tensor input, Tensor selected, Tensor positions,
                                     OptionalTensor weight, OptionalTensor bias, OptionalTensor mask, Tensor mean,
                                     Tensor invstd, bool training, std::int64_t activation,
                                     std::vector<double> activation_params, double drop_scale,
                                     std::vector<std::int64_t> window, bool ceil_mode, bool input_grad,
                                     bool affine_grad) {
  const Pool pool = pool_of(window, ceil_mode, input);
  const Shape shape = shape_of_result(input);
  check_pool_size(pool, shape);
  check_pooled("grad_output", grad_output, pool, input, input.scalar_type());
  check_pooled("selected", selected, pool, input, input.scalar_type());
  check_pooled("positions", positions, pool, input, ScalarType::Byte);
  const BackwardChannels channels{weight, bias, mean, invstd, training};
  channels.check(input);

  const Gpu gpu(input);
  Tensor grad_input = input_grad ? torch::stable::empty_like(input) : empty_vector(input, 0, input.scalar_type());
  Tensor grad_weight = channels.empty_gradient(weight, affine_grad);
  Tensor grad_bias = channels.empty_gradient(bias, affine_grad);
  if (input.numel() == 0) {
    torch::stable::zero_(grad_weight);
    torch::stable::zero_(grad_bias);
    return {grad_input, grad_weight, grad_bias};
  }

  PooledBackwardArgs args;
  args.shape = shape;
  args.dtype = storage_dtype(input);
  args.activation = activation_call(activation, activation_params);
  args.keep = channel_keep_of(input, mask, drop_scale);
  args.pool = pool;
  const Shape pooled = pooled_shape(pool, shape);
  const View grad_output_view = as_source(pooled, grad_output), selected_view = as_source(pooled, selected);
  args.grad_output = grad_output_view.source();
  args.input = selected_view.source();
  const Tensor positions_in_order = in_order(pooled, positions);
  args.positions = static_cast<const std::uint8_t*>(positions_in_order.const_data_ptr());
  std::optional<View> input_view;
  if (training) args.whole_input = optional_source(input_view, shape, input);
  std::optional<Output> input_out;
  if (input_grad) args.grad_input = input_out.emplace(shape, grad_input).target();
  channels.set(args, grad_weight, grad_bias);
  const PooledPlan plan = cuda::plan_pooled_backward(args, Gpu::sizes(input));
  run(cuda::batch_norm_act_pool_backward, args, plan, plan.sums.workspace_bytes, input, gpu);
  if (input_out) input_out->finish();
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace fastlayers::cuda_ops

#endif
