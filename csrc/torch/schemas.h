// The schemas of the operators that every device's kernels implement. Their meaning: fastlayers/reference.py; their
// fake versions: fastlayers/fakes.py.
#pragma once

namespace fastlayers::schemas {

inline constexpr const char* batch_norm_act_fwd =
    "batch_norm_act_fwd(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mask, "
    "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, bool training, "
    "float? momentum, float eps, int activation, float[] activation_params, float drop_scale, bool save_flat_bits) "
    "-> (Tensor output, Tensor mean, Tensor invstd, Tensor flat_bits)";
inline constexpr const char* batch_norm_act_bwd =
    "batch_norm_act_bwd(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, "
    "Tensor? flat_bits, Tensor? mask, Tensor mean, Tensor invstd, bool training, int activation, "
    "float[] activation_params, float drop_scale, bool input_grad, bool affine_grad, bool residual_grad) "
    "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)";
// `window` is kernel, stride, padding and dilation, each of height and width; inputs of one dimension have height 1.
// `monotone` says that the activation nowhere falls. Without `save`, selected and positions are empty.
inline constexpr const char* batch_norm_act_pool_fwd =
    "batch_norm_act_pool_fwd(Tensor input, Tensor? weight, Tensor? bias, Tensor? mask, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, bool training, float? momentum, float eps, "
    "int activation, float[] activation_params, bool monotone, float drop_scale, int[] window, bool ceil_mode, "
    "bool save) -> (Tensor output, Tensor mean, Tensor invstd, Tensor selected, Tensor positions)";
inline constexpr const char* batch_norm_act_pool_bwd =
    "batch_norm_act_pool_bwd(Tensor grad_output, Tensor input, Tensor selected, Tensor positions, Tensor? weight, "
    "Tensor? bias, Tensor? mask, Tensor mean, Tensor invstd, bool training, int activation, float[] activation_params, "
    "float drop_scale, int[] window, bool ceil_mode, bool input_grad, bool affine_grad) "
    "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)";
inline constexpr const char* dropout = "dropout(Tensor input, Tensor mask, float scale) -> Tensor";
inline constexpr const char* pack_mask = "pack_mask(Tensor mask, bool flat) -> Tensor";
inline constexpr const char* unpack_mask = "unpack_mask(Tensor bits, Tensor like, bool flat) -> Tensor";
// Of a GPU's masks of single elements, which are seeds: fastlayers/reference.py.
inline constexpr const char* element_mask = "element_mask(Tensor seed, Tensor like, float drop_scale) -> Tensor";
inline constexpr const char* draw_channel_mask =
    "draw_channel_mask(Tensor state, Tensor like, float keep_probability) -> (Tensor mask, Tensor next_state)";
inline constexpr const char* draw_element_mask =
    "draw_element_mask(Tensor state, Tensor like, float keep_probability, bool flat) "
    "-> (Tensor bits, Tensor next_state)";

}  // namespace fastlayers::schemas
