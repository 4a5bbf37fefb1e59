// Vectors of kLanes elements for whatever instruction set this file is compiled with, and how they are loaded from and
// stored to each storage type. Built on the vector extensions of GCC and clang, so arithmetic is written with operators
// and works on every processor; intrinsics appear only where the compilers miss the instruction.
//
// The number of lanes is the same for float and double, so that a vector of either covers whole bytes of a bit mask.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../common/dtypes.h"
#include "../common/macros.h"

namespace fastlayers {
inline namespace FASTLAYERS_ISA {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
#else
inline constexpr int kLanes = 8;
#endif
inline constexpr int kMaskBytes = kLanes / 8;

template <class E>
struct VectorType {
  typedef E type __attribute__((vector_size(kLanes * sizeof(E))));
  typedef E unaligned __attribute__((vector_size(kLanes * sizeof(E)), aligned(1), may_alias));
};
template <class E>
using Vec = typename VectorType<E>::type;

// What a comparison of two Vec<S> gives: all bits of a lane set where it holds.
template <class S>
struct MaskType;
template <>
struct MaskType<float> {
  using type = Vec<std::int32_t>;
};
template <>
struct MaskType<double> {
  using type = Vec<std::int64_t>;
};
template <class S>
using Mask = typename MaskType<S>::type;

template <class To, class From>
FL_INLINE To convert(From v) {
  return __builtin_convertvector(v, To);
}

template <class V>
FL_INLINE V splat(double s) {
  using E = decltype(V{}[0] + V{}[0]);
  return V{} + static_cast<E>(s);
}

// How many lanes an operation covers: all of them, or the first few at the end of a row. Two types, so that the
// common case is compiled without a count.
struct AllLanes {
  static constexpr int count = kLanes;
};
struct FirstLanes {
  int count;
};

namespace detail {

FL_INLINE Vec<std::int32_t> lane_numbers() {
  Vec<std::int32_t> v;
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}

template <class E>
FL_INLINE Vec<E> load_unaligned(const void* p) {
  return *static_cast<const typename VectorType<E>::unaligned*>(p);
}

template <class E>
FL_INLINE void store_unaligned(void* p, Vec<E> v) {
  *static_cast<typename VectorType<E>::unaligned*>(p) = v;
}

// Elements past the count are neither read nor written, and read as zero.
template <class E>
FL_INLINE Vec<E> load_first(const void* p, int count) {
  Vec<E> v{};
#if defined(__AVX512F__)
  const auto live = static_cast<std::uint32_t>((1u << count) - 1);
  if constexpr (sizeof(E) == 8) {
    const __m512d low = _mm512_maskz_loadu_pd(static_cast<__mmask8>(live), p);
    const __m512d high = _mm512_maskz_loadu_pd(static_cast<__mmask8>(live >> 8), static_cast<const double*>(p) + 8);
    std::memcpy(&v, &low, 64);
    std::memcpy(reinterpret_cast<char*>(&v) + 64, &high, 64);
  } else if constexpr (sizeof(E) == 4) {
    v = reinterpret_cast<Vec<E>>(_mm512_maskz_loadu_ps(static_cast<__mmask16>(live), p));
  } else {
    v = reinterpret_cast<Vec<E>>(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(live), p));
  }
#else
  for (int i = 0; i < count; ++i) v[i] = static_cast<const E*>(p)[i];
#endif
  return v;
}

template <class E>
FL_INLINE void store_first(void* p, Vec<E> v, int count) {
#if defined(__AVX512F__)
  const auto live = static_cast<std::uint32_t>((1u << count) - 1);
  if constexpr (sizeof(E) == 4) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>(live), reinterpret_cast<__m512>(v));
    return;
  } else if constexpr (sizeof(E) == 2) {
    _mm256_mask_storeu_epi16(p, static_cast<__mmask16>(live), reinterpret_cast<__m256i>(v));
    return;
  }
#endif
  for (int i = 0; i < count; ++i) static_cast<E*>(p)[i] = v[i];
}

template <class E>
FL_INLINE Vec<E> load_lanes(const void* p, AllLanes) {
  return load_unaligned<E>(p);
}
template <class E>
FL_INLINE Vec<E> load_lanes(const void* p, FirstLanes lanes) {
  return load_first<E>(p, lanes.count);
}
template <class E>
FL_INLINE void store_lanes(void* p, Vec<E> v, AllLanes) {
  store_unaligned<E>(p, v);
}
template <class E>
FL_INLINE void store_lanes(void* p, Vec<E> v, FirstLanes lanes) {
  store_first<E>(p, v, lanes.count);
}

using Half = Vec<std::uint16_t>;
using Word = Vec<std::uint32_t>;

FL_INLINE Vec<float> as_float(Word bits) {
  return reinterpret_cast<Vec<float>>(bits);
}
FL_INLINE Word as_word(Vec<float> v) {
  return reinterpret_cast<Word>(v);
}
FL_INLINE Word choose(Vec<std::int32_t> mask, Word yes, Word no) {
  return mask ? yes : no;
}

