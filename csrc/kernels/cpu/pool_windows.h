// Finds the largest of each window of a plane, whose keys lie row by row in scratch memory.
//
// First each row is pooled horizontally, then these rows' results vertically: in that order, the first of equal ones is
// the one that a walk row by row finds first. For the horizontal step a row is taken apart into as many phases as the
// stride has elements, so that what any tap of adjacent windows takes is adjacent too and a vector holds as many
// windows as it has lanes. A plane is pooled in blocks of output rows, so that all of this stays in the first-level
// cache.
#pragma once

#include <type_traits>

#include "choices.h"
#include "pool.h"
#include "pool_geometry.h"

namespace fastlayers {
inline namespace FASTLAYERS_ISA {

// Whether there is an instruction that picks every other element of two vectors.
template <class S>
inline constexpr bool kSplitsPairs = false;
#if defined(__AVX512F__)
template <>
inline constexpr bool kSplitsPairs<float> = true;
#endif

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
    if (pairs_) return rows / 2 * row_vectors_;
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
  bool pairs_;                  // windows are two by two elements, no two of them share one, and all of them exist
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
  const auto in_twos = [](const PoolAxis& a) {
    return a.kernel == 2 && a.stride == 2 && a.dilation == 1 && a.padding == 0 && 2 * a.output <= a.input;
  };
  pairs_ = kSplitsPairs<S> && in_twos(width) && in_twos(pool.height);
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

  // Pools rows of the output. Keys are `sign` times what is found at x, the rows of the input, without gaps.
  template <class From>
  void pool(const From* x, S sign, PlaneRows output, PlaneRows input, FetchAhead& ahead) {
    if constexpr (kSplitsPairs<S>) {
      if (w_.pairs_) return pool_pairs(x, sign, output, ahead);
    }
    if (!w_.flat_ && take_rows_apart(x, sign, input.count())) return pool(output, input, ahead);
    fill(x, input.count(), sign);
    if (w_.flat_)
      take_apart(1, vectors_for(input.count() * w_.outputs_));
    else
      take_apart(input.count(), vectors_of_phase());
    pool(output, input, ahead);
  }

  // The keys and numbers of the last pooled rows, without gaps; there is room for a whole vector behind their end.
  S* keys() const { return keys_.data(); }
  Number<S>* numbers() const { return numbers_.data(); }

 private:
  template <class From>
  void fill(const From* x, std::int64_t rows, S sign) {
    const std::int64_t width = w_.pool_.width.input;
    if (w_.flat_) return fill_line(lines_.data(), x, rows * width, sign);
    for (std::int64_t row = 0; row < rows; ++row)
      fill_line(lines_.data() + row * w_.line_ + w_.pool_.width.padding, x + row * width, width, sign);
  }

  // Pools these rows, the rows of the input having been taken apart.
  void pool(PlaneRows output, PlaneRows input, FetchAhead& ahead);

  // Two rows of the input at a time, straight from x: nothing on the way is written down.
  template <class From>
  void pool_pairs(const From* x, S sign, PlaneRows output, FetchAhead& ahead);
  // The first and the second elements of adjacent pairs.
  template <class From, class Lanes>
  FL_INLINE static void load_pairs(const From* from, Lanes lanes, V* to);

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

  static std::int64_t vectors_for(std::int64_t n) { return (n + kLanes - 1) / kLanes; }
  // That windows read of a row's phase.
  std::int64_t vectors_of_phase() const { return vectors_for(w_.pool_.width.output + w_.shift_); }

  // Element i of phase p is element i * stride + p of the line, in each of `lines` lines.
  void take_apart(std::int64_t lines, std::int64_t vectors);
  template <int kStride>
  void take_apart_by(std::int64_t lines, std::int64_t vectors);
  template <int kStride>
  FL_INLINE static void take_apart(const S* line, std::int64_t stride, std::int64_t phase, std::int64_t vectors, S* to);
  // The same straight from x, without lines, where there are instructions for that; returns whether it was done.
  template <class From>
  bool take_rows_apart(const From* x, S sign, std::int64_t rows) {
    if constexpr (kSplitsPairs<S> && std::is_same_v<From, S>) {
      const std::int64_t vectors = vectors_of_phase();
      if (w_.stride_ == 2) return take_rows_apart<2>(x, sign, rows, vectors), true;
      if (w_.stride_ == 3) return take_rows_apart<3>(x, sign, rows, vectors), true;
    }
    return false;
  }
  template <int kStride>
  void take_rows_apart(const S* x, S sign, std::int64_t rows, std::int64_t vectors);
  // Vectors of adjacent windows, and the distances from one to the next.
  struct Across {
    std::int64_t vectors;
    const S* phases;
    std::int64_t from_step, to, to_step, first_step;
  };
  void pool_across(const Across& v, FetchAhead& ahead) const;
  template <int kTogether>
  FL_INLINE void pool_across(const Across& v, std::int64_t first, FetchAhead& ahead) const;
  void pool_column(std::int64_t o, PlaneRows input, S* keys, Number<S>* numbers) const;

  const PlaneWindows<S>& w_;
  Scratch<S> lines_, phases_, row_keys_, keys_;
  Scratch<Number<S>> row_numbers_, numbers_, first_taps_;
  Scratch<std::uint16_t> there_;  // which lanes of a line's vectors are elements of the row
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
      there_(w.line_ / kLanes + 1),
      taps_(w.pool_.width.kernel) {
  const PoolAxis& width = w.pool_.width;
  const std::int64_t all = w.most_rows_ * w.line_ + (w.stride_ + 1) * kLanes;
  for (std::int64_t i = 0; i < all; ++i) lines_[i] = -std::numeric_limits<S>::infinity();
  for (std::int64_t o = 0; o < w.row_vectors_ * kLanes; ++o)
    first_taps_[o] = static_cast<Number<S>>(o < width.output ? width.first(o) : 0);
  for (std::int64_t i = 0; i < w.line_ / kLanes; ++i) {
    there_[i] = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      const std::int64_t column = i * kLanes + lane - width.padding;
      if (column >= 0 && column < width.input) there_[i] |= static_cast<std::uint16_t>(1u << lane);
    }
  }
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

}  // namespace detail

// Of a line whose vectors are line(0), line(1) and so on.
template <int kStride>
FL_INLINE void take_vectors_apart(std::int64_t phase, std::int64_t vectors, float* to, auto&& line) {
  for (std::int64_t i = 0; i < vectors; ++i, to += kLanes) {
    const Vec<float> a = line(kStride * i), b = line(kStride * i + 1);
    if constexpr (kStride == 2) {
      for (int p = 0; p < 2; ++p)
        detail::store_unaligned<float>(to + p * phase, picked(a, detail::kPickedBy2.at[0][p], b));
    } else {
      const Vec<float> c = line(kStride * i + 2);
      for (int p = 0; p < 3; ++p) {
        const Vec<float> of_two = picked(a, detail::kPickedBy3.at[0][p], b);
        detail::store_unaligned<float>(to + p * phase, picked(of_two, detail::kPickedBy3.at[1][p], c));
      }
    }
  }
}

template <>
template <>
FL_INLINE void PlanePooler<float>::take_apart<2>(const float* line, std::int64_t, std::int64_t phase,
                                                 std::int64_t vectors, float* to) {
  take_vectors_apart<2>(phase, vectors, to,
                        [=](std::int64_t i) { return detail::load_unaligned<float>(line + i * kLanes); });
}
template <>
template <>
FL_INLINE void PlanePooler<float>::take_apart<3>(const float* line, std::int64_t, std::int64_t phase,
                                                 std::int64_t vectors, float* to) {
  take_vectors_apart<3>(phase, vectors, to,
                        [=](std::int64_t i) { return detail::load_unaligned<float>(line + i * kLanes); });
}

template <>
template <int kStride>
void PlanePooler<float>::take_rows_apart(const float* x, float sign, std::int64_t rows, std::int64_t vectors) {
  const PoolAxis& width = w_.pool_.width;
  float* to = phases_.data();
  const std::uint16_t* const there = there_.data();
  for (std::int64_t row = 0; row < rows; ++row, x += width.input, to += kStride * w_.phase_)
    take_vectors_apart<kStride>(phase_pitch_, vectors, to, [=, from = x - width.padding](std::int64_t i) {
      return product_where(there[i], from + i * kLanes, sign, -std::numeric_limits<float>::infinity());
    });
}
#endif

#if defined(__AVX512F__)
template <>
template <class From, class Lanes>
FL_INLINE void PlanePooler<float>::load_pairs(const From* from, Lanes lanes, V* to) {
  V a, b;
  if constexpr (std::is_same_v<Lanes, AllLanes>) {
    a = load(from, lanes), b = load(from + kLanes, lanes);
  } else {
    const int count = 2 * lanes.count, in_first = count < kLanes ? count : kLanes;
    a = load(from, FirstLanes{in_first}), b = load(from + in_first, FirstLanes{count - in_first});
  }
  for (int p = 0; p < 2; ++p) to[p] = picked(a, detail::kPickedBy2.at[0][p], b);
}
#endif

template <class S>
template <class From>
void PlanePooler<S>::pool_pairs(const From* x, S sign, PlaneRows output, FetchAhead& ahead) {
  constexpr int kPositions = 4;
  const std::int64_t width = w_.pool_.width.input, windows = w_.pool_.width.output;
  S* keys = keys_.data();
  Number<S>* numbers = numbers_.data();
  // A row's last vectors reach into the next one, which is written after it.
  for (std::int64_t o = output.begin; o < output.end; ++o, x += 2 * width, keys += windows, numbers += windows) {
    for_each_vector(windows, [&](std::int64_t i, auto lanes) {
      ahead.step();
      V elements[kPositions];
      load_pairs(x + 2 * i, lanes, elements);
      load_pairs(x + width + 2 * i, lanes, elements + 2);
      Best<S> best{elements[0] * sign, all_numbered<S>(0)};
      for (int k = 1; k < kPositions; ++k) best.offer(elements[k] * sign, all_numbered<S>(k));
      detail::store_unaligned<S>(keys + i, best.key);
      detail::store_unaligned<Number<S>>(numbers + i, best.number);
    });
  }
}

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
void PlanePooler<S>::pool_across(const Across& v, FetchAhead& ahead) const {
  constexpr int kTogether = 4;
  std::int64_t i = 0;
  for (; i + kTogether <= v.vectors; i += kTogether) pool_across<kTogether>(v, i, ahead);
  for (; i < v.vectors; ++i) pool_across<1>(v, i, ahead);
}

template <class S>
template <int kTogether>
FL_INLINE void PlanePooler<S>::pool_across(const Across& v, std::int64_t first, FetchAhead& ahead) const {
  const std::int64_t taps = w_.pool_.width.kernel;
  const S* phases = v.phases + first * v.from_step;
  // Nothing else in the loop over `best`: it has to be unrolled for that to be registers.
  ahead.step(kTogether);
  Best<S> best[kTogether];
  for (int u = 0; u < kTogether; ++u)
    best[u] = Best<S>::none(detail::load_unaligned<Number<S>>(first_taps_.data() + (first + u) * v.first_step));
  Numbers<S> number{};
  for (std::int64_t k = 0; k < taps; ++k, number += 1)
    for (int u = 0; u < kTogether; ++u)
      best[u].offer(detail::load_unaligned<S>(phases + taps_[k] + u * v.from_step), number);
  for (int u = 0; u < kTogether; ++u) {
    const std::int64_t to = v.to + (first + u) * v.to_step;
    detail::store_unaligned<S>(row_keys_.data() + to, best[u].key);
    detail::store_unaligned<Number<S>>(row_numbers_.data() + to, best[u].number);
  }
}

template <class S>
void PlanePooler<S>::pool_column(std::int64_t o, PlaneRows input, S* keys, Number<S>* numbers) const {
  const PoolAxis& height = w_.pool_.height;
  // Only windows at the edges cost divisions.
  const std::int64_t start = height.start(o);
  const bool whole = start >= 0 && start + height.extent() <= height.input;
  const std::int64_t first = whole ? 0 : height.first(o), end = whole ? height.kernel : height.end(o);
  const std::int64_t from = start + first * height.dilation - input.begin;
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
  const S* phases = w_.stride_ == 1 ? lines_.data() : phases_.data();
  const std::int64_t pitch = w_.stride_ == 1 ? w_.line_ : w_.stride_ * w_.phase_;
  if (w_.flat_) {
    pool_across({vectors_for(input.count() * w_.outputs_), phases, kLanes, 0, kLanes, 0}, ahead);
  } else {
    if (w_.row_vectors_ == 1) {
      pool_across({input.count(), phases, pitch, 0, w_.outputs_, 0}, ahead);
    } else {
      for (std::int64_t row = 0; row < input.count(); ++row)
        pool_across({w_.row_vectors_, phases + row * pitch, kLanes, row * w_.outputs_, kLanes, kLanes}, ahead);
    }
  }
  for (std::int64_t o = output.begin; o < output.end; ++o) {
    const std::int64_t at = (o - output.begin) * w_.pool_.width.output;
    pool_column(o, input, keys_.data() + at, numbers_.data() + at);
  }
}

}  // namespace FASTLAYERS_ISA
}  // namespace fastlayers
