// Kernels for tensors made of planes: the positions of one sample and channel are adjacent.
//
// A channel is one unit of work: its planes are walked once for the sums and, in reverse, once more to write the
// result, so that the second walk starts with what is still in cache and, where a channel fits, finds all of it there.
// The first walk reads several planes side by side: they lie far apart, and the processor fetches ahead in each of
// them. Where nothing is summed, the planes are walked in the order of memory. Where channels are few, each is split
// into spans that different threads take, and the walks become two parallel loops. The split depends on the shape
// alone, so the result does not depend on the number of threads.
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

template <int kCount>
struct Together {
  static constexpr int count = kCount;
};

// Calls f(pieces, together) for all pieces that are wanted: with kCount whole planes where there are as many left.
template <int kCount, class Wanted, class F>
FL_INLINE void for_each_group(Span span, std::int64_t spatial, Wanted&& wanted, F&& f) {
  Piece group[kCount];
  int found = 0;
  const auto one_by_one = [&] {
    for (int i = 0; i < found; ++i) f(group + i, Together<1>{});
    found = 0;
  };
  for_each_piece(span, spatial, Walk::forward, [&](Piece p) {
    if (!wanted(p)) return;
    group[found++] = p;
    if (p.length != spatial) {
      one_by_one();
    } else if (found == kCount) {
      f(group, Together<kCount>{});
      found = 0;
    }
  });
  one_by_one();
}

// Within its plane a span starts at a multiple of this, so that no two spans share a byte of a bit mask.
inline constexpr std::int64_t kSpanBoundary = 64;

// How the channels of a tensor are shared out: `spans` spans each.
struct PlaneSplit {
  std::int64_t per_channel, spans, length;

  explicit PlaneSplit(const Geometry& g)
      : per_channel(g.batch * g.spatial), channels_(g.channels), spatial_(g.spatial) {
    constexpr std::int64_t kEnoughTasks = 16;
    spans = g.channels < kEnoughTasks ? (2 * kEnoughTasks + g.channels - 1) / g.channels : 1;
    const std::int64_t most = per_channel / kElementsPerThread;
    if (spans > most) spans = most > 1 ? most : 1;
    length = (per_channel + spans - 1) / spans;
  }

  Span span(std::int64_t i) const { return {boundary(i), boundary(i + 1)}; }

  // Calls f(i, channel, span) for the spans of all channels.
  void each_span(ParallelFor parallel_for, const auto& f) const {
    parallel_each(parallel_for, channels_ * spans, length, [&](std::int64_t i) { f(i, i / spans, span(i % spans)); });
  }

  // Calls f(channel, piece) for all planes, whole or in parts, in the order of memory as far as may be.
  void each_plane(ParallelFor parallel_for, const auto& f) const {
    if (spans > 1) {
      each_span(parallel_for, [&](std::int64_t, std::int64_t c, Span span) {
        for_each_piece(span, spatial_, Walk::forward, [&](Piece p) { f(c, p); });
      });
      return;
    }
    parallel_each(parallel_for, per_channel / spatial_ * channels_, spatial_,
                  [&](std::int64_t plane) { f(plane % channels_, Piece{plane / channels_, 0, spatial_}); });
  }

 private:
  std::int64_t boundary(std::int64_t i) const {
    const std::int64_t position = i * length < per_channel ? i * length : per_channel;
    const std::int64_t offset = position % spatial_;
    return position - offset % kSpanBoundary;
  }

  std::int64_t channels_, spatial_;
};

FL_INLINE std::int64_t smaller(std::int64_t a, std::int64_t b) {
  return a < b ? a : b;
}

template <class T>
FL_INLINE const T* piece_start(const Source& x, Piece p, std::int64_t channel) {
  return advance(static_cast<const T*>(x.data), p.n * x.outer + channel * x.inner + p.offset);
}
template <class T>
FL_INLINE T* piece_start(const Target& x, Piece p, std::int64_t channel) {
  return advance(static_cast<T*>(x.data), p.n * x.outer + channel * x.inner + p.offset);
}

inline constexpr int kPlanesTogether = 4, kBackwardTogether = 2;

// Elements that one vector of sums takes before it is merged in double; a longer piece is cut.
inline constexpr std::int64_t kChunk = kFloatAdditions * kLanes;
// Gradients' sums cancel more, and carrying them over costs little.
inline constexpr std::int64_t kBackwardChunk = kChunk / 2;

