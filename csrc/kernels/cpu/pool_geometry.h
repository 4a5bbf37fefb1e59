// Which rows, windows and elements of a plane belong to each other, for the CPU kernels.
#pragma once

#include "../common/pooling.h"
#include "pool.h"
#include "scratch.h"

namespace fastlayers {
inline namespace FASTLAYERS_ISA {

FL_INLINE std::int64_t rounded_up(std::int64_t n, std::int64_t to) {
  return (n + to - 1) / to * to;
}

// Rows [begin, end) of a plane.
struct PlaneRows {
  std::int64_t begin, end;
  FL_INLINE std::int64_t count() const { return end - begin; }
};

// Rows of the input among which are all that windows in rows of the output have.
FL_INLINE PlaneRows window_rows(const PoolAxis& height, PlaneRows output) {
  const std::int64_t begin = height.start(output.begin);
  const std::int64_t end = height.start(output.end - 1) + (height.kernel - 1) * height.dilation + 1;
  return {begin > 0 ? begin : 0, end < height.input ? end : height.input};
}
// The rows of the output whose windows can have elements in rows of the input; there may be none.
FL_INLINE PlaneRows covering_rows(const PoolAxis& height, PlaneRows input) {
  const std::int64_t first = height.first_window(input.begin), end = height.windows_end(input.end - 1);
  return {first, end > first ? end : first};
}

// Where the elements of a window are, from its first element on, whether that exists or not.
class WindowOffsets {
 public:
  explicit WindowOffsets(const Pool& pool) : pool_(pool), offsets_(Pool::kMostPositions) {
    for (std::int64_t i = 0; i < Pool::kMostPositions; ++i) {
      const std::int64_t row = i / pool.width.kernel, column = i % pool.width.kernel;
      offsets_[i] = row * pool.height.dilation * pool.width.input + column * pool.width.dilation;
    }
  }

  // Calls f(i, at): window i of these rows of the output has element `at`, counted from row `first` of the plane, as
  // the given number. Memory is fetched ahead at each row.
  template <class Number, class F>
  FL_INLINE void each(PlaneRows output, std::int64_t first, const Number* numbers, FetchAhead& ahead, F&& f) const {
    const PoolAxis &height = pool_.height, &width = pool_.width;
    std::int64_t i = 0;
    for (std::int64_t o = output.begin; o < output.end; ++o) {
      ahead.step();
      std::int64_t at = (height.start(o) - first) * width.input - width.padding;
      for (std::int64_t k = 0; k < width.output; ++k, ++i, at += width.stride) f(i, at + offsets_[numbers[i]]);
    }
  }

 private:
  const Pool& pool_;
  Scratch<std::int64_t> offsets_;
};

// Which windows along an axis have element i, and as which number.
class AxisTaps {
 public:
  struct Tap {
    std::int64_t window, number;
  };

  explicit AxisTaps(const PoolAxis& axis) : begins_(axis.input + 1), taps_(axis.output * axis.kernel) {
    std::int64_t count = 0;
    for (std::int64_t i = 0; i < axis.input; ++i) {
      begins_[i] = count;
      for (std::int64_t o = axis.first_window(i); o < axis.windows_end(i); ++o)
        if ((i - axis.start(o)) % axis.dilation == 0) taps_[count++] = {o, (i - axis.start(o)) / axis.dilation};
    }
    begins_[axis.input] = count;
  }

  FL_INLINE const Tap* begin(std::int64_t i) const { return taps_.data() + begins_[i]; }
  FL_INLINE const Tap* end(std::int64_t i) const { return taps_.data() + begins_[i + 1]; }

 private:
  Scratch<std::int64_t> begins_;
  Scratch<Tap> taps_;
};

}  // namespace FASTLAYERS_ISA
}  // namespace fastlayers
