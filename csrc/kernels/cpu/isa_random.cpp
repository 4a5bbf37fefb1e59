// MT19937 in vectors. Compiled once for each instruction set, which FASTLAYERS_ISA names: defines random_<isa>, from
// which dispatch.cpp chooses.
#include "mersenne_twister.h"
#include "simd.h"

namespace fastlayers {
inline namespace FASTLAYERS_ISA {

namespace {

using Words = Vec<std::uint32_t>;
// Each of two words, the first of them in the low half. Values and limits have 53 bits.
typedef std::uint64_t Pairs __attribute__((vector_size(kLanes * sizeof(std::uint32_t))));
static_assert(MersenneTwister::kWords % kLanes == 0 && kLanes <= RandomKernels::kReadAhead);

FL_INLINE Words load_words(const std::uint32_t* p) {
  return detail::load_unaligned<std::uint32_t>(p);
}

void next_block(std::uint32_t* words) {
  constexpr int kMiddle = 397;
  for (int i = 0; i < MersenneTwister::kWords; i += kLanes) {
    const Words low = load_words(words + i + 1);
    const Words mixed = (load_words(words + i) & 0x80000000u) | (low & 0x7fffffffu);
    const Words twisted = (mixed >> 1) ^ (-(low & 1u) & 0x9908b0dfu);
    detail::store_unaligned<std::uint32_t>(words + MersenneTwister::kWords + i,
                                           load_words(words + i + kMiddle) ^ twisted);
  }
}

FL_INLINE Words temper(Words y) {
  y ^= y >> 11;
  y ^= (y << 7) & 0x9d2c5680u;
  y ^= (y << 15) & 0xefc60000u;
  return y ^ (y >> 18);
}

// Negative where a value is below the limit.
FL_INLINE Pairs distances(const std::uint32_t* words, std::uint64_t limit) {
  const Pairs pairs = reinterpret_cast<Pairs>(temper(load_words(words)));
  return (((pairs << 32) | (pairs >> 32)) & ((std::uint64_t{1} << 53) - 1)) - limit;
}

FL_INLINE unsigned sign_bits(Pairs v) {
#if defined(__AVX512DQ__)
  return _mm512_movepi64_mask(reinterpret_cast<__m512i>(v));
#elif defined(__AVX2__)
  return static_cast<unsigned>(_mm256_movemask_pd(reinterpret_cast<__m256d>(v)));
#elif defined(__SSE2__)
  __m128d halves[2];
  std::memcpy(halves, &v, sizeof(v));
  return static_cast<unsigned>(_mm_movemask_pd(halves[0]) | _mm_movemask_pd(halves[1]) << 2);
#else
  unsigned bits = 0;
  for (int i = 0; i < kLanes / 2; ++i) bits |= static_cast<unsigned>(v[i] >> 63) << i;
  return bits;
#endif
}

void below(const std::uint32_t* words, std::int64_t count, std::uint64_t limit, std::uint8_t* bits) {
  for (std::int64_t i = 0; i < count; i += kLanes, bits += kMaskBytes) {
    const unsigned first = sign_bits(distances(words + 2 * i, limit));
    const unsigned second = sign_bits(distances(words + 2 * i + kLanes, limit));
    const auto both = static_cast<std::uint16_t>(first | second << (kLanes / 2));
    std::memcpy(bits, &both, kMaskBytes);
  }
}

}  // namespace

}  // namespace FASTLAYERS_ISA

#define FASTLAYERS_JOIN_(a, b) a##b
#define FASTLAYERS_JOIN(a, b) FASTLAYERS_JOIN_(a, b)

extern const RandomKernels FASTLAYERS_JOIN(random_, FASTLAYERS_ISA);
const RandomKernels FASTLAYERS_JOIN(random_, FASTLAYERS_ISA){next_block, below};

}  // namespace fastlayers
