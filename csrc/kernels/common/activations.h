// Activations: value and gradient side by side, written once for the CPU and the CUDA kernels.
//
// `M` says what to compute with: M::V is a float, a double or a vector of them, M::S its element, and M::exp, M::select
// and so on work on V. Each activation offers
//   value(z)          act(z)
//   gradient(g, z)    g * act'(z); where torch selects instead of multiplying, so that 0 * NaN stays 0, so does this
// and, if its derivative takes only two values (`two_valued`), so that one bit per element is all that backward needs,
//   flat(z)               where the derivative takes the smaller value
//   gradient_if(g, flat)  gradient from that bit
// Comparisons are written so that a NaN comes out wherever torch lets it out.
#pragma once

#include <cstdint>

#include "macros.h"

namespace fastlayers {

// The numbers are those of fastlayers/activations.py.
enum class Activation : std::int64_t {
  identity = 0,
  relu = 1,
  relu6 = 2,
  leaky_relu = 3,
  elu = 4,  // also selu and celu: scaled on both sides and along z
  silu = 5,
  mish = 6,
  gelu = 7,
  gelu_tanh = 8,
  sigmoid = 9,
  tanh = 10,
  hardswish = 11,
  hardsigmoid = 12,
  softplus = 13,
};
inline constexpr std::int64_t kActivationCount = 14;
inline constexpr int kActivationParams = 3;

inline namespace FASTLAYERS_ISA {

// sigmoid(z) and its derivative, by exp(-|z|): neither overflows, and no digits of the small ones cancel.
template <class M>
struct Logistic {
  typename M::V value, derivative;
  FL_INLINE explicit Logistic(typename M::V z) {
    const auto e = M::exp(-M::abs(z)), d = M::splat(1) / (M::splat(1) + e);
    value = M::select(z < M::splat(0), e * d, d);
    derivative = e * d * d;
  }
};

template <class M>
struct Identity {
  using V = typename M::V;
  static constexpr bool two_valued = false;
  FL_INLINE explicit Identity(const double*) {}
  FL_INLINE V value(V z) const { return z; }
  FL_INLINE V gradient(V g, V) const { return g; }
};

// Adds gradient(g, z) to an activation that has flat and gradient_if.
template <class Self, class M>
struct TwoValued {
  using V = typename M::V;
  static constexpr bool two_valued = true;
  FL_INLINE V gradient(V g, V z) const {
    const Self& self = static_cast<const Self&>(*this);
    return self.gradient_if(g, self.flat(z));
  }
};

template <class M>
struct Relu : TwoValued<Relu<M>, M> {
  using V = typename M::V;
  FL_INLINE explicit Relu(const double*) {}
  FL_INLINE V value(V z) const { return M::select(z <= M::splat(0), M::splat(0), z); }
  FL_INLINE auto flat(V z) const { return z <= M::splat(0); }
  template <class Mask>
  FL_INLINE V gradient_if(V g, Mask flat) const {
    return M::select(flat, M::splat(0), g);
  }
};

template <class M>
struct Relu6 : TwoValued<Relu6<M>, M> {
  using V = typename M::V;
  FL_INLINE explicit Relu6(const double*) {}
  FL_INLINE V value(V z) const { return M::clamp(z, 0, 6); }
  FL_INLINE auto flat(V z) const { return (z <= M::splat(0)) | (z >= M::splat(6)); }
  template <class Mask>
  FL_INLINE V gradient_if(V g, Mask flat) const {
    return M::select(flat, M::splat(0), g);
  }
};

template <class M>
struct LeakyRelu : TwoValued<LeakyRelu<M>, M> {
  using V = typename M::V;
  typename M::S negative_slope;
  FL_INLINE explicit LeakyRelu(const double* p) : negative_slope(p[0]) {}
  FL_INLINE V value(V z) const { return M::select(z <= M::splat(0), z * negative_slope, z); }
  FL_INLINE auto flat(V z) const { return M::negate(z > M::splat(0)); }
  template <class Mask>
  FL_INLINE V gradient_if(V g, Mask flat) const {
    return M::select(flat, g * negative_slope, g);
  }
};

// elu, selu and celu: positive * z above zero, negative * (exp(inner * z) - 1) below.
template <class M>
struct Elu {
  using V = typename M::V;
  static constexpr bool two_valued = false;
  typename M::S positive, negative, inner;
  FL_INLINE explicit Elu(const double* p) : positive(p[0]), negative(p[1]), inner(p[2]) {}
  FL_INLINE V value(V z) const {
    return M::select(z > M::splat(0), z * positive, M::expm1(M::min(z, 0) * inner) * negative);
  }
  FL_INLINE V gradient(V g, V z) const {
    const V below = M::exp(M::min(z, 0) * inner) * (negative * inner);
    return g * M::select(z <= M::splat(0), below, M::splat(positive));
  }
};

template <class M>
struct Silu {
  using V = typename M::V;
  static constexpr bool two_valued = false;
  FL_INLINE explicit Silu(const double*) {}
  FL_INLINE V value(V z) const { return z / (M::splat(1) + M::exp(-z)); }
  FL_INLINE V gradient(V g, V z) const {
    const Logistic<M> s(z);
    return g * (s.value + z * s.derivative);
  }
};

// z * tanh(softplus(z)) without a logarithm: with e = exp(z) and w = e (e + 2), tanh(log(1 + e)) = w / (w + 2).
template <class M>
struct Mish {
  using V = typename M::V;
  static constexpr bool two_valued = false;
  FL_INLINE explicit Mish(const double*) {}
  FL_INLINE V value(V z) const {
    const V e = M::exp(limited(z)), w = e * (e + M::splat(2));
    return z * (w / (w + M::splat(2)));
  }
  FL_INLINE V gradient(V g, V z) const {
    const V e = M::exp(limited(z)), w = e * (e + M::splat(2)), inverse = M::splat(1) / (w + M::splat(2));
    return g * (w * inverse + limited(z) * (M::splat(4) * e * (M::splat(1) + e) * inverse) * inverse);
  }

 private:
  // From 20 on w / (w + 2) is 1 and the rest of the gradient nothing beside it, in both precisions; w stays finite.
  FL_INLINE static V limited(V z) { return M::min(z, 20); }
};

template <class M>
struct Gelu {
  using V = typename M::V;
  static constexpr bool two_valued = false;
  static constexpr double kSqrtHalf = 0.70710678118654752440;
  static constexpr double kInvSqrtTwoPi = 0.39894228040143267794;
  FL_INLINE explicit Gelu(const double*) {}
  FL_INLINE V value(V z) const { return z * cdf(z); }
  FL_INLINE V gradient(V g, V z) const {
    const V density = M::exp(z * z * M::splat(-0.5)) * M::splat(kInvSqrtTwoPi);
    return g * (cdf(z) + z * density);
  }

 private:
  FL_INLINE static V cdf(V z) { return M::splat(0.5) + M::splat(0.5) * M::erf(z * M::splat(kSqrtHalf)); }
};

// Hendrycks and Gimpel 2016, https://arxiv.org/abs/1606.08415, section 2, with 0.5 (1 + tanh(u)) = sigmoid(2 u).
template <class M>
struct GeluTanh {
  using V = typename M::V;
  static constexpr bool two_valued = false;
  static constexpr double kTwoSqrtTwoOverPi = 1.59576912160573071176;
  static constexpr double kCubic = 0.044715;
  FL_INLINE explicit GeluTanh(const double*) {}
  FL_INLINE V value(V z) const { return z * Logistic<M>(inner(limited(z))).value; }
  FL_INLINE V gradient(V g, V z) const {
    const V near = limited(z);
    const Logistic<M> s(inner(near));
    const V slope = M::splat(kTwoSqrtTwoOverPi) * (M::splat(1) + M::splat(3 * kCubic) * near * near);
    return g * (s.value + near * slope * s.derivative);
  }

 private:
  // From 30 on the sigmoid is 0 or 1 and its derivative 0 in both precisions, and nothing overflows.
  FL_INLINE static V limited(V z) { return M::clamp(z, -30, 30); }
  FL_INLINE static V inner(V z) { return M::splat(kTwoSqrtTwoOverPi) * (z + M::splat(kCubic) * z * z * z); }
};

template <class M>
struct Sigmoid {
  using V = typename M::V;
  static constexpr bool two_valued = false;
  FL_INLINE explicit Sigmoid(const double*) {}
  FL_INLINE V value(V z) const { return Logistic<M>(z).value; }
  FL_INLINE V gradient(V g, V z) const { return g * Logistic<M>(z).derivative; }
};

template <class M>
struct Tanh {
  using V = typename M::V;
  static constexpr bool two_valued = false;
  FL_INLINE explicit Tanh(const double*) {}
  FL_INLINE V value(V z) const { return M::tanh(z); }
  // 1 - tanh(z)^2 = 4 sigmoid'(2 z)
  FL_INLINE V gradient(V g, V z) const { return g * (M::splat(4) * Logistic<M>(z + z).derivative); }
};

template <class M>
struct Hardswish {
  using V = typename M::V;
  static constexpr bool two_valued = false;
  FL_INLINE explicit Hardswish(const double*) {}
  FL_INLINE V value(V z) const { return z * M::clamp(z + M::splat(3), 0, 6) * M::splat(1.0 / 6); }
  FL_INLINE V gradient(V g, V z) const {
    const V inside = g * (z * M::splat(1.0 / 3) + M::splat(0.5));
    return M::select(z <= M::splat(-3), M::splat(0), M::select(z < M::splat(3), inside, g));
  }
};

template <class M>
struct Hardsigmoid : TwoValued<Hardsigmoid<M>, M> {
  using V = typename M::V;
  FL_INLINE explicit Hardsigmoid(const double*) {}
  FL_INLINE V value(V z) const { return M::clamp(z + M::splat(3), 0, 6) * M::splat(1.0 / 6); }
  FL_INLINE auto flat(V z) const { return M::negate((z > M::splat(-3)) & (z < M::splat(3))); }
  template <class Mask>
  FL_INLINE V gradient_if(V g, Mask flat) const {
    return M::select(flat, M::splat(0), g * M::splat(1.0 / 6));
  }
};

template <class M>
struct Softplus {
  using V = typename M::V;
  static constexpr bool two_valued = false;
  typename M::S beta, inverse_beta, threshold;
  FL_INLINE explicit Softplus(const double* p) : beta(p[0]), inverse_beta(1 / p[0]), threshold(p[1]) {}
  FL_INLINE V value(V z) const {
    const V t = z * beta;
    const V soft = (M::max(t, 0) + M::log1p(M::exp(-M::abs(t)))) * inverse_beta;
    return M::select(t > M::splat(threshold), z, soft);
  }
  FL_INLINE V gradient(V g, V z) const {
    const V t = z * beta;
    return M::select(t > M::splat(threshold), g, g * Logistic<M>(t).value);
  }
};

// Calls f with the activation that `kind` names, set up with its parameters.
template <class M, class F>
FL_DEVICE_TOO void with_activation(Activation kind, const double* params, F&& f) {
  switch (kind) {
    case Activation::identity: return f(Identity<M>(params));
    case Activation::relu: return f(Relu<M>(params));
    case Activation::relu6: return f(Relu6<M>(params));
    case Activation::leaky_relu: return f(LeakyRelu<M>(params));
    case Activation::elu: return f(Elu<M>(params));
    case Activation::silu: return f(Silu<M>(params));
    case Activation::mish: return f(Mish<M>(params));
    case Activation::gelu: return f(Gelu<M>(params));
    case Activation::gelu_tanh: return f(GeluTanh<M>(params));
    case Activation::sigmoid: return f(Sigmoid<M>(params));
    case Activation::tanh: return f(Tanh<M>(params));
    case Activation::hardswish: return f(Hardswish<M>(params));
    case Activation::hardsigmoid: return f(Hardsigmoid<M>(params));
    case Activation::softplus: return f(Softplus<M>(params));
  }
}

}  // namespace FASTLAYERS_ISA
}  // namespace fastlayers
