// Vectors of candidates: which of them each lane keeps, and their numbers inside a window, which are bytes in memory.
#pragma once

#include <limits>

#include "simd.h"

namespace fastlayers {
inline namespace FASTLAYERS_ISA {

// What a lane's number is kept in, and where lanes keep what they have, as these instruction sets choose best: numbers
// as bytes and one bit per lane where there are instructions for both, otherwise as wide as the keys.
template <class S>
struct ChoiceTypes {
  using Number = decltype(Mask<S>{}[0] + Mask<S>{}[0]);
  using Stays = Mask<S>;
};
#if defined(__AVX512BW__) && defined(__AVX512VL__)
template <>
struct ChoiceTypes<float> {
  using Number = std::uint8_t;
  using Stays = __mmask16;
};
#endif
template <class S>
using Number = typename ChoiceTypes<S>::Number;
template <class S>
using Numbers = Vec<Number<S>>;
template <class S>
using Stays = typename ChoiceTypes<S>::Stays;

template <class S>
FL_INLINE Numbers<S> all_numbered(std::int64_t number) {
  return Numbers<S>{} + static_cast<Number<S>>(number);
}

namespace detail {

FL_INLINE Vec<std::uint8_t> load_bytes(const std::uint8_t* p, AllLanes) {
  return load_unaligned<std::uint8_t>(p);
}
FL_INLINE Vec<std::uint8_t> load_bytes(const std::uint8_t* p, FirstLanes lanes) {
  Vec<std::uint8_t> v{};
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  v = reinterpret_cast<Vec<std::uint8_t>>(_mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << lanes.count) - 1), p));
#else
  for (int i = 0; i < lanes.count; ++i) v[i] = p[i];
#endif
  return v;
}

FL_INLINE void store_bytes(std::uint8_t* p, Vec<std::uint8_t> v, AllLanes) {
  store_unaligned<std::uint8_t>(p, v);
}
FL_INLINE void store_bytes(std::uint8_t* p, Vec<std::uint8_t> v, FirstLanes lanes) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  _mm_mask_storeu_epi8(p, static_cast<__mmask16>((1u << lanes.count) - 1), reinterpret_cast<__m128i>(v));
#else
  for (int i = 0; i < lanes.count; ++i) p[i] = v[i];
#endif
}

// Max-pooling's rule, torch's: of equal candidates the first stays, and a NaN only gives way to a later one.
template <class V>
FL_INLINE auto stays(V best, V v) {
  return ~((v > best) | (v != v));
}
template <class Stay, class V>
FL_INLINE V keep(Stay stay, V best, V v) {
  return stay ? best : v;
}
#if defined(__AVX512BW__) && defined(__AVX512VL__)
FL_INLINE __mmask16 stays(Vec<float> best, Vec<float> v) {
  const auto a = reinterpret_cast<__m512>(best), b = reinterpret_cast<__m512>(v);
  return _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(b, b, _CMP_ORD_Q), b, a, _CMP_NGT_UQ);
}
FL_INLINE Vec<float> keep(__mmask16 stay, Vec<float> best, Vec<float> v) {
  return reinterpret_cast<Vec<float>>(
      _mm512_mask_mov_ps(reinterpret_cast<__m512>(v), stay, reinterpret_cast<__m512>(best)));
}
FL_INLINE Vec<std::uint8_t> keep(__mmask16 stay, Vec<std::uint8_t> best, Vec<std::uint8_t> v) {
  return reinterpret_cast<Vec<std::uint8_t>>(
      _mm_mask_mov_epi8(reinterpret_cast<__m128i>(v), stay, reinterpret_cast<__m128i>(best)));
}
#endif

}  // namespace detail

#if defined(__AVX512F__)
// Lane i is lane at[i] of a, or, counted on, of b: one instruction, which gcc does not find.
FL_INLINE Vec<float> picked(Vec<float> a, const std::int32_t (&at)[kLanes], Vec<float> b) {
  return reinterpret_cast<Vec<float>>(
      _mm512_permutex2var_ps(reinterpret_cast<__m512>(a), _mm512_load_si512(at), reinterpret_cast<__m512>(b)));
}
#endif

#if defined(__AVX512F__)
// factor times the elements from p on, in these lanes; `rest` in the others, of which nothing is read.
FL_INLINE Vec<float> product_where(std::uint16_t lanes, const float* p, float factor, float rest) {
  const __m512 v = _mm512_maskz_loadu_ps(lanes, p);
  return reinterpret_cast<Vec<float>>(_mm512_mask_mul_ps(_mm512_set1_ps(rest), lanes, v, _mm512_set1_ps(factor)));
}
#endif

// The best candidate so far of each lane, by `key`, and its number.
template <class S>
struct Best {
  Vec<S> key;
  Numbers<S> number;

  // Before any candidate: one that only wins if all are equal to it, or where there are none.
  FL_INLINE static Best none(Numbers<S> first) { return {splat<Vec<S>>(-std::numeric_limits<S>::infinity()), first}; }

  // Returns which lanes keep what they have.
  FL_INLINE Stays<S> offer(Vec<S> candidate, Numbers<S> candidates_number) {
    const Stays<S> stay = detail::stays(key, candidate);
    key = detail::keep(stay, key, candidate);
    number = detail::keep(stay, number, candidates_number);
    return stay;
  }
};

// Which of two values of its own a candidate's lane keeps, by what `offer` returned.
template <class S>
FL_INLINE Vec<S> keep(Stays<S> stay, Vec<S> best, Vec<S> candidate) {
  return detail::keep(stay, best, candidate);
}

template <class S, class Lanes>
FL_INLINE void store_numbers(std::uint8_t* p, Numbers<S> v, Lanes lanes) {
  detail::store_bytes(p, convert<Vec<std::uint8_t>>(v), lanes);
}

// sum + v in the lanes whose number, of those from p on, is the given one.
template <class S, class Lanes>
FL_INLINE Vec<S> add_where(const std::uint8_t* p, std::int64_t number, Vec<S> sum, Vec<S> v, Lanes lanes) {
  const Vec<std::uint8_t> numbers = detail::load_bytes(p, lanes);
  const Vec<std::uint8_t> wanted = Vec<std::uint8_t>{} + static_cast<std::uint8_t>(number);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  if constexpr (sizeof(S) == 4) {
    const __mmask16 there = _mm_cmpeq_epi8_mask(reinterpret_cast<__m128i>(numbers), reinterpret_cast<__m128i>(wanted));
    const auto a = reinterpret_cast<__m512>(sum);
    return reinterpret_cast<Vec<S>>(_mm512_mask_add_ps(a, there, a, reinterpret_cast<__m512>(v)));
  }
#endif
  const auto there = convert<Mask<S>>(convert<Vec<std::int32_t>>(numbers) == convert<Vec<std::int32_t>>(wanted));
  return there ? sum + v : sum;
}

}  // namespace FASTLAYERS_ISA
}  // namespace fastlayers
