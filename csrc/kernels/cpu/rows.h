// Kernels for tensors made of rows: the channels of one sample and position are adjacent.
//
// A tile of rows is swept row by row with the sums of all its channels beside it in the first-level cache. Large
// tensors are cut into tiles of rows, whose sums are merged between two parallel loops; the second loop walks each tile
// in reverse, starting with what is still in cache. Small ones are cut by channels only, so that a thread finishes its
// channels alone and in cache. The cut depends on the shape alone, so the result does not depend on the number of
// threads.
#pragma once

#include "planes.h"

namespace fastlayers {
inline namespace FASTLAYERS_ISA {

// Channels whose sums a thread keeps at hand; also the widest block of channels that is one task.
inline constexpr std::int64_t kBlockChannels = 512;

// Rows [begin, end) and channels [channel, channel + channels).
struct Tile {
  std::int64_t begin, end, channel, channels;
};

struct RowSplit {
  std::int64_t tiles, rows_each, blocks, channels_each;

  explicit RowSplit(const Geometry& g) : rows_(g.row_count()), channels_(g.channels) {
    constexpr std::int64_t kElementsPerTile = 64 * 1024, kMostTiles = 64, kNarrowest = 64;
    channels_each = channels_ < kBlockChannels ? channels_ : kBlockChannels;
    tiles = rows_ * channels_each / kElementsPerTile;
    if (tiles > kMostTiles) tiles = kMostTiles;
    if (tiles <= 1) {
      tiles = 1;
      // Nothing to merge: narrow blocks give every thread something to do.
      while (channels_each > kNarrowest && rows_ * channels_each > kElementsPerThread)
        channels_each = (channels_each / 2 + kNarrowest - 1) / kNarrowest * kNarrowest;
    }
    rows_each = (rows_ + tiles - 1) / tiles;
    tiles = (rows_ + rows_each - 1) / rows_each;
    blocks = (channels_ + channels_each - 1) / channels_each;
  }

  std::int64_t tasks() const { return tiles * blocks; }
  std::int64_t elements_each() const { return rows_each * channels_each; }

  Tile tile(std::int64_t task) const {
    const std::int64_t begin = task / blocks * rows_each, channel = task % blocks * channels_each;
    const std::int64_t end = begin + rows_each;
    return {begin, end < rows_ ? end : rows_, channel,
            channels_ - channel < channels_each ? channels_ - channel : channels_each};
  }

 private:
  std::int64_t rows_, channels_;
};

// One value per channel of a tile, with room for whole vectors.
template <class E>
using ChannelArray = Vec<E>[kBlockChannels / kLanes];

// mean, scale and shift of a tile's channels.
template <class S>
class RowAffine {
 public:
  template <class Args>
  RowAffine(const Args& args, const Tile& t) {
    for (std::int64_t i = 0; i < t.channels; ++i) {
      const ChannelAffine<S> k = channel_affine<S>(args, t.channel + i);
      mean_[i] = k.mean;
      scale_[i] = k.scale;
      shift_[i] = k.shift;
    }
    for (std::int64_t i = t.channels; i % kLanes != 0; ++i) mean_[i] = scale_[i] = shift_[i] = 0;
  }

  FL_INLINE Affine<Vec<S>> at(std::int64_t i) const {
    return {load(mean_ + i, AllLanes{}), load(scale_ + i, AllLanes{}), load(shift_ + i, AllLanes{})};
  }

 private:
  alignas(64) S mean_[kBlockChannels], scale_[kBlockChannels], shift_[kBlockChannels];
};

template <class T>
FL_INLINE const T* row_start(const Source& x, std::int64_t row, std::int64_t channel) {
  return advance(static_cast<const T*>(x.data), row * x.outer + channel);
}
template <class T>
FL_INLINE T* row_start(const Target& x, std::int64_t row, std::int64_t channel) {
  return advance(static_cast<T*>(x.data), row * x.outer + channel);
}

// Where the masks of a row's channels, from `channel` on, are.
struct RowMasks {
  std::int64_t bits;
  const std::uint8_t *keep_bits, *keep_channels;

  RowMasks() = default;
  RowMasks(const Geometry& g, const Keep& keep, std::int64_t row, std::int64_t channel) {
    bits = row * g.mask_stride() + channel / 8;
    keep_bits = advance(keep.bits, bits);
    keep_channels = keep.planes ? keep.planes + row / g.spatial * g.channels + channel : nullptr;
  }

  template <class S, class Lanes>
  FL_INLINE Mask<S> kept(std::int64_t i, Lanes lanes) const {
    if (keep_channels) return load_mask_bytes<S>(keep_channels + i, lanes);
    return keep_bits ? load_mask_bits<S>(keep_bits + i / 8, lanes) : all_kept<S>();
  }
};

// The moments of each channel of a tile.
struct TileMoments {
  double count = 0;
  ChannelArray<double> mean, squares;

  std::int64_t vectors;

  explicit TileMoments(const Tile& t) : vectors((t.channels + kLanes - 1) / kLanes) {
    for (std::int64_t v = 0; v < vectors; ++v) mean[v] = squares[v] = Vec<double>{};
  }

  Moments at(std::int64_t i) const { return {count, mean[i / kLanes][i % kLanes], squares[i / kLanes][i % kLanes]}; }

  bool is_finite() const {
    Vec<double> zero{};  // x - x is 0 for a finite x and NaN for others
    for (std::int64_t v = 0; v < vectors; ++v) zero += squares[v] - squares[v];
    return std::isfinite(sum_of_lanes<double>(zero));
  }
};

// Sums of (x - shift) and its square for each channel of a tile, in vectors of A: float, or double where float
// overflows.
template <class T, class A>
class RowSums {
 public:
  RowSums(const Source& x, const Tile& tile) : x_(x), tile_(tile) {}

  void reset(const TileMoments& around) {
    count_ = 0;
    for (std::int64_t v = 0; v * kLanes < tile_.channels; ++v) {
      shift_[v] = convert<Vec<A>>(around.mean[v]);
      sum_[v] = square_[v] = Vec<A>{};
    }
  }

  void add(std::int64_t begin, std::int64_t end) {
    std::int64_t row = begin;
    for (; row + kRowsAtOnce <= end; row += kRowsAtOnce) add_rows<kRowsAtOnce>(row);
    for (; row < end; ++row) add_rows<1>(row);
    count_ += end - begin;
  }

  void merge_into(TileMoments& total) const {
    using D = Vec<double>;
    const auto count = static_cast<double>(count_);
    BasicMoments<D> merged;
    for (std::int64_t v = 0; v * kLanes < tile_.channels; ++v) {
      merged = {total.count, total.mean[v], total.squares[v]};
      merged.merge(
          BasicMoments<D>::from_shifted(count, convert<D>(shift_[v]), convert<D>(sum_[v]), convert<D>(square_[v])));
      total.mean[v] = merged.mean;
      total.squares[v] = merged.squares;
    }
    total.count += count;
  }

 private:
  static constexpr int kRowsAtOnce = 8;

  template <int kRows>
  FL_INLINE void add_rows(std::int64_t row) {
    const T* x = row_start<T>(x_, row, tile_.channel);
    for_each_vector(tile_.channels, [&](std::int64_t i, auto lanes) {
      Vec<A> sum = sum_[i / kLanes], square = square_[i / kLanes];
      const Vec<A> shift = shift_[i / kLanes];
      for (int r = 0; r < kRows; ++r) {
        const Vec<A> d = convert<Vec<A>>(load(x + r * x_.outer + i, lanes)) - shift;
        sum += d;
        square += d * d;
      }
      sum_[i / kLanes] = sum;
      square_[i / kLanes] = square;
    });
  }

  Source x_;
  Tile tile_;
  std::int64_t count_ = 0;
  ChannelArray<A> shift_, sum_, square_;
};

FL_INLINE std::int64_t smaller(std::int64_t a, std::int64_t b) {
  return a < b ? a : b;
}

// As plane_moments: one pass, each chunk shifted by the mean of all rows before it, the first by its own.
template <class T, class A>
__attribute__((noinline)) TileMoments tile_moments(const Source& x, const Tile& tile) {
  RowSums<T, A> sums(x, tile);
  TileMoments total(tile), first(tile);
  std::int64_t chunk = smaller(8, tile.end - tile.begin);
  sums.reset(first);
  sums.add(tile.begin, tile.begin + chunk);
  sums.merge_into(first);
  sums.reset(first);
  for (std::int64_t row = tile.begin; row < tile.end; row += chunk) {
    if (row > tile.begin) chunk = smaller(smaller(row - tile.begin, kFloatAdditions), tile.end - row);
    sums.add(row, row + chunk);
    sums.merge_into(total);
    sums.reset(total);
  }
  return total;
}

// As plane_moments_of_non_finite.
template <class T>
TileMoments tile_moments_of_non_finite(const Source& x, const Tile& tile) {
  RowSums<T, double> sums(x, tile);
  TileMoments total(tile);
  sums.reset(total);
  sums.add(tile.begin, tile.end);
  sums.merge_into(total);
  return total;
}

template <class T>
TileMoments tile_moments(const Source& x, const Tile& tile) {
  TileMoments m = tile_moments<T, Compute<T>>(x, tile);
  if (m.is_finite()) return m;
  // Squares beyond the range of float, or something that is not finite in x: double tells which.
  if constexpr (sizeof(Compute<T>) < sizeof(double)) m = tile_moments<T, double>(x, tile);
  return m.is_finite() ? m : tile_moments_of_non_finite<T>(x, tile);
}

template <class T, class Act>
class RowsForward {
  using S = Compute<T>;

 public:
  RowsForward(const ForwardArgs& args, Act activation)
      : args_(args), split_(args.geometry), fused_{activation, splat<Vec<S>>(args.keep.scale)} {}

  void run() const {
    if (!args_.training) {
      each_tile([&](std::int64_t, const Tile& t) { write(t); });
    } else if (split_.tiles == 1) {
      each_tile([&](std::int64_t, const Tile& t) {
        const TileMoments m = tile_moments<T>(args_.input, t);
        for (std::int64_t i = 0; i < t.channels; ++i) finish_statistics(args_, t.channel + i, m.at(i));
        write(t);
      });
    } else {
      statistics_of_tiles();
      each_tile([&](std::int64_t, const Tile& t) { write(t); });
    }
  }

 private:
  template <class F>
  void each_tile(const F& f) const {
    parallel_each(args_.parallel_for, split_.tasks(), split_.elements_each(),
                  [&](std::int64_t task) { f(task, split_.tile(task)); });
  }

  void statistics_of_tiles() const {
    const std::int64_t channels = args_.geometry.channels;
    Scratch<Moments> parts(split_.tiles * channels);
    each_tile([&](std::int64_t task, const Tile& t) {
      const TileMoments m = tile_moments<T>(args_.input, t);
      Moments* to = parts.data() + task / split_.blocks * channels + t.channel;
      for (std::int64_t i = 0; i < t.channels; ++i) to[i] = m.at(i);
    });
    parallel_each(args_.parallel_for, channels, 16 * split_.tiles, [&](std::int64_t c) {
      Moments total;
      for (std::int64_t tile = 0; tile < split_.tiles; ++tile) total.merge(parts[tile * channels + c]);
      finish_statistics(args_, c, total);
    });
  }

  void write(const Tile& t) const {
    const RowAffine<S> k(args_, t);
    for (std::int64_t row = t.end - 1; row >= t.begin; --row) {
      const RowMasks masks(args_.geometry, args_.keep, row, t.channel);
      const ForwardRun<T> run{row_start<T>(args_.input, row, t.channel), row_start<T>(args_.residual, row, t.channel),
                              row_start<T>(args_.output, row, t.channel), advance(args_.flat_bits, masks.bits)};
      for_each_vector_in_reverse(t.channels, [&](std::int64_t i, auto lanes) {
        fused_.forward(run, i, k.at(i), masks.kept<S>(i, lanes), lanes);
      });
    }
  }

  const ForwardArgs& args_;
  RowSplit split_;
  FusedElements<T, Act> fused_;
};

// Both sums of each channel of a tile, carried over from float to double as they grow.
template <class S>
struct TileGradientSums {
  ChannelArray<S> grad, grad_deviation;
  ChannelArray<double> total_grad, total_grad_deviation;
  std::int64_t vectors;

  explicit TileGradientSums(const Tile& t) : vectors((t.channels + kLanes - 1) / kLanes) {
    for (std::int64_t v = 0; v < vectors; ++v) {
      grad[v] = grad_deviation[v] = Vec<S>{};
      total_grad[v] = total_grad_deviation[v] = Vec<double>{};
    }
  }

  void carry() {
    for (std::int64_t v = 0; v < vectors; ++v) {
      total_grad[v] += convert<Vec<double>>(grad[v]);
      total_grad_deviation[v] += convert<Vec<double>>(grad_deviation[v]);
      grad[v] = grad_deviation[v] = Vec<S>{};
    }
  }

  GradientSums at(std::int64_t i) const {
    return {total_grad[i / kLanes][i % kLanes], total_grad_deviation[i / kLanes][i % kLanes]};
  }
};

template <class T, class Act>
class RowsBackward {
  using S = Compute<T>;
  using V = Vec<S>;

 public:
  RowsBackward(const BackwardArgs& args, Act activation)
      : args_(args), split_(args.geometry), fused_{activation, splat<V>(args.keep.scale)} {}

  void run() const {
    const std::int64_t channels = args_.geometry.channels;
    // Coefficients of the input gradient, as two arrays so that they load as vectors.
    Scratch<S> by_deviation(channels), constant(channels);
    const auto finish = [&](std::int64_t c, const GradientSums& total) {
      const InputGradient g = finish_sums<S>(args_, c, total);
      by_deviation[c] = static_cast<S>(g.by_deviation);
      constant[c] = static_cast<S>(g.constant);
    };
    if (!needs_sums(args_)) {
      each_tile([&](std::int64_t, const Tile& t) { write(t, nullptr, nullptr); });
    } else if (split_.tiles == 1) {
      each_tile([&](std::int64_t, const Tile& t) {
        const TileGradientSums<S> s = sums(t);
        for (std::int64_t i = 0; i < t.channels; ++i) finish(t.channel + i, s.at(i));
        write(t, by_deviation.data(), constant.data());
      });
    } else {
      Scratch<GradientSums> parts(split_.tiles * channels);
      each_tile([&](std::int64_t task, const Tile& t) {
        const TileGradientSums<S> s = sums(t);
        GradientSums* to = parts.data() + task / split_.blocks * channels + t.channel;
        for (std::int64_t i = 0; i < t.channels; ++i) to[i] = s.at(i);
      });
      parallel_each(args_.parallel_for, channels, 16 * split_.tiles, [&](std::int64_t c) {
        GradientSums total;
        for (std::int64_t tile = 0; tile < split_.tiles; ++tile) total.add(parts[tile * channels + c]);
        finish(c, total);
      });
      each_tile([&](std::int64_t, const Tile& t) { write(t, by_deviation.data(), constant.data()); });
    }
  }

 private:
  static constexpr std::int64_t kRowsAtOnce = 4;

  template <class F>
  void each_tile(const F& f) const {
    parallel_each(args_.parallel_for, split_.tasks(), split_.elements_each(),
                  [&](std::int64_t task) { f(task, split_.tile(task)); });
  }

  BackwardRun<T> run_at(std::int64_t row, const Tile& t, const RowMasks& masks) const {
    return {row_start<T>(args_.grad_output, row, t.channel), row_start<T>(args_.input, row, t.channel),
            row_start<T>(args_.residual, row, t.channel), advance(args_.flat_bits, masks.bits)};
  }

  __attribute__((noinline)) TileGradientSums<S> sums(const Tile& t) const {
    const RowAffine<S> k(args_, t);
    TileGradientSums<S> s(t);
    std::int64_t since_carry = 0;
    for (std::int64_t row = t.begin; row < t.end; row += kRowsAtOnce) {
      const std::int64_t rows = smaller(kRowsAtOnce, t.end - row);
      add_rows(row, rows, t, k, s);
      since_carry += rows;
      if (since_carry >= kFloatAdditions || row + rows == t.end) {
        s.carry();
        since_carry = 0;
      }
    }
    return s;
  }

  void add_rows(std::int64_t row, std::int64_t rows, const Tile& t, const RowAffine<S>& k,
                TileGradientSums<S>& s) const {
    RowMasks masks[kRowsAtOnce];
    BackwardRun<T> runs[kRowsAtOnce];
    for (std::int64_t r = 0; r < rows; ++r) {
      masks[r] = RowMasks(args_.geometry, args_.keep, row + r, t.channel);
      runs[r] = run_at(row + r, t, masks[r]);
    }
    for_each_vector(t.channels, [&](std::int64_t i, auto lanes) {
      const Affine<V> affine = k.at(i);
      V grad = s.grad[i / kLanes], grad_deviation = s.grad_deviation[i / kLanes];
// Unrolled, this loop would be half of the whole library.
#pragma GCC unroll 1
      for (std::int64_t r = 0; r < rows; ++r) {
        const V x = load(runs[r].input + i, lanes);
        const V g =
            covered<S>(fused_.backward(runs[r], i, x, affine, masks[r].template kept<S>(i, lanes), lanes), lanes);
        grad += g;
        grad_deviation += g * (x - affine.mean);
      }
      s.grad[i / kLanes] = grad;
      s.grad_deviation[i / kLanes] = grad_deviation;
    });
  }

  // The coefficients are null in evaluation mode, where the input gradient needs none.
  void write(const Tile& t, const S* by_deviation, const S* constant) const {
    if (!args_.grad_input.data && !args_.grad_residual.data) return;
    const RowAffine<S> k(args_, t);
    for (std::int64_t row = t.end - 1; row >= t.begin; --row) {
      const RowMasks masks(args_.geometry, args_.keep, row, t.channel);
      const BackwardRun<T> run = run_at(row, t, masks);
      T* grad_input = row_start<T>(args_.grad_input, row, t.channel);
      T* grad_residual = row_start<T>(args_.grad_residual, row, t.channel);
      for_each_vector_in_reverse(t.channels, [&](std::int64_t i, auto lanes) {
        const Affine<V> affine = k.at(i);
        const V x = load(run.input + i, lanes);
        const V g = fused_.backward(run, i, x, affine, masks.kept<S>(i, lanes), lanes);
        if (grad_input) {
          const V gx = args_.training
                           ? input_gradient(g, x, affine.mean, affine.scale, load(by_deviation + t.channel + i, lanes),
                                            load(constant + t.channel + i, lanes))
                           : g * affine.scale;
          store(grad_input + i, gx, lanes);
        }
        if (grad_residual) store(grad_residual + i, g, lanes);
      });
    }
  }

  const BackwardArgs& args_;
  RowSplit split_;
  FusedElements<T, Act> fused_;
};

template <class T>
void dropout_rows(const DropoutArgs& args) {
  using S = Compute<T>;
  const Geometry& g = args.geometry;
  const Vec<S> scale = splat<Vec<S>>(args.keep.scale);
  parallel_each(args.parallel_for, g.row_count(), g.channels, [&](std::int64_t row) {
    const RowMasks masks(g, args.keep, row, 0);
    const T* input = row_start<T>(args.input, row, 0);
    T* output = row_start<T>(args.output, row, 0);
    for_each_vector(g.channels, [&](std::int64_t i, auto lanes) {
      store(output + i, masks.kept<S>(i, lanes) ? load(input + i, lanes) * scale : Vec<S>{}, lanes);
    });
  });
}

}  // namespace FASTLAYERS_ISA
}  // namespace fastlayers
