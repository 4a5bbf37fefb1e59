// The operators on CUDA tensors: checks and layouts around the kernels. Nothing here waits for the GPU, and all memory
// comes from torch's allocator, so that CUDA graphs can capture every operator.
#include "cuda_ops.h"

#if FASTLAYERS_HAVE_CUDA

#include "cuda_calls.h"

namespace fastlayers::cuda_ops {
namespace {

Shape checked_shape(const Tensor& output) {
  const Shape shape = shape_of(output);
  check_size(shape);
  return shape;
}

// A seed's elements go by their places in the memory of the output. Where the kernels write another order, which is
// copied over it, dropout is a step of its own.
bool drops_apart(const Shape& shape, const Tensor& output, const Keep& keep) {
  return keep.seed && !is_in_order(shape, output);
}

}  // namespace

FourTensors batch_norm_act_fwd(Tensor input, OptionalTensor weight, OptionalTensor bias, OptionalTensor residual,
                               OptionalTensor mask, OptionalTensor running_mean, OptionalTensor running_var,
                               OptionalTensor num_batches_tracked, bool training, std::optional<double> momentum,
                               double eps, std::int64_t activation, std::vector<double> activation_params,
                               double drop_scale, bool save_flat_bits) {
  check_input(input);
  const ForwardChannels channels{weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps};
  channels.check(input);
  if (residual) check_full_size("residual", *residual, input);

  const Gpu gpu(input);
  Tensor output = torch::stable::empty_like(input);
  const Shape shape = checked_shape(output);
  Tensor mean = empty_vector(input, shape.channels, ScalarType::Double);
  Tensor invstd = empty_vector(input, shape.channels, ScalarType::Double);
  Tensor flat_bits = empty_vector(input, save_flat_bits ? cuda::flat_bits_bytes(shape) : 0, ScalarType::Byte);

  ForwardArgs args;
  args.shape = shape;
  args.dtype = storage_dtype(input);
  args.activation = activation_call(activation, activation_params);
  args.keep = keep_of(input, mask, drop_scale);
  channels.set(args, input, mean, invstd);
  if (input.numel() == 0) {
    forward_of_nothing(args, mean, invstd, gpu);
    return {output, mean, invstd, flat_bits};
  }
  const bool apart = drops_apart(shape, output, args.keep);
  if (apart) args.keep = {};
  const View input_view = as_source(shape, input);
  args.input = input_view.source();
  std::optional<View> residual_view;
  args.residual = optional_source(residual_view, shape, residual);
  Output out(shape, output);
  args.output = out.target();
  args.flat_bits = save_flat_bits ? static_cast<std::uint8_t*>(flat_bits.mutable_data_ptr()) : nullptr;
  const Plan plan = cuda::plan_forward(args, Gpu::sizes(input));
  run(cuda::batch_norm_act_forward, args, plan, plan.workspace_bytes, input, gpu);
  out.finish();
  return {apart ? dropout(output, *mask, drop_scale) : output, mean, invstd, flat_bits};
}

FourTensors batch_norm_act_bwd(Tensor grad_output, Tensor input, OptionalTensor weight, OptionalTensor bias,
                               OptionalTensor residual, OptionalTensor flat_bits, OptionalTensor mask, Tensor mean,
                               Tensor invstd, bool training, std::int64_t activation,
                               std::vector<double> activation_params, double drop_scale, bool input_grad,
                               bool affine_grad, bool residual_grad) {
  check_input(input);
  check_full_size("grad_output", grad_output, input);
  if (residual) check_full_size("residual", *residual, input);
  const BackwardChannels channels{weight, bias, mean, invstd, training};
  channels.check(input);

  const Gpu gpu(input);
  // Its strides decide the layout even where the gradient itself is not wanted.
  Tensor grad_input = torch::stable::empty_like(input);
  const Shape shape = checked_shape(grad_input);
  const auto none = [&] { return empty_vector(input, 0, input.scalar_type()); };
  Tensor grad_residual = residual_grad ? torch::stable::empty_like(input) : none();
  Tensor grad_weight = channels.empty_gradient(weight, affine_grad);
  Tensor grad_bias = channels.empty_gradient(bias, affine_grad);
  if (input.numel() == 0) {
    torch::stable::zero_(grad_weight);
    torch::stable::zero_(grad_bias);
    return {input_grad ? grad_input : none(), grad_weight, grad_bias, grad_residual};
  }
  if (flat_bits)
    STD_TORCH_CHECK(flat_bits->scalar_type() == ScalarType::Byte && flat_bits->is_contiguous() &&
                        flat_bits->numel() == cuda::flat_bits_bytes(shape),
                    "flat_bits should be ", cuda::flat_bits_bytes(shape), " contiguous bytes of uint8");

  BackwardArgs args;
  args.shape = shape;
  args.dtype = storage_dtype(input);
  args.activation = activation_call(activation, activation_params);
  args.keep = keep_of(input, mask, drop_scale);
  if (drops_apart(shape, grad_input, args.keep)) {
    args.keep = {};
    torch::stable::copy_(grad_input, grad_output);
    grad_output = dropout(grad_input, *mask, drop_scale);
  }
  const View grad_output_view = as_source(shape, grad_output), input_view = as_source(shape, input);
  args.grad_output = grad_output_view.source();
  args.input = input_view.source();
  std::optional<View> residual_view;
  args.residual = optional_source(residual_view, shape, residual);
  args.flat_bits = flat_bits ? static_cast<const std::uint8_t*>(flat_bits->const_data_ptr()) : nullptr;
  std::optional<Output> input_out, residual_out;
  if (input_grad) args.grad_input = input_out.emplace(shape, grad_input).target();
  if (residual_grad) args.grad_residual = residual_out.emplace(shape, grad_residual).target();
  channels.set(args, grad_weight, grad_bias);
  const Plan plan = cuda::plan_backward(args, Gpu::sizes(input));
  run(cuda::batch_norm_act_backward, args, plan, plan.workspace_bytes, input, gpu);
  if (input_out) input_out->finish();
  if (residual_out) residual_out->finish();
  return {input_grad ? grad_input : none(), grad_weight, grad_bias, grad_residual};
}

Tensor dropout(Tensor input, Tensor mask, double scale) {
  const Gpu gpu(input);
  Tensor output = torch::stable::empty_like(input);
  if (input.numel() == 0) return output;
  DropoutArgs args;
  args.dtype = storage_dtype(input);
  args.keep = keep_of(input, mask, scale);
  args.shape = args.keep.seed ? Shape{false, 1, 1, input.numel()} : shape_of(output);
  // Element by element the shape does not matter, only the order in memory, which is that of the output.
  Tensor source = args.keep.seed ? dense(input) : in_order(args.shape, input);
  Tensor target = args.keep.seed || is_in_order(args.shape, output) ? output : torch::stable::empty_like(source);
  args.input = source.const_data_ptr();
  args.output = target.mutable_data_ptr();
  check(cuda::dropout(args, gpu.stream()), "dropout");
  if (target.get() != output.get()) torch::stable::copy_(output, target);
  return output;
}

Tensor unpack_mask(Tensor bits, Tensor like, bool flat) {
  STD_TORCH_CHECK(!flat, "flat should be false: on a GPU, masks of dropout are seeds");
  const Gpu gpu(like);
  Tensor mask = empty_like(like, ScalarType::Bool);
  const Shape shape = shape_of(mask);
  STD_TORCH_CHECK(
      bits.scalar_type() == ScalarType::Byte && bits.numel() == cuda::flat_bits_bytes(shape) && bits.is_contiguous(),
      "bits should be ", cuda::flat_bits_bytes(shape), " contiguous bytes of uint8");
  check_same_device("bits", bits, like);
  if (mask.numel() == 0) return mask;
  Tensor target = in_order(shape, mask);
  check(cuda::unpack_flat_bits(shape, static_cast<const std::uint8_t*>(bits.const_data_ptr()),
                               static_cast<bool*>(target.mutable_data_ptr()), gpu.stream()),
        "unpacking a mask");
  if (target.get() != mask.get()) torch::stable::copy_(mask, target);
  return mask;
}

Tensor element_mask(Tensor seed, Tensor like, double drop_scale) {
  const Gpu gpu(like);
  Tensor mask = empty_like(like, ScalarType::Bool);
  if (mask.numel() == 0) return mask;
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1, "seed should be one int64");
  check(cuda::element_mask(mask.numel(), keep_of(like, seed, drop_scale), static_cast<bool*>(mask.mutable_data_ptr()),
                           gpu.stream()),
        "drawing a mask");
  return mask;
}

}  // namespace fastlayers::cuda_ops

#endif
