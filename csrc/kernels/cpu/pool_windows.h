// Finds the largest of each window of a plane, whose keys lie row by row in scratch memory.
//
// First each row is pooled horizontally, then these rows' results vertically: in that order, the first of equal ones is
// the one that a walk row by row finds first. For the horizontal step a row is taken apart into as many phases as the
// stride has elements, so that what any tap of adjacent windows takes is adjacent too and a vector holds as many
// windows as it has lanes. A plane is pooled in blocks of output rows, so that all of this stays in the first-level
// cache.
#pragma once

#include "../common/pooling.h"
#include "choices.h"
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

template <class S>
class PlaneWindows {
 public:
  explicit PlaneWindows(const Pool& pool);

  std::int64_t blocks() const { return (pool_.height.output + rows_each_ - 1) / rows_each_; }
  // The output rows of a block.
  PlaneRows block(std::int64_t i) const {
    const std::int64_t end = (i + 1) * rows_each_;
    return {i * rows_each_, end < pool_.height.output ? end : pool_.height.output};
  }
  std::int64_t most_outputs() const { return rows_each_ * pool_.width.output; }
  std::int64_t most_inputs() const { return most_rows_ * pool_.width.input; }
  // How often the horizontal step takes a vector, for so many rows of the input.
  std::int64_t steps(std::int64_t rows) const {
    return flat_ ? (rows * outputs_ + kLanes - 1) / kLanes : rows * row_vectors_;
  }

 private:
  template <class>
  friend class PlanePooler;

  std::int64_t window_extent() const { return (pool_.height.kernel - 1) * pool_.height.dilation + 1; }
  std::int64_t scratch_bytes_per_row() const {
    return (line_ + stride_ * phase_ + outputs_) * static_cast<std::int64_t>(sizeof(S)) +
           outputs_ * static_cast<std::int64_t>(sizeof(Number<S>));
  }

  Pool pool_;
  std::int64_t stride_;
  bool flat_;                   // no window leaves its row, or shares its elements: rows follow each other like one
  std::int64_t shift_;          // how far into a phase the last tap starts
  std::int64_t row_vectors_;    // that hold a row's windows, if not flat
  std::int64_t line_, phase_;   // elements of a row with its padding, and of a phase of it
  std::int64_t outputs_;        // elements of a horizontally pooled row
  std::int64_t rows_each_ = 0;  // of the output, in a block
  std::int64_t most_rows_ = 0;  // of the input, for a block
};

template <class S>
PlaneWindows<S>::PlaneWindows(const Pool& pool) : pool_(pool), stride_(pool.width.stride) {
  const PoolAxis& width = pool.width;
  const std::int64_t reach = (width.kernel - 1) * width.dilation;
  flat_ = width.padding == 0 && width.input == width.output * stride_ && reach < stride_;
  shift_ = reach / stride_;
  row_vectors_ = (width.output + kLanes - 1) / kLanes;
  outputs_ = flat_ ? width.output : row_vectors_ * kLanes;
  phase_ = flat_ ? outputs_ : rounded_up(outputs_ + shift_, kLanes);
  line_ = flat_ ? width.input : rounded_up(width.padding + width.input, kLanes) + kLanes;
  if (!flat_ && line_ < stride_ * phase_) line_ = stride_ * phase_;

  constexpr std::int64_t kScratchBytes = 24 * 1024;
  const PoolAxis& height = pool.height;
  const std::int64_t extent = window_extent();
  rows_each_ = (kScratchBytes / scratch_bytes_per_row() - extent) / height.stride + 1;
  // At most half of the rows are pooled horizontally for two blocks.
  const std::int64_t least = (extent + height.stride - 1) / height.stride;
  if (rows_each_ < least) rows_each_ = least;
  if (rows_each_ > height.output) rows_each_ = height.output;
  most_rows_ = (rows_each_ - 1) * height.stride + extent;
  if (most_rows_ > height.input) most_rows_ = height.input;
}

// The scratch memory of one thread, and what is done in it.
template <class S>
class PlanePooler {
  using V = Vec<S>;

 public:
  explicit PlanePooler(const PlaneWindows<S>& windows);

  // Takes `rows` rows of keys, which are `sign` times what is found at x, without gaps.
  template <class From>
  void fill(const From* x, std::int64_t rows, S sign) {
    const std::int64_t width = w_.pool_.width.input;
    if (w_.flat_) return fill_line(lines_.data(), x, rows * width, sign);
    for (std::int64_t row = 0; row < rows; ++row)
      fill_line(lines_.data() + row * w_.line_ + w_.pool_.width.padding, x + row * width, width, sign);
  }

  // Pools these rows, the rows of the input having been filled in.
  void pool(PlaneRows output, PlaneRows input, FetchAhead& ahead);

  // The keys and numbers of the last pooled rows, without gaps; there is room for a whole vector behind their end.
  S* keys() const { return keys_.data(); }
  Number<S>* numbers() const { return numbers_.data(); }

