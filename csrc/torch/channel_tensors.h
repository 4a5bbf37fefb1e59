// What the operators with batch normalisation on the CPU do with tensors of one number per channel.
#pragma once

#include "tensors.h"

namespace fastlayers {

void check_batch_norm_input(const Tensor& input);
ActivationSpec activation_spec(std::int64_t kind, const std::vector<double>& params);

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

// Weight and bias, checked, in double; 1 and 0 where there is none.
struct AffineValues {
  std::vector<double> weight, bias;

  AffineValues(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias);
  template <class Args>
  void set(Args& args) const {
    args.weight = weight.data();
    args.bias = bias.data();
  }
};

// The arguments of forward that have one number per channel, checked, and how they are used.
class ForwardChannels {
 public:
  ForwardChannels(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                  const RunningStatistics& running, bool training, std::optional<double> momentum, double eps);

  // mean and invstd of the batch, for backward.
  Tensor empty_statistics(const Tensor& input) const;
  // To be called before and after the kernel; `args` has the geometry.
  void start(ForwardArgs& args, const Tensor& mean, const Tensor& invstd);
  void finish(const ForwardArgs& args) const;
  // As torch: statistics of nothing are 0 and leave the running ones as they are, and the batch counts.
  void of_nothing(const Tensor& mean, const Tensor& invstd) const;

 private:
  RunningStatistics running_;
  bool training_;
  std::optional<double> momentum_;
  double eps_, factor_ = 0;
  AffineValues affine_;
  std::vector<double> variance_;
};

// The same of backward.
class BackwardChannels {
 public:
  BackwardChannels(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean,
                   const Tensor& invstd, bool training, bool affine_grad);

  void set(BackwardArgs& args);
  // In the dtype of the parameter; empty where there is none, or its gradient is not wanted.
  Tensor grad_weight() const { return gradient(weight_, weight_sums_); }
  Tensor grad_bias() const { return gradient(bias_, bias_sums_); }

 private:
  Tensor gradient(const OptionalTensor& parameter, const std::vector<double>& sums) const;

  OptionalTensor weight_, bias_;
  Tensor mean_, invstd_;
  bool training_;
  AffineValues affine_;
  std::vector<double> weight_sums_, bias_sums_;
};

}  // namespace fastlayers
