// Kernels for tensors whose runs hold all channels: channels_last and (N, C), and contiguous ones with small planes.
//
// A run is a row here, its elements are the columns, and each column belongs to a channel. A tile of rows is swept row
// by row with the sums of all its columns beside it in the first-level cache; then the sums of each channel's columns
// are put together. Large tensors are cut into tiles of rows, whose sums are merged between two parallel loops; the
// second loop walks back, starting with what is still in cache. Small ones, and contiguous ones with few samples, are
// cut by channels only, so that a thread finishes its channels alone and in cache. The cut depends on the shape alone,
// so the result does not depend on the number of threads.
#pragma once

#include "planes.h"

namespace fastlayers {
inline namespace FASTLAYERS_ISA {

// Columns whose sums a thread keeps at hand.
inline constexpr std::int64_t kBlockColumns = 1024;
static_assert(8 * Geometry::kSmallPlane <= kBlockColumns &&
              Geometry::kRowsPerRun * Geometry::kNarrowRow <= kBlockColumns);

// Rows [begin, end), channels [channel, channel + channels) and the columns that these have.
struct Tile {
  std::int64_t begin, end, channel, channels, column, columns;
};

// How a tensor is cut into tiles.
class RowSplit {
 public:
  std::int64_t tiles, blocks;

  static constexpr std::int64_t kMostTiles = 64;

  // `twice`: a walk for sums, then one back.
  RowSplit(const Geometry& g, bool twice, std::int64_t most_tiles = kMostTiles)
      : rows_(g.runs()),
        channels_(g.channels),
        positions_(g.positions_per_run()),
        whole_row_(g.rows && positions_ > 1) {
    constexpr std::int64_t kElementsPerTile = 64 * 1024, kNarrowest = 64;
    // A block starts at a multiple of 16 columns, so that its vectors are aligned where the row is, or at least at a
    // multiple of 8, so that no two blocks share a byte of a bit mask.
    const std::int64_t sixteen = 16 * positions_ <= kBlockColumns ? 16 : 8;
    const std::int64_t granule = whole_row_ ? channels_ : positions_ > 1 ? sixteen : kNarrowest;
    channels_each_ = whole_row_ ? channels_ : kBlockColumns / (granule * positions_) * granule;
    channels_each_ = smaller(channels_each_, channels_);
    tiles = smaller(rows_ * channels_each_ * positions_ / kElementsPerTile, most_tiles);
    if (twice && !g.rows && positions_ > 1 && fits_in_blocks()) {
      tiles = 1;
    } else if (tiles <= 1) {
      tiles = 1;
      // Nothing to merge: narrow blocks give every thread something to do.
      while (channels_each_ > granule && channels_each_ * positions_ > kNarrowest &&
             rows_ * channels_each_ * positions_ > kElementsPerThread)
        channels_each_ = (channels_each_ / 2 + granule - 1) / granule * granule;
    }
    rows_each_ = (rows_ + tiles - 1) / tiles;
    tiles = (rows_ + rows_each_ - 1) / rows_each_;
    blocks = (channels_ + channels_each_ - 1) / channels_each_;
  }

  std::int64_t tasks() const { return tiles * blocks; }
  // The column at which the second block starts, if there are several.
  std::int64_t part() const { return blocks > 1 ? channels_each_ * positions_ : 0; }
  std::int64_t columns_each() const { return channels_each_ * positions_; }
  std::int64_t elements_each() const { return rows_each_ * columns_each(); }

  Tile tile(std::int64_t task) const {
    const std::int64_t begin = task / blocks * rows_each_, channel = task % blocks * channels_each_;
    const std::int64_t channels = smaller(channels_ - channel, channels_each_);
    return {begin, smaller(begin + rows_each_, rows_), channel, channels, channel * positions_, channels * positions_};
  }

 private:
  // Makes blocks so narrow that what a thread walks twice stays in the second-level cache, and that there are several
  // for each thread; or returns false.
  bool fits_in_blocks() {
    constexpr std::int64_t kInCache = 192 * 1024, kBlocks = 16, kFewestBlocks = 8, kGranule = 8, kNarrowest = 256;
    std::int64_t each = channels_each_;
    const auto elements = [&] { return rows_ * each * positions_; };
    while ((elements() > kInCache || kBlocks * each > channels_) && each > kGranule && each * positions_ > kNarrowest)
      each = (each / 2 + kGranule - 1) / kGranule * kGranule;
    if (elements() > kInCache || kFewestBlocks * each > channels_) return false;
    channels_each_ = each;
    return true;
  }

  std::int64_t rows_, channels_, positions_;
  bool whole_row_;
  std::int64_t channels_each_ = 0, rows_each_ = 0;
};

// One value per column of a tile. There is room to store a whole vector at any column.
template <class E>
struct alignas(64) ColumnArray {
  E values[kBlockColumns + kLanes];

  FL_INLINE Vec<E> at(std::int64_t i) const { return detail::load_unaligned<E>(values + i); }
  FL_INLINE void set(std::int64_t i, Vec<E> v) { detail::store_unaligned<E>(values + i, v); }
  FL_INLINE void clear(std::int64_t i) { set(i, Vec<E>{}); }
};

// Clears the first `width` columns of each.
FL_INLINE void clear_columns(std::int64_t width, auto&... arrays) {
  for (std::int64_t i = 0; i < width; i += kLanes) (arrays.clear(i), ...);
}

// Which columns of a tile belong to which channel.
struct Columns {
  std::int64_t positions;
  bool adjacent;  // a channel's columns, as against one of each channel after the other

  explicit Columns(const Geometry& g) : positions(g.positions_per_run()), adjacent(!g.rows && positions > 1) {}

  // Writes value(c), for each channel c of the tile, to all its columns.
  template <class E, class F>
  FL_INLINE void spread(const Tile& t, ColumnArray<E>& to, F&& value) const {
    if (adjacent) {
      // The last of its vectors may reach into the next channel's columns, which are written after it.
      for (std::int64_t c = 0; c < t.channels; ++c) {
        const Vec<E> v = Vec<E>{} + value(t.channel + c);
        for (std::int64_t k = 0; k < positions; k += kLanes) to.set(c * positions + k, v);
      }
    } else {
      for (std::int64_t c = 0; c < t.channels; ++c) to.values[c] = value(t.channel + c);
      for (std::int64_t i = t.channels; i < t.columns; ++i) to.values[i] = to.values[i - t.channels];
    }
  }

  // Calls f(i) for the columns i of channel c.
  template <class F>
  FL_INLINE void each(const Tile& t, std::int64_t c, F&& f) const {
    const std::int64_t step = adjacent ? 1 : t.channels;
    for (std::int64_t k = 0, i = first(c); k < positions; ++k, i += step) f(i);
  }

  // The first column of channel c of the tile.
  FL_INLINE std::int64_t first(std::int64_t c) const { return adjacent ? c * positions : c; }

  // The sum of f(x[i]) over the columns i of channel c.
  template <class F>
  FL_INLINE double sum(const Tile& t, std::int64_t c, const ColumnArray<double>& x, F&& f) const {
    if (adjacent) {
      Vec<double> sum{};
      for_each_vector(positions,
                      [&](std::int64_t k, auto lanes) { sum += covered<double>(f(x.at(c * positions + k)), lanes); });
      return sum_of_lanes<double>(sum);
    }
    double sum = 0;
    for (std::int64_t i = c; i < t.columns; i += t.channels) sum += f(x.values[i]);
    return sum;
  }
};

// mean, scale and shift of a tile's columns.
template <class T>
class RowAffine {
  using S = Compute<T>;

 public:
  template <class Args>
  RowAffine(const Args& args, const Tile& t) {
    const Columns columns(args.geometry);
    columns.spread(t, mean_, [&](std::int64_t c) { return channel_affine<S>(args, c).mean; });
    columns.spread(t, scale_, [&](std::int64_t c) { return channel_affine<S>(args, c).scale; });
    columns.spread(t, shift_, [&](std::int64_t c) { return channel_affine<S>(args, c).shift; });
    for (std::int64_t i = t.columns; i % kLanes != 0; ++i) mean_.values[i] = scale_.values[i] = shift_.values[i] = 0;
  }

  FL_INLINE Affine<Vec<S>> at(std::int64_t i) const { return {mean_.at(i), scale_.at(i), shift_.at(i)}; }

 private:
  ColumnArray<S> mean_, scale_, shift_;
};

template <class T>
FL_INLINE const T* row_start(const Source& x, std::int64_t row, const Tile& t) {
  return advance(static_cast<const T*>(x.data), row * x.outer + t.column);
}
template <class T>
FL_INLINE T* row_start(const Target& x, std::int64_t row, const Tile& t) {
  return advance(static_cast<T*>(x.data), row * x.outer + t.column);
}

// Where the masks of one row of a tile are.
struct RowMasks {
  std::int64_t bits;
  const std::uint8_t *keep_bits, *keep_columns;

  template <class S, class Lanes>
  FL_INLINE Mask<S> kept(std::int64_t i, Lanes lanes) const {
    if (keep_columns) return load_mask_bytes<S>(keep_columns + i, lanes);
    return keep_bits ? load_mask_bits<S>(keep_bits + i / 8, lanes) : all_kept<S>();
  }
};

// Finds the masks of a tile's rows. A mask of channels is spread over the columns where a channel has several; there is
// room for kRows rows at a time.
template <int kRows>
class TileMasks {
 public:
  TileMasks(const Geometry& g, const Keep& keep, const Tile& t)
      : keep_(keep),
        tile_(t),
        columns_(g),
        channels_(g.channels),
        stride_(g.mask_stride()),
        rows_per_sample_(g.spatial / columns_.positions) {
    for (std::int64_t& sample : sample_) sample = -1;
  }

  FL_INLINE RowMasks at(std::int64_t row, int slot = 0) {
    const std::int64_t bits = row * stride_ + tile_.column / 8;
    return {bits, advance(keep_.bits, bits), keep_.planes ? kept_columns(row, slot) : nullptr};
  }

 private:
  FL_INLINE const std::uint8_t* kept_columns(std::int64_t row, int slot) {
    const std::int64_t sample = row / rows_per_sample_;
    const std::uint8_t* kept = keep_.planes + sample * channels_;
    if (columns_.positions == 1) return kept + tile_.channel;
    if (sample != sample_[slot]) {
      columns_.spread(tile_, spread_[slot], [&](std::int64_t c) { return kept[c]; });
      sample_[slot] = sample;
    }
    return spread_[slot].values;
  }

  const Keep& keep_;
  const Tile& tile_;
  Columns columns_;
  std::int64_t channels_, stride_, rows_per_sample_;
  std::int64_t sample_[kRows];
  ColumnArray<std::uint8_t> spread_[kRows];
};

// The moments of each column of a tile. Means are kept as differences from an origin that all columns of a channel
// share, so that what differs between these columns keeps its digits where a mean is large beside the spread.
struct TileMoments {
  double count = 0;
  ColumnArray<double> origin, mean, squares;
  std::int64_t width;

  explicit TileMoments(const Tile& t) : width(t.columns) { clear_columns(width, origin, mean, squares); }

  // Those of channel c, from its columns, which all have the same count.
  Moments of_channel(const Columns& columns, const Tile& t, std::int64_t c) const {
    const double from = origin.values[columns.first(c)];
    if (columns.positions == 1) return {count, from + mean.values[c], squares.values[c]};
    const auto itself = [](auto x) { return x; };
    const auto n = static_cast<double>(columns.positions);
    const double average = columns.sum(t, c, mean, itself) / n;
    const double between = columns.sum(t, c, mean, [&](auto x) { return (x - average) * (x - average); });
    return {count * n, from + average, columns.sum(t, c, squares, itself) + count * between};
  }

  bool is_finite() const {
    Vec<double> zero{};  // x - x is 0 for a finite x and NaN for others
    for (std::int64_t i = 0; i < width; i += kLanes) zero += squares.at(i) - squares.at(i);
    return std::isfinite(sum_of_lanes<double>(zero));
  }

  // Takes over what `other` has of the channels that are not finite here.
  void replace_non_finite(const TileMoments& other, const Columns& columns, const Tile& t) {
    for (std::int64_t c = 0; c < t.channels; ++c) {
      if (columns.sum(t, c, squares, [](auto x) { return x - x; }) == 0) continue;
      columns.each(t, c, [&](std::int64_t i) {
        origin.values[i] = other.origin.values[i];
        mean.values[i] = other.mean.values[i];
        squares.values[i] = other.squares.values[i];
      });
    }
  }
};

// Sums of (x - shift) and its square for each column of a tile, in vectors of A: float, or double where float
// overflows.
template <class T, class A>
class RowSums {
 public:
  RowSums(const Source& x, const Tile& tile) : x_(x), tile_(tile) {}

  // Starts with the means of these rows as shifts and origins.
  void start(std::int64_t begin, std::int64_t end, const Columns& columns, TileMoments& total) {
    const A share = 1 / static_cast<A>(end - begin);
    for_each_vector(tile_.columns, [&](std::int64_t i, auto lanes) {
      Vec<A> sum{};
      for (std::int64_t row = begin; row < end; ++row)
        sum += convert<Vec<A>>(load(row_start<T>(x_, row, tile_) + i, lanes));
      restart(i, sum * share);
    });
    columns.spread(tile_, total.origin, [&](std::int64_t c) {
      return static_cast<double>(shift_.values[columns.first(c - tile_.channel)]);
    });
    count_ = 0;
  }

  // Goes on with the means so far as shifts.
  void restart(const TileMoments& total) {
    for (std::int64_t i = 0; i < tile_.columns; i += kLanes)
      restart(i, convert<Vec<A>>(total.origin.at(i) + total.mean.at(i)));
    count_ = 0;
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
    for (std::int64_t i = 0; i < tile_.columns; i += kLanes) {
      BasicMoments<D> merged{total.count, total.mean.at(i), total.squares.at(i)};
      merged.merge(BasicMoments<D>::from_shifted(count, convert<D>(shift_.at(i)) - total.origin.at(i),
                                                 convert<D>(sum_.at(i)), convert<D>(square_.at(i))));
      total.mean.set(i, merged.mean);
      total.squares.set(i, merged.squares);
    }
    total.count += count;
  }

 private:
  static constexpr int kRowsAtOnce = 8;

  FL_INLINE void restart(std::int64_t i, Vec<A> shift) {
    shift_.set(i, shift);
    sum_.clear(i);
    square_.clear(i);
  }

  template <int kRows>
  FL_INLINE void add_rows(std::int64_t row) {
    const T* x = row_start<T>(x_, row, tile_);
    for_each_vector(tile_.columns, [&](std::int64_t i, auto lanes) {
      Vec<A> sum = sum_.at(i), square = square_.at(i);
      const Vec<A> shift = shift_.at(i);
      for (int r = 0; r < kRows; ++r) {
        const Vec<A> d = convert<Vec<A>>(load(x + r * x_.outer + i, lanes)) - shift;
        sum += d;
        square += d * d;
      }
      sum_.set(i, sum);
      square_.set(i, square);
    });
  }

  Source x_;
  Tile tile_;
  std::int64_t count_ = 0;
  ColumnArray<A> shift_, sum_, square_;
};

// As plane_moments: one pass, each chunk shifted by the mean of all rows before it, the first by that of its own first
// rows.
template <class T, class A>
__attribute__((noinline)) TileMoments tile_moments(const Source& x, const Tile& tile, const Columns& columns) {
  constexpr std::int64_t kFirst = 8, kGrowth = 8;
  RowSums<T, A> sums(x, tile);
  TileMoments total(tile);
  std::int64_t chunk = kFirst;
  sums.start(tile.begin, smaller(tile.begin + kFirst, tile.end), columns, total);
  for (std::int64_t row = tile.begin; row < tile.end; row += chunk) {
    if (row > tile.begin) {
      chunk = smaller(kGrowth * chunk, kFloatAdditions);
      sums.restart(total);
    }
    sums.add(row, smaller(row + chunk, tile.end));
    sums.merge_into(total);
  }
  return total;
}

// As plane_moments_of_non_finite.
template <class T>
TileMoments tile_moments_of_non_finite(const Source& x, const Tile& tile) {
  RowSums<T, double> sums(x, tile);
  TileMoments total(tile);
  sums.restart(total);
  sums.add(tile.begin, tile.end);
  sums.merge_into(total);
  return total;
}

// As for the moments of a channel, for all of a tile's.
template <class T>
bool is_above_underflow(const TileMoments& m, double eps, const Columns& columns, const Tile& tile) {
  if (eps >= kSmallestVariance) return true;
  for (std::int64_t c = 0; c < tile.channels; ++c)
    if (!is_above_underflow<T>(m.of_channel(columns, tile, c), eps)) return false;
  return true;
}

template <class T>
TileMoments tile_moments(const ForwardArgs& args, const Tile& tile, const Columns& columns) {
  const Source& x = args.input;
  TileMoments m = tile_moments<T, Compute<T>>(x, tile, columns);
  if (m.is_finite() && is_above_underflow<T>(m, args.eps, columns, tile)) return m;
  // Squares beyond the range of float, or something that is not finite in x: double tells which.
  if constexpr (sizeof(Compute<T>) < sizeof(double)) m = tile_moments<T, double>(x, tile, columns);
  if (!m.is_finite()) m.replace_non_finite(tile_moments_of_non_finite<T>(x, tile), columns, tile);
  return m;
}

template <class Args>
void each_tile(const Args& args, const RowSplit& split, Walk walk, const auto& f) {
  parallel_each(args.parallel_for, split.tasks(), split.elements_each(), walk,
                [&](std::int64_t task) { f(task, split.tile(task)); });
}

// All of the statistics of a tile's channels, which has all of their rows.
template <class T>
void statistics_of_tile(const ForwardArgs& args, const Tile& t) {
  const Columns columns(args.geometry);
  const TileMoments m = tile_moments<T>(args, t, columns);
  finish_statistics(args, t.channel, t.channel + t.channels,
                    [&](std::int64_t c) { return m.of_channel(columns, t, c - t.channel); });
}

// The same where channels have several tiles. Calls meanwhile(tile) while what a tile holds is in cache.
template <class T, class F>
void statistics_of_tiles(const ForwardArgs& args, const RowSplit& split, F&& meanwhile) {
  const std::int64_t channels = args.geometry.channels;
  const Columns columns(args.geometry);
  Scratch<Moments> parts(split.tiles * channels);
  each_tile(args, split, Walk::forward, [&](std::int64_t task, const Tile& t) {
    const TileMoments m = tile_moments<T>(args, t, columns);
    Moments* to = parts.data() + task / split.blocks * channels + t.channel;
    for (std::int64_t c = 0; c < t.channels; ++c) to[c] = m.of_channel(columns, t, c);
    meanwhile(t);
  });
  parallel_each(args.parallel_for, channels, 16 * split.tiles, [&](std::int64_t c) {
    Moments total;
    for (std::int64_t tile = 0; tile < split.tiles; ++tile) total.merge(parts[tile * channels + c]);
    finish_statistics(args, c, c + 1, [&](std::int64_t) { return total; });
  });
}
template <class T>
void statistics_of_tiles(const ForwardArgs& args, const RowSplit& split) {
  statistics_of_tiles<T>(args, split, [](const Tile&) {});
}

// Walks a tile of rows back. Where it is all of its rows, so do the vectors inside a row: memory is then read in
// descending order throughout, which the processor notices and fetches ahead. A part of wide rows is read in pieces
// anyway, and ascending is what it expects of a piece.
inline Walk walk_inside_rows(const RowSplit& split) {
  return split.blocks == 1 ? Walk::reverse : Walk::forward;
}

// How many rows ahead of its place a walk has memory fetched, 0 where the processor does so by itself: it follows
// narrow rows, which lie one after the other, but loses track where a page or a part of a wide row ends.
struct Prefetching {
  std::int64_t sums = 0;                  // of what is summed
  std::int64_t reading = 0, writing = 0;  // of what the walk back reads and writes

  template <class T>
  static Prefetching of(const Geometry& g, const RowSplit& split, bool streaming) {
    constexpr std::int64_t kNarrow = 128, kElementsAhead = 4096;
    const std::int64_t columns = split.columns_each();
    if (!worth_prefetching<T>(g) || columns < kNarrow) return {};
    const std::int64_t rows = kElementsAhead / columns;
    if (split.blocks == 1) return {rows};
    // With one tile, the walk back finds its input in cache.
    return {rows, split.tiles > 1 ? rows / 2 : 0, streaming ? 0 : rows / 2};
  }
};

template <class T, class Act>
class RowsForward {
  using S = Compute<T>;

 public:
  RowsForward(const ForwardArgs& args, Act activation)
      : args_(args),
        split_(args.geometry, args.training),
        fused_{activation, splat<Vec<S>>(args.keep.scale),
               worth_streaming<T>(args.geometry, args.output, split_.part())},
        ahead_(Prefetching::of<T>(args.geometry, split_, fused_.streaming)) {}

  void run() const {
    if (!args_.training) {
      each_tile(args_, split_, Walk::reverse, [&](std::int64_t, const Tile& t) { write(t); });
    } else if (split_.tiles == 1) {
      each_tile(args_, split_, Walk::forward, [&](std::int64_t, const Tile& t) {
        statistics_of_tile<T>(args_, t);
        write(t);
      });
    } else {
      statistics_of_tiles<T>(args_, split_);
      each_tile(args_, split_, Walk::reverse, [&](std::int64_t, const Tile& t) { write(t); });
    }
  }

 private:
  void write(const Tile& t) const {
    const RowAffine<T> k(args_, t);
    TileMasks<1> masks(args_.geometry, args_.keep, t);
    const Walk inside = walk_inside_rows(split_);
    const std::int64_t write_ahead = ahead_.writing * args_.output.outer,
                       read_ahead = ahead_.reading * args_.input.outer;
    for (std::int64_t row = t.end - 1; row >= t.begin; --row) {
      const RowMasks m = masks.at(row);
      const ForwardRun<T> run{row_start<T>(args_.input, row, t), row_start<T>(args_.residual, row, t),
                              row_start<T>(args_.output, row, t), advance(args_.flat_bits, m.bits)};
      for_each_vector(t.columns, inside, [&](std::int64_t i, auto lanes) {
        if (write_ahead) prefetch_for_writing(run.output + i - write_ahead);
        if (read_ahead) prefetch(run.input + i - read_ahead);
        fused_.forward(run, i, k.at(i), m.template kept<S>(i, lanes), lanes);
      });
    }
  }

  const ForwardArgs& args_;
  RowSplit split_;
  FusedElements<T, Act> fused_;
  Prefetching ahead_;
};

// Both sums of each column of a tile, carried over from S to double as they grow.
template <class T>
struct TileGradientSums {
  using S = Compute<T>;
  ColumnArray<S> grad, grad_deviation;
  ColumnArray<double> total_grad, total_grad_deviation;
  std::int64_t width;

  explicit TileGradientSums(const Tile& t) : width(t.columns) {
    clear_columns(width, grad, grad_deviation, total_grad, total_grad_deviation);
  }

  void carry() {
    for (std::int64_t i = 0; i < width; i += kLanes) {
      total_grad.set(i, total_grad.at(i) + convert<Vec<double>>(grad.at(i)));
      total_grad_deviation.set(i, total_grad_deviation.at(i) + convert<Vec<double>>(grad_deviation.at(i)));
      grad.clear(i);
      grad_deviation.clear(i);
    }
  }

  GradientSums of_channel(const Columns& columns, const Tile& t, std::int64_t c) const {
    const auto itself = [](auto x) { return x; };
    return {columns.sum(t, c, total_grad, itself), columns.sum(t, c, total_grad_deviation, itself)};
  }
};

// The input gradients' coefficients of all channels, where these have several tiles. add(tile, sums) stores a tile's
// sums of each of its channels.
template <class T, class F>
void finish_sums_of_tiles(const BackwardArgs& args, const RowSplit& split, InputGradient* coefficients, F&& add) {
  const std::int64_t channels = args.geometry.channels;
  Scratch<GradientSums> parts(split.tiles * channels);
  each_tile(args, split, Walk::forward, [&](std::int64_t task, const Tile& t) {
    add(t, parts.data() + task / split.blocks * channels + t.channel);
  });
  parallel_each(args.parallel_for, channels, 16 * split.tiles, [&](std::int64_t c) {
    coefficients[c] = finish_sums<T>(args, c, parts.data() + c, split.tiles, channels);
  });
}

template <class T, class Act>
class RowsBackward {
  using S = Compute<T>;
  using V = Vec<S>;

 public:
  RowsBackward(const BackwardArgs& args, Act activation)
      : args_(args),
        split_(args.geometry, needs_sums(args)),
        columns_(args.geometry),
        fused_{activation, splat<V>(args.keep.scale),
               worth_streaming<T>(args.geometry, args.grad_input, split_.part()) &&
                   worth_streaming<T>(args.geometry, args.grad_residual, split_.part())},
        ahead_(Prefetching::of<T>(args.geometry, split_, fused_.streaming)) {}

  void run() const {
    const std::int64_t channels = args_.geometry.channels;
    Scratch<InputGradient> coefficients(channels);
    if (!needs_sums(args_)) {
      each_tile(args_, split_, Walk::reverse, [&](std::int64_t, const Tile& t) { write(t, nullptr); });
    } else if (split_.tiles == 1) {
      each_tile(args_, split_, Walk::forward, [&](std::int64_t, const Tile& t) {
        const TileGradientSums<T> s = sums(t);
        for (std::int64_t c = 0; c < t.channels; ++c)
          coefficients[t.channel + c] = finish_sums<T>(args_, t.channel + c, s.of_channel(columns_, t, c));
        write(t, coefficients.data());
      });
    } else {
      finish_sums_of_tiles<T>(args_, split_, coefficients.data(), [&](const Tile& t, GradientSums* to) {
        const TileGradientSums<T> s = sums(t);
        for (std::int64_t c = 0; c < t.channels; ++c) to[c] = s.of_channel(columns_, t, c);
      });
      each_tile(args_, split_, Walk::reverse, [&](std::int64_t, const Tile& t) { write(t, coefficients.data()); });
    }
  }

 private:
  static constexpr int kRowsAtOnce = 2;

  BackwardRun<T> run_at(std::int64_t row, const Tile& t, const RowMasks& masks) const {
    return {row_start<T>(args_.grad_output, row, t), row_start<T>(args_.input, row, t),
            row_start<T>(args_.residual, row, t), advance(args_.flat_bits, masks.bits)};
  }

  __attribute__((noinline)) TileGradientSums<T> sums(const Tile& t) const {
    const RowAffine<T> k(args_, t);
    TileMasks<kRowsAtOnce> masks(args_.geometry, args_.keep, t);
    TileGradientSums<T> s(t);
    std::int64_t since_carry = 0;
    for (std::int64_t row = t.begin; row < t.end; row += kRowsAtOnce) {
      const auto rows = static_cast<int>(smaller(kRowsAtOnce, t.end - row));
      add_rows(row, rows, t, k, masks, s);
      since_carry += rows;
      if (since_carry >= kFloatAdditions || row + rows == t.end) {
        s.carry();
        since_carry = 0;
      }
    }
    return s;
  }

  void add_rows(std::int64_t row, int rows, const Tile& t, const RowAffine<T>& k, TileMasks<kRowsAtOnce>& tile_masks,
                TileGradientSums<T>& s) const {
    RowMasks masks[kRowsAtOnce];
    BackwardRun<T> runs[kRowsAtOnce];
    for (int r = 0; r < rows; ++r) {
      masks[r] = tile_masks.at(row + r, r);
      runs[r] = run_at(row + r, t, masks[r]);
    }
    const std::int64_t ahead = ahead_.sums;
    for_each_vector(t.columns, [&](std::int64_t i, auto lanes) {
      const Affine<V> affine = k.at(i);
      V grad = s.grad.at(i), grad_deviation = s.grad_deviation.at(i);
// Unrolled, this loop would be half of the whole library.
#pragma GCC unroll 1
      for (int r = 0; r < rows; ++r) {
        if (ahead) {
          prefetch(runs[r].input + i + ahead * args_.input.outer);
          prefetch(runs[r].grad_output + i + ahead * args_.grad_output.outer);
        }
        fused_.add_gradient(runs[r], i, affine, masks[r].template kept<S>(i, lanes), lanes, grad, grad_deviation);
      }
      s.grad.set(i, grad);
      s.grad_deviation.set(i, grad_deviation);
    });
  }

  // The coefficients are null in evaluation mode, where the input gradient needs none.
  void write(const Tile& t, const InputGradient* coefficients) const {
    if (!args_.grad_input.data && !args_.grad_residual.data) return;
    const RowAffine<T> k(args_, t);
    ColumnArray<S> by_deviation, constant;
    if (args_.training) {
      columns_.spread(t, by_deviation, [&](std::int64_t c) { return static_cast<S>(coefficients[c].by_deviation); });
      columns_.spread(t, constant, [&](std::int64_t c) { return static_cast<S>(coefficients[c].constant); });
    }
    TileMasks<1> masks(args_.geometry, args_.keep, t);
    const Walk inside = walk_inside_rows(split_);
    const std::int64_t write_ahead = ahead_.writing * args_.grad_input.outer;
    const std::int64_t read_ahead = ahead_.reading * args_.input.outer;
    const std::int64_t read_grad_ahead = ahead_.reading * args_.grad_output.outer;
    for (std::int64_t row = t.end - 1; row >= t.begin; --row) {
      const RowMasks m = masks.at(row);
      const BackwardRun<T> run = run_at(row, t, m);
      T* grad_input = row_start<T>(args_.grad_input, row, t);
      T* grad_residual = row_start<T>(args_.grad_residual, row, t);
      for_each_vector(t.columns, inside, [&](std::int64_t i, auto lanes) {
        const Affine<V> affine = k.at(i);
        const V x = load(run.input + i, lanes);
        if (write_ahead) prefetch_for_writing(grad_input + i - write_ahead);
        if (read_ahead) {
          prefetch(run.input + i - read_ahead);
          prefetch(run.grad_output + i - read_grad_ahead);
        }
        const V g = fused_.backward(run, i, x, affine, m.template kept<S>(i, lanes), lanes);
        if (grad_input) {
          const V gx = args_.training
                           ? input_gradient(g, x, affine.mean, affine.scale, by_deviation.at(i), constant.at(i))
                           : g * affine.scale;
          fused_.put(grad_input + i, gx, lanes);
        }
        if (grad_residual) fused_.put(grad_residual + i, g, lanes);
      });
    }
  }

  const BackwardArgs& args_;
  RowSplit split_;
  Columns columns_;
  FusedElements<T, Act> fused_;
  Prefetching ahead_;
};

template <class T>
void dropout_rows(const DropoutArgs& args) {
  using S = Compute<T>;
  const RowSplit split(args.geometry, false);
  const Vec<S> scale = splat<Vec<S>>(args.keep.scale);
  each_tile(args, split, Walk::forward, [&](std::int64_t, const Tile& t) {
    TileMasks<1> masks(args.geometry, args.keep, t);
    for (std::int64_t row = t.begin; row < t.end; ++row) {
      const RowMasks m = masks.at(row);
      const T* input = row_start<T>(args.input, row, t);
      T* output = row_start<T>(args.output, row, t);
      for_each_vector(t.columns, [&](std::int64_t i, auto lanes) {
        store(output + i, m.template kept<S>(i, lanes) ? load(input + i, lanes) * scale : Vec<S>{}, lanes);
      });
    }
  });
}

}  // namespace FASTLAYERS_ISA
}  // namespace fastlayers
