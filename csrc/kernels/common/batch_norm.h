// The formulas of batch normalisation, one definition each. Ioffe and Szegedy 2015,
// https://arxiv.org/abs/1502.03167: Algorithm 1 (forward) and section 3 (gradients).
#pragma once

#include <cstdint>

#include "macros.h"

namespace fastlayers {
inline namespace FASTLAYERS_ISA {

// Count, mean and sum of squared deviations from the mean of a set of values; V is double, or a vector of doubles for
// as many sets of the same count.
template <class V>
struct BasicMoments {
  double count = 0;
  V mean{}, squares{};

  // Chan, Golub and LeVeque 1979, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances".
  FL_INLINE void merge(const BasicMoments& other) {
    if (other.count == 0) return;
    const double total = count + other.count, share = other.count / total, weight = count * share;
    const V delta = other.mean - mean;
    // Where one mean is infinite, so is the mean of all; delta would make it NaN.
    mean = delta - delta == 0 ? mean + delta * share : mean + other.mean;
    squares += other.squares + delta * delta * weight;
    count = total;
  }

  // From sums of (x - shift) and (x - shift)^2. Accurate while shift is near the mean compared with the spread.
  FL_INLINE static BasicMoments from_shifted(double count, V shift, V sum, V sum_of_squares) {
    const V offset = sum * (1 / count);
    const V squares = sum_of_squares - sum * offset;
    return {count, shift + offset, squares < 0 ? V{} : squares};
  }
};
using Moments = BasicMoments<double>;

// What corrects a sum by less than its rounding: nothing where it is infinite or NaN and would hide the sum's own kind.
FL_INLINE double correction(double x) {
  return x - x == 0 ? x : 0;
}

// A channel's normalisation, weight and bias in the type S that elements are computed in.
//
// The mean has more digits than S holds where it is large beside the spread. Subtracting the part that S holds is exact
// there, and the rest moves into the shift; (x * scale + shift) with one shift for all would lose those digits.
template <class S>
struct ChannelAffine {
  S mean, scale, shift;
  double mean_rest;

  ChannelAffine() = default;
  FL_INLINE ChannelAffine(double mean_, double invstd, double weight, double bias) {
    mean = static_cast<S>(mean_);
    mean_rest = mean_ - static_cast<double>(mean);
    if (mean_rest != mean_rest) mean_rest = 0;  // an infinite mean
    scale = static_cast<S>(weight * invstd);
    shift = static_cast<S>(bias - correction(mean_rest * (weight * invstd)));
  }
};

template <class V>
FL_INLINE V normalize(V x, V mean, V scale, V shift) {
  return (x - mean) * scale + shift;
}

// What a channel's gradients need: the sums over it of g and of g * (x - mean), where g is the gradient of the
// normalised, scaled and shifted value and mean is ChannelAffine's.
struct GradientSums {
  double grad = 0, grad_deviation = 0;

  FL_INLINE void add(const GradientSums& other) {
    grad += other.grad;
    grad_deviation += other.grad_deviation;
  }
  // The same about the whole mean.
  FL_INLINE void include_mean_rest(double rest) { grad_deviation -= correction(rest * grad); }
};

// grad_input = scale * (g + by_deviation * (x - mean) + constant), with ChannelAffine's mean and scale. In evaluation
// mode the statistics are constants, and only the first term is left. Without the scale, by_deviation is of the size of
// 1 / deviation; with it, of that of its square, which float cannot hold for deviations beyond 1e19 and below 1e-19.
struct InputGradient {
  double by_deviation = 0, constant = 0;

  // `sums` are about the whole mean.
  FL_INLINE static InputGradient training(double invstd, double mean_rest, double count, const GradientSums& sums) {
    const double by_deviation = invstd * (invstd * sums.grad_deviation) / -count;
    return {by_deviation, sums.grad / -count - correction(mean_rest * by_deviation)};
  }
};

template <class V>
FL_INLINE V input_gradient(V grad, V x, V mean, V scale, V by_deviation, V constant) {
  return (grad + ((x - mean) * by_deviation + constant)) * scale;
}

}  // namespace FASTLAYERS_ISA
}  // namespace fastlayers
