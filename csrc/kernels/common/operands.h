// What the CPU and the CUDA kernels take alike: the shape of a tensor, where its elements lie, the activation. No
// torch.
#pragma once

#include <cstdint>

namespace fastlayers {

enum class Activation : std::int64_t;

// A tensor of N samples, C channels and S positions each is either
//   planes  the S positions of one sample and channel are adjacent (contiguous tensors), or
//   rows    the C channels of one sample and position are adjacent (channels_last tensors, and (N, C));
//           then there are N * S rows at one distance from each other.
struct Shape {
  bool rows = false;
  std::int64_t batch = 0, channels = 0, spatial = 0;

  std::int64_t numel() const { return batch * channels * spatial; }
  std::int64_t count_per_channel() const { return batch * spatial; }
};

// Strides count elements. Where one step takes all channels `outer` leads to the next row or run of rows or sample, and
// `inner` is not used; elsewhere `outer` leads to the next sample and `inner` to the next channel.
template <class Pointer>
struct Strided {
  Pointer data = nullptr;
  std::int64_t outer = 0, inner = 0;
};
using Source = Strided<const void*>;
using Target = Strided<void*>;

struct ActivationSpec {
  Activation kind{};
  const double* params = nullptr;
};

}  // namespace fastlayers
