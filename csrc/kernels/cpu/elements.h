// What the kernels do with one vector of elements, whatever the layout: the fused forward and backward arithmetic.
#pragma once

#include <cmath>

#include "../common/batch_norm.h"
#include "kernels.h"
#include "simd.h"

namespace fastlayers {
inline namespace FASTLAYERS_ISA {

template <class P>
FL_INLINE P* advance(P* p, std::int64_t n) {
  return p ? p + n : nullptr;
}

// The per-channel numbers that turn x into z = (x - mean) * scale + shift, for one vector of elements.
template <class V>
struct Affine {
  V mean, scale, shift;
};

template <class S>
FL_INLINE Mask<S> all_kept() {
  return Mask<S>{} == Mask<S>{};
}

// Where the elements of one run (a plane or a row) are, from its start on. Null pointers stand for what is not given.
template <class T>
struct ForwardRun {
  const T* input;
  const T* residual;
  T* output;
  std::uint8_t* flat_bits;
};

template <class T>
struct BackwardRun {
  const T* grad_output;
  const T* input;
  const T* residual;
  const std::uint8_t* flat_bits;
};

// Whether writing `x` should bypass the caches: they do not hold it beside what it is computed from, and all its
// vectors are aligned, where what is written begins at multiples of `part` elements of a run or sample. No objection
// from what is not written (null).
template <class T>
bool worth_streaming(const Geometry& g, const Target& x, std::int64_t part) {
  constexpr std::int64_t size = sizeof(T);
  const auto aligned = [](std::int64_t bytes) { return bytes % static_cast<std::int64_t>(kVectorBytes<T>) == 0; };
  return 2 * g.numel() * size >= last_level_cache_bytes() &&
         aligned(static_cast<std::int64_t>(reinterpret_cast<std::intptr_t>(x.data))) && aligned(x.outer * size) &&
         aligned(part * size);
}

// Whether memory is worth fetching ahead: not for tensors so small that they may be in cache.
template <class T>
bool worth_prefetching(const Geometry& g) {
  constexpr std::int64_t kSmall = 1 << 20;
  return g.numel() * static_cast<std::int64_t>(sizeof(T)) >= kSmall;
}

template <class T, class Act>
struct FusedElements {
  using S = Compute<T>;
  using V = Vec<S>;

  Act activation;
  V keep_scale;
  bool streaming;

  // Stores one vector of a result.
  template <class Lanes>
  FL_INLINE void put(T* p, V v, Lanes lanes) const {
    streaming ? stream(p, v, lanes) : store(p, v, lanes);
  }

  // act(normalised + residual), dropped or scaled, at position i of the run.
  template <class Lanes>
  FL_INLINE void forward(const ForwardRun<T>& run, std::int64_t i, const Affine<V>& k, Mask<S> kept,
                         Lanes lanes) const {
    V z = normalize(load(run.input + i, lanes), k.mean, k.scale, k.shift);
    if (run.residual) z = z + load(run.residual + i, lanes);
    if constexpr (Act::two_valued)
      if (run.flat_bits) store_mask_bits(run.flat_bits + i / 8, activation.flat(z), lanes);
    put(run.output + i, kept ? activation.value(z) * keep_scale : V{}, lanes);
  }

  // The gradient of the value that goes into the activation.
  template <class Lanes>
  FL_INLINE V backward(const BackwardRun<T>& run, std::int64_t i, V x, const Affine<V>& k, Mask<S> kept,
                       Lanes lanes) const {
    const V g = load(run.grad_output + i, lanes) * keep_scale;
    if constexpr (Act::two_valued) {
      if (run.flat_bits) {
        const Mask<S> flat = load_mask_bits<S>(run.flat_bits + i / 8, lanes);
        return kept ? activation.gradient_if(g, flat) : V{};
      }
    }
    V z = normalize(x, k.mean, k.scale, k.shift);
    if (run.residual) z = z + load(run.residual + i, lanes);
    return kept ? activation.gradient(g, z) : V{};
  }

  // Adds that gradient, and it times the deviation from the mean, to the sums.
  template <class Lanes>
  FL_INLINE void add_gradient(const BackwardRun<T>& run, std::int64_t i, const Affine<V>& k, Mask<S> kept, Lanes lanes,
                              V& grad, V& grad_deviation) const {
    const V x = load(run.input + i, lanes);
    const V g = covered<S>(backward(run, i, x, k, kept, lanes), lanes);
    grad += g;
    grad_deviation += g * (x - k.mean);
  }
};

template <class S, class Args>
ChannelAffine<S> channel_affine(const Args& args, std::int64_t c) {
  return {args.mean[c], args.invstd[c], args.weight[c], args.bias[c]};
}

// Of smaller variances float's squares have lost digits to underflow.
inline constexpr double kSmallestVariance = 1e-36;

// Whether what `m` has lost to underflow does not matter beside its squares and eps.
template <class T>
FL_INLINE bool is_above_underflow(const Moments& m, double eps) {
  return sizeof(Compute<T>) == sizeof(double) || m.squares + m.count * eps >= m.count * kSmallestVariance;
}

// Turns the moments of channels [begin, end) into what is kept of them; moments(c) gives those of channel c.
template <class F>
void finish_statistics(const ForwardArgs& args, std::int64_t begin, std::int64_t end, F&& moments) {
  // Locals, and a loop of its own for roots and divisions, so that it is compiled to vectors.
  double* const __restrict mean = args.mean, * const __restrict invstd = args.invstd;
  double* const __restrict variance = args.variance;
  const double eps = args.eps;
  for (std::int64_t c = begin; c < end; ++c) {
    const Moments m = moments(c);
    mean[c] = m.mean;
    variance[c] = m.squares;
  }
  const auto count = static_cast<double>(args.geometry.count_per_channel());
  for (std::int64_t c = begin; c < end; ++c) {
    variance[c] /= count;
    invstd[c] = 1 / std::sqrt(variance[c] + eps);
  }
}

FL_INLINE bool needs_sums(const BackwardArgs& args) {
  return args.training || args.grad_weight || args.grad_bias;
}

// Stores a channel's parameter gradients and returns what its input gradient needs, for tensors of T.
template <class T>
InputGradient finish_sums(const BackwardArgs& args, std::int64_t c, GradientSums sums) {
  const double rest = channel_affine<Compute<T>>(args, c).mean_rest;
  sums.include_mean_rest(rest);
  if (args.grad_weight) args.grad_weight[c] = sums.grad_deviation * args.invstd[c];
  if (args.grad_bias) args.grad_bias[c] = sums.grad;
  if (!args.training) return {};
  const auto count = static_cast<double>(args.geometry.count_per_channel());
  return InputGradient::training(args.invstd[c], rest, count, sums);
}

// The same from the sums of `parts` parts of the channel, each `stride` behind the one before it.
template <class T>
InputGradient finish_sums(const BackwardArgs& args, std::int64_t c, const GradientSums* sums, std::int64_t parts,
                          std::int64_t stride) {
  GradientSums total;
  for (std::int64_t i = 0; i < parts; ++i) total.add(sums[i * stride]);
  return finish_sums<T>(args, c, total);
}

// float sums are exact enough over this many additions; then they are carried over to double.
inline constexpr std::int64_t kFloatAdditions = 64;

}  // namespace FASTLAYERS_ISA
}  // namespace fastlayers