// Sums of (x - shift) and its square over pieces of a channel, in vectors of A: float, or double where float overflows.
template <class T, class A>
class ShiftedSums {
 public:
  FL_INLINE explicit ShiftedSums(double shift) { reset(shift); }

  FL_INLINE void reset(double shift) {
    shift_ = static_cast<A>(shift);
    count_ = 0;
    for (Pair& pair : pairs_) pair = {};
  }

  // Adds n elements from x on, in as many stretches as there are vectors of sums.
  FL_INLINE void add(const T* x, std::int64_t n) {
    const std::int64_t stretch = n / (kPlanesTogether * kLanes) * kLanes;
    const T* starts[kPlanesTogether];
    for (int u = 0; u < kPlanesTogether; ++u) starts[u] = x + u * stretch;
    add(starts, stretch, Together<kPlanesTogether>{});
    const T* rest = x + kPlanesTogether * stretch;
    add(&rest, n - kPlanesTogether * stretch, Together<1>{});
  }

  // Adds n elements from each of the kCount pointers on.
  template <int kCount>
  FL_INLINE void add(const T* const* x, std::int64_t n, Together<kCount>) {
    Pair pairs[kCount];  // in registers, where members are not
    for (int u = 0; u < kCount; ++u) pairs[u] = pairs_[u];
    for_each_vector(n, [&](std::int64_t i, auto lanes) {
      for (int u = 0; u < kCount; ++u) {
        const Vec<A> d = covered<A>(convert<Vec<A>>(load(x[u] + i, lanes)) - shift_, lanes);
        pairs[u].sum += d;
        pairs[u].square += d * d;
      }
    });
    for (int u = 0; u < kCount; ++u) pairs_[u] = pairs[u];
    count_ += n * kCount;
  }

  FL_INLINE std::int64_t count() const { return count_; }

  FL_INLINE Moments moments() const {
    Vec<A> sum{}, square{};
    for (const Pair& pair : pairs_) sum += pair.sum, square += pair.square;
    return Moments::from_shifted(static_cast<double>(count_), static_cast<double>(shift_), sum_of_lanes<A>(sum),
                                 sum_of_lanes<A>(square));
  }

 private:
  struct Pair {
    Vec<A> sum{}, square{};
  };

  A shift_;
  std::int64_t count_;
  Pair pairs_[kPlanesTogether];
};

template <class T>
double mean_of(const T* x, std::int64_t n) {
  Vec<Compute<T>> sum{};
  for_each_vector(n, [&](std::int64_t i, auto lanes) { sum += load(x + i, lanes); });
  return sum_of_lanes<Compute<T>>(sum) / static_cast<double>(n);
}

// Moments of part of a channel in one pass. Each chunk is shifted by the mean of all before it: if that is far from the
// chunk's own mean, the total variance is large too, so what cancels does not matter, as long as a chunk has not many
// times the elements of all before it. The first chunk is shifted by the mean of its first elements.
template <class T, class A>
class PlaneMoments {
 public:
  // Adds `length` elements from each of the pointers on, which may change.
  template <int kCount>
  FL_INLINE void add(const T** from, std::int64_t length, Together<kCount> together) {
    if (chunk_ == 0) {
      chunk_ = kFirst;
      sums_.reset(mean_of(from[0], smaller(length, kFirst)));
    }
    for (std::int64_t left = length; left > 0;) {
      const std::int64_t room = (chunk_ - sums_.count() + kCount - 1) / kCount, n = smaller(left, room);
      if constexpr (kCount == 1)
        sums_.add(from[0], n);
      else
        sums_.add(from, n, together);
      for (int u = 0; u < kCount; ++u) from[u] += n;
      left -= n;
      if (sums_.count() < chunk_) break;
      total_.merge(sums_.moments());
      sums_.reset(total_.mean);
      chunk_ = smaller(chunk_ * kGrowth, kMost);
    }
  }

  Moments finish() {
    if (sums_.count() > 0) total_.merge(sums_.moments());
    return total_;
  }

 private:
  static constexpr std::int64_t kFirst = 4 * kLanes, kGrowth = 8, kMost = kPlanesTogether * kChunk;