FL_INLINE Vec<float> from_bf16(Half h) {
  return as_float(convert<Word>(h) << 16);
}

// Round to nearest even; a NaN stays one and keeps its sign.
FL_INLINE Half to_bf16(Vec<float> v) {
  const Word bits = as_word(v);
  const Word rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return convert<Half>(choose(v != v, (bits >> 16) | 0x40u, rounded));
}

#if defined(__AVX512F__)
FL_INLINE Vec<float> from_f16(Half h) {
  return reinterpret_cast<Vec<float>>(_mm512_cvtph_ps(reinterpret_cast<__m256i>(h)));
}
FL_INLINE Half to_f16(Vec<float> v) {
  return reinterpret_cast<Half>(_mm512_cvtps_ph(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
FL_INLINE Vec<float> from_f16(Half h) {
  return reinterpret_cast<Vec<float>>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(h)));
}
FL_INLINE Half to_f16(Vec<float> v) {
  return reinterpret_cast<Half>(_mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
}
#else
// Without the instruction: move the exponent from 5 bits to 8 and back. Multiplying by a power of two normalises
// what is subnormal in half precision; 0x1.0p112f = 2^(127 - 15).
FL_INLINE Vec<float> from_f16(Half h) {
  const Word bits = convert<Word>(h);
  const Word magnitude = (bits & 0x7fffu) << 13;
  const Word finite = as_word(as_float(magnitude) * 0x1.0p112f);
  const auto not_finite = reinterpret_cast<Vec<std::int32_t>>(magnitude) >= 0x0f800000;
  return as_float(choose(not_finite, magnitude | 0x7f800000u, finite) | ((bits & 0x8000u) << 16));
}
FL_INLINE Half to_f16(Vec<float> v) {
  const Word bits = as_word(v), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  const auto below = [&](std::int32_t limit) { return reinterpret_cast<Vec<std::int32_t>>(magnitude) < limit; };
  // Adding 0.5 leaves a subnormal half's digits, rounded to nearest even, in the low bits of the sum.
  const Word subnormal = as_word(as_float(magnitude) + 0.5f) - 0x3f000000u;
  const Word normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const Word special = choose(below(0x7f800001), Word{} + 0x7c00u, Word{} + 0x7e00u);
  const Word finite = choose(below(0x38800000), subnormal, normal);
  return convert<Half>(choose(below(0x47800000), finite, special) | sign);
}
#endif

}  // namespace detail

template <class Lanes>
FL_INLINE Vec<float> load(const f32* p, Lanes lanes) {
  return detail::load_lanes<float>(p, lanes);
}
template <class Lanes>
FL_INLINE Vec<double> load(const f64* p, Lanes lanes) {
  return detail::load_lanes<double>(p, lanes);
}
template <class Lanes>
FL_INLINE Vec<float> load(const bf16* p, Lanes lanes) {
  return detail::from_bf16(detail::load_lanes<std::uint16_t>(p, lanes));
}
template <class Lanes>
FL_INLINE Vec<float> load(const f16* p, Lanes lanes) {
  return detail::from_f16(detail::load_lanes<std::uint16_t>(p, lanes));
}

template <class Lanes>
FL_INLINE void store(f32* p, Vec<float> v, Lanes lanes) {
  detail::store_lanes<float>(p, v, lanes);
}
template <class Lanes>
FL_INLINE void store(f64* p, Vec<double> v, Lanes lanes) {
  detail::store_lanes<double>(p, v, lanes);
}
template <class Lanes>
FL_INLINE void store(bf16* p, Vec<float> v, Lanes lanes) {
  detail::store_lanes<std::uint16_t>(p, detail::to_bf16(v), lanes);
}
template <class Lanes>
FL_INLINE void store(f16* p, Vec<float> v, Lanes lanes) {
  detail::store_lanes<std::uint16_t>(p, detail::to_f16(v), lanes);
}

// Streaming stores bypass the caches: what is too large to stay in them need not be read before it is overwritten, nor
// push out what is still wanted. They need whole vectors at aligned addresses; elsewhere `stream` stores as usual.
template <class T>
inline constexpr std::size_t kVectorBytes = kLanes * sizeof(T);

namespace detail {

template <int kBytes>
FL_INLINE void stream_bytes(void* p, const void* v) {
#if defined(__AVX512F__)
  if constexpr (kBytes % 64 == 0) {
    for (int i = 0; i < kBytes / 64; ++i)
      _mm512_stream_si512(static_cast<__m512i*>(p) + i, _mm512_loadu_si512(static_cast<const __m512i*>(v) + i));
    return;
  }
#endif
#if defined(__AVX2__)
  if constexpr (kBytes % 32 == 0) {
    for (int i = 0; i < kBytes / 32; ++i)
      _mm256_stream_si256(static_cast<__m256i*>(p) + i, _mm256_loadu_si256(static_cast<const __m256i*>(v) + i));
    return;
  }
#endif
#if defined(__SSE2__)
  for (int i = 0; i < kBytes / 16; ++i)
    _mm_stream_si128(static_cast<__m128i*>(p) + i, _mm_loadu_si128(static_cast<const __m128i*>(v) + i));
#else
  std::memcpy(p, v, kBytes);
#endif
}

}  // namespace detail

template <class T>
FL_INLINE void stream(T* p, Vec<Compute<T>> v, AllLanes lanes) {
  alignas(64) T stored[kLanes];
  store(stored, v, lanes);
  detail::stream_bytes<kVectorBytes<T>>(p, stored);
}
template <class T>
FL_INLINE void stream(T* p, Vec<Compute<T>> v, FirstLanes lanes) {
  store(p, v, lanes);
}

// Has the line of *p fetched into the second-level cache.
FL_INLINE void prefetch(const void* p) {
  __builtin_prefetch(p, 0, 2);
}
FL_INLINE void prefetch_for_writing(const void* p) {
  __builtin_prefetch(p, 1, 2);
}

// Streaming stores of this thread are done before it goes on.
FL_INLINE void finish_streaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// v with the lanes that are not covered set to zero.
template <class S>
FL_INLINE Vec<S> covered(Vec<S> v, AllLanes) {
  return v;
}
template <class S>
FL_INLINE Vec<S> covered(Vec<S> v, FirstLanes lanes) {
  const Mask<S> live = convert<Mask<S>>(detail::lane_numbers() < lanes.count);
  return live ? v : Vec<S>{};
}

template <class S>
FL_INLINE double sum_of_lanes(Vec<S> v) {
  const Vec<double> lanes = convert<Vec<double>>(v);
  double sums[kLanes];
  std::memcpy(sums, &lanes, sizeof(sums));
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) sums[i] += sums[i + width];
  return sums[0];
}

