// What is kept and computed once per channel: parameters, statistics, gradients of the parameters.
#pragma once

#include <cmath>

#include "../common/batch_norm.h"
#include "storage.h"
#include "sums.h"

namespace fastlayers::cuda {

__device__ __forceinline__ double read(const ChannelSource& from, std::int64_t c, double missing) {
  if (!from.data) return missing;
  const std::int64_t i = c * from.stride;
  switch (from.dtype) {
    case Dtype::f32: return static_cast<const float*>(from.data)[i];
    case Dtype::f64: return static_cast<const double*>(from.data)[i];
    case Dtype::bf16: return widen(static_cast<const bf16*>(from.data)[i]);
    case Dtype::f16: return widen(static_cast<const f16*>(from.data)[i]);
  }
  return missing;
}

__device__ __forceinline__ double read(const ChannelTarget& from, std::int64_t c, double missing) {
  return read(ChannelSource{from.data, from.dtype, from.stride}, c, missing);
}

__device__ __forceinline__ void write(const ChannelTarget& to, std::int64_t c, double value) {
  if (!to.data) return;
  const std::int64_t i = c * to.stride;
  switch (to.dtype) {
    case Dtype::f32: static_cast<float*>(to.data)[i] = static_cast<float>(value); return;
    case Dtype::f64: static_cast<double*>(to.data)[i] = value; return;
    case Dtype::bf16: narrow(static_cast<float>(value), static_cast<bf16*>(to.data)[i]); return;
    case Dtype::f16: narrow(static_cast<float>(value), static_cast<f16*>(to.data)[i]); return;
  }
}

struct Statistics {
  double mean = 0, invstd = 0;
};

template <class Args>
__device__ __forceinline__ double count_per_channel(const Args& args) {
  return static_cast<double>(args.shape.batch * args.shape.spatial);
}

// running = (1 - factor) * running + factor * value
__device__ __forceinline__ void update_running(const ChannelTarget& running, std::int64_t c, double factor,
                                               double value) {
  if (running.data) write(running, c, (1 - factor) * read(running, c, 0) + factor * value);
}

// Of a channel whose deviations from `origin` have these sums. Who `leads` the channel's blocks also stores them and
// updates the running statistics.
__device__ __forceinline__ Statistics batch_statistics(const ForwardArgs& args, std::int64_t c, double origin,
                                                       const Pair& sums, bool leads) {
  const double count = count_per_channel(args);
  const Moments moments = Moments::from_shifted(count, origin, sums.first, sums.second);
  const double variance = moments.squares / count;
  const Statistics found{moments.mean, 1 / std::sqrt(variance + args.eps)};
  if (!leads) return found;
  args.mean[c] = found.mean;
  args.invstd[c] = found.invstd;
  // The count of batches is already that of this one where it is read here (count_batch).
  const double factor = args.cumulative ? 1 / static_cast<double>(*args.num_batches_tracked) : args.momentum;
  update_running(args.running_mean, c, factor, found.mean);
  update_running(args.running_var, c, factor, moments.squares / (count - 1));
  if (c == 0 && args.num_batches_tracked && !args.cumulative) ++*args.num_batches_tracked;
  return found;
}

__device__ __forceinline__ Statistics running_statistics(const ForwardArgs& args, std::int64_t c, bool leads) {
  const Statistics found{read(args.running_mean, c, 0), 1 / std::sqrt(read(args.running_var, c, 1) + args.eps)};
  if (leads) {
    args.mean[c] = found.mean;
    args.invstd[c] = found.invstd;
  }
  return found;
}

template <class S, class Args>
__device__ __forceinline__ ChannelAffine<S> channel_affine(const Args& args, std::int64_t c, const Statistics& s) {
  return {s.mean, s.invstd, read(args.weight, c, 1), read(args.bias, c, 0)};
}

// With the statistics of forward.
template <class S>
__device__ __forceinline__ ChannelAffine<S> saved_affine(const BackwardArgs& args, std::int64_t c) {
  return channel_affine<S>(args, c, {args.mean[c], args.invstd[c]});
}

// What a channel's input gradients need, in the type that elements are computed in.
template <class S>
struct Gradient {
  ChannelAffine<S> affine;
  S by_deviation = 0, constant = 0;
};

// `sums` are about the affine's mean. Who leads the channel's blocks stores the parameters' gradients.
template <class S>
__device__ __forceinline__ Gradient<S> channel_gradient(const BackwardArgs& args, std::int64_t c, const Pair& sums,
                                                        bool leads) {
  const Statistics saved{args.mean[c], args.invstd[c]};
  Gradient<S> gradient{channel_affine<S>(args, c, saved)};
  GradientSums about_mean{sums.first, sums.second};
  about_mean.include_mean_rest(gradient.affine.mean_rest);
  if (leads) {
    write(args.grad_weight, c, about_mean.grad_deviation * saved.invstd);
    write(args.grad_bias, c, about_mean.grad);
  }
  if (!args.training) return gradient;
  const auto of_input =
      InputGradient::training(saved.invstd, gradient.affine.mean_rest, count_per_channel(args), about_mean);
  gradient.by_deviation = static_cast<S>(of_input.by_deviation);
  gradient.constant = static_cast<S>(of_input.constant);
  return gradient;
}

// Whether anything at all is summed over channels.
inline bool needs_sums(const BackwardArgs& args) {
  return args.training || args.grad_weight.data || args.grad_bias.data;
}

}  // namespace fastlayers::cuda