  Moments total_;
  ShiftedSums<T, A> sums_{0};
  std::int64_t chunk_ = 0;  // how many elements are summed before the next merge
};

template <class T, class A>
__attribute__((noinline)) Moments plane_moments(const Source& x, std::int64_t channel, Span span,
                                                std::int64_t spatial) {
  PlaneMoments<T, A> moments;
  const auto all = [](Piece) { return true; };
  for_each_group<kPlanesTogether>(span, spatial, all, [&](const Piece* pieces, auto together) {
    const T* from[together.count];
    for (int u = 0; u < together.count; ++u) from[u] = piece_start<T>(x, pieces[u], channel);
    moments.add(from, pieces[0].length, together);
  });
  return moments.finish();
}

// The same without a shift: only good for telling how infinities and NaN come out.
template <class T>
Moments plane_moments_of_non_finite(const Source& x, std::int64_t channel, Span span, std::int64_t spatial) {
  ShiftedSums<T, double> sums(0);
  for_each_piece(span, spatial, Walk::forward, [&](Piece p) { sums.add(piece_start<T>(x, p, channel), p.length); });
  return sums.moments();
}

// `m`, what Compute<T> gives for these elements of the input, or the same by other means where that is too small for
// it.
template <class T>
Moments checked_moments(Moments m, const ForwardArgs& args, std::int64_t channel, Span span) {
  const Source& x = args.input;
  const std::int64_t spatial = args.geometry.spatial;
  if (std::isfinite(m.squares) && is_above_underflow<T>(m, args.eps)) return m;
  // Squares beyond the range of float, or something that is not finite in x: double tells which.
  if constexpr (sizeof(Compute<T>) < sizeof(double)) m = plane_moments<T, double>(x, channel, span, spatial);
  return std::isfinite(m.squares) ? m : plane_moments_of_non_finite<T>(x, channel, span, spatial);
}

template <class T>
Moments plane_moments(const ForwardArgs& args, std::int64_t channel, Span span) {
  const Moments m = plane_moments<T, Compute<T>>(args.input, channel, span, args.geometry.spatial);
  return checked_moments<T>(m, args, channel, span);
}

// All of a channel's statistics, from its only span.
template <class T>
void statistics_of_channel(const ForwardArgs& args, std::int64_t c, Span whole) {
  finish_statistics(args, c, c + 1, [&](std::int64_t) { return plane_moments<T>(args, c, whole); });
}

template <class T>
void statistics_of_spans(const ForwardArgs& args, const PlaneSplit& split) {
  const std::int64_t channels = args.geometry.channels;
  Scratch<Moments> parts(channels * split.spans);
  split.each_span(args.parallel_for,
                  [&](std::int64_t i, std::int64_t c, Span s) { parts[i] = plane_moments<T>(args, c, s); });
  finish_statistics(args, 0, channels, [&](std::int64_t c) {
    Moments total;
    for (std::int64_t s = 0; s < split.spans; ++s) total.merge(parts[c * split.spans + s]);
    return total;
  });
}

// Where a piece's masks are, and what dropout does with it.
struct PieceMasks {
  std::int64_t bits;
  bool dropped;
  const std::uint8_t* keep_bits;

  PieceMasks() = default;
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

template <class S>
FL_INLINE Affine<Vec<S>> splat_affine(const ChannelAffine<S>& k) {
  return {splat<Vec<S>>(k.mean), splat<Vec<S>>(k.scale), splat<Vec<S>>(k.shift)};
}

template <class S, class Args>
Affine<Vec<S>> plane_affine(const Args& args, std::int64_t c) {
  return splat_affine<S>(channel_affine<S>(args, c));
}

template <class T, class Act>
class PlanesForward {
  using S = Compute<T>;

 public:
  PlanesForward(const ForwardArgs& args, Act activation)
      : args_(args),
        split_(args.geometry),
        fused_{activation, splat<Vec<S>>(args.keep.scale),
               worth_streaming<T>(args.geometry, args.output, args.output.inner)} {}

  void run() const {
    if (!args_.training) {
      write_in_order();
    } else if (split_.spans == 1) {
      split_.each_span(args_.parallel_for, [&](std::int64_t, std::int64_t c, Span whole) {
        statistics_of_channel<T>(args_, c, whole);
        write(c, whole);
      });
    } else {
      statistics_of_spans<T>(args_, split_);
      split_.each_span(args_.parallel_for, [&](std::int64_t, std::int64_t c, Span s) { write(c, s); });
    }
  }

