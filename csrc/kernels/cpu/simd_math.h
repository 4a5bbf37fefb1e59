// What activations.h computes with on the CPU: selection, clamping and elementary functions of vectors.
//
// The float functions are polynomials after range reduction, accurate to about 1 unit in the last place over the range
// where their result is normal (tests/test_simd_math.py measures it). The double ones call the C library lane by lane:
// double is for checking gradients, not for speed.
#pragma once

#include <cmath>

#include "simd.h"

namespace fastlayers {
inline namespace FASTLAYERS_ISA {

template <class Scalar>
struct SimdMathBase {
  using S = Scalar;
  using V = Vec<S>;

  FL_INLINE static V splat(double s) { return V{} + static_cast<S>(s); }
  FL_INLINE static V select(Mask<S> mask, V yes, V no) { return mask ? yes : no; }
  FL_INLINE static Mask<S> negate(Mask<S> mask) { return ~mask; }
  // A NaN passes through min, max and clamp.
  FL_INLINE static V min(V v, double limit) { return select(v > splat(limit), splat(limit), v); }
  FL_INLINE static V max(V v, double limit) { return select(v < splat(limit), splat(limit), v); }
  FL_INLINE static V clamp(V v, double low, double high) { return min(max(v, low), high); }
  FL_INLINE static V abs(V v) { return select(v < splat(0), -v, v); }
};

template <class Scalar>
struct SimdMath;

template <>
struct SimdMath<float> : SimdMathBase<float> {
  FL_INLINE static V exp(V x) {
    // Beyond these limits the result is 0 or infinity, which the scaling in two steps gives.
    const Reduced r = reduce(clamp(x, -105, 90));
    return scale(scale(r.expm1 + 1.0f, r.exponent >> 1), r.exponent - (r.exponent >> 1));
  }

  // By halves: 2^exponent itself is infinite already for the largest x whose result is not.
  FL_INLINE static V expm1(V x) {
    const Reduced r = reduce(clamp(x, -30, 89));
    const V half = scale(splat(1), r.exponent - 1);
    const V sum = r.expm1 * half + (half - 0.5f);
    return sum + sum;
  }

  // For 0 <= x <= 1, by log(1 + x) = 2 atanh(x / (2 + x)).
  FL_INLINE static V log1p(V x) {
    const V s = x / (x + 2.0f), q = s * s;
    const V tail = horner(q, 0.11619525402784348, 0.10851657390594482, 0.14296291768550873, 0.19999851286411285,
                          0.3333333432674408);
    const V twice = s + s;
    return twice + twice * (q * tail);
  }

  FL_INLINE static V tanh(V x) {
    const V a = abs(x);
    // Near zero expm1 keeps the digits of x, further out 1 - 2 e / (1 + e) those of the distance from 1.
    const V m = expm1(-2.0f * a), e = exp(-2.0f * a);
    const V magnitude = select(a < 0.55f, -m / (m + 2.0f), 1.0f - (e + e) / (1.0f + e));
    return select(x < 0.0f, -magnitude, magnitude);
  }

  FL_INLINE static V erf(V x) {
    const V a = abs(x);
    const V t = x * x;
    const V near = x + x * horner(t, 7.882497448008507e-05, -0.0008018855005502701, 0.005189312156289816,
                                  -0.02685432881116867, 0.11283597350120544, -0.3761262595653534, 0.12837916612625122);
    // 1 - exp(-p(a)), where p approximates -log(erfc(a)) on [1, 4]; beyond 4 the result rounds to 1.
    const V b = min(a, 4);
    const V p = horner(b, -1.6140616025950294e-06, 4.559062290354632e-05, -0.0005927695310674608, 0.004740222357213497,
                       -0.02636471763253212, 0.10997824370861053, 0.6319370865821838, 1.1301666498184204,
                       -0.00030321296071633697);
    const V far = 1.0f - exp(-p);
    return select(a < 1.0f, near, select(x < 0.0f, -far, far));
  }

 private:
  // x = exponent * log(2) + r with |r| <= log(2) / 2, and expm1(r).
  struct Reduced {
    V expm1;
    Vec<std::int32_t> exponent;
  };

  FL_INLINE static Reduced reduce(V x) {
    // Adding and subtracting 1.5 * 2^23 rounds to an integer.
    const V n = (x * 1.44269504088896f + 12582912.0f) - 12582912.0f;
    // log(2) in two parts: the first has few enough digits for n * part to be exact.
    const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    const V tail = horner(r, 1.0 / 5040, 1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5);
    return {r + r * r * tail, convert<Vec<std::int32_t>>(n)};
  }

  FL_INLINE static V scale(V v, Vec<std::int32_t> exponent) { return v * reinterpret_cast<V>((exponent + 127) << 23); }

  template <class... Rest>
  FL_INLINE static V horner(V x, double highest, Rest... rest) {
    V sum = splat(highest);
    ((sum = sum * x + static_cast<float>(rest)), ...);
    return sum;
  }
};

template <>
struct SimdMath<double> : SimdMathBase<double> {
  FL_INLINE static V exp(V x) { return lanewise<std::exp>(x); }
  FL_INLINE static V expm1(V x) { return lanewise<std::expm1>(x); }
  FL_INLINE static V log1p(V x) { return lanewise<std::log1p>(x); }
  FL_INLINE static V tanh(V x) { return lanewise<std::tanh>(x); }
  FL_INLINE static V erf(V x) { return lanewise<std::erf>(x); }

 private:
  template <double (*f)(double)>
  FL_INLINE static V lanewise(V x) {
    each_lane(reinterpret_cast<double*>(&x), f);
    return x;
  }

  // Out of line, or its kLanes calls would be most of the library.
  __attribute__((noinline)) static void each_lane(double* x, double (*f)(double)) {
    for (int i = 0; i < kLanes; ++i) x[i] = f(x[i]);
  }
};

}  // namespace FASTLAYERS_ISA
}  // namespace fastlayers