 private:
  // What is behind x in the last vector is -inf in the line.
  template <class From>
  FL_INLINE static void fill_line(S* line, const From* x, std::int64_t n, S sign) {
    const V lowest = splat<V>(-std::numeric_limits<S>::infinity());
    for_each_vector(n, [&](std::int64_t i, auto lanes) {
      const V v = load(x + i, lanes) * sign;
      detail::store_unaligned<S>(line + i, only_covered(v, lowest, lanes));
    });
  }
  FL_INLINE static V only_covered(V v, V, AllLanes) { return v; }
  FL_INLINE static V only_covered(V v, V rest, FirstLanes lanes) {
    const Mask<S> live = convert<Mask<S>>(detail::lane_numbers() < lanes.count);
    return live ? v : rest;
  }

  // Element i of phase p is element i * stride + p of the line, in each of `lines` lines.
  void take_apart(std::int64_t lines, std::int64_t vectors);
  template <int kStride>
  void take_apart_by(std::int64_t lines, std::int64_t vectors);
  template <int kStride>
  FL_INLINE static void take_apart(const S* line, std::int64_t stride, std::int64_t phase, std::int64_t vectors, S* to);
  void pool_row(const S* phases, std::int64_t vectors, S* keys, Number<S>* numbers, FetchAhead& ahead) const;
  void pool_column(std::int64_t o, PlaneRows input, S* keys, Number<S>* numbers) const;

  const PlaneWindows<S>& w_;
  Scratch<S> lines_, phases_, row_keys_, keys_;
  Scratch<Number<S>> row_numbers_, numbers_, first_taps_;
  Scratch<std::int64_t> taps_;    // where in the phases a tap's element for the first window is
  std::int64_t phase_pitch_ = 0;  // from one phase to the next
};

template <class S>
PlanePooler<S>::PlanePooler(const PlaneWindows<S>& w)
    : w_(w),
      lines_(w.most_rows_ * w.line_ + (w.stride_ + 1) * kLanes),
      phases_(w.stride_ == 1 ? 0 : w.stride_ * (w.most_rows_ * w.phase_ + kLanes)),
      row_keys_(w.most_rows_ * w.outputs_ + kLanes),
      keys_(w.most_outputs() + kLanes),
      row_numbers_(w.most_rows_ * w.outputs_ + kLanes),
      numbers_(w.most_outputs() + kLanes),
      first_taps_(w.row_vectors_ * kLanes),
      taps_(w.pool_.width.kernel) {
  const PoolAxis& width = w.pool_.width;
  const std::int64_t all = w.most_rows_ * w.line_ + (w.stride_ + 1) * kLanes;
  for (std::int64_t i = 0; i < all; ++i) lines_[i] = -std::numeric_limits<S>::infinity();
  for (std::int64_t o = 0; o < w.row_vectors_ * kLanes; ++o)
    first_taps_[o] = static_cast<Number<S>>(o < width.output ? width.first(o) : 0);
  phase_pitch_ = w.flat_ ? rounded_up(w.most_rows_ * w.phase_, kLanes) : w.phase_;
  for (std::int64_t k = 0; k < width.kernel; ++k) {
    const std::int64_t at = k * width.dilation;
    taps_[k] = at % w.stride_ * phase_pitch_ + at / w.stride_;
  }
}

template <class S>
template <int kStride>
FL_INLINE void PlanePooler<S>::take_apart(const S* line, std::int64_t stride, std::int64_t phase, std::int64_t vectors,
                                          S* to) {
  const std::int64_t step = kStride ? kStride : stride;
  for (std::int64_t p = 0; p < step; ++p)
    for (std::int64_t i = 0; i < vectors * kLanes; ++i) to[p * phase + i] = line[i * step + p];
}

#if defined(__AVX512F__)
// gcc does not find the instruction that picks elements of two registers.
namespace detail {

// Every kStride-th element from the p-th on, of two vectors; or, with a third vector, of what these two gave and it.
struct Picked {
  std::int32_t at[2][3][kLanes];
  constexpr explicit Picked(int stride) : at{} {
    for (int p = 0; p < stride; ++p) {
      for (int i = 0; i < kLanes; ++i) {
        const int from = stride * i + p;
        at[0][p][i] = from < 2 * kLanes ? from : 0;
        at[1][p][i] = from < 2 * kLanes ? i : from - kLanes;
      }
    }
  }
};
alignas(64) inline constexpr Picked kPickedBy2(2), kPickedBy3(3);

FL_INLINE __m512 pick(__m512 a, const std::int32_t (&at)[kLanes], __m512 b) {
  return _mm512_permutex2var_ps(a, _mm512_load_si512(at), b);
}

}  // namespace detail

template <>
template <>
FL_INLINE void PlanePooler<float>::take_apart<2>(const float* line, std::int64_t, std::int64_t phase,
                                                 std::int64_t vectors, float* to) {
  for (std::int64_t i = 0; i < vectors * kLanes; i += kLanes) {
    const __m512 a = _mm512_loadu_ps(line + 2 * i), b = _mm512_loadu_ps(line + 2 * i + kLanes);
    for (int p = 0; p < 2; ++p) _mm512_storeu_ps(to + p * phase + i, detail::pick(a, detail::kPickedBy2.at[0][p], b));
  }
}

