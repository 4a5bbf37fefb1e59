// Kernels for tensors made of planes: the positions of one sample and channel are adjacent.
//
// A channel is one unit of work: its planes are walked once for the statistics and, in reverse, once more to write the
// result, so that the second walk starts with what is still in cache and, where a channel fits, finds all of it there.
// Where channels are few, each is split into spans that different threads take, and the walks become two parallel
// loops. The split depends on the shape alone, so the result does not depend on the number of threads.
#pragma once

#include <cmath>

#include "../common/activations.h"
#include "elements.h"
#include "parallel.h"
#include "scratch.h"
#include "simd_math.h"

namespace fastlayers {
inline namespace FASTLAYERS_ISA {

// Positions [begin, end) of the batch * spatial that one channel has.
struct Span {
  std::int64_t begin, end;
};

// Part of one plane: positions [offset, offset + length) of sample n.
struct Piece {
  std::int64_t n, offset, length;
};

enum class Walk { forward, reverse };

template <class F>
FL_INLINE void for_each_piece(Span span, std::int64_t spatial, Walk walk, F&& f) {
  const std::int64_t first = span.begin / spatial, last = (span.end - 1) / spatial;
  for (std::int64_t k = first; k <= last; ++k) {
    const std::int64_t n = walk == Walk::forward ? k : first + last - k;
    const std::int64_t begin = n == first ? span.begin - n * spatial : 0;
    const std::int64_t end = n == last ? span.end - n * spatial : spatial;
    f(Piece{n, begin, end - begin});
  }
}

// How the channels of a tensor are shared out: `spans` spans each.
struct PlaneSplit {
  std::int64_t per_channel, spans, length;

  explicit PlaneSplit(const Geometry& g) : per_channel(g.batch * g.spatial), spatial_(g.spatial) {
    constexpr std::int64_t kEnoughTasks = 16;
    spans = g.channels < kEnoughTasks ? (2 * kEnoughTasks + g.channels - 1) / g.channels : 1;
    const std::int64_t most = per_channel / kElementsPerThread;
    if (spans > most) spans = most > 1 ? most : 1;
    length = (per_channel + spans - 1) / spans;
  }

  Span span(std::int64_t i) const { return {boundary(i), boundary(i + 1)}; }

 private:
  // Within its plane a span starts at a multiple of 64, so that no two spans share a byte of a bit mask.
  std::int64_t boundary(std::int64_t i) const {
    const std::int64_t position = i * length < per_channel ? i * length : per_channel;
    const std::int64_t offset = position % spatial_;
    return position - offset % 64;
  }

  std::int64_t spatial_;
};

template <class T>
FL_INLINE const T* piece_start(const Source& x, Piece p, std::int64_t channel) {
  return advance(static_cast<const T*>(x.data), p.n * x.outer + channel * x.inner + p.offset);
}
template <class T>
FL_INLINE T* piece_start(const Target& x, Piece p, std::int64_t channel) {
  return advance(static_cast<T*>(x.data), p.n * x.outer + channel * x.inner + p.offset);
}

// Sums of (x - shift) and its square over pieces of a channel, in vectors of A: float, or double where float overflows.
template <class T, class A>
class ShiftedSums {
 public:
  FL_INLINE explicit ShiftedSums(double shift) { reset(shift); }

  FL_INLINE void reset(double shift) {
    shift_ = static_cast<A>(shift);
    count_ = 0;
    for (int u = 0; u < kUnroll; ++u) sum_[u] = square_[u] = Vec<A>{};
  }

  FL_INLINE void add(const T* x, std::int64_t n) {
    std::int64_t i = 0;
    for (; i + kUnroll * kLanes <= n; i += kUnroll * kLanes)
      for (int u = 0; u < kUnroll; ++u) add_vector(u, x + i + u * kLanes, AllLanes{});
    for_each_vector(n - i, [&](std::int64_t j, auto lanes) { add_vector(0, x + i + j, lanes); });
    count_ += n;
  }

  FL_INLINE std::int64_t count() const { return count_; }

  FL_INLINE Moments moments() const {
    Vec<A> sum = sum_[0], square = square_[0];
    for (int u = 1; u < kUnroll; ++u) sum += sum_[u], square += square_[u];
    return Moments::from_shifted(static_cast<double>(count_), static_cast<double>(shift_), sum_of_lanes<A>(sum),
                                 sum_of_lanes<A>(square));
  }

 private:
  static constexpr int kUnroll = 4;

  template <class Lanes>
  FL_INLINE void add_vector(int u, const T* x, Lanes lanes) {
    const Vec<A> d = covered<A>(convert<Vec<A>>(load(x, lanes)) - shift_, lanes);
    sum_[u] += d;
    square_[u] += d * d;
  }

  A shift_;
  std::int64_t count_;
  Vec<A> sum_[kUnroll], square_[kUnroll];
};

// Elements summed before they are merged in double; a longer piece is cut.
inline constexpr std::int64_t kChunk = kFloatAdditions * kLanes;

template <class F>
FL_INLINE void for_each_chunk(std::int64_t length, F&& f) {
  for (std::int64_t begin = 0; begin < length; begin += kChunk)
    f(begin, length - begin < kChunk ? length - begin : kChunk);
}

// Moments of part of a channel in one pass. Each chunk is shifted by the mean of all before it: if that is far from the
// chunk's own mean, the total variance is large too, so what cancels does not matter. The first chunk is shifted by its
// own mean, and no chunk has more elements than all before it.
template <class T, class A>
__attribute__((noinline)) Moments plane_moments(const Source& x, std::int64_t channel, Span span,
                                                std::int64_t spatial) {
  Moments total;
  ShiftedSums<T, A> sums(0);
  for_each_piece(span, spatial, Walk::forward, [&](Piece p) {
    for_each_chunk(p.length, [&](std::int64_t begin, std::int64_t n) {
      const T* from = piece_start<T>(x, p, channel) + begin;
      if (total.count == 0) {
        sums.add(from, n);
        sums.reset(sums.moments().mean);
      }
      sums.add(from, n);
      if (sums.count() >= kChunk || static_cast<double>(sums.count()) >= total.count) {
        total.merge(sums.moments());
        sums.reset(total.mean);
      }
    });
  });
  if (sums.count() > 0) total.merge(sums.moments());
  return total;
}

// The same without a shift: only good for telling how infinities and NaN come out.
template <class T>
Moments plane_moments_of_non_finite(const Source& x, std::int64_t channel, Span span, std::int64_t spatial) {
  ShiftedSums<T, double> sums(0);
  for_each_piece(span, spatial, Walk::forward, [&](Piece p) { sums.add(piece_start<T>(x, p, channel), p.length); });
  return sums.moments();
}

template <class T>
Moments plane_moments(const Source& x, std::int64_t channel, Span span, std::int64_t spatial) {
  Moments m = plane_moments<T, Compute<T>>(x, channel, span, spatial);
  if (std::isfinite(m.squares)) return m;
  // Squares beyond the range of float, or something that is not finite in x: double tells which.
  if constexpr (sizeof(Compute<T>) < sizeof(double)) m = plane_moments<T, double>(x, channel, span, spatial);
  return std::isfinite(m.squares) ? m : plane_moments_of_non_finite<T>(x, channel, span, spatial);
}

// Where a piece's masks are, and what dropout does with it.
struct PieceMasks {
  std::int64_t bits;
  bool dropped;
  const std::uint8_t* keep_bits;

  PieceMasks(const Geometry& g, const Keep& keep, Piece p, std::int64_t channel) {
    const std::int64_t plane = p.n * g.channels + channel;
    bits = plane * g.mask_stride() + p.offset / 8;
    dropped = keep.planes && !keep.planes[plane];
    keep_bits = advance(keep.bits, bits);
  }

  template <class S, class Lanes>
  FL_INLINE Mask<S> kept(std::int64_t i, Lanes lanes) const {
    return keep_bits ? load_mask_bits<S>(keep_bits + i / 8, lanes) : all_kept<S>();
  }
};

template <class S, class Args>
Affine<Vec<S>> plane_affine(const Args& args, std::int64_t c) {
  const ChannelAffine<S> k = channel_affine<S>(args, c);
  return {splat<Vec<S>>(k.mean), splat<Vec<S>>(k.scale), splat<Vec<S>>(k.shift)};
}

template <class T, class Act>
class PlanesForward {
  using S = Compute<T>;

 public:
  PlanesForward(const ForwardArgs& args, Act activation)
      : args_(args), split_(args.geometry), fused_{activation, splat<Vec<S>>(args.keep.scale)} {}

  void run() const {
    const std::int64_t channels = args_.geometry.channels;
    if (split_.spans == 1) {
      parallel_each(args_.parallel_for, channels, split_.per_channel, [&](std::int64_t c) {
        const Span whole = split_.span(0);
        if (args_.training) finish_statistics(args_, c, plane_moments<T>(args_.input, c, whole, spatial()));
        write(c, whole);
      });
      return;
    }
    const auto each_span = [&](const auto& f) {
      parallel_each(args_.parallel_for, channels * split_.spans, split_.length,
                    [&](std::int64_t i) { f(i, i / split_.spans, split_.span(i % split_.spans)); });
    };
    if (args_.training) {
      Scratch<Moments> parts(channels * split_.spans);
      each_span(
          [&](std::int64_t i, std::int64_t c, Span s) { parts[i] = plane_moments<T>(args_.input, c, s, spatial()); });
      for (std::int64_t c = 0; c < channels; ++c) {
        Moments total;
        for (std::int64_t s = 0; s < split_.spans; ++s) total.merge(parts[c * split_.spans + s]);
        finish_statistics(args_, c, total);
      }
    }
    each_span([&](std::int64_t, std::int64_t c, Span s) { write(c, s); });
  }

 private:
  std::int64_t spatial() const { return args_.geometry.spatial; }

  void write(std::int64_t c, Span span) const {
    const Affine<Vec<S>> k = plane_affine<S>(args_, c);
    for_each_piece(span, spatial(), Walk::reverse, [&](Piece p) {
      const PieceMasks masks(args_.geometry, args_.keep, p, c);
      T* output = piece_start<T>(args_.output, p, c);
      if (masks.dropped) {
        std::memset(output, 0, static_cast<std::size_t>(p.length) * sizeof(T));
        if (args_.flat_bits) std::memset(args_.flat_bits + masks.bits, 0, static_cast<std::size_t>(p.length + 7) / 8);
        return;
      }
      const ForwardRun<T> run{piece_start<T>(args_.input, p, c), piece_start<T>(args_.residual, p, c), output,
                              advance(args_.flat_bits, masks.bits)};
      for_each_vector(p.length,
                      [&](std::int64_t i, auto lanes) { fused_.forward(run, i, k, masks.kept<S>(i, lanes), lanes); });
    });
  }

  const ForwardArgs& args_;
  PlaneSplit split_;
  FusedElements<T, Act> fused_;
};

template <class T, class Act>
class PlanesBackward {
  using S = Compute<T>;
  using V = Vec<S>;

 public:
  PlanesBackward(const BackwardArgs& args, Act activation)
      : args_(args), split_(args.geometry), fused_{activation, splat<V>(args.keep.scale)} {}

  void run() const {
    const std::int64_t channels = args_.geometry.channels;
    if (split_.spans == 1) {
      parallel_each(args_.parallel_for, channels, split_.per_channel, [&](std::int64_t c) {
        const Span whole = split_.span(0);
        const GradientSums total = needs_sums(args_) ? sums(c, whole) : GradientSums{};
        write(c, whole, finish_sums<S>(args_, c, total));
      });
      return;
    }
    const auto each_span = [&](const auto& f) {
      parallel_each(args_.parallel_for, channels * split_.spans, split_.length,
                    [&](std::int64_t i) { f(i, i / split_.spans, split_.span(i % split_.spans)); });
    };
    Scratch<InputGradient> coefficients(channels);
    Scratch<GradientSums> parts(channels * split_.spans);
    if (needs_sums(args_)) each_span([&](std::int64_t i, std::int64_t c, Span s) { parts[i] = sums(c, s); });
    for (std::int64_t c = 0; c < channels; ++c) {
      GradientSums total;
      if (needs_sums(args_))
        for (std::int64_t s = 0; s < split_.spans; ++s) total.add(parts[c * split_.spans + s]);
      coefficients[c] = finish_sums<S>(args_, c, total);
    }
    each_span([&](std::int64_t, std::int64_t c, Span s) { write(c, s, coefficients[c]); });
  }

 private:
  std::int64_t spatial() const { return args_.geometry.spatial; }

  BackwardRun<T> run_at(Piece p, std::int64_t c, const PieceMasks& masks) const {
    return {piece_start<T>(args_.grad_output, p, c), piece_start<T>(args_.input, p, c),
            piece_start<T>(args_.residual, p, c), advance(args_.flat_bits, masks.bits)};
  }

  GradientSums sums(std::int64_t c, Span span) const {
    const Affine<V> k = plane_affine<S>(args_, c);
    GradientSums total;
    V grad{}, grad_deviation{};
    std::int64_t summed = 0;
    const auto carry = [&] {
      total.add({sum_of_lanes<S>(grad), sum_of_lanes<S>(grad_deviation)});
      grad = grad_deviation = V{};
      summed = 0;
    };
    for_each_piece(span, spatial(), Walk::forward, [&](Piece p) {
      const PieceMasks masks(args_.geometry, args_.keep, p, c);
      if (masks.dropped) return;
      const BackwardRun<T> run = run_at(p, c, masks);
      for_each_chunk(p.length, [&](std::int64_t begin, std::int64_t length) {
        for_each_vector(length, [&](std::int64_t j, auto lanes) {
          const std::int64_t i = begin + j;
          const V x = load(run.input + i, lanes);
          const V g = covered<S>(fused_.backward(run, i, x, k, masks.kept<S>(i, lanes), lanes), lanes);
          grad += g;
          grad_deviation += g * (x - k.mean);
        });
        summed += length;
        if (summed >= kChunk) carry();
      });
    });
    carry();
    return total;
  }

  void write(std::int64_t c, Span span, const InputGradient& coefficients) const {
    if (!args_.grad_input.data && !args_.grad_residual.data) return;
    const Affine<V> k = plane_affine<S>(args_, c);
    const V by_deviation = splat<V>(coefficients.by_deviation), constant = splat<V>(coefficients.constant);
    for_each_piece(span, spatial(), Walk::reverse, [&](Piece p) {
      const PieceMasks masks(args_.geometry, args_.keep, p, c);
      const BackwardRun<T> run = run_at(p, c, masks);
      T* grad_input = piece_start<T>(args_.grad_input, p, c);
      T* grad_residual = piece_start<T>(args_.grad_residual, p, c);
      for_each_vector(p.length, [&](std::int64_t i, auto lanes) {
        const V x = load(run.input + i, lanes);
        // A dropped plane's gradient is zero, so its grad_output is never read.
        const V g = masks.dropped ? V{} : fused_.backward(run, i, x, k, masks.kept<S>(i, lanes), lanes);
        if (grad_input)
          store(grad_input + i,
                args_.training ? input_gradient(g, x, k.mean, k.scale, by_deviation, constant) : g * k.scale, lanes);
        if (grad_residual) store(grad_residual + i, g, lanes);
      });
    });
  }

  const BackwardArgs& args_;
  PlaneSplit split_;
  FusedElements<T, Act> fused_;
};

template <class T>
void dropout_planes(const DropoutArgs& args) {
  using S = Compute<T>;
  const Geometry& g = args.geometry;
  const PlaneSplit split(g);
  const Vec<S> scale = splat<Vec<S>>(args.keep.scale);
  parallel_each(args.parallel_for, g.channels * split.spans, split.length, [&](std::int64_t task) {
    const std::int64_t c = task / split.spans;
    for_each_piece(split.span(task % split.spans), g.spatial, Walk::forward, [&](Piece p) {
      const PieceMasks masks(g, args.keep, p, c);
      const T* input = piece_start<T>(args.input, p, c);
      T* output = piece_start<T>(args.output, p, c);
      if (masks.dropped) {
        std::memset(output, 0, static_cast<std::size_t>(p.length) * sizeof(T));
        return;
      }
      for_each_vector(p.length, [&](std::int64_t i, auto lanes) {
        store(output + i, masks.kept<S>(i, lanes) ? load(input + i, lanes) * scale : Vec<S>{}, lanes);
      });
    });
  });
}

}  // namespace FASTLAYERS_ISA
}  // namespace fastlayers
