// Pooling kernels for tensors made of planes, cut into tasks as planes.h cuts them: a channel, or, where channels are
// few, its spans for the statistics and blocks of rows for the rest. Dropped planes are read for the statistics only.
#pragma once

#include "activation_runs.h"
#include "planes.h"
#include "pool.h"
#include "pool_spread.h"
#include "pool_windows.h"

namespace fastlayers {
inline namespace FASTLAYERS_ISA {

// One channel's affine in vectors.
template <class S>
class ChannelRun {
 public:
  FL_INLINE void set(const ChannelAffine<S>& k) {
    for (int i = 0; i < kLanes; ++i) mean_[i] = k.mean, scale_[i] = k.scale, shift_[i] = k.shift;
  }
  FL_INLINE RunAffine<S> affine() const { return {mean_, scale_, shift_, false}; }
  FL_INLINE S mean() const { return mean_[0]; }
  FL_INLINE S scale() const { return scale_[0]; }

 private:
  alignas(64) S mean_[kLanes], scale_[kLanes], shift_[kLanes];
};

// A task is a few adjacent channels, whose planes are walked together, sample by sample: the processor fetches ahead in
// memory that is read in order. How many depends on the shape alone.
struct ChannelBlocks {
  static constexpr std::int64_t kMost = 8, kEnoughTasks = 16;
  std::int64_t channels, each;

  explicit ChannelBlocks(std::int64_t channels_) : channels(channels_), each(channels_ / kEnoughTasks) {
    if (each < 1) each = 1;
    if (each > kMost) each = kMost;
  }
  std::int64_t count() const { return (channels + each - 1) / each; }
  std::int64_t begin(std::int64_t block) const { return block * each; }
  std::int64_t end(std::int64_t block) const { return smaller((block + 1) * each, channels); }
};

template <class T>
class PlanesPoolForward {
  using S = Compute<T>;
  using V = Vec<S>;

 public:
  explicit PlanesPoolForward(const PoolForwardArgs& args)
      : args_(args),
        split_(args.geometry),
        windows_(args.pool),
        found_(static_cast<T*>(args.selected ? args.selected : args.output.data)) {}

  void run() const {
    const Geometry& g = args_.geometry;
    if (args_.training && split_.spans == 1) {
      const ChannelBlocks channels(g.channels);
      parallel_parts(args_.parallel_for, channels.count(), channels.each * split_.length,
                     [&](std::int64_t begin, std::int64_t end) {
                       Worker worker(*this);
                       for (std::int64_t i = begin; i < end; ++i)
                         pool_channels(worker, channels.begin(i), channels.end(i));
                     });
      return;
    }
    if (args_.training) statistics_of_spans<T>(args_, split_);
    const std::int64_t blocks = windows_.blocks();
    parallel_parts(args_.parallel_for, g.batch * g.channels * blocks, g.spatial / blocks,
                   [&](std::int64_t begin, std::int64_t end) {
                     Worker worker(*this);
                     for (std::int64_t i = begin; i < end; ++i) {
                       const std::int64_t plane = i / blocks, n = plane / g.channels, c = plane % g.channels;
                       worker.set_channels(c, c + 1, [&](std::int64_t) { return scale(c); });
                       worker.find_block(n, c, i % blocks);
                       worker.activate_block(n, c, i % blocks);
                     }
                   });
  }

 private:
  class Worker;

  double scale(std::int64_t c) const { return args_.weight[c] * args_.invstd[c]; }

  // With a monotone activation, the sign of the weight decides what is the largest element of a window. So planes are
  // pooled while they are in cache for their statistics, and only what was found is walked once more.
  void pool_channels(Worker& worker, std::int64_t begin, std::int64_t end) const {
    const std::int64_t batch = args_.geometry.batch;
    const auto weight = [&](std::int64_t c) { return args_.weight[c]; };
    const auto final_scale = [&](std::int64_t c) { return scale(c); };
    worker.set_channels(begin, end, weight);
    statistics_of_channels(worker, begin, end);
    // The signs differ where the deviation is infinite or NaN.
    bool found = args_.monotone;
    for (std::int64_t c = begin; c < end; ++c) found &= key_sign(scale(c)) == key_sign(weight(c));
    worker.set_channels(begin, end, final_scale);
    for (std::int64_t n = batch - 1; n >= 0; --n)
      for (std::int64_t c = begin; c < end; ++c) {
        if (!found) worker.find(n, n + 1, c);
        worker.activate(n, c);
      }
  }

  void statistics_of_channels(Worker& worker, std::int64_t begin, std::int64_t end) const {
    PlaneMoments<T, S> moments[ChannelBlocks::kMost];
    const std::int64_t batch = args_.geometry.batch, together = batch & -kPlanesTogether;
    for (std::int64_t n = 0; n < together; n += kPlanesTogether)
      add_planes(worker, n, begin, end, moments, Together<kPlanesTogether>{});
    for (std::int64_t n = together; n < batch; ++n) add_planes(worker, n, begin, end, moments, Together<1>{});
    finish_statistics(args_, begin, end, [&](std::int64_t c) {
      return checked_moments<T>(moments[c - begin].finish(), args_, c, split_.span(0));
    });
  }

  template <int kCount>
  void add_planes(Worker& worker, std::int64_t n, std::int64_t begin, std::int64_t end, PlaneMoments<T, S>* moments,
                  Together<kCount> together) const {
    for (std::int64_t c = begin; c < end; ++c) {
      const T* from[kCount];
      for (int u = 0; u < kCount; ++u) from[u] = piece_start<T>(args_.input, Piece{n + u, 0, 0}, c);
      moments[c - begin].add(from, args_.geometry.spatial, together);
      if (!args_.monotone) continue;
      const bool last = c + 1 == end;
      worker.fetch_ahead(n, last ? n + kCount : n, kCount, c, last ? begin : c + 1);
      worker.find(n, n + kCount, c);
    }
  }

  // The scratch memory of one thread, and what it does with one plane after the other.
  class Worker {
   public:
    explicit Worker(const PlanesPoolForward& of)
        : args_(of.args_),
          windows_(of.windows_),
          found_(of.found_),
          pooler_(of.windows_),
          offsets_(of.args_.pool),
          keys_(of.windows_.most_inputs() + kLanes),
          prefetching_(worth_prefetching<T>(of.args_.geometry) &&
                       of.args_.geometry.spatial * static_cast<std::int64_t>(sizeof(T)) <= kLongPlane) {}

    // scale(c) has the sign of the channel's. The statistics are only read for what is not monotone, and to activate.
    void set_channels(std::int64_t begin, std::int64_t end, auto scale) {
      first_channel_ = begin;
      for (std::int64_t c = begin; c < end; ++c) {
        signs_[c - begin] = args_.monotone ? static_cast<S>(key_sign(scale(c))) : S{1};
        runs_[c - begin].set(channel_affine<S>(args_, c));
      }
    }

    // While `count` planes of channel c from n on are pooled, has as many fetched, those of another channel from
    // another sample on, which are read next.
    void fetch_ahead(std::int64_t n, std::int64_t next_n, std::int64_t count, std::int64_t c, std::int64_t next_c) {
      ahead_ = {};
      const Geometry& g = args_.geometry;
      if (!prefetching_ || next_n + count > g.batch) return;
      std::int64_t kept = 0;
      for (std::int64_t i = 0; i < count; ++i) kept += !part(n + i, c, 0).dropped;
      constexpr auto size = static_cast<std::int64_t>(sizeof(T));
      ahead_ = FetchAhead(piece_start<T>(args_.input, Piece{next_n, 0, 0}, next_c), g.spatial * size, count,
                          args_.input.outer * size, kept * windows_.steps(args_.pool.height.input));
    }

    // Finds the largest elements of the windows of planes [begin, end).
    void find(std::int64_t begin, std::int64_t end, std::int64_t c) {
      for (std::int64_t n = begin; n < end; ++n)
        for (std::int64_t i = 0; i < windows_.blocks(); ++i) find_block(n, c, i);
    }
    void find_block(std::int64_t n, std::int64_t c, std::int64_t block) {
      const Part to = part(n, c, block);
      if (to.dropped) return write_zeros(to);
      if (prefetching_) {
        prefetch_run_for_writing(found_ + to.at, to.count * static_cast<std::int64_t>(sizeof(T)));
        if (args_.positions) prefetch_run_for_writing(args_.positions + to.at, to.count);
      }
      const PlaneRows input = window_rows(args_.pool.height, to.rows);
      const std::int64_t width = args_.pool.width.input;
      const T* x = piece_start<T>(args_.input, Piece{n, input.begin * width, 0}, c);
      if (args_.monotone) {
        pooler_.pool(x, sign_of(c), to.rows, input, ahead_);
      } else {
        const std::int64_t count = input.count() * width;
        load_run(x, count, keys_.data());
        activation_values(args_.activation, run_of(c).affine(), Runs{count}, keys_.data(), keys_.data());
        pooler_.pool(keys_.data(), S{1}, to.rows, input, ahead_);
      }
      store_found(to, x, input.begin, sign_of(c));
      if (!args_.positions) return;
      for_each_vector(to.count, [&](std::int64_t i, auto lanes) {
        store_numbers<S>(args_.positions + to.at + i, detail::load_unaligned<Number<S>>(pooler_.numbers() + i), lanes);
      });
    }

    // Writes a plane's output, from the elements that were found.
    void activate(std::int64_t n, std::int64_t c) {
      for (std::int64_t i = 0; i < windows_.blocks(); ++i) activate_block(n, c, i);
    }
    void activate_block(std::int64_t n, std::int64_t c, std::int64_t block) {
      const Part to = part(n, c, block);
      T* output = static_cast<T*>(args_.output.data) + to.at;
      if (to.dropped) {
        std::memset(output, 0, static_cast<std::size_t>(to.count) * sizeof(T));
        return;
      }
      S* const x = pooler_.keys();
      load_run(found_ + to.at, to.count, x);
      activation_values(args_.activation, run_of(c).affine(), Runs{to.count}, x, x);
      const V scale = splat<V>(args_.keep.scale);
      for_each_vector(to.count, [&](std::int64_t i, auto lanes) {
        store(output + i, detail::load_unaligned<S>(x + i) * scale, lanes);
      });
    }

   private:
    // Rows of a plane's output, and where they are in memory.
    struct Part {
      PlaneRows rows;
      std::int64_t at, count;
      bool dropped;
    };

    const ChannelRun<S>& run_of(std::int64_t c) const { return runs_[c - first_channel_]; }
    S sign_of(std::int64_t c) const { return signs_[c - first_channel_]; }

    Part part(std::int64_t n, std::int64_t c, std::int64_t block) const {
      const PlaneRows rows = windows_.block(block);
      const std::int64_t plane = n * args_.geometry.channels + c, width = args_.pool.width.output;
      return {rows, plane * args_.pool.outputs() + rows.begin * width, rows.count() * width,
              args_.keep.planes && !args_.keep.planes[plane]};
    }

    void write_zeros(const Part& to) const {
      std::memset(found_ + to.at, 0, static_cast<std::size_t>(to.count) * sizeof(T));
      if (args_.positions) std::memset(args_.positions + to.at, 0, static_cast<std::size_t>(to.count));
    }

    // Writes the elements that the keys belong to; row `first` of the plane is at x.
    void store_found(const Part& to, const T* x, std::int64_t first, S sign) {
      S* const keys = pooler_.keys();
      T* const found = found_ + to.at;
      if (args_.monotone && sign * sign == 1)
        return for_each_vector(to.count, [&](std::int64_t i, auto lanes) {
          store(found + i, detail::load_unaligned<S>(keys + i) * sign, lanes);
        });
      FetchAhead nothing;
      offsets_.each(to.rows, first, pooler_.numbers(), nothing,
                    [&](std::int64_t i, std::int64_t at) { keys[i] = load_one(x + at); });
      store_run(keys, to.count, found);
    }

    // Bytes from which on the processor itself fetches enough of a plane ahead.
    static constexpr std::int64_t kLongPlane = 8 * 1024;

    const PoolForwardArgs& args_;
    const PlaneWindows<S>& windows_;
    T* found_;
    PlanePooler<S> pooler_;
    WindowOffsets offsets_;
    Scratch<S> keys_;
    std::int64_t first_channel_ = 0;
    ChannelRun<S> runs_[ChannelBlocks::kMost];
    S signs_[ChannelBlocks::kMost];
    FetchAhead ahead_;
    bool prefetching_;
  };

  const PoolForwardArgs& args_;
  PlaneSplit split_;
  PlaneWindows<S> windows_;
  T* found_;
};

template <class T>
class PlanesPoolBackward {
  using S = Compute<T>;
  using V = Vec<S>;

 public:
  explicit PlanesPoolBackward(const PoolBackwardArgs& args) : args_(args), split_(args.geometry) {
    constexpr std::int64_t kScratchBytes = 16 * 1024;
    const PoolAxis &height = args.pool.height, &width = args.pool.width;
    // Windows reach so far into the rows above a block and below it.
    const std::int64_t margin = (height.kernel - 1) * height.dilation;
    rows_each_ = kScratchBytes / (width.input * static_cast<std::int64_t>(sizeof(S)));
    if (rows_each_ < margin + 1) rows_each_ = margin + 1;
    rows_each_ = smaller(rows_each_, height.input);
    blocks_ = (height.input + rows_each_ - 1) / rows_each_;
    most_outputs_ = smaller((rows_each_ + margin) / height.stride + 1, height.output);
    most_inputs_ = smaller(rows_each_ + 2 * margin, height.input);
    streaming_ = worth_streaming<T>(args.geometry, args.grad_input, args.grad_input.inner) &&
                 worth_streaming<T>(args.geometry, args.grad_input, rows_each_ * width.input);
    prefetching_ = args.training && worth_prefetching<T>(args.geometry);
  }

  void run() const {
    const Geometry& g = args_.geometry;
    if (needs_sums(args_) && split_.spans == 1) {
      const ChannelBlocks channels(g.channels);
      parallel_parts(args_.parallel_for, channels.count(), channels.each * split_.length,
                     [&](std::int64_t begin, std::int64_t end) {
                       Worker worker(*this);
                       for (std::int64_t i = begin; i < end; ++i)
                         run_channels(worker, channels.begin(i), channels.end(i));
                     });
      return;
    }
    Scratch<InputGradient> coefficients(g.channels);
    if (needs_sums(args_)) {
      sums_of_parts(coefficients.data());
    } else {
      for (std::int64_t c = 0; c < g.channels; ++c) coefficients[c] = {};
    }
    if (!args_.grad_input.data) return;
    parallel_parts(args_.parallel_for, g.batch * g.channels * blocks_, g.spatial / blocks_,
                   [&](std::int64_t begin, std::int64_t end) {
                     Worker worker(*this);
                     for (std::int64_t i = begin; i < end; ++i) {
                       const std::int64_t n = i / blocks_ / g.channels, c = i / blocks_ % g.channels;
                       worker.set_channels(c, c + 1);
                       worker.write(n, c, i % blocks_, coefficients[c], nullptr);
                     }
                   });
  }

 private:
  // Windows whose gradients are summed in float before they are carried over to double.
  static constexpr std::int64_t kRun = kFloatAdditions * kLanes;

  // Windows whose gradients are in scratch memory at a time.
  std::int64_t most_windows() const {
    const std::int64_t written = most_outputs_ * args_.pool.width.output;
    return kRun > written ? kRun : written;
  }

  class Worker;

  // Sums whose lanes are only added up at the end, which takes longer than a small plane's additions.
  struct LaneSums {
    Vec<double> grad{}, grad_deviation{};
    GradientSums finish() const { return {sum_of_lanes<double>(grad), sum_of_lanes<double>(grad_deviation)}; }
  };

  void run_channels(Worker& worker, std::int64_t begin, std::int64_t end) const {
    const std::int64_t batch = args_.geometry.batch;
    LaneSums sums[ChannelBlocks::kMost];
    InputGradient coefficients[ChannelBlocks::kMost];
    worker.set_channels(begin, end);
    for (std::int64_t n = 0; n < batch; ++n)
      for (std::int64_t c = begin; c < end; ++c) worker.add(n, c, 0, args_.pool.outputs(), sums[c - begin]);
    for (std::int64_t c = begin; c < end; ++c)
      coefficients[c - begin] = finish_sums<T>(args_, c, sums[c - begin].finish());
    if (!args_.grad_input.data) return;
    for (std::int64_t n = batch - 1; n >= 0; --n)
      for (std::int64_t c = begin; c < end; ++c) {
        const T* const next = c + 1 < end ? worker.input_if_dropped(n, c + 1) : worker.input_if_dropped(n - 1, begin);
        for (std::int64_t i = 0; i < blocks_; ++i)
          worker.write(n, c, i, coefficients[c - begin], i + 1 == blocks_ ? next : nullptr);
      }
  }

  void sums_of_parts(InputGradient* coefficients) const {
    constexpr std::int64_t kPart = 8 * kRun;
    const Geometry& g = args_.geometry;
    const std::int64_t outputs = args_.pool.outputs(), parts = (outputs + kPart - 1) / kPart;
    const std::int64_t per_channel = g.batch * parts;
    Scratch<GradientSums> sums(g.channels * per_channel);
    parallel_parts(args_.parallel_for, g.channels * per_channel, outputs / parts,
                   [&](std::int64_t begin, std::int64_t end) {
                     Worker worker(*this);
                     for (std::int64_t i = begin; i < end; ++i) {
                       const std::int64_t from = i % parts * kPart, c = i / per_channel;
                       worker.set_channels(c, c + 1);
                       LaneSums s;
                       worker.add(i % per_channel / parts, c, from, smaller(from + kPart, outputs), s);
                       sums[i] = s.finish();
                     }
                   });
    for (std::int64_t c = 0; c < g.channels; ++c)
      coefficients[c] = finish_sums<T>(args_, c, sums.data() + c * per_channel, per_channel, 1);
  }

  // The scratch memory of one thread, and what it does with one plane after the other.
  class Worker {
   public:
    explicit Worker(const PlanesPoolBackward& of)
        : of_(of),
          args_(of.args_),
          spreader_(of.args_.pool, of.most_inputs_),
          x_(of.most_windows() + kLanes),
          grad_(of.most_windows() + kLanes) {}

    void set_channels(std::int64_t begin, std::int64_t end) {
      first_channel_ = begin;
      for (std::int64_t c = begin; c < end; ++c) runs_[c - begin].set(channel_affine<S>(args_, c));
    }

    // Adds those of windows [begin, end) of a plane.
    void add(std::int64_t n, std::int64_t c, std::int64_t begin, std::int64_t end, LaneSums& sums) {
      if (dropped(n, c)) return;
      for (std::int64_t from = begin; from < end; from += kRun) {
        const std::int64_t count = smaller(kRun, end - from);
        find_gradients(n, c, from, count);
        V of_run{}, deviation_of_run{};
        const S mean = run_of(c).mean();
        for_each_vector(count, [&](std::int64_t i, auto lanes) {
          const V g = covered<S>(detail::load_unaligned<S>(grad_.data() + i), lanes);
          of_run += g;
          deviation_of_run += g * (detail::load_unaligned<S>(x_.data() + i) - mean);
        });
        sums.grad += convert<Vec<double>>(of_run);
        sums.grad_deviation += convert<Vec<double>>(deviation_of_run);
      }
    }

    // A plane of the input that nothing is fetched of before it is written, if that is worth it.
    const T* input_if_dropped(std::int64_t n, std::int64_t c) const {
      return of_.prefetching_ && n >= 0 && dropped(n, c) ? piece_start<T>(args_.input, Piece{n, 0, 0}, c) : nullptr;
    }

    // Writes a block of a plane's input gradient. Meanwhile as much is fetched from `next` on.
    void write(std::int64_t n, std::int64_t c, std::int64_t block, const InputGradient& coefficients, const T* next) {
      const PoolAxis& height = args_.pool.height;
      const std::int64_t begin = block * of_.rows_each_, width = args_.pool.width.input;
      const PlaneRows rows{begin, smaller(begin + of_.rows_each_, height.input)};
      const S* spread = dropped(n, c) ? nullptr : spread_gradients(n, c, rows);
      const Piece piece{n, begin * width, rows.count() * width};
      const T* input = piece_start<T>(args_.input, piece, c);
      T* to = piece_start<T>(args_.grad_input, piece, c);
      const V mean = splat<V>(run_of(c).mean()), scale = splat<V>(run_of(c).scale());
      const V by_deviation = splat<V>(coefficients.by_deviation), constant = splat<V>(coefficients.constant);
      const auto spread_at = [&](std::int64_t i) { return detail::load_unaligned<S>(spread + i); };
      const auto with = [&](V g, std::int64_t i, auto lanes) {
        if (next) prefetch(next + i);
        return input_gradient(g, load(input + i, lanes), mean, scale, by_deviation, constant);
      };
      if (!args_.training)
        write_run(to, piece.length, [&](std::int64_t i, auto) { return (spread ? spread_at(i) : V{}) * scale; });
      else if (spread)
        write_run(to, piece.length, [&](std::int64_t i, auto lanes) { return with(spread_at(i), i, lanes); });
      else
        write_run(to, piece.length, [&](std::int64_t i, auto lanes) { return with(V{}, i, lanes); });
    }

   private:
    // Writes gradient(i, lanes) to each vector of a run.
    FL_INLINE void write_run(T* to, std::int64_t n, auto&& gradient) const {
      if (of_.streaming_)
        for_each_vector(n, [&](std::int64_t i, auto lanes) { stream(to + i, gradient(i, lanes), lanes); });
      else
        for_each_vector(n, [&](std::int64_t i, auto lanes) { store(to + i, gradient(i, lanes), lanes); });
    }

    bool dropped(std::int64_t n, std::int64_t c) const {
      return args_.keep.planes && !args_.keep.planes[n * args_.geometry.channels + c];
    }

    const ChannelRun<S>& run_of(std::int64_t c) const { return runs_[c - first_channel_]; }

    std::int64_t at(std::int64_t n, std::int64_t c, std::int64_t window) const {
      return (n * args_.geometry.channels + c) * args_.pool.outputs() + window;
    }

    // Leaves what goes into the activation of windows [from, from + count), and its gradients, in scratch memory.
    void find_gradients(std::int64_t n, std::int64_t c, std::int64_t from, std::int64_t count) {
      const T* grad_output = piece_start<T>(args_.grad_output, Piece{n, from, count}, c);
      const T* selected = static_cast<const T*>(args_.selected) + at(n, c, from);
      const V keep_scale = splat<V>(args_.keep.scale);
      S *const x = x_.data(), *const grad = grad_.data();
      for_each_vector(count, [=](std::int64_t i, auto lanes) {
        detail::store_unaligned<S>(x + i, load(selected + i, lanes));
        detail::store_unaligned<S>(grad + i, load(grad_output + i, lanes) * keep_scale);
      });
      activation_gradients(args_.activation, run_of(c).affine(), Runs{count}, x, grad);
    }

    // Returns the gradients of rows of the input, before the normalisation. Meanwhile these rows are fetched.
    const S* spread_gradients(std::int64_t n, std::int64_t c, PlaneRows rows) {
      const Pool& pool = args_.pool;
      const PlaneRows output = covering_rows(pool.height, rows);
      const std::int64_t width = pool.width.input, first = output.begin * pool.width.output;
      FetchAhead ahead;
      if (of_.prefetching_ && output.count() > 0)
        ahead = FetchAhead(piece_start<T>(args_.input, Piece{n, rows.begin * width, 0}, c),
                           rows.count() * width * std::int64_t{sizeof(T)}, 1, 0, output.count());
      if (output.count() > 0) find_gradients(n, c, first, output.count() * pool.width.output);
      return spreader_.spread(rows, output, grad_.data(), args_.positions + at(n, c, first), ahead);
    }

    const PlanesPoolBackward& of_;
    const PoolBackwardArgs& args_;
    PlaneSpreader<S> spreader_;
    Scratch<S> x_, grad_;
    std::int64_t first_channel_ = 0;
    ChannelRun<S> runs_[ChannelBlocks::kMost];
  };

  const PoolBackwardArgs& args_;
  PlaneSplit split_;
  std::int64_t rows_each_, blocks_, most_outputs_, most_inputs_;
  bool streaming_, prefetching_;
};

}  // namespace FASTLAYERS_ISA
}  // namespace fastlayers
