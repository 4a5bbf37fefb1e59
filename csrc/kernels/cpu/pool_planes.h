// Pooling kernels for tensors made of planes, cut into tasks as planes.h cuts them: a channel, or, where channels are
// few, its spans for the statistics and blocks of rows for the rest. Dropped planes are read for the statistics only.
#pragma once

#include "activation_runs.h"
#include "planes.h"
#include "pool.h"
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
  // the given number.
  template <class Number, class F>
  FL_INLINE void each(PlaneRows output, std::int64_t first, const Number* numbers, F&& f) const {
    const PoolAxis &height = pool_.height, &width = pool_.width;
    std::int64_t i = 0;
    for (std::int64_t o = output.begin; o < output.end; ++o) {
      std::int64_t at = (height.start(o) - first) * width.input - width.padding;
      for (std::int64_t k = 0; k < width.output; ++k, ++i, at += width.stride) f(i, at + offsets_[numbers[i]]);
    }
  }

 private:
  const Pool& pool_;
  Scratch<std::int64_t> offsets_;
};

template <class T>
class PlanesPoolForward {
  using S = Compute<T>;
  using V = Vec<S>;

 public:
  explicit PlanesPoolForward(const PoolForwardArgs& args) : args_(args), split_(args.geometry), windows_(args.pool) {}

  void run() const {
    const Geometry& g = args_.geometry;
    const std::int64_t blocks = windows_.blocks();
    if (args_.training && split_.spans == 1) {
      parallel_parts(args_.parallel_for, g.channels, split_.length, [&](std::int64_t begin, std::int64_t end) {
        Worker worker(*this);
        for (std::int64_t c = begin; c < end; ++c) {
          statistics_of_channel<T>(args_, c, split_.span(0));
          for (std::int64_t i = g.batch * blocks - 1; i >= 0; --i) worker.pool(i / blocks, c, i % blocks);
        }
      });
      return;
    }
    if (args_.training) statistics_of_spans<T>(args_, split_);
    parallel_parts(args_.parallel_for, g.batch * g.channels * blocks, g.spatial / blocks,
                   [&](std::int64_t begin, std::int64_t end) {
                     Worker worker(*this);
                     for (std::int64_t i = begin; i < end; ++i)
                       worker.pool(i / blocks / g.channels, i / blocks % g.channels, i % blocks);
                   });
  }

 private:
  // The scratch memory of one thread, and what it does with one block of a plane after the other.
  class Worker {
   public:
    explicit Worker(const PlanesPoolForward& of)
        : args_(of.args_),
          windows_(of.windows_),
          pooler_(of.windows_),
          offsets_(of.args_.pool),
          activated_(of.args_.monotone ? 0 : of.windows_.most_inputs() + kLanes) {}

    void pool(std::int64_t n, std::int64_t c, std::int64_t block) {
      const PlaneRows output = windows_.block(block);
      const std::int64_t plane = n * args_.geometry.channels + c, width = args_.pool.width.output;
      const std::int64_t to = plane * args_.pool.outputs() + output.begin * width, count = output.count() * width;
      if (args_.keep.planes && !args_.keep.planes[plane]) return write_zeros(to, count);
      if (c != channel_) set_channel(c);
      find(piece_start<T>(args_.input, Piece{n, 0, 0}, c), output);
      write(to, count);
    }

   private:
    void set_channel(std::int64_t c) {
      channel_ = c;
      run_.set(channel_affine<S>(args_, c));
      sign_ = args_.monotone ? static_cast<S>(key_sign(args_.weight[c] * args_.invstd[c])) : S{1};
    }

    void write_zeros(std::int64_t to, std::int64_t count) const {
      const auto bytes = static_cast<std::size_t>(count) * sizeof(T);
      std::memset(static_cast<T*>(args_.output.data) + to, 0, bytes);
      if (args_.selected) std::memset(static_cast<T*>(args_.selected) + to, 0, bytes);
      if (args_.positions) std::memset(args_.positions + to, 0, static_cast<std::size_t>(count));
    }

    // Leaves the largest elements of the windows where the pooler has their keys.
    void find(const T* plane, PlaneRows output) {
      const PlaneRows input = window_rows(args_.pool.height, output);
      const std::int64_t width = args_.pool.width.input;
      const T* x = plane + input.begin * width;
      if (args_.monotone) {
        pooler_.fill(x, input.count(), sign_);
      } else {
        const std::int64_t n = input.count() * width;
        load_run(x, n, activated_.data());
        activation_values(args_.activation, run_.affine(), activated_.data(), n, activated_.data());
        pooler_.fill(activated_.data(), input.count(), S{1});
      }
      pooler_.pool(output, input);
      S* keys = pooler_.keys();
      if (args_.monotone && sign_ * sign_ == 1) {
        const std::int64_t n = output.count() * args_.pool.width.output;
        for (std::int64_t i = 0; i < n; i += kLanes)
          detail::store_unaligned<S>(keys + i, detail::load_unaligned<S>(keys + i) * sign_);
      } else {
        offsets_.each(output, input.begin, pooler_.numbers(),
                      [&](std::int64_t i, std::int64_t at) { keys[i] = load_one(x + at); });
      }
    }

