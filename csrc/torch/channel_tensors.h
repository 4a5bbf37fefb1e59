// What the operators with batch normalisation on the CPU do with tensors of one number per channel.
#pragma once

#include "tensors.h"

namespace fastlayers {

void check_batch_norm_input(const Tensor& input);
ActivationSpec activation_spec(std::int64_t kind, const std::vector<double>& params);

void fill(const Tensor& t, double value);

// Running statistics of a forward pass, and the count of batches. Any may be missing.
struct RunningStatistics {
  OptionalTensor mean, var, num_batches_tracked;

  void check(const Tensor& input, bool training) const;
  // Adds one to the count of batches and returns the weight of the newest: `momentum`, or for a cumulative average its
  // share of all batches. Nothing of that without a running mean, nor in evaluation mode.
  double update_factor(bool training, std::optional<double> momentum) const;
  // In evaluation mode, the statistics that the kernels take.
  void load(const ForwardArgs& args) const;
  // running = (1 - factor) * running + factor * the batch's
  void update(double factor, const ForwardArgs& args) const;
};

// Weight and bias in double, 1 and 0 where there is none.
struct AffineValues {
  std::vector<double> weight, bias;

  AffineValues(const OptionalTensor& weight, const OptionalTensor& bias, std::int64_t channels)
      : weight(channel_values(weight, channels, 1)), bias(channel_values(bias, channels, 0)) {}

  template <class Args>
  void set(Args& args) const {
    args.weight = weight.data();
    args.bias = bias.data();
  }
};

// A gradient that was summed in double, in the dtype of its parameter; empty where it is not wanted.
Tensor channel_gradient(const Tensor& input, const OptionalTensor& parameter, const std::vector<double>& sums);

}  // namespace fastlayers
