// fastlayers::batch_norm_act_pool_fwd and _bwd on the CPU. schemas.h has their schemas.
#pragma once

#include "pooling.h"

namespace fastlayers {

// Returns output, mean, invstd and, if `save`, for each window its selected element and that one's position in it.
FiveTensors batch_norm_act_pool_fwd(Tensor input, OptionalTensor weight, OptionalTensor bias, OptionalTensor mask,
                                    OptionalTensor running_mean, OptionalTensor running_var,
                                    OptionalTensor num_batches_tracked, bool training, std::optional<double> momentum,
                                    double eps, std::int64_t activation, std::vector<double> activation_params,
                                    bool monotone, double drop_scale, std::vector<std::int64_t> window, bool ceil_mode,
                                    bool save);

// Returns the gradients of input, weight and bias; an empty tensor for one that is not wanted.
ThreeTensors batch_norm_act_pool_bwd(Tensor grad_output, Tensor input, Tensor selected, Tensor positions,
                                     OptionalTensor weight, OptionalTensor bias, OptionalTensor mask, Tensor mean,
                                     Tensor invstd, bool training, std::int64_t activation,
                                     std::vector<double> activation_params, double drop_scale,
                                     std::vector<std::int64_t> window, bool ceil_mode, bool input_grad,
                                     bool affine_grad);

}  // namespace fastlayers