    void write(std::int64_t to, std::int64_t count) const {
      S* x = pooler_.keys();
      if (args_.selected) store_run(x, count, static_cast<T*>(args_.selected) + to);
      if (args_.positions) {
        for_each_vector(count, [&](std::int64_t i, auto lanes) {
          store_numbers<S>(args_.positions + to + i, detail::load_unaligned<Number<S>>(pooler_.numbers() + i), lanes);
        });
      }
      activation_values(args_.activation, run_.affine(), x, count, x);
      T* output = static_cast<T*>(args_.output.data) + to;
      const V scale = splat<V>(args_.keep.scale);
      for_each_vector(count, [&](std::int64_t i, auto lanes) {
        store(output + i, detail::load_unaligned<S>(x + i) * scale, lanes);
      });
    }

    const PoolForwardArgs& args_;
    const PlaneWindows<S>& windows_;
    PlanePooler<S> pooler_;
    WindowOffsets offsets_;
    Scratch<S> activated_;
    ChannelRun<S> run_;
    std::int64_t channel_ = -1;
    S sign_ = 1;
  };

  const PoolForwardArgs& args_;
  PlaneSplit split_;
  PlaneWindows<S> windows_;
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
    most_outputs_ = smaller((rows_each_ + margin) / height.stride + 1, height.output) * width.output;
    most_inputs_ = smaller(rows_each_ + 2 * margin, height.input) * width.input;
    streaming_ = worth_streaming<T>(args.geometry, args.grad_input, args.grad_input.inner) &&
                 worth_streaming<T>(args.geometry, args.grad_input, rows_each_ * width.input);
    if (args.training && worth_prefetching<T>(args.geometry) && blocks_ == 1) next_input_ = args.input.outer;
  }

  void run() const {
    const Geometry& g = args_.geometry;
    if (needs_sums(args_) && split_.spans == 1) {
      parallel_parts(args_.parallel_for, g.channels, split_.length, [&](std::int64_t begin, std::int64_t end) {
        Worker worker(*this);
        for (std::int64_t c = begin; c < end; ++c) {
          GradientSums sums;
          for (std::int64_t n = 0; n < g.batch; ++n) sums.add(worker.sums(n, c, 0, args_.pool.outputs()));
          const InputGradient coefficients = finish_sums<T>(args_, c, sums);
          if (!args_.grad_input.data) continue;
          for (std::int64_t i = g.batch * blocks_ - 1; i >= 0; --i)
            worker.write(i / blocks_, c, i % blocks_, coefficients);
        }
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
                       worker.write(n, c, i % blocks_, coefficients[c]);
                     }
                   });
  }

 private:
  // Windows whose gradients are in scratch memory at a time.
  static constexpr std::int64_t kRun = 1024;

  void sums_of_parts(InputGradient* coefficients) const {
    constexpr std::int64_t kPart = 8 * kRun;
    const Geometry& g = args_.geometry;
    const std::int64_t outputs = args_.pool.outputs(), parts = (outputs + kPart - 1) / kPart;
    const std::int64_t per_channel = g.batch * parts;
    Scratch<GradientSums> sums(g.channels * per_channel);
    parallel_parts(
        args_.parallel_for, g.channels * per_channel, outputs / parts, [&](std::int64_t begin, std::int64_t end) {
          Worker worker(*this);
          for (std::int64_t i = begin; i < end; ++i) {
            const std::int64_t from = i % parts * kPart;
            sums[i] = worker.sums(i % per_channel / parts, i / per_channel, from, smaller(from + kPart, outputs));
          }
        });
    for (std::int64_t c = 0; c < g.channels; ++c) {
      GradientSums total;
      for (std::int64_t i = 0; i < per_channel; ++i) total.add(sums[c * per_channel + i]);
      coefficients[c] = finish_sums<T>(args_, c, total);
    }
  }

  // The scratch memory of one thread, and what it does with one plane after the other.
  class Worker {
   public:
    explicit Worker(const PlanesPoolBackward& of)
        : of_(of),
          args_(of.args_),
          offsets_(of.args_.pool),
          x_((kRun > of.most_outputs_ ? kRun : of.most_outputs_) + kLanes),
          grad_((kRun > of.most_outputs_ ? kRun : of.most_outputs_) + kLanes),
          spread_(of.most_inputs_ + kLanes) {}

    // Those of windows [begin, end) of a plane.
    GradientSums sums(std::int64_t n, std::int64_t c, std::int64_t begin, std::int64_t end) {
      if (dropped(n, c)) return {};
      Vec<double> grad{}, grad_deviation{};
      for (std::int64_t from = begin; from < end; from += kRun) {
        const std::int64_t count = smaller(kRun, end - from);
        find_gradients(n, c, from, count);
        for_each_vector(count, [&](std::int64_t i, auto lanes) {
          const V g = covered<S>(detail::load_unaligned<S>(grad_.data() + i), lanes);
          const V x = covered<S>(detail::load_unaligned<S>(x_.data() + i), lanes);
          grad += convert<Vec<double>>(g);
          grad_deviation += convert<Vec<double>>(g) * convert<Vec<double>>(x - run_.mean());
        });
      }
      return {sum_of_lanes<double>(grad), sum_of_lanes<double>(grad_deviation)};
    }

    // Writes a block of a plane's input gradient.
    void write(std::int64_t n, std::int64_t c, std::int64_t block, const InputGradient& coefficients) {
      const PoolAxis& height = args_.pool.height;
      const std::int64_t begin = block * of_.rows_each_, width = args_.pool.width.input;
      const PlaneRows rows{begin, smaller(begin + of_.rows_each_, height.input)};
      set_channel(c);
      const S* spread = dropped(n, c) ? nullptr : spread_gradients(n, c, rows);
      const Piece piece{n, begin * width, rows.count() * width};
      const T* input = piece_start<T>(args_.input, piece, c);
      T* to = piece_start<T>(args_.grad_input, piece, c);
      const V mean = splat<V>(run_.mean()), scale = splat<V>(run_.scale());
      const V by_deviation = splat<V>(coefficients.by_deviation), constant = splat<V>(coefficients.constant);
      const std::int64_t next = of_.next_input_;
      for_each_vector(piece.length, [&](std::int64_t i, auto lanes) {
        if (next) prefetch(input + i - next);
        const V g = spread ? detail::load_unaligned<S>(spread + i) : V{};
        const V gx =
            args_.training ? input_gradient(g, load(input + i, lanes), mean, scale, by_deviation, constant) : g * scale;
        of_.streaming_ ? stream(to + i, gx, lanes) : store(to + i, gx, lanes);
      });
    }

   private:
    bool dropped(std::int64_t n, std::int64_t c) const {
      return args_.keep.planes && !args_.keep.planes[n * args_.geometry.channels + c];
    }

    void set_channel(std::int64_t c) {
      if (c == channel_) return;
      channel_ = c;
      run_.set(channel_affine<S>(args_, c));
    }

    std::int64_t at(std::int64_t n, std::int64_t c, std::int64_t window) const {
      return (n * args_.geometry.channels + c) * args_.pool.outputs() + window;
    }

    // Leaves what goes into the activation of windows [from, from + count), and its gradients, in scratch memory.
    void find_gradients(std::int64_t n, std::int64_t c, std::int64_t from, std::int64_t count) {
      set_channel(c);
      const T* grad_output = piece_start<T>(args_.grad_output, Piece{n, from, count}, c);
      load_run(static_cast<const T*>(args_.selected) + at(n, c, from), count, x_.data());
      const V keep_scale = splat<V>(args_.keep.scale);
      for_each_vector(count, [&](std::int64_t i, auto lanes) {
        detail::store_unaligned<S>(grad_.data() + i, load(grad_output + i, lanes) * keep_scale);
      });
      activation_gradients(args_.activation, run_.affine(), x_.data(), count, grad_.data());
    }

    // Returns the gradients of rows of the input, before the normalisation.
    const S* spread_gradients(std::int64_t n, std::int64_t c, PlaneRows rows) {
      const PlaneRows output = covering_rows(args_.pool.height, rows);
      PlaneRows touched = rows;
      if (output.count() > 0) {
        const PlaneRows of_windows = window_rows(args_.pool.height, output);
        touched = {smaller(rows.begin, of_windows.begin), of_windows.end > rows.end ? of_windows.end : rows.end};
      }
      const std::int64_t width = args_.pool.width.input, outputs = args_.pool.width.output;
      S* const spread = spread_.data();
      for (std::int64_t i = 0; i < touched.count() * width; i += kLanes) detail::store_unaligned<S>(spread + i, V{});
      if (output.count() > 0) {
        const std::int64_t first = output.begin * outputs;
        find_gradients(n, c, first, output.count() * outputs);
        const S* const grad = grad_.data();
        offsets_.each(output, touched.begin, args_.positions + at(n, c, first),
                      [&](std::int64_t i, std::int64_t to) { spread[to] += grad[i]; });
      }
      return spread + (rows.begin - touched.begin) * width;
    }

    const PlanesPoolBackward& of_;
    const PoolBackwardArgs& args_;
    WindowOffsets offsets_;
    Scratch<S> x_, grad_, spread_;
    ChannelRun<S> run_;
    std::int64_t channel_ = -1;
  };

  const PoolBackwardArgs& args_;
  PlaneSplit split_;
  std::int64_t rows_each_, blocks_, most_outputs_, most_inputs_;
  bool streaming_;
  std::int64_t next_input_ = 0;  // back to what is read after a plane, if that is to be fetched ahead
};

}  // namespace FASTLAYERS_ISA
}  // namespace fastlayers
