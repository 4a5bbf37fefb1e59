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
    // Not mean + delta * 1 for the first: an infinite mean would become a NaN one sooner than torch's.
    mean = count == 0 ? other.mean : mean + delta * share;
    squares += other.squares + delta * delta * weight;
    count = total;
  }

  // From sums of (x - shift) and (x - shift)^2. Accurate while shift is near the mean compared with the spread.
  FL_INLINE static BasicMoments from_shifted(double count, V shift, V sum, V sum_of_squares) {
    const V offset = sum / count;
    const V squares = sum_of_squares - sum * offset;
    return {count, shift + offset, squares < 0 ? V{} : squares};
  }
};
using Moments = BasicMoments<double>;

// Subtracting the mean first keeps the digits that x * scale + (shift - mean * scale) would cancel.
template <class V>
FL_INLINE V normalize(V x, V mean, V scale, V shift) {
  return (x - mean) * scale + shift;
}

// What normalize needs beside the mean: weight / std and bias.
template <class Scalar>
FL_INLINE Scalar normalize_scale(Scalar weight, Scalar invstd) {
  return weight * invstd;
}

// grad_input = scale * grad + by_deviation * (x - mean) + constant, where grad is the gradient of the normalised,
// scaled and shifted value. In evaluation mode the statistics are constants and only the first term is left.
struct InputGradient {
  double by_deviation = 0;
  double constant = 0;

  FL_INLINE static InputGradient training(double scale, double invstd, double count, double sum_grad,
                                          double sum_grad_deviation) {
    return {-scale * invstd * invstd * sum_grad_deviation / count, -scale * sum_grad / count};
  }
};

template <class V>
FL_INLINE V input_gradient(V grad, V x, V mean, V scale, V by_deviation, V constant) {
  return grad * scale + ((x - mean) * by_deviation + constant);
}

}  // namespace FASTLAYERS_ISA
}  // namespace fastlayers
