// The vector code of csrc/kernels/cpu over whole arrays, for one instruction set.
#pragma once

#include <cstdint>

namespace fastlayers {

// Arrays of `n` elements; 16-bit floats as their bits.
struct SimdFunctions {
  using Math = void (*)(const float* x, float* result, std::int64_t n);
  Math exp, expm1, log1p, tanh, erf;
  void (*from_bf16)(const std::uint16_t* bits, float* result, std::int64_t n);
  void (*from_f16)(const std::uint16_t* bits, float* result, std::int64_t n);
  void (*to_bf16)(const float* x, std::uint16_t* result, std::int64_t n);
  void (*to_f16)(const float* x, std::uint16_t* result, std::int64_t n);
};

}  // namespace fastlayers
