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
    const std::int64_t at = i & -std::int64_t{per_element};
    const auto load = [at](const S* p) { return detail::load_unaligned<S>(p + at); };
    return normalize(x, load(mean), load(scale), load(shift));
  }
};

// Some runs in scratch memory, `step` apart. What works on them works on whole vectors, for which there has to be room
// behind a run's end.
struct Runs {
  std::int64_t length, count = 1, step = 0;

  // Calls f(at, i) for each vector: `at` from the first run's start, i from its own run's.
  template <class F>
  FL_INLINE void each_vector(F&& f) const {
    for (std::int64_t r = 0; r < count; ++r)
      for (std::int64_t i = 0; i < length; i += kLanes) f(r * step + i, i);
  }
};

// y = act(z(x))
template <class S>
__attribute__((noinline)) void activation_values(const ActivationSpec& spec, const RunAffine<S>& affine,
                                                 const Runs& runs, const S* x, S* y) {
  with_activation<SimdMath<S>>(spec.kind, spec.params, [&](auto act) {
    runs.each_vector([=](std::int64_t at, std::int64_t i) {
      detail::store_unaligned<S>(y + at, act.value(affine.normalized(detail::load_unaligned<S>(x + at), i)));
    });
  });
}

// g = g * act'(z(x)), in torch's sense.
template <class S>
__attribute__((noinline)) void activation_gradients(const ActivationSpec& spec, const RunAffine<S>& affine,
                                                    const Runs& runs, const S* x, S* g) {
  with_activation<SimdMath<S>>(spec.kind, spec.params, [&](auto act) {
    runs.each_vector([=](std::int64_t at, std::int64_t i) {
      const Vec<S> z = affine.normalized(detail::load_unaligned<S>(x + at), i);
      detail::store_unaligned<S>(g + at, act.gradient(detail::load_unaligned<S>(g + at), z));
    });
  });
}

}  // namespace FASTLAYERS_ISA
}  // namespace fastlayers