// Lane i of a mask is bit i of kMaskBytes bytes; a row of n elements takes (n + 7) / 8 bytes.
template <class S, class Lanes>
FL_INLINE Mask<S> load_mask_bits(const std::uint8_t* p, Lanes lanes) {
  std::uint16_t bits = p[0];
  if (kMaskBytes == 2 && lanes.count > 8) bits |= static_cast<std::uint16_t>(p[1] << 8);
  const Vec<std::int32_t> set = ((Vec<std::int32_t>{} + bits) >> detail::lane_numbers()) & 1;
  return convert<Mask<S>>(set != 0);
}

template <class Lanes>
FL_INLINE void store_mask_bits(std::uint8_t* p, Vec<std::int32_t> mask, Lanes lanes) {
#if defined(__AVX512DQ__)
  unsigned bits = _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask));
#elif defined(__AVX2__)
  unsigned bits = static_cast<unsigned>(_mm256_movemask_ps(reinterpret_cast<__m256>(mask)));
#else
  unsigned bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= (mask[i] & 1u) << i;
#endif
  bits &= (1u << lanes.count) - 1;
  p[0] = static_cast<std::uint8_t>(bits);
  if (kMaskBytes == 2 && lanes.count > 8) p[1] = static_cast<std::uint8_t>(bits >> 8);
}
template <class Lanes>
FL_INLINE void store_mask_bits(std::uint8_t* p, Vec<std::int64_t> mask, Lanes lanes) {
  store_mask_bits(p, convert<Vec<std::int32_t>>(mask), lanes);
}

// One byte per element, 0 or 1.
template <class S, class Lanes>
FL_INLINE Mask<S> load_mask_bytes(const std::uint8_t* p, Lanes lanes) {
  Vec<std::uint8_t> bytes{};
  std::memcpy(&bytes, p, static_cast<std::size_t>(lanes.count));
#if defined(__AVX512BW__) && defined(__AVX512DQ__)
  const __mmask16 set = _mm_test_epi8_mask(reinterpret_cast<__m128i>(bytes), reinterpret_cast<__m128i>(bytes));
  return convert<Mask<S>>(reinterpret_cast<Vec<std::int32_t>>(_mm512_movm_epi32(set)));
#elif defined(__AVX2__)
  const __m256i words = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(&bytes)));
  return convert<Mask<S>>(reinterpret_cast<Vec<std::int32_t>>(words) != 0);
#else
  return convert<Mask<S>>(convert<Vec<std::int32_t>>(bytes) != 0);
#endif
}

// Calls f(i, lanes) for the elements i, i + 1, ... of each vector that covers [0, n).
template <class F>
FL_INLINE void for_each_vector(std::int64_t n, F&& f) {
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, AllLanes{});
  if (i < n) f(i, FirstLanes{static_cast<int>(n - i)});
}

enum class Walk { forward, reverse };

// The same in either order, except that an incomplete vector comes first.
template <class F>
FL_INLINE void for_each_vector(std::int64_t n, Walk walk, F&& f) {
  const std::int64_t whole = n & -kLanes;
  if (whole < n) f(whole, FirstLanes{static_cast<int>(n - whole)});
  const std::int64_t step = walk == Walk::forward ? kLanes : -kLanes;
  std::int64_t i = walk == Walk::forward ? 0 : whole - kLanes;
  for (std::int64_t left = whole; left > 0; left -= kLanes, i += step) f(i, AllLanes{});
}

}  // namespace FASTLAYERS_ISA
}  // namespace fastlayers
