// The geometry of max-pooling: which elements of a row or column a window has. No torch.
#pragma once

#include <cstdint>

#include "macros.h"
#include "operands.h"

namespace fastlayers {

// In no namespace of an instruction set: the CPU kernels take these from code that was compiled for none, and functions
// that are inlined everywhere leave the linker nothing to mix up.

// One dimension of a pool: window o has the elements start(o) + k * dilation, 0 <= k < kernel, that exist. Factor is
// Int, or what divides one faster.
template <class Int, class Factor = Int>
struct BasicPoolAxis {
  Int input = 1, output = 1;  // sizes
  Int kernel = 1;
  Factor stride = 1;
  Int padding = 0;
  Factor dilation = 1;

  // As torch: with `ceil_mode`, a last window may go beyond the input, but starts in it or before it.
  FL_INLINE static Int output_size(const BasicPoolAxis& axis, bool ceil_mode) {
    const Int last_start = axis.input + 2 * axis.padding - axis.dilation * (axis.kernel - 1) - 1;
    if (last_start < 0 && !(ceil_mode && last_start + axis.stride > 0)) return 0;
    const Int count = (last_start + (ceil_mode ? axis.stride - 1 : 0)) / axis.stride + 1;
    return ceil_mode && (count - 1) * axis.stride >= axis.input + axis.padding ? count - 1 : count;
  }

  FL_INLINE Int start(Int o) const { return o * stride - padding; }
  // The first k of window o that exists, and the first behind it that does not.
  FL_INLINE Int first(Int o) const {
    const Int before = -start(o);
    return before > 0 ? (before + dilation - 1) / dilation : 0;
  }
  FL_INLINE Int end(Int o) const {
    const Int room = (input - start(o) + dilation - 1) / dilation;
    return room < kernel ? room : kernel;
  }

  // The windows that can have element i: from first_window(i) to before windows_end(i). Each has it as number
  // (i - start(o)) / dilation if that is whole.
  FL_INLINE Int first_window(Int i) const {
    const Int from = i + padding - (kernel - 1) * dilation;
    return from > 0 ? (from + stride - 1) / stride : 0;
  }
  FL_INLINE Int windows_end(Int i) const {
    const Int end = (i + padding) / stride + 1;
    return end < output ? end : output;
  }

  // From the first to the last element of a window, if all exist.
  FL_INLINE Int extent() const { return (kernel - 1) * dilation + 1; }
};
using PoolAxis = BasicPoolAxis<std::int64_t>;

// Elements of a window are numbered row by row, and their numbers kept in a byte each.
struct Pool {
  static constexpr std::int64_t kMostPositions = 256;
  PoolAxis height, width;

  FL_INLINE std::int64_t positions() const { return height.kernel * width.kernel; }
  FL_INLINE std::int64_t outputs() const { return height.output * width.output; }
};

// Of what is pooled, in the order of memory that an input of this shape has.
FL_INLINE Shape pooled_shape(const Pool& pool, const Shape& input) {
  return {input.rows, input.batch, input.channels, pool.outputs()};
}

}  // namespace fastlayers
