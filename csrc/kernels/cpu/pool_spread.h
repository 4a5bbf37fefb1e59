// Gives what windows have to the elements of a plane that they selected: backward's counterpart to pool_windows.h.
#pragma once

#include "choices.h"
#include "pool_geometry.h"

namespace fastlayers {
inline namespace FASTLAYERS_ISA {

template <class S>
class PlaneSpreader {
  using V = Vec<S>;

 public:
  // For so many rows of the input at a time.
  PlaneSpreader(const Pool& pool, std::int64_t input_rows)
      : pool_(pool),
        in_pairs_(tiles(pool.width) && tiles(pool.height) && pool.width.kernel == 2),
        offsets_(pool),
        sums_(input_rows * pool.width.input + 2 * kLanes) {}

  // Returns the sums of what windows give to rows of the input. `output`: all rows of windows that can have any of
  // these, whose gradients and numbers are given without gaps; there is room for a vector behind the gradients.
  const S* spread(PlaneRows input, PlaneRows output, const S* grad, const std::uint8_t* numbers, FetchAhead& ahead) {
    return in_pairs_ ? spread_pairs(input, output, grad, numbers, ahead)
                     : spread_elements(input, output, grad, numbers, ahead);
  }

 private:
  // Whether each element belongs to one window, or at the end to none.
  static bool tiles(const PoolAxis& axis) {
    return axis.kernel == axis.stride && axis.padding == 0 && axis.dilation == 1;
  }

  const S* spread_elements(PlaneRows input, PlaneRows output, const S* grad, const std::uint8_t* numbers,
                           FetchAhead& ahead);
  const S* spread_pairs(PlaneRows input, PlaneRows output, const S* grad, const std::uint8_t* numbers,
                        FetchAhead& ahead);
  FL_INLINE static void interleave(V even, V odd, S* to);

  const Pool& pool_;
  bool in_pairs_;
  WindowOffsets offsets_;
  Scratch<S> sums_;
};

template <class S>
const S* PlaneSpreader<S>::spread_elements(PlaneRows input, PlaneRows output, const S* grad,
                                           const std::uint8_t* numbers, FetchAhead& ahead) {
  PlaneRows touched = input;
  if (output.count() > 0) {
    const PlaneRows of_windows = window_rows(pool_.height, output);
    if (of_windows.begin < input.begin) touched.begin = of_windows.begin;
    if (of_windows.end > input.end) touched.end = of_windows.end;
  }
  S* const sums = sums_.data();
  for (std::int64_t i = 0; i < touched.count() * pool_.width.input; i += kLanes)
    detail::store_unaligned<S>(sums + i, V{});
  offsets_.each(output, touched.begin, numbers, ahead, [&](std::int64_t i, std::int64_t at) { sums[at] += grad[i]; });
  return sums + (input.begin - touched.begin) * pool_.width.input;
}

// Where windows are pairs of columns, no two of which share an element, whole rows are written at once.
template <class S>
const S* PlaneSpreader<S>::spread_pairs(PlaneRows input, PlaneRows output, const S* grad, const std::uint8_t* numbers,
                                        FetchAhead& ahead) {
  const std::int64_t width = pool_.width.input, windows = pool_.width.output, kernel = pool_.height.kernel;
  // A row's last vectors may reach into the next one, which is written after it.
  std::int64_t o = input.begin / kernel, tap = input.begin % kernel;
  for (std::int64_t row = input.begin; row < input.end; ++row, ++tap) {
    ahead.step();
    if (tap == kernel) ++o, tap = 0;
    S* const to = sums_.data() + (row - input.begin) * width;
    const std::int64_t number = tap * 2, from = (o - output.begin) * windows;
    if (o >= output.end) {
      for (std::int64_t i = 0; i < width; i += kLanes) detail::store_unaligned<S>(to + i, V{});
      continue;
    }
    for_each_vector(windows, [&](std::int64_t i, auto lanes) {
      const V g = detail::load_unaligned<S>(grad + from + i);
      const std::uint8_t* at = numbers + from + i;
      interleave(add_where<S>(at, number, V{}, g, lanes), add_where<S>(at, number + 1, V{}, g, lanes), to + 2 * i);
    });
    if (2 * windows < width) to[width - 1] = 0;
  }
  return sums_.data();
}

template <class S>
FL_INLINE void PlaneSpreader<S>::interleave(V even, V odd, S* to) {
  alignas(64) S pairs[2][kLanes];
  detail::store_unaligned<S>(pairs[0], even);
  detail::store_unaligned<S>(pairs[1], odd);
  for (int i = 0; i < kLanes; ++i) to[2 * i] = pairs[0][i], to[2 * i + 1] = pairs[1][i];
}

#if defined(__AVX512F__)
namespace detail {

struct Interleaved {
  std::int32_t at[2][kLanes];
  constexpr Interleaved() : at{} {
    for (int i = 0; i < 2 * kLanes; ++i) at[i / kLanes][i % kLanes] = i / 2 + i % 2 * kLanes;
  }
};
alignas(64) inline constexpr Interleaved kInterleaved;

}  // namespace detail

template <>
FL_INLINE void PlaneSpreader<float>::interleave(V even, V odd, float* to) {
  for (int half = 0; half < 2; ++half)
    detail::store_unaligned<float>(to + half * kLanes, picked(even, detail::kInterleaved.at[half], odd));
}
#endif

}  // namespace FASTLAYERS_ISA
}  // namespace fastlayers