template <>
template <>
FL_INLINE void PlanePooler<float>::take_apart<3>(const float* line, std::int64_t, std::int64_t phase,
                                                 std::int64_t vectors, float* to) {
  for (std::int64_t i = 0; i < vectors * kLanes; i += kLanes) {
    const float* from = line + 3 * i;
    const __m512 a = _mm512_loadu_ps(from), b = _mm512_loadu_ps(from + kLanes), c = _mm512_loadu_ps(from + 2 * kLanes);
    for (int p = 0; p < 3; ++p) {
      const __m512 of_two = detail::pick(a, detail::kPickedBy3.at[0][p], b);
      _mm512_storeu_ps(to + p * phase + i, detail::pick(of_two, detail::kPickedBy3.at[1][p], c));
    }
  }
}
#endif

template <class S>
template <int kStride>
void PlanePooler<S>::take_apart_by(std::int64_t lines, std::int64_t vectors) {
  for (std::int64_t i = 0; i < lines; ++i)
    take_apart<kStride>(lines_.data() + i * w_.line_, w_.stride_, phase_pitch_, vectors,
                        phases_.data() + i * w_.stride_ * w_.phase_);
}

template <class S>
void PlanePooler<S>::take_apart(std::int64_t lines, std::int64_t vectors) {
  switch (w_.stride_) {
    case 1: return;
    case 2: return take_apart_by<2>(lines, vectors);
    case 3: return take_apart_by<3>(lines, vectors);
    default: return take_apart_by<0>(lines, vectors);
  }
}

template <class S>
void PlanePooler<S>::pool_row(const S* phases, std::int64_t vectors, S* keys, Number<S>* numbers,
                              FetchAhead& ahead) const {
  const std::int64_t taps = w_.pool_.width.kernel;
  for (std::int64_t i = 0; i < vectors * kLanes; i += kLanes) {
    ahead.step();
    Numbers<S> number{};
    Best<S> best = Best<S>::none(w_.flat_ ? number : detail::load_unaligned<Number<S>>(first_taps_.data() + i));
    for (std::int64_t k = 0; k < taps; ++k, number += 1)
      best.offer(detail::load_unaligned<S>(phases + taps_[k] + i), number);
    detail::store_unaligned<S>(keys + i, best.key);
    detail::store_unaligned<Number<S>>(numbers + i, best.number);
  }
}

template <class S>
void PlanePooler<S>::pool_column(std::int64_t o, PlaneRows input, S* keys, Number<S>* numbers) const {
  const PoolAxis& height = w_.pool_.height;
  const std::int64_t first = height.first(o), end = height.end(o);
  const std::int64_t from = height.start(o) + first * height.dilation - input.begin;
  for (std::int64_t i = 0; i < w_.pool_.width.output; i += kLanes) {
    std::int64_t at = from * w_.outputs_ + i;
    Numbers<S> row = all_numbered<S>(first * w_.pool_.width.kernel);
    Best<S> best{detail::load_unaligned<S>(row_keys_.data() + at),
                 detail::load_unaligned<Number<S>>(row_numbers_.data() + at) + row};
    for (std::int64_t k = first + 1; k < end; ++k) {
      at += height.dilation * w_.outputs_;
      row += static_cast<Number<S>>(w_.pool_.width.kernel);
      best.offer(detail::load_unaligned<S>(row_keys_.data() + at),
                 detail::load_unaligned<Number<S>>(row_numbers_.data() + at) + row);
    }
    detail::store_unaligned<S>(keys + i, best.key);
    detail::store_unaligned<Number<S>>(numbers + i, best.number);
  }
}

template <class S>
void PlanePooler<S>::pool(PlaneRows output, PlaneRows input, FetchAhead& ahead) {
  const auto vectors_for = [](std::int64_t n) { return (n + kLanes - 1) / kLanes; };
  const S* phases = w_.stride_ == 1 ? lines_.data() : phases_.data();
  if (w_.flat_) {
    const std::int64_t vectors = vectors_for(input.count() * w_.outputs_);
    take_apart(1, vectors);
    pool_row(phases, vectors, row_keys_.data(), row_numbers_.data(), ahead);
  } else {
    const std::int64_t pitch = w_.stride_ == 1 ? w_.line_ : w_.stride_ * w_.phase_;
    take_apart(input.count(), vectors_for(w_.pool_.width.output + w_.shift_));
    for (std::int64_t row = 0; row < input.count(); ++row)
      pool_row(phases + row * pitch, w_.row_vectors_, row_keys_.data() + row * w_.outputs_,
               row_numbers_.data() + row * w_.outputs_, ahead);
  }
  for (std::int64_t o = output.begin; o < output.end; ++o) {
    const std::int64_t at = (o - output.begin) * w_.pool_.width.output;
    pool_column(o, input, keys_.data() + at, numbers_.data() + at);
  }
}

}  // namespace FASTLAYERS_ISA
}  // namespace fastlayers