 private:
  std::int64_t spatial() const { return args_.geometry.spatial; }

  // With the statistics known, nothing keeps a channel's planes together.
  void write_in_order() const {
    Scratch<ChannelAffine<S>> affines(args_.geometry.channels);
    for (std::int64_t c = 0; c < args_.geometry.channels; ++c) affines[c] = channel_affine<S>(args_, c);
    split_.each_plane(args_.parallel_for,
                      [&](std::int64_t c, Piece p) { write_piece(c, p, splat_affine<S>(affines[c])); });
  }

  void write(std::int64_t c, Span span) const {
    const Affine<Vec<S>> k = plane_affine<S>(args_, c);
    for_each_piece(span, spatial(), Walk::reverse, [&](Piece p) { write_piece(c, p, k); });
  }

  FL_INLINE void write_piece(std::int64_t c, Piece p, const Affine<Vec<S>>& k) const {
    const PieceMasks masks(args_.geometry, args_.keep, p, c);
    T* output = piece_start<T>(args_.output, p, c);
    if (masks.dropped) {
      for_each_vector(p.length, [&](std::int64_t i, auto lanes) { fused_.put(output + i, Vec<S>{}, lanes); });
      if (args_.flat_bits) std::memset(args_.flat_bits + masks.bits, 0, static_cast<std::size_t>(p.length + 7) / 8);
      return;
    }
    const ForwardRun<T> run{piece_start<T>(args_.input, p, c), piece_start<T>(args_.residual, p, c), output,
                            advance(args_.flat_bits, masks.bits)};
    for_each_vector(p.length,
                    [&](std::int64_t i, auto lanes) { fused_.forward(run, i, k, masks.kept<S>(i, lanes), lanes); });
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
      : args_(args),
        split_(args.geometry),
        fused_{activation, splat<V>(args.keep.scale),
               worth_streaming<T>(args.geometry, args.grad_input, args.grad_input.inner) &&
                   worth_streaming<T>(args.geometry, args.grad_residual, args.grad_residual.inner)},
        prefetching_(worth_prefetching<T>(args.geometry) &&
                     args.geometry.spatial * static_cast<std::int64_t>(sizeof(T)) <= kLongPlane) {}

  void run() const {
    if (!needs_sums(args_)) {
      split_.each_span(args_.parallel_for, [&](std::int64_t, std::int64_t c, Span s) { write(c, s, {}); });
    } else if (split_.spans == 1) {
      split_.each_span(args_.parallel_for, [&](std::int64_t, std::int64_t c, Span whole) {
        write(c, whole, finish_sums<T>(args_, c, sums(c, whole)));
      });
    } else {
      Scratch<InputGradient> coefficients(args_.geometry.channels);
      sums_of_spans(coefficients.data());
      split_.each_span(args_.parallel_for, [&](std::int64_t, std::int64_t c, Span s) { write(c, s, coefficients[c]); });
    }
  }

 private:
  void sums_of_spans(InputGradient* coefficients) const {
    const std::int64_t channels = args_.geometry.channels;
    Scratch<GradientSums> parts(channels * split_.spans);
    split_.each_span(args_.parallel_for, [&](std::int64_t i, std::int64_t c, Span s) { parts[i] = sums(c, s); });
    for (std::int64_t c = 0; c < channels; ++c)
      coefficients[c] = finish_sums<T>(args_, c, parts.data() + c * split_.spans, split_.spans, 1);
  }

  std::int64_t spatial() const { return args_.geometry.spatial; }

  BackwardRun<T> run_at(Piece p, std::int64_t c, const PieceMasks& masks) const {
    return {piece_start<T>(args_.grad_output, p, c), piece_start<T>(args_.input, p, c),
            piece_start<T>(args_.residual, p, c), advance(args_.flat_bits, masks.bits)};
  }

  GradientSums sums(std::int64_t c, Span span) const {
    ChannelSums s{plane_affine<S>(args_, c)};
    const auto kept = [&](Piece p) { return !PieceMasks(args_.geometry, args_.keep, p, c).dropped; };
    for_each_group<kBackwardTogether>(span, spatial(), kept, [&](const Piece* pieces, auto together) {
      constexpr int kCount = decltype(together)::count;
      PieceMasks masks[kCount];
      BackwardRun<T> runs[kCount];
      for (int u = 0; u < kCount; ++u) {
        masks[u] = PieceMasks(args_.geometry, args_.keep, pieces[u], c);
        runs[u] = run_at(pieces[u], c, masks[u]);
      }
      for (std::int64_t begin = 0; begin < pieces[0].length; begin += kBackwardChunk)
        add(runs, masks, begin, smaller(begin + kBackwardChunk, pieces[0].length), together, s);
    });
    return s.total();
  }

  // Both sums of one channel, carried over from S to double as they grow.
  struct ChannelSums {
    Affine<V> affine;
    Vec<double> total_grad{}, total_grad_deviation{};
    std::int64_t summed = 0;  // at most, by one vector
    V grad[kBackwardTogether]{}, grad_deviation[kBackwardTogether]{};

    FL_INLINE void carry() {
      for (int u = 0; u < kBackwardTogether; ++u) {
        total_grad += convert<Vec<double>>(grad[u]);
        total_grad_deviation += convert<Vec<double>>(grad_deviation[u]);
        grad[u] = grad_deviation[u] = V{};
      }
      summed = 0;
    }

    GradientSums total() {
      carry();
      return {sum_of_lanes<double>(total_grad), sum_of_lanes<double>(total_grad_deviation)};
    }
  };

  template <int kCount>
  FL_INLINE void add(const BackwardRun<T>* runs, const PieceMasks* masks, std::int64_t begin, std::int64_t end,
                     Together<kCount>, ChannelSums& s) const {
    V grad[kCount], grad_deviation[kCount];  // in registers, where members are not
    for (int u = 0; u < kCount; ++u) grad[u] = s.grad[u], grad_deviation[u] = s.grad_deviation[u];
    const std::int64_t next_input = kCount * args_.input.outer, next_grad = kCount * args_.grad_output.outer;
    const bool prefetching = prefetching_;
    for_each_vector(end - begin, [&](std::int64_t j, auto lanes) {
      const std::int64_t i = begin + j;
      for (int u = 0; u < kCount; ++u) {
        if (prefetching) {
          prefetch(runs[u].input + i + next_input);
          prefetch(runs[u].grad_output + i + next_grad);
        }
        fused_.add_gradient(runs[u], i, s.affine, masks[u].template kept<S>(i, lanes), lanes, grad[u],
                            grad_deviation[u]);
      }
    });
    for (int u = 0; u < kCount; ++u) s.grad[u] = grad[u], s.grad_deviation[u] = grad_deviation[u];
    s.summed += end - begin;
    if (s.summed >= kBackwardChunk) s.carry();
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
      // Dropped planes were not read for the sums: the next one may be one of them.
      const std::int64_t next = prefetching_ && args_.keep.planes ? args_.input.outer : 0;
      for_each_vector(p.length, [&](std::int64_t i, auto lanes) {
        if (next) prefetch(run.input + i - next);
        const V x = load(run.input + i, lanes);
        // A dropped plane's gradient is zero, so its grad_output is never read.
        const V g = masks.dropped ? V{} : fused_.backward(run, i, x, k, masks.kept<S>(i, lanes), lanes);
        if (grad_input)
          fused_.put(grad_input + i,
                     args_.training ? input_gradient(g, x, k.mean, k.scale, by_deviation, constant) : g * k.scale,
                     lanes);
        if (grad_residual) fused_.put(grad_residual + i, g, lanes);
      });
    });
  }

  // Bytes from which on the processor itself fetches enough of a plane ahead.
  static constexpr std::int64_t kLongPlane = 8 * 1024;

  const BackwardArgs& args_;
  PlaneSplit split_;
  FusedElements<T, Act> fused_;
  bool prefetching_;
};

template <class T>
void dropout_planes(const DropoutArgs& args) {
  using S = Compute<T>;
  const Geometry& g = args.geometry;
  const PlaneSplit split(g);
  const Vec<S> scale = splat<Vec<S>>(args.keep.scale);
  split.each_plane(args.parallel_for, [&](std::int64_t c, Piece p) {
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
}

}  // namespace FASTLAYERS_ISA
}  // namespace fastlayers
