// Compiled once for each instruction set, which FASTLAYERS_ISA names: defines simd_<isa>.
#include "kernels/cpu/simd_math.h"
#include "simd.h"

namespace fastlayers {
inline namespace FASTLAYERS_ISA {

namespace {

template <auto f>
void each_vector(const float* x, float* result, std::int64_t n) {
  for_each_vector(n, [&](std::int64_t i, auto lanes) { store(result + i, f(load(x + i, lanes)), lanes); });
}

template <class From, class To, class FromBits, class ToBits>
void convert_all(const FromBits* from, ToBits* to, std::int64_t n) {
  static_assert(sizeof(From) == sizeof(FromBits) && sizeof(To) == sizeof(ToBits));
  const auto* source = reinterpret_cast<const From*>(from);
  auto* target = reinterpret_cast<To*>(to);
  for_each_vector(n, [&](std::int64_t i, auto lanes) { store(target + i, load(source + i, lanes), lanes); });
}

using Math = SimdMath<float>;

}  // namespace

}  // namespace FASTLAYERS_ISA

#define FASTLAYERS_JOIN_(a, b) a##b
#define FASTLAYERS_JOIN(a, b) FASTLAYERS_JOIN_(a, b)

extern const SimdFunctions FASTLAYERS_JOIN(simd_, FASTLAYERS_ISA);
const SimdFunctions FASTLAYERS_JOIN(simd_, FASTLAYERS_ISA){
    each_vector<Math::exp>,  each_vector<Math::expm1>, each_vector<Math::log1p>,
    each_vector<Math::tanh>, each_vector<Math::erf>,   convert_all<bf16, f32>,
    convert_all<f16, f32>,   convert_all<f32, bf16>,   convert_all<f32, f16>,
};

}  // namespace fastlayers
