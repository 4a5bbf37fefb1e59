// The operators on CUDA tensors. schemas.h has their schemas, kernels/cuda what they call.
#pragma once

#include "batch_norm_act.h"
#include "pooling.h"

namespace fastlayers::cuda_ops {

FourTensors batch_norm_act_fwd(Tensor input, OptionalTensor weight, OptionalTensor bias, OptionalTensor residual,
                               OptionalTensor mask, OptionalTensor running_mean, OptionalTensor running_var,
                               OptionalTensor num_batches_tracked, bool training, std::optional<double> momentum,
                               double eps, std::int64_t activation, std::vector<double> activation_params,
                               double drop_scale, bool save_flat_bits);

FourTensors batch_norm_act_bwd(Tensor grad_output, Tensor input, OptionalTensor weight, OptionalTensor bias,
                               OptionalTensor residual, OptionalTensor flat_bits, OptionalTensor mask, Tensor mean,
                               Tensor invstd, bool training, std::int64_t activation,
                               std::vector<double> activation_params, double drop_scale, bool input_grad,
                               bool affine_grad, bool residual_grad);

FiveTensors batch_norm_act_pool_fwd(Tensor input, OptionalTensor weight, OptionalTensor bias, OptionalTensor mask,
                                    OptionalTensor running_mean, OptionalTensor running_var,
                                    OptionalTensor num_batches_tracked, bool training, std::optional<double> momentum,
                                    double eps, std::int64_t activation, std::vector<double> activation_params,
                                    bool monotone, double drop_scale, std::vector<std::int64_t> window, bool ceil_mode,
                                    bool save);

ThreeTensors batch_norm_act_pool_bwd(Tensor grad_output, Tensor input, Tensor selected, Tensor positions,
                                     OptionalTensor weight, OptionalTensor bias, OptionalTensor mask, Tensor mean,
                                     Tensor invstd, bool training, std::int64_t activation,
                                     std::vector<double> activation_params, double drop_scale,
                                     std::vector<std::int64_t> window, bool ceil_mode, bool input_grad,
                                     bool affine_grad);

Tensor dropout(Tensor input, Tensor mask, double scale);
// Of the bits that forward saves; `flat`, which belongs to the CPU's masks of dropout, has to be false.
Tensor unpack_mask(Tensor bits, Tensor like, bool flat);
// What the element-wise dropout of a seed keeps.
Tensor element_mask(Tensor seed, Tensor like, double drop_scale);

}  // namespace fastlayers::cuda_ops
