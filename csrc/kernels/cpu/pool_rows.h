// Pooling kernels for tensors made of rows, cut into tiles as rows.h cuts them. Vectors hold a position's channels, so
// that a window's elements are taken one after the other. A row of the image belongs to the tile that has its first
// position, a row of windows to the tile where it starts.
//
// With a monotone activation, the signs of the weights decide what is the largest element of a window. So tiles are
// pooled while they are in cache for their statistics, and only what was found is walked once more.
#pragma once

#include "activation_runs.h"
#include "choices.h"
#include "pool.h"
#include "pool_geometry.h"
#include "rows.h"

namespace fastlayers {
inline namespace FASTLAYERS_ISA {

// Rows of an image, or of windows, numbered through all samples.
struct ImageRows {
  std::int64_t begin, end;
};

// Which image rows and rows of windows belong to a tile.
class RowShares {
 public:
  RowShares(const Geometry& g, const Pool& pool) : g_(g), pool_(pool) {}

  ImageRows inputs(const Tile& t) const {
    const std::int64_t height = pool_.height.input, width = pool_.width.input;
    return share(t, g_.batch * height, [&](std::int64_t row) { return row * width; });
  }
  ImageRows outputs(const Tile& t) const {
    const PoolAxis& height = pool_.height;
    return share(t, g_.batch * height.output, [&](std::int64_t row) {
      const std::int64_t start = height.start(row % height.output);
      return (row / height.output * height.input + (start > 0 ? start : 0)) * pool_.width.input;
    });
  }

 private:
  // Of `count` rows, those whose first position, first(row), is one of the tile's.
  ImageRows share(const Tile& t, std::int64_t count, auto first) const {
    const auto from = [&](std::int64_t run) {
      const std::int64_t position = run * g_.positions_per_run();
      std::int64_t low = 0, high = count;
      while (low < high) {
        const std::int64_t middle = (low + high) / 2;
        (first(middle) < position ? low : high) = first(middle) < position ? middle + 1 : middle;
      }
      return low;
    };
    return {from(t.begin), from(t.end)};
  }

  const Geometry& g_;
  const Pool& pool_;
};

// How many windows' channels are activated at a time.
inline constexpr std::int64_t kWindowsTogether = 16;

// Numbers of a tile's channels. Behind the last channel is room for a vector.
template <class S>
class TileChannels {
 public:
  template <class Args>
  TileChannels(const Args& args, const Tile& t) {
    for (std::int64_t i = 0; i < t.channels + kLanes; ++i) {
      const bool exists = i < t.channels;
      const ChannelAffine<S> k = exists ? channel_affine<S>(args, t.channel + i) : ChannelAffine<S>(0, 0, 0, 0);
      mean_.values[i] = k.mean, scale_.values[i] = k.scale, shift_.values[i] = k.shift;
    }
  }

  RunAffine<S> run() const { return {mean_.values, scale_.values, shift_.values, true}; }
  FL_INLINE Vec<S> mean(std::int64_t i) const { return mean_.at(i); }
  FL_INLINE Vec<S> scale(std::int64_t i) const { return scale_.at(i); }

 private:
  ColumnArray<S> mean_, scale_, shift_;
};

// Where positions are in memory: `step` elements from one to the next.
template <class E>
struct Pixels {
  E* data;
  std::int64_t step;
  FL_INLINE E* at(std::int64_t i) const { return advance(data, i * step); }
};

template <class Pointer>
std::int64_t position_step(const Geometry& g, const Strided<Pointer>& x) {
  return x.outer / g.positions_per_run();
}

inline const std::uint8_t* kept_channels(const Keep& keep, const Geometry& g, std::int64_t n, const Tile& t) {
  return advance(keep.planes, n * g.channels + t.channel);
}

template <class S, class Lanes>
FL_INLINE Mask<S> kept_lanes(const std::uint8_t* kept, std::int64_t i, Lanes lanes) {
  return kept ? load_mask_bytes<S>(kept + i, lanes) : all_kept<S>();
}

// Finds the largest elements of a tile's windows.
template <class T, bool kMonotone>
class TilePooler {
  using S = Compute<T>;
  using V = Vec<S>;

 public:
  // The statistics are only needed for what is not monotone; scale(c) has the sign of a channel's scale.
  TilePooler(const PoolForwardArgs& args, T* found, const Tile& t, auto scale)
      : args_(args),
        tile_(t),
        found_(found),
        input_{static_cast<const T*>(args.input.data) + t.channel, position_step(args.geometry, args.input)},
        key_step_(kMonotone ? 0 : rounded_up(t.channels, kLanes)),
        key_rows_(kMonotone ? 0 : (args.pool.height.kernel - 1) * args.pool.height.dilation + 1),
        keys_(key_rows_ * key_step_ * args.pool.width.input),
        row_of_keys_(key_rows_),
        rows_(args.pool.height.kernel),
        rows_of_keys_(args.pool.height.kernel),
        taps_(args.pool.width.output) {
    for (std::int64_t i = 0; i < key_rows_; ++i) row_of_keys_[i] = -1;
    for (std::int64_t i = 0; i < args.pool.width.output; ++i)
      taps_[i] = {args.pool.width.first(i), args.pool.width.end(i)};
    for (std::int64_t i = 0; i < t.channels + kLanes; ++i) {
      const double sign = kMonotone && i < t.channels ? key_sign(scale(t.channel + i)) : 1;
      sign_.values[i] = static_cast<S>(sign);
      if (sign * sign != 1) signs_are_ones_ = false;
    }
  }

  // Pools a row of windows. At each window, memory is fetched ahead.
  void pool(std::int64_t row, FetchAhead& ahead) {
    const PoolAxis &height = args_.pool.height, &width = args_.pool.width;
    const std::int64_t n = row / height.output, o = row % height.output;
    Window w{{height.first(o), height.end(o)},
             {},
             0,
             row * width.output,
             kept_channels(args_.keep, args_.geometry, n, tile_)};
    for (std::int64_t k = w.down.first; k < w.down.end; ++k) {
      const std::int64_t at = n * height.input + height.start(o) + k * height.dilation;
      rows_[k] = input_.at(at * width.input);
      if (!kMonotone) rows_of_keys_[k] = keys_of(at);
    }
    for (std::int64_t i = 0; i < width.output; ++i, ++w.output) {
      ahead.step();
      w.across = taps_[i], w.start = width.start(i);
      pool(w);
    }
  }

 private:
  // The taps that exist, along an axis.
  struct Taps {
    std::int64_t first, end;
  };
  struct Window {
    Taps down, across;
    std::int64_t start;  // in its rows
    std::int64_t output;
    const std::uint8_t* kept;
  };

  // The keys of an image row, computed once for all windows that have some of it.
  const S* keys_of(std::int64_t row) {
    const std::int64_t slot = row % key_rows_, width = args_.pool.width.input;
    S* const keys = keys_.data() + slot * width * key_step_;
    if (row_of_keys_[slot] == row) return keys;
    row_of_keys_[slot] = row;
    const TileChannels<S> channels(args_, tile_);
    for (std::int64_t i = 0; i < width; ++i) {
      S* const to = keys + i * key_step_;
      load_run(input_.at(row * width + i), tile_.channels, to);
      activation_values(args_.activation, channels.run(), Runs{tile_.channels}, to, to);
    }
    return keys;
  }

  void pool(const Window& w) {
    constexpr int kVectors = 4;
    std::int64_t i = 0;
    for (; i + kVectors * kLanes <= tile_.channels; i += kVectors * kLanes) pool<kVectors>(w, i, AllLanes{});
    for_each_vector(tile_.channels - i, [&](std::int64_t k, auto lanes) { pool<1>(w, i + k, lanes); });
  }

  template <int kVectors, class Lanes>
  FL_INLINE void pool(const Window& w, std::int64_t channel, Lanes lanes) {
    const PoolAxis& width = args_.pool.width;
    Best<S> best[kVectors];
    V sign[kVectors], x[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      best[v] = Best<S>::none(all_numbered<S>(w.down.first * width.kernel + w.across.first));
      sign[v] = sign_.at(channel + v * kLanes);
      // Where no candidate wins, the first one is the result.
      if (!kMonotone) x[v] = load(element(w, w.down.first, w.across.first) + channel + v * kLanes, lanes);
    }
    for (std::int64_t row = w.down.first; row < w.down.end; ++row) {
      const T* from = element(w, row, w.across.first) + channel;
      const S* key =
          kMonotone ? nullptr : rows_of_keys_[row] + (w.start + w.across.first * width.dilation) * key_step_ + channel;
      Numbers<S> number = all_numbered<S>(row * width.kernel + w.across.first);
      for (std::int64_t k = w.across.first; k < w.across.end; ++k, number += 1) {
        for (int v = 0; v < kVectors; ++v) {
          const V candidate = load(from + v * kLanes, lanes);
          if constexpr (kMonotone) {
            best[v].offer(candidate * sign[v], number);
          } else {
            const auto stay = best[v].offer(detail::load_unaligned<S>(key + v * kLanes), number);
            x[v] = keep<S>(stay, x[v], candidate);
          }
        }
        from += width.dilation * input_.step;
        if (!kMonotone) key += width.dilation * key_step_;
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      const std::int64_t at = channel + v * kLanes;
      const V found = kMonotone ? best[v].key * sign[v] : x[v];
      write(w, at, kMonotone && !signs_are_ones_ ? looked_up(w, at, best[v].number, lanes) : found, best[v].number,
            lanes);
    }
  }

  FL_INLINE const T* element(const Window& w, std::int64_t row, std::int64_t k) const {
    return rows_[row] + (w.start + k * args_.pool.width.dilation) * input_.step;
  }

  // The elements of these numbers, where keys do not tell them.
  template <class Lanes>
  V looked_up(const Window& w, std::int64_t channel, Numbers<S> number, Lanes lanes) const {
    V x{};
    const std::int64_t kernel = args_.pool.width.kernel;
    for (int i = 0; i < lanes.count; ++i) {
      const auto at = static_cast<std::int64_t>(number[i]);
      x[i] = load_one(element(w, at / kernel, at % kernel) + channel + i);
    }
    return x;
  }

  template <class Lanes>
  FL_INLINE void write(const Window& w, std::int64_t channel, V x, Numbers<S> number, Lanes lanes) {
    const std::int64_t to = w.output * args_.geometry.channels + tile_.channel + channel;
    store(found_ + to, kept_lanes<S>(w.kept, channel, lanes) ? x : V{}, lanes);
    if (!args_.positions) return;
    Vec<std::uint8_t> bytes = convert<Vec<std::uint8_t>>(number);
    if (w.kept) bytes = bytes & -detail::load_bytes(w.kept + channel, lanes);
    detail::store_bytes(args_.positions + to, bytes, lanes);
  }

  const PoolForwardArgs& args_;
  const Tile tile_;
  T* found_;
  Pixels<const T> input_;
  std::int64_t key_step_, key_rows_;
  Scratch<S> keys_;
  Scratch<std::int64_t> row_of_keys_;
  Scratch<const T*> rows_;
  Scratch<const S*> rows_of_keys_;
  Scratch<Taps> taps_;
  bool signs_are_ones_ = true;
  ColumnArray<S> sign_;
};

template <class T>
class RowsPoolForward {
  using S = Compute<T>;

 public:
  explicit RowsPoolForward(const PoolForwardArgs& args)
      : args_(args),
        split_(args.geometry, args.training, kMostTiles),
        shares_(args.geometry, args.pool),
        found_(static_cast<T*>(args.selected ? args.selected : args.output.data)) {}

  void run() const {
    if (!args_.training || split_.tiles == 1) {
      each_tile(args_, split_, Walk::forward, [&](std::int64_t, const Tile& t) {
        if (args_.training) statistics_of_tile<T>(args_, t);
        pool(t);
        activate(t);
      });
      return;
    }
    if (args_.monotone) {
      const auto weight = [&](std::int64_t c) { return args_.weight[c]; };
      statistics_of_tiles<T>(args_, split_, [&](const Tile& t) { pool_monotone(t, weight, next_tile(t)); });
    } else {
      statistics_of_tiles<T>(args_, split_);
    }
    const bool pooled = args_.monotone && signs_are_those_of_weights();
    each_tile(args_, split_, Walk::reverse, [&](std::int64_t, const Tile& t) {
      if (!pooled) pool(t);
      activate(t);
    });
  }

 private:
  // So many that a tile, and the next one, which is fetched meanwhile, stay in the second-level cache.
  static constexpr std::int64_t kMostTiles = 1024, kMostFetched = 512 * 1024;

  double scale(std::int64_t c) const { return args_.weight[c] * args_.invstd[c]; }

  // As they are unless the deviation is infinite or NaN.
  bool signs_are_those_of_weights() const {
    for (std::int64_t c = 0; c < args_.geometry.channels; ++c)
      if (!(key_sign(scale(c)) == key_sign(args_.weight[c]))) return false;
    return true;
  }

  void pool_monotone(const Tile& t, auto scale, FetchAhead ahead) const {
    pool_with(TilePooler<T, true>(args_, found_, t, scale), t, ahead);
  }

  // What is read of the tile behind `t`, while that is pooled.
  FetchAhead next_tile(const Tile& t) const {
    constexpr auto size = static_cast<std::int64_t>(sizeof(T));
    const std::int64_t rows = smaller(t.end - t.begin, args_.geometry.runs() - t.end);
    const ImageRows windows = shares_.outputs(t);
    if (!worth_prefetching<T>(args_.geometry) || rows * t.columns * size > kMostFetched) return {};
    return FetchAhead(row_start<T>(args_.input, t.end, t), t.columns * size, rows, args_.input.outer * size,
                      (windows.end - windows.begin) * args_.pool.width.output);
  }

  void pool(const Tile& t) const {
    const auto of_channel = [&](std::int64_t c) { return scale(c); };
    if (args_.monotone) return pool_monotone(t, of_channel, {});
    // So few channels at a time that the keys that windows share stay in cache.
    constexpr std::int64_t kKeysInCache = 64 * 1024, kFewest = 64;
    const PoolAxis& height = args_.pool.height;
    const std::int64_t rows = (height.kernel - 1) * height.dilation + 1;
    std::int64_t channels = kKeysInCache / (rows * args_.pool.width.input) / kFewest * kFewest;
    if (channels < kFewest) channels = kFewest;
    for (std::int64_t c = 0; c < t.channels; c += channels) {
      Tile part = t;
      part.channel += c;
      part.channels = smaller(channels, t.channels - c);
      pool_with(TilePooler<T, false>(args_, found_, part, of_channel), t, {});
    }
  }

  void pool_with(auto&& pooler, const Tile& t, FetchAhead ahead) const {
    const ImageRows rows = shares_.outputs(t);
    for (std::int64_t row = rows.begin; row < rows.end; ++row) pooler.pool(row, ahead);
  }

  // Writes the output, from the elements that were found.
  void activate(const Tile& t) const {
    const TileChannels<S> channels(args_, t);
    const std::int64_t step = rounded_up(t.channels, kLanes), width = args_.pool.width.output;
    Scratch<S> x(kWindowsTogether * step);
    const ImageRows rows = shares_.outputs(t);
    for (std::int64_t row = rows.begin; row < rows.end; ++row) {
      const std::uint8_t* kept = kept_channels(args_.keep, args_.geometry, row / args_.pool.height.output, t);
      for (std::int64_t i = 0; i < width; i += kWindowsTogether) {
        const Runs runs{t.channels, smaller(kWindowsTogether, width - i), step};
        const std::int64_t at = (row * width + i) * args_.geometry.channels + t.channel;
        for (std::int64_t k = 0; k < runs.count; ++k)
          load_run(found_ + at + k * args_.geometry.channels, t.channels, x.data() + k * step);
        activation_values(args_.activation, channels.run(), runs, x.data(), x.data());
        for (std::int64_t k = 0; k < runs.count; ++k)
          write(x.data() + k * step, kept, t.channels, at + k * args_.geometry.channels);
      }
    }
  }

  FL_INLINE void write(const S* activated, const std::uint8_t* kept, std::int64_t channels, std::int64_t at) const {
    T* output = static_cast<T*>(args_.output.data) + at;
    const Vec<S> keep_scale = splat<Vec<S>>(args_.keep.scale);
    for_each_vector(channels, [&](std::int64_t i, auto lanes) {
      const Vec<S> y = detail::load_unaligned<S>(activated + i) * keep_scale;
      store(output + i, kept_lanes<S>(kept, i, lanes) ? y : Vec<S>{}, lanes);
    });
  }

  const PoolForwardArgs& args_;
  RowSplit split_;
  RowShares shares_;
  T* found_;
};

// What backward does with a tile: gradients of rows of windows, in scratch memory, their sums, and the input's.
template <class T>
class TilePoolBackward {
  using S = Compute<T>;
  using V = Vec<S>;

 public:
  TilePoolBackward(const PoolBackwardArgs& args, const ImageRows& windows, const Tile& t)
      : args_(args),
        tile_(t),
        windows_(windows),
        input_{advance(static_cast<const T*>(args.input.data), t.channel), position_step(args.geometry, args.input)},
        grad_input_{advance(static_cast<T*>(args.grad_input.data), t.channel),
                    position_step(args.geometry, args.grad_input)},
        channels_(args, t),
        step_(rounded_up(t.channels, kLanes)),
        grad_rows_((args.pool.height.kernel - 1) * args.pool.height.dilation / args.pool.height.stride + 1),
        grad_(grad_rows_ * args.pool.width.output * step_ + kWindowsTogether * step_),
        row_of_grad_(grad_rows_),
        x_(kWindowsTogether * step_),
        columns_(args.pool.width),
        ahead_(args.training && worth_prefetching<T>(args.geometry) ? kAhead : 0),
        windows_ahead_(worth_prefetching<T>(args.geometry) ? 1 + kGradAhead / t.channels : 0) {
    for (std::int64_t i = 0; i < grad_rows_; ++i) row_of_grad_[i] = -1;
  }

  // The sums over the tile's own rows of windows.
  TileGradientSums<T> sums() {
    TileGradientSums<T> s(tile_);
    const std::int64_t width = args_.pool.width.output, end = windows_.end * width;
    std::int64_t since_carry = 0;
    for (std::int64_t window = windows_.begin * width; window < end; window += kWindowsTogether) {
      const std::int64_t count = smaller(kWindowsTogether, end - window);
      find_gradients(window, count, grad_.data());
      add(count, s);
      since_carry += count;
      if (since_carry < kFloatAdditions) continue;
      s.carry();
      since_carry = 0;
    }
    s.carry();
    return s;
  }

  // Writes the input gradient of image row `row`.
  void write(std::int64_t row, const ColumnArray<S>& by_deviation, const ColumnArray<S>& constant, bool streaming) {
    const PoolAxis &height = args_.pool.height, &width = args_.pool.width;
    const std::int64_t n = row / height.input, h = row % height.input;
    std::int64_t rows = 0;
    RowTerm row_terms[Pool::kMostPositions];
    for (std::int64_t o = height.first_window(h); o < height.windows_end(h); ++o) {
      if ((h - height.start(o)) % height.dilation != 0) continue;
      const std::int64_t of_windows = n * height.output + o;
      row_terms[rows++] = {gradients_of(of_windows),
                           args_.positions + of_windows * width.output * args_.geometry.channels + tile_.channel,
                           (h - height.start(o)) / height.dilation * width.kernel};
    }
    for (std::int64_t w = 0; w < width.input; ++w)
      write_position(row * width.input + w, {row_terms, rows, columns_.begin(w), columns_.end(w)}, by_deviation,
                     constant, streaming);
  }

 private:
  // A row of windows that has the image row, the first of whose elements there is `number`.
  struct RowTerm {
    const S* grad;
    const std::uint8_t* positions;
    std::int64_t number;
  };
  // The windows that have a position: these of each row of windows.
  struct Terms {
    const RowTerm* row_terms;
    std::int64_t rows;
    const AxisTaps::Tap *taps, *taps_end;
  };

  void write_position(std::int64_t at, const Terms& terms, const ColumnArray<S>& by_deviation,
                      const ColumnArray<S>& constant, bool streaming) const {
    constexpr int kVectors = 4;
    const T* const input = input_.at(at);
    T* const to = grad_input_.at(at);
    std::int64_t i = 0;
    const auto write = [&](std::int64_t from, auto count, auto lanes) {
      V g[count];
      sum_terms(terms, from, g, lanes);
      const auto each = [&](auto&& f) {
        for (int v = 0; v < count; ++v) f(g[v], from + v * kLanes);
      };
      if (ahead_) each([&](V&, std::int64_t c) { prefetch(input + c + ahead_); });
      if (args_.training)
        each([&](V& gx, std::int64_t c) {
          gx = input_gradient(gx, load(input + c, lanes), channels_.mean(c), channels_.scale(c), by_deviation.at(c),
                              constant.at(c));
        });
      else
        each([&](V& gx, std::int64_t c) { gx *= channels_.scale(c); });
      if (streaming)
        each([&](V gx, std::int64_t c) { stream(to + c, gx, lanes); });
      else
        each([&](V gx, std::int64_t c) { store(to + c, gx, lanes); });
    };
    for (; i + kVectors * kLanes <= tile_.channels; i += kVectors * kLanes)
      write(i, std::integral_constant<int, kVectors>{}, AllLanes{});
    for_each_vector(tile_.channels - i,
                    [&](std::int64_t k, auto lanes) { write(i + k, std::integral_constant<int, 1>{}, lanes); });
  }

  // What windows give to vectors of channels of one position.
  template <int kCount, class Lanes>
  FL_INLINE void sum_terms(const Terms& terms, std::int64_t channel, V (&g)[kCount], Lanes lanes) const {
    for (int v = 0; v < kCount; ++v) g[v] = V{};
    for (const RowTerm* row = terms.row_terms; row < terms.row_terms + terms.rows; ++row)
      for (const AxisTaps::Tap* tap = terms.taps; tap < terms.taps_end; ++tap) {
        const S* const grad = row->grad + tap->window * step_ + channel;
        const std::uint8_t* const positions = row->positions + tap->window * args_.geometry.channels + channel;
        for (int v = 0; v < kCount; ++v)
          g[v] = add_where<S>(positions + v * kLanes, row->number + tap->number, g[v],
                              detail::load_unaligned<S>(grad + v * kLanes), lanes);
      }
  }

  // The gradients of a row of windows, computed once for all image rows that these have.
  const S* gradients_of(std::int64_t row) {
    const std::int64_t slot = row % grad_rows_, width = args_.pool.width.output;
    S* const grad = grad_.data() + slot * width * step_;
    if (row_of_grad_[slot] == row) return grad;
    row_of_grad_[slot] = row;
    for (std::int64_t i = 0; i < width; i += kWindowsTogether)
      find_gradients(row * width + i, smaller(kWindowsTogether, width - i), grad + i * step_);
    return grad;
  }

  // Adds gradients of the first windows in scratch memory to the sums.
  FL_INLINE void add(std::int64_t count, TileGradientSums<T>& s) const {
    for (std::int64_t i = 0; i < tile_.channels; i += kLanes) {
      V grad = s.grad.at(i), grad_deviation = s.grad_deviation.at(i);
      const V mean = channels_.mean(i);
      for (std::int64_t k = 0; k < count; ++k) {
        const V g = detail::load_unaligned<S>(grad_.data() + k * step_ + i);
        grad += g;
        grad_deviation += g * (detail::load_unaligned<S>(x_.data() + k * step_ + i) - mean);
      }
      s.grad.set(i, grad);
      s.grad_deviation.set(i, grad_deviation);
    }
  }

  // Of what goes into the activations of adjacent windows, at most kWindowsTogether, which is left in x_.
  void find_gradients(std::int64_t window, std::int64_t count, S* grad) {
    const std::int64_t grad_step = args_.grad_output.outer, selected_step = args_.geometry.channels;
    const std::int64_t grad_ahead = windows_ahead_ * grad_step, selected_ahead = windows_ahead_ * selected_step;
    const T* grad_output = static_cast<const T*>(args_.grad_output.data) + window * grad_step + tile_.channel;
    const T* selected = static_cast<const T*>(args_.selected) + window * selected_step + tile_.channel;
    const V keep_scale = splat<V>(args_.keep.scale);
    S *grad_to = grad, *x_to = x_.data();
    for (std::int64_t k = 0; k < count; ++k) {
      for_each_vector(tile_.channels, [=](std::int64_t i, auto lanes) {
        if (grad_ahead) {
          prefetch(grad_output + i + grad_ahead);
          prefetch(selected + i + selected_ahead);
        }
        detail::store_unaligned<S>(grad_to + i, load(grad_output + i, lanes) * keep_scale);
        detail::store_unaligned<S>(x_to + i, load(selected + i, lanes));
      });
      grad_output += grad_step, selected += selected_step, grad_to += step_, x_to += step_;
    }
    activation_gradients(args_.activation, channels_.run(), Runs{tile_.channels, count, step_}, x_.data(), grad);
    if (!args_.keep.planes && tile_.channels == step_) return;
    for (std::int64_t k = 0; k < count; ++k) drop(window + k, grad + k * step_);
  }

  // Leaves the gradients of what is kept.
  FL_INLINE void drop(std::int64_t window, S* grad) const {
    const std::uint8_t* kept = kept_channels(args_.keep, args_.geometry, window / args_.pool.outputs(), tile_);
    for_each_vector(tile_.channels, [&](std::int64_t i, auto lanes) {
      const V g = detail::load_unaligned<S>(grad + i);
      detail::store_unaligned<S>(grad + i, covered<S>(kept_lanes<S>(kept, i, lanes) ? g : V{}, lanes));
    });
  }

  static constexpr std::int64_t kAhead = 8 * 1024 / sizeof(T), kGradAhead = 4 * 1024 / sizeof(T);

  const PoolBackwardArgs& args_;
  const Tile tile_;
  const ImageRows windows_;
  Pixels<const T> input_;
  Pixels<T> grad_input_;
  TileChannels<S> channels_;
  std::int64_t step_, grad_rows_;
  Scratch<S> grad_;
  Scratch<std::int64_t> row_of_grad_;
  Scratch<S> x_;
  AxisTaps columns_;
  std::int64_t ahead_, windows_ahead_;
};

template <class T>
class RowsPoolBackward {
  using S = Compute<T>;

 public:
  explicit RowsPoolBackward(const PoolBackwardArgs& args)
      : args_(args),
        split_(args.geometry, needs_sums(args)),
        shares_(args.geometry, args.pool),
        streaming_(worth_streaming<T>(args.geometry, args.grad_input, split_.part()) &&
                   worth_streaming<T>(args.geometry, args.grad_input, position_step(args.geometry, args.grad_input))) {}

  void run() const {
    const std::int64_t channels = args_.geometry.channels;
    Scratch<InputGradient> coefficients(channels);
    if (!needs_sums(args_)) {
      for (std::int64_t c = 0; c < channels; ++c) coefficients[c] = {};
    } else if (split_.tiles == 1) {
      each_tile(args_, split_, Walk::forward, [&](std::int64_t, const Tile& t) {
        TilePoolBackward<T> tile(args_, shares_.outputs(t), t);
        const TileGradientSums<T> s = tile.sums();
        for (std::int64_t c = 0; c < t.channels; ++c)
          coefficients[t.channel + c] = finish_sums<T>(args_, t.channel + c, of_channel(s, c));
        write(tile, t, coefficients.data());
      });
      return;
    } else {
      finish_sums_of_tiles<T>(args_, split_, coefficients.data(), [&](const Tile& t, GradientSums* to) {
        TilePoolBackward<T> tile(args_, shares_.outputs(t), t);
        const TileGradientSums<T> s = tile.sums();
        for (std::int64_t c = 0; c < t.channels; ++c) to[c] = of_channel(s, c);
      });
    }
    each_tile(args_, split_, Walk::forward, [&](std::int64_t, const Tile& t) {
      TilePoolBackward<T> tile(args_, shares_.outputs(t), t);
      write(tile, t, coefficients.data());
    });
  }

 private:
  static GradientSums of_channel(const TileGradientSums<T>& s, std::int64_t c) {
    return {s.total_grad.values[c], s.total_grad_deviation.values[c]};
  }

  void write(TilePoolBackward<T>& tile, const Tile& t, const InputGradient* coefficients) const {
    if (!args_.grad_input.data) return;
    ColumnArray<S> by_deviation, constant;
    for (std::int64_t c = 0; c < t.channels; ++c) {
      by_deviation.values[c] = static_cast<S>(coefficients[t.channel + c].by_deviation);
      constant.values[c] = static_cast<S>(coefficients[t.channel + c].constant);
    }
    const ImageRows rows = shares_.inputs(t);
    for (std::int64_t row = rows.begin; row < rows.end; ++row) tile.write(row, by_deviation, constant, streaming_);
  }

  const PoolBackwardArgs& args_;
  RowSplit split_;
  RowShares shares_;
  bool streaming_;
};

}  // namespace FASTLAYERS_ISA
}  // namespace fastlayers
