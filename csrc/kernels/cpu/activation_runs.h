// Activations of runs of numbers in scratch memory: all that pooling computes with them, so that none of its other code
// is compiled once per activation.
#pragma once

#include "../common/activations.h"
#include "../common/batch_norm.h"
#include "../common/operands.h"
#include "simd_math.h"

namespace fastlayers {
inline namespace FASTLAYERS_ISA {

// What x is normalised with: one number of each per element, or one for all of a run, filling a vector.
template <class S>
struct RunAffine {
  const S *mean, *scale, *shift;
  bool per_element;

  FL_INLINE Vec<S> normalized(Vec<S> x, std::int64_t i) const {
    const std::int64_t at = per_element ? i : 0;
    const auto load = [at](const S* p) { return detail::load_unaligned<S>(p + at); };
    return normalize(x, load(mean), load(scale), load(shift));
  }
};

// Both work on whole vectors, so that there has to be room for these behind a run's end.

// y = act(z(x))
template <class S>
__attribute__((noinline)) void activation_values(const ActivationSpec& spec, const RunAffine<S>& affine, const S* x,
                                                 std::int64_t n, S* y) {
  with_activation<SimdMath<S>>(spec.kind, spec.params, [&](auto act) {
    for (std::int64_t i = 0; i < n; i += kLanes)
      detail::store_unaligned<S>(y + i, act.value(affine.normalized(detail::load_unaligned<S>(x + i), i)));
  });
}

// g = g * act'(z(x)), in torch's sense.
template <class S>
__attribute__((noinline)) void activation_gradients(const ActivationSpec& spec, const RunAffine<S>& affine, const S* x,
                                                    std::int64_t n, S* g) {
  with_activation<SimdMath<S>>(spec.kind, spec.params, [&](auto act) {
    for (std::int64_t i = 0; i < n; i += kLanes) {
      const Vec<S> z = affine.normalized(detail::load_unaligned<S>(x + i), i);
      detail::store_unaligned<S>(g + i, act.gradient(detail::load_unaligned<S>(g + i), z));
    }
  });
}

}  // namespace FASTLAYERS_ISA
}  // namespace fastlayers
