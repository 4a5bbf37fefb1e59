// What activations.h computes with on the GPU: one float or double for each thread.
#pragma once

#include <cmath>

#include "../common/activations.h"
#include "plan.h"
#include "runtime.h"

namespace fastlayers::cuda {

template <class Scalar>
struct ScalarMath {
  using S = Scalar;
  using V = Scalar;

  FL_INLINE static V splat(double s) { return static_cast<S>(s); }
  FL_INLINE static V select(bool mask, V yes, V no) { return mask ? yes : no; }
  FL_INLINE static bool negate(bool mask) { return !mask; }
  // A NaN passes through min, max and clamp.
  FL_INLINE static V min(V v, double limit) { return v > splat(limit) ? splat(limit) : v; }
  FL_INLINE static V max(V v, double limit) { return v < splat(limit) ? splat(limit) : v; }
  FL_INLINE static V clamp(V v, double low, double high) { return min(max(v, low), high); }
  FL_INLINE static V abs(V v) { return std::fabs(v); }
  FL_INLINE static V exp(V v) { return std::exp(v); }
  FL_INLINE static V expm1(V v) { return std::expm1(v); }
  FL_INLINE static V log1p(V v) { return std::log1p(v); }
  FL_INLINE static V erf(V v) { return std::erf(v); }
  FL_INLINE static V tanh(V v) { return std::tanh(v); }
};

template <Activations kWhich, class S, class F>
__device__ __forceinline__ void with_call(const ActivationCall& call, F&& f) {
  using M = ScalarMath<S>;
  if constexpr (kWhich == Activations::all)
    with_activation<M>(call.kind, call.params, f);
  else if (call.kind == Activation::relu)
    f(Relu<M>(call.params));
  else
    f(Identity<M>(call.params));
}

}  // namespace fastlayers::cuda
