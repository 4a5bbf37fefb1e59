// The operators on CUDA tensors: checks and layouts around the kernels. Nothing here waits for the GPU, and all memory
// comes from torch's allocator, so that CUDA graphs can capture every operator.
#include "cuda_ops.h"

#if FASTLAYERS_HAVE_CUDA

#include "../kernels/common/activations.h"
#include "../kernels/cuda/plan.h"
#include "gpu.h"

namespace fastlayers::cuda_ops {

// The CPU's types of the same names are one namespace further out.
using cuda::ActivationCall, cuda::BackwardArgs, cuda::ChannelSource, cuda::ChannelTarget, cuda::Device,
    cuda::DropoutArgs, cuda::Error, cuda::ForwardArgs, cuda::Keep, cuda::Plan, cuda::Stream;

namespace {

void check(Error error, const std::string& what) {
  STD_TORCH_CHECK(error == 0, "fastlayers: a CUDA kernel could not be launched: ", cuda::error_text(error), " (", what,
                  ")");
}

// Groups and runs of rows are counted in 31 bits.
void check_size(const Shape& shape) {
  const std::int64_t groups = shape.rows ? shape.count_per_channel() : shape.batch * cuda::groups_per_plane(shape);
  constexpr std::int64_t kLimit = (std::int64_t{1} << 31) - (1 << 20);
  STD_TORCH_CHECK(
      groups < kLimit && shape.channels < kLimit / cuda::kMaxRowsPerRun, "input should have less than ", kLimit,
      shape.rows ? " positions in all its samples, not " : " groups of 8 elements in a channel, not ", groups);
}

Shape checked_shape(const Tensor& output) {
  const Shape shape = shape_of(output);
  check_size(shape);
  return shape;
}

ActivationCall activation_call(std::int64_t kind, const std::vector<double>& params) {
  check_activation(kind, params);
  ActivationCall call;
  call.kind = static_cast<Activation>(kind);
  for (std::size_t i = 0; i < params.size(); ++i) call.params[i] = params[i];
  return call;
}

// What a mask means: a value per sample and channel, or the seed of a value per element.
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

void check_input(const Tensor& input) {
  STD_TORCH_CHECK(input.dim() >= 2, "input should have at least 2 dimensions (N, C, ...), not ", input.dim());
}

// A seed's elements go by their places in the memory of the output. Where the kernels write another order, which is
// copied over it, dropout is a step of its own.
bool drops_apart(const Shape& shape, const Tensor& output, const Keep& keep) {
  return keep.seed && !is_in_order(shape, output);
}

// Runs what was planned, in workspace of torch's.
template <class Args>
void run(Error (*kernels)(const Args&, const Plan&, void*, Stream), const Args& args, const Plan& plan,
         const Tensor& input, const Gpu& gpu) {
  Tensor workspace = empty_vector(input, static_cast<std::int64_t>(plan.workspace_bytes), ScalarType::Byte);
  check(kernels(args, plan, workspace.mutable_data_ptr(), gpu.stream()), cuda::describe(plan));
}

}  // namespace

FourTensors batch_norm_act_fwd(Tensor input, OptionalTensor weight, OptionalTensor bias, OptionalTensor residual,
                               OptionalTensor mask, OptionalTensor running_mean, OptionalTensor running_var,
                               OptionalTensor num_batches_tracked, bool training, std::optional<double> momentum,
                               double eps, std::int64_t activation, std::vector<double> activation_params,
                               double drop_scale, bool save_flat_bits) {
  check_input(input);
  check_channel_vector("weight", weight, input);
  check_channel_vector("bias", bias, input);
  check_channel_vector("running_mean", running_mean, input);
  check_channel_vector("running_var", running_var, input);
  STD_TORCH_CHECK(training || (running_mean && running_var),
                  "running_mean and running_var must be defined in evaluation mode");
  const bool tracks = training && running_mean;
  STD_TORCH_CHECK(!tracks || momentum || num_batches_tracked,
                  "momentum should be a number, not None, without num_batches_tracked");
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
  args.num_batches_tracked = tracks ? batch_counter(num_batches_tracked, input) : nullptr;
  if (input.numel() == 0) {
    // As torch: statistics of nothing leave the running ones as they are.
    torch::stable::zero_(mean);
    torch::stable::zero_(invstd);
    if (args.num_batches_tracked) check(cuda::count_batch(args.num_batches_tracked, gpu.stream()), "counting a batch");
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
  args.weight = channel_source(weight);
  args.bias = channel_source(bias);
  args.running_mean = channel_target(running_mean);
  args.running_var = channel_target(running_var);
  args.training = training;
  args.cumulative = tracks && !momentum;
  args.momentum = momentum.value_or(0);
  args.eps = eps;
  args.mean = static_cast<double*>(mean.mutable_data_ptr());
  args.invstd = static_cast<double*>(invstd.mutable_data_ptr());
  run(cuda::batch_norm_act_forward, args, cuda::plan_forward(args, Gpu::sizes(input)), input, gpu);
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
  check_channel_vector("weight", weight, input);
  check_channel_vector("bias", bias, input);
  check_saved_statistics("mean", mean, input);
  check_saved_statistics("invstd", invstd, input);

  const Gpu gpu(input);
  // Its strides decide the layout even where the gradient itself is not wanted.
  Tensor grad_input = torch::stable::empty_like(input);
  const Shape shape = checked_shape(grad_input);
  const auto none = [&] { return empty_vector(input, 0, ScalarType::Double); };
  const auto channel_gradient = [&](const OptionalTensor& parameter) {
    return affine_grad && parameter ? empty_vector(input, shape.channels, parameter->scalar_type()) : none();
  };
  Tensor grad_residual = residual_grad ? torch::stable::empty_like(input) : none();
  Tensor grad_weight = channel_gradient(weight), grad_bias = channel_gradient(bias);
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
  args.grad_weight = channel_target(grad_weight);
  args.grad_bias = channel_target(grad_bias);
  args.weight = channel_source(weight);
  args.bias = channel_source(bias);
  args.mean = static_cast<const double*>(mean.const_data_ptr());
  args.invstd = static_cast<const double*>(invstd.const_data_ptr());
  args.training = training;
  run(cuda::batch_norm_act_backward, args, cuda::plan_backward(args, Gpu::sizes(input)), input, gpu);
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
