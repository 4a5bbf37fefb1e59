// The geometry of max-pooling: which elements of a row or column a window has. No torch.
#pragma once

#include <cstdint>

#include "macros.h"

namespace fastlayers {

// In no namespace of an instruction set: the CPU kernels take these from code that was compiled for none, and functions
// that are inlined everywhere leave the linker nothing to mix up.

// One dimension of a pool: window o has the elements start(o) + k * dilation, 0 <= k < kernel, that exist.
struct PoolAxis {
  std::int64_t input = 1, output = 1;  // sizes
  std::int64_t kernel = 1, stride = 1, padding = 0, dilation = 1;

  // As torch: with `ceil_mode`, a last window may go beyond the input, but starts in it or before it.
  FL_INLINE static std::int64_t output_size(const PoolAxis& axis, bool ceil_mode) {
    const std::int64_t last_start = axis.input + 2 * axis.padding - axis.dilation * (axis.kernel - 1) - 1;
    if (last_start < 0 && !(ceil_mode && last_start + axis.stride > 0)) return 0;
    const std::int64_t count = (last_start + (ceil_mode ? axis.stride - 1 : 0)) / axis.stride + 1;
    return ceil_mode && (count - 1) * axis.stride >= axis.input + axis.padding ? count - 1 : count;
  }

  FL_INLINE std::int64_t start(std::int64_t o) const { return o * stride - padding; }
  // The first k of window o that exists, and the first behind it that does not.
  FL_INLINE std::int64_t first(std::int64_t o) const {
    const std::int64_t before = -start(o);
    return before > 0 ? (before + dilation - 1) / dilation : 0;
  }
  FL_INLINE std::int64_t end(std::int64_t o) const {
    const std::int64_t room = (input - start(o) + dilation - 1) / dilation;
    return room < kernel ? room : kernel;
  }

  // The windows that can have element i: from first_window(i) to before windows_end(i). Each has it as number
  // (i - start(o)) / dilation if that is whole.
  FL_INLINE std::int64_t first_window(std::int64_t i) const {
    const std::int64_t from = i + padding - (kernel - 1) * dilation;
    return from > 0 ? (from + stride - 1) / stride : 0;
  }
  FL_INLINE std::int64_t windows_end(std::int64_t i) const {
    const std::int64_t end = (i + padding) / stride + 1;
    return end < output ? end : output;
  }
};

// Elements of a window are numbered row by row, and their numbers kept in a byte each.
struct Pool {
  static constexpr std::int64_t kMostPositions = 256;
  PoolAxis height, width;

  FL_INLINE std::int64_t positions() const { return height.kernel * width.kernel; }
  FL_INLINE std::int64_t outputs() const { return height.output * width.output; }
};

}  // namespace fastlayers
