// fastlayers::batch_norm_act_fwd and _bwd on the CPU. schemas.h has their schemas.
#pragma once

#include <tuple>

#include "tensors.h"

namespace fastlayers {

using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Returns output, mean, invstd and, if save_flat_bits, a bit per element that says where a two-valued derivative is
// small.
FourTensors batch_norm_act_fwd(Tensor input, OptionalTensor weight, OptionalTensor bias, OptionalTensor residual,
                               OptionalTensor mask, OptionalTensor running_mean, OptionalTensor running_var,
                               OptionalTensor num_batches_tracked, bool training, std::optional<double> momentum,
                               double eps, std::int64_t activation, std::vector<double> activation_params,
                               double drop_scale, bool save_flat_bits);

// Returns the gradients of input, weight, bias and residual; an empty tensor for one that is not wanted.
FourTensors batch_norm_act_bwd(Tensor grad_output, Tensor input, OptionalTensor weight, OptionalTensor bias,
                               OptionalTensor residual, OptionalTensor flat_bits, OptionalTensor mask, Tensor mean,
                               Tensor invstd, bool training, std::int64_t activation,
                               std::vector<double> activation_params, double drop_scale, bool input_grad,
                               bool affine_grad, bool residual_grad);

}  // namespace fastlayers
