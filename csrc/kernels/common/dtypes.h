// The storage types of tensors and the types that kernels compute in. No torch, no CUDA.
#pragma once

#include <cstdint>

namespace fastlayers {

enum class Dtype { f32, f64, bf16, f16 };

// 16-bit floats are only ever converted, so their bits are all that the CPU kernels need.
struct bf16 {
  std::uint16_t bits;
};
struct f16 {
  std::uint16_t bits;
};
using f32 = float;
using f64 = double;

template <class T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<f64> {
  using type = double;
};
template <class T>
using Compute = typename ComputeType<T>::type;

}  // namespace fastlayers
