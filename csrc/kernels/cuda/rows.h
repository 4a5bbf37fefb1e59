// Kernels for channels_last tensors and (N, C): the channels of one sample and position, a row, are adjacent.
//
// Where a row does not fill whole groups of 8 elements, as many rows as do are taken as one long row, a run, whose
// columns are channels several times over; elsewhere a run is one row. Each thread has one group of columns and goes
// down the runs with it; threads beside each other have neighbouring groups, the lanes of a block neighbouring runs.
#pragma once

#include "divisor.h"
#include "keep.h"
#include "sums.h"
#include "tiles.h"

namespace fastlayers::cuda {

struct RowGroup;
class KeptColumns;

struct RowsWalk {
  using Place = RowGroup;
  using Dropout = KeptColumns;

  std::int64_t channels = 0;
  std::uint32_t runs = 0;
  int rows_per_run = 1;
  std::int64_t columns = 0, last_columns = 0;  // of a run, and of the last one
  Divisor by_channels, by_spatial;
  std::int64_t groups = 0;         // of a run
  int tile_groups = 1, tiles = 1;  // how many groups of a run a block is wide, and how many blocks a run
  int lanes = 1;                   // runs that a block has in hand at once
  int splits = 1;                  // blocks that share the runs
  bool cooperative = false;        // several blocks have columns of a channel, and meet in the kernel
  std::uint32_t kept_tiles = 0;
  bool aligned_mask = false;  // the 8 values of a group of channels can be read as words
  Aligned aligned;
};

// What one thread of a block does.
struct RowsPart {
  int tile;
  std::uint32_t split, lane, column;  // column: the first of this thread's group
  bool active;

  __device__ __forceinline__ RowsPart(const RowsWalk& walk, std::uint32_t block) {
    tile = static_cast<int>(block % static_cast<std::uint32_t>(walk.tiles));
    split = block / static_cast<std::uint32_t>(walk.tiles);
    lane = threadIdx.x / static_cast<std::uint32_t>(walk.tile_groups);
    const std::uint32_t group = static_cast<std::uint32_t>(tile * walk.tile_groups) +
                                threadIdx.x % static_cast<std::uint32_t>(walk.tile_groups);
    column = group * kGroup;
    active = lane < static_cast<std::uint32_t>(walk.lanes) && group < walk.groups;
  }
  // The channel of element e of this thread's group.
  __device__ __forceinline__ std::uint32_t channel(const RowsWalk& walk, int e) const {
    const std::uint32_t c = column + static_cast<std::uint32_t>(e);
    return walk.by_channels.remainder(c, walk.by_channels.quotient(c));
  }
};

// Where a group is. kRows groups of each thread are one tile.
struct RowGroup {
  std::uint32_t run = 0;
  Span valid;
};

template <int kRows>
__device__ __forceinline__ std::uint32_t tiles_of(const RowsWalk& walk, const RowsPart& part) {
  const auto rows = static_cast<std::uint32_t>(kRows * walk.lanes);
  const std::uint32_t in_all = (walk.runs + rows - 1) / rows;
  return part.split < in_all ? (in_all - part.split - 1) / static_cast<std::uint32_t>(walk.splits) + 1 : 0;
}

template <int kRows>
__device__ __forceinline__ RowGroup group_at(const RowsWalk& walk, const RowsPart& part, std::uint32_t i,
                                             std::uint32_t u) {
  RowGroup at;
  const std::uint32_t tile = part.split + i * static_cast<std::uint32_t>(walk.splits);
  at.run = (tile * kRows + u) * static_cast<std::uint32_t>(walk.lanes) + part.lane;
  if (!part.active || at.run >= walk.runs) return at;
  const std::int64_t left = (at.run == walk.runs - 1 ? walk.last_columns : walk.columns) - part.column;
  at.valid.end = static_cast<int>(left < kGroup ? (left > 0 ? left : 0) : kGroup);
  return at;
}

// Calls f(e, where element e lies from the tensor's start) for a group whose rows have gaps between them.
template <class F>
__device__ __forceinline__ void each_with_gaps(const RowsWalk& walk, std::int64_t row_stride, const RowsPart& part,
                                               const RowGroup& g, F&& f) {
#pragma unroll
  for (int e = 0; e < kGroup; ++e) {
    const std::uint32_t column = part.column + static_cast<std::uint32_t>(e), row = walk.by_channels.quotient(column);
    const std::int64_t in_all = std::int64_t{g.run} * walk.rows_per_run + row;
    if (g.valid.has(e)) f(e, in_all * row_stride + walk.by_channels.remainder(column, row));
  }
}

template <class T>
__device__ __forceinline__ Group<T> load(const Source& from, const RowsWalk& walk, const RowsPart& part,
                                         const RowGroup& g, bool aligned) {
  const T* data = static_cast<const T*>(from.data);
  if (walk.rows_per_run == 1 || from.outer == walk.channels)
    return load(data + (g.run * (walk.rows_per_run * from.outer) + part.column), g.valid, aligned);
  Group<T> group = zeros<T>();
  each_with_gaps(walk, from.outer, part, g, [&](int e, std::int64_t offset) { group.elements[e] = data[offset]; });
  return group;
}

// Where the group is in the memory of results, which have no gaps.
__device__ __forceinline__ std::int64_t offset_of(const RowsWalk& walk, const RowsPart& part, const RowGroup& g) {
  return g.run * walk.columns + part.column;
}

template <class T>
__device__ __forceinline__ void store(const Target& to, const RowsWalk& walk, const RowsPart& part, const RowGroup& g,
                                      const Group<T>& group, bool aligned) {
  store(static_cast<T*>(to.data) + offset_of(walk, part, g), group, g.valid, aligned);
}

__device__ __forceinline__ std::int64_t flat_byte_of(const RowsWalk& walk, const RowsPart& part, const RowGroup& g) {
  return offset_of(walk, part, g) / kGroup;
}

// What dropout keeps of a thread's groups of columns. The channels of a sample have one answer for all its rows.
class KeptColumns {
 public:
  __device__ __forceinline__ unsigned of(const Keep& keep, const RowsWalk& walk, const RowsPart& part,
                                         const RowGroup& g) {
    const unsigned valid = g.valid.bits();
    if (!valid || !(keep.planes || keep.seed)) return valid;
    if (keep.seed) return valid & KeptElements(keep).from(offset_of(walk, part, g));
    if (walk.rows_per_run > 1) return of_several_rows(keep, walk, part, g);
    const std::uint32_t sample = walk.by_spatial.quotient(g.run);
    if (sample != sample_) {
      sample_ = sample;
      bits_ = kept_channels(keep, sample * walk.channels + part.column, {0, kGroup}, walk.aligned_mask);
    }
    return bits_;
  }

 private:
  static __device__ __forceinline__ unsigned of_several_rows(const Keep& keep, const RowsWalk& walk,
                                                             const RowsPart& part, const RowGroup& g) {
    unsigned bits = 0;
    each_with_gaps(walk, walk.channels, part, g, [&](int e, std::int64_t offset) {
      const std::uint32_t channel = part.channel(walk, e);
      const auto row = static_cast<std::uint32_t>((offset - channel) / walk.channels);
      if (is_kept(keep, walk.by_spatial.quotient(row) * walk.channels + channel)) bits |= 1u << e;
    });
    return bits;
  }

  std::uint32_t sample_ = ~0u;
  unsigned bits_ = 0;
};

// A block's shared memory: two doubles for each thread and element of a group, a Pair for each thread, then the tiles
// that the block keeps.
class RowsShared {
 public:
  __device__ __forceinline__ double& first(int e) const { return sums()[2 * e * blockDim.x + threadIdx.x]; }
  __device__ __forceinline__ double& second(int e) const { return sums()[(2 * e + 1) * blockDim.x + threadIdx.x]; }
  __device__ __forceinline__ Pair* parts() const {
    return reinterpret_cast<Pair*>(dynamic_shared() + kGroup * sizeof(Pair) * blockDim.x);
  }
  __device__ __forceinline__ unsigned char* tiles() const { return dynamic_shared() + rows_shared_bytes(blockDim.x); }

  __device__ __forceinline__ void clear() const {
#pragma unroll
    for (int e = 0; e < kGroup; ++e) first(e) = second(e) = 0;
  }

 private:
  static __device__ __forceinline__ double* sums() { return reinterpret_cast<double*>(dynamic_shared()); }
};

// So many rows are summed in float before they are carried over to double: few enough that a first row far from the
// others, about which they are summed, costs no more digits than that (it is one of them).
inline constexpr int kFloatRows = 32;

// The origin of a channel's deviations: its element in the first row (sums.h).
template <class T>
__device__ __forceinline__ double column_origin(const ForwardArgs& args, std::int64_t channel) {
  return Deviations<Compute<T>>(widen(static_cast<const T*>(args.input.data)[channel])).origin();
}

// Sums a thread's columns into its place in shared memory, and keeps its block's first tiles.
template <class T, int kRows>
__device__ __forceinline__ void collect_forward(const ForwardArgs& args, const RowsWalk& walk, const RowsPart& part,
                                                const RowsShared& shared) {
  using S = Compute<T>;
  shared.clear();
  S origin[kGroup] = {}, deviations[kGroup] = {}, squares[kGroup] = {};
  int rows = 0, partial_end = 0;
  const std::uint32_t tiles = tiles_of<kRows>(walk, part);
  for (std::uint32_t i = 0; i < tiles; ++i) {
    Group<T> x[kRows];
    Span valid[kRows];
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      const RowGroup g = group_at<kRows>(walk, part, i, u);
      valid[u] = g.valid;
      x[u] = g.valid.empty() ? zeros<T>() : load<T>(args.input, walk, part, g, walk.aligned.input);
      if (i < walk.kept_tiles) Kept<T>::put(shared.tiles(), i * kRows + u, x[u]);
    }
    if (rows == 0) {
#pragma unroll
      for (int e = 0; e < kGroup; ++e) origin[e] = x[0][e] - x[0][e] == 0 ? x[0][e] : S(0);
    }
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      if (valid[u].whole()) {
        ++rows;
#pragma unroll
        for (int e = 0; e < kGroup; ++e) {
          const S d = x[u][e] - origin[e];
          deviations[e] += d;
          squares[e] += d * d;
        }
      } else if (!valid[u].empty()) {  // only in the last run
        partial_end = valid[u].end;
#pragma unroll
        for (int e = 0; e < kGroup; ++e) {
          const S d = valid[u].has(e) ? x[u][e] - origin[e] : S(0);
          deviations[e] += d;
          squares[e] += d * d;
        }
      }
    }
    if (rows + kRows <= kFloatRows && i + 1 < tiles) continue;
    if (part.active) {
#pragma unroll
      for (int e = 0; e < kGroup; ++e) {
        const double n = rows + (e < partial_end), d = deviations[e];
        const double shift = static_cast<double>(origin[e]) - column_origin<T>(args, part.channel(walk, e));
        shared.first(e) += d + n * shift;
        shared.second(e) += static_cast<double>(squares[e]) + shift * (d + d + n * shift);
        deviations[e] = squares[e] = 0;
      }
    }
    rows = partial_end = 0;
  }
}

// Adds up the lanes of a block and writes one Pair for each of its columns to `partial`, [splits][columns].
__device__ __forceinline__ void write_partial(const RowsWalk& walk, const RowsPart& part, const RowsShared& shared,
                                              Pair* partial) {
  for (int lanes = walk.lanes; lanes > 1; lanes = (lanes + 1) / 2) {
    const int half = (lanes + 1) / 2;
    __syncthreads();
    if (static_cast<int>(part.lane) < lanes - half) {
#pragma unroll
      for (int e = 0; e < kGroup; ++e) {
        shared.first(e) += (&shared.first(e))[half * walk.tile_groups];
        shared.second(e) += (&shared.second(e))[half * walk.tile_groups];
      }
    }
  }
  if (part.lane != 0 || !part.active) return;
#pragma unroll
  for (int e = 0; e < kGroup; ++e) {
    partial[part.split * walk.columns + part.column + e] = {shared.first(e), shared.second(e)};
  }
}

// Calls finish(channel, sums) for `count` channels, at most as many as a block has threads, from `first` on: once for
// each, by some thread of the block.
template <class F>
__device__ __forceinline__ void each_channel(const RowsWalk& walk, std::int64_t first, int count, const Pair* partial,
                                             F&& finish) {
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const int shares = threads / count, i = thread % count, share = thread / count;
  Pair* parts = RowsShared().parts();
  Pair sums;
  if (share < shares) {
    const int entries = walk.splits * walk.rows_per_run;
#pragma unroll 4
    for (int entry = share; entry < entries; entry += shares) {
      const int split = entry / walk.rows_per_run, row = entry % walk.rows_per_run;
      sums.add(partial[split * walk.columns + row * walk.channels + first + i]);
    }
  }
  __syncthreads();  // whoever still reads parts of other channels
  parts[thread] = sums;
  __syncthreads();
  if (share > 0) return;
  for (int s = 1; s < shares; ++s) sums.add(parts[s * count + i]);
  finish(first + i, sums);
}

// The same for all channels of the tensor, shared out over the blocks of a grid.
template <class F>
__device__ __forceinline__ void all_channels(const RowsWalk& walk, const Pair* partial, F&& finish) {
  for (std::int64_t first = std::int64_t{blockIdx.x} * kFinishedChannels; first < walk.channels;
       first += std::int64_t{gridDim.x} * kFinishedChannels) {
    const std::int64_t left = walk.channels - first;
    each_channel(walk, first, static_cast<int>(left < kFinishedChannels ? left : kFinishedChannels), partial, finish);
  }
}

// The same in a kernel that goes on with the channels: in all blocks together where several have columns of a channel,
// else in each block for the channels that it has itself.
template <class F>
__device__ __forceinline__ void meet(const RowsWalk& walk, const RowsPart& part, const Pair* partial, F&& finish) {
  if (walk.cooperative) {
    grid_sync();
    all_channels(walk, partial, finish);
    grid_sync();
    return;
  }
  __syncthreads();
  const std::int64_t width = std::int64_t{walk.tile_groups} * kGroup, first = part.tile * width;
  const std::int64_t end = first + width < walk.channels ? first + width : walk.channels;
  for (std::int64_t c = first; c < end; c += blockDim.x)
    each_channel(walk, c, static_cast<int>(end - c < blockDim.x ? end - c : blockDim.x), partial, finish);
  __syncthreads();
}

// What numbers(e, c) has of the 8 channels c of a thread's group.
template <class F>
__device__ __forceinline__ auto of_columns(const RowsWalk& walk, const RowsPart& part, F&& numbers) {
  PerElement<decltype(numbers(0, 0u))> mine{};
#pragma unroll
  for (int e = 0; e < kGroup; ++e)
    if (part.active) mine.values[e] = numbers(e, part.channel(walk, e));
  return mine;
}
template <class Numbers>
__device__ __forceinline__ PerElement<Numbers> read_columns(const RowsWalk& walk, const RowsPart& part,
                                                            const Numbers* numbers) {
  return of_columns(walk, part, [&](int, std::uint32_t c) { return numbers[c]; });
}

// Sums of the gradients of a thread's columns: those of some rows, and, in its place in shared memory, of all.
template <class S, int kRows>
class GradientsOfColumns {
 public:
  explicit __device__ __forceinline__ GradientsOfColumns(const RowsShared& shared) : shared_(shared) {
    shared_.clear();
  }
  __device__ __forceinline__ void add(int e, S grad, S deviation) {
    grad_[e] += grad;
    grad_deviation_[e] += grad * deviation;
  }
  __device__ __forceinline__ void end_tile(bool last) {
    rows_ += kRows;
    if (rows_ + kRows <= kFloatRows && !last) return;
#pragma unroll
    for (int e = 0; e < kGroup; ++e) {
      shared_.first(e) += static_cast<double>(grad_[e]);
      shared_.second(e) += static_cast<double>(grad_deviation_[e]);
      grad_[e] = grad_deviation_[e] = 0;
    }
    rows_ = 0;
  }

 private:
  const RowsShared& shared_;
  S grad_[kGroup] = {}, grad_deviation_[kGroup] = {};
  int rows_ = 0;
};

// Sums a thread's columns into its place in shared memory.
template <class T, int kRows, Activations kWhich>
__device__ __forceinline__ void sum_backward(const BackwardArgs& args, const RowsWalk& walk, const RowsPart& part,
                                             const RowsShared& shared) {
  using S = Compute<T>;
  const auto affines = of_columns(walk, part, [&](int, std::uint32_t c) { return saved_affine<S>(args, c); });
  GradientsOfColumns<S, kRows> gradients(shared);
  collect_backward<T, kRows, kWhich>(args, walk, part, affines, shared.tiles(), gradients);
}

// What is worked out once a channel's sums are known.
template <class T>
__device__ __forceinline__ void finish_channel(const ForwardArgs& args, std::int64_t channel, const Pair& sums,
                                               ChannelAffine<Compute<T>>* numbers) {
  const Statistics found = batch_statistics(args, channel, column_origin<T>(args, channel), sums, true);
  numbers[channel] = channel_affine<Compute<T>>(args, channel, found);
}
template <class T>
__device__ __forceinline__ void finish_channel(const BackwardArgs& args, std::int64_t channel, const Pair& sums,
                                               Gradient<Compute<T>>* numbers) {
  numbers[channel] = channel_gradient<Compute<T>>(args, channel, sums, true);
}

// In one kernel.
template <class T, int kRows, Activations kWhich>
__global__ void __launch_bounds__(kRowThreads, row_blocks(sizeof(T)))
    rows_forward_on_chip(const ForwardArgs args, const RowsWalk walk, Pair* partial,
                         ChannelAffine<Compute<T>>* numbers) {
  const RowsPart part(walk, blockIdx.x);
  const RowsShared shared;
  collect_forward<T, kRows>(args, walk, part, shared);
  write_partial(walk, part, shared, partial);
  meet(walk, part, partial, [&](std::int64_t c, const Pair& sums) { finish_channel<T>(args, c, sums, numbers); });
  apply_forward<T, kRows, kWhich>(args, walk, part, read_columns(walk, part, numbers), shared.tiles());
}

template <class T, int kRows, Activations kWhich>
__global__ void __launch_bounds__(kRowThreads, row_blocks(sizeof(T)))
    rows_backward_on_chip(const BackwardArgs args, const RowsWalk walk, Pair* partial, Gradient<Compute<T>>* numbers) {
  const RowsPart part(walk, blockIdx.x);
  const RowsShared shared;
  sum_backward<T, kRows, kWhich>(args, walk, part, shared);
  write_partial(walk, part, shared, partial);
  meet(walk, part, partial, [&](std::int64_t c, const Pair& sums) { finish_channel<T>(args, c, sums, numbers); });
  apply_backward<T, kRows, kWhich>(args, walk, part, read_columns(walk, part, numbers), shared.tiles());
}

// In three kernels: the first of them,
template <class T, int kRows>
__global__ void __launch_bounds__(kRowThreads, row_blocks(sizeof(T)))
    rows_forward_sums(const ForwardArgs args, const RowsWalk walk, Pair* partial) {
  const RowsPart part(walk, blockIdx.x);
  const RowsShared shared;
  collect_forward<T, kRows>(args, walk, part, shared);
  write_partial(walk, part, shared, partial);
}

template <class T, int kRows, Activations kWhich>
__global__ void __launch_bounds__(kRowThreads, row_blocks(sizeof(T)))
    rows_backward_sums(const BackwardArgs args, const RowsWalk walk, Pair* partial) {
  const RowsPart part(walk, blockIdx.x);
  const RowsShared shared;
  sum_backward<T, kRows, kWhich>(args, walk, part, shared);
  write_partial(walk, part, shared, partial);
}

// the second,
template <class T, class Args, class Numbers>
__global__ void __launch_bounds__(kRowThreads, row_blocks(sizeof(T)))
    rows_finish(const Args args, const RowsWalk walk, const Pair* partial, Numbers* numbers) {
  all_channels(walk, partial, [&](std::int64_t c, const Pair& sums) { finish_channel<T>(args, c, sums, numbers); });
}

// and the last, which begins where the first ended. Without sums it is the only one, and `numbers` is null: each thread
// works them out itself.
template <class T, int kRows, Activations kWhich>
__global__ void __launch_bounds__(kRowThreads, row_blocks(sizeof(T)))
    rows_forward_apply(const ForwardArgs args, const RowsWalk walk, const ChannelAffine<Compute<T>>* numbers) {
  using S = Compute<T>;
  const RowsPart part(walk, gridDim.x - 1 - blockIdx.x);
  const auto of_running = [&](int e, std::uint32_t c) {
    const bool leads = part.split == 0 && part.lane == 0 && part.column + e < walk.channels;
    return channel_affine<S>(args, c, running_statistics(args, c, leads));
  };
  const auto affines = numbers ? read_columns(walk, part, numbers) : of_columns(walk, part, of_running);
  apply_forward<T, kRows, kWhich>(args, walk, part, affines, nullptr);
}

template <class T, int kRows, Activations kWhich>
__global__ void __launch_bounds__(kRowThreads, row_blocks(sizeof(T)))
    rows_backward_apply(const BackwardArgs args, const RowsWalk walk, const Gradient<Compute<T>>* numbers) {
  using S = Compute<T>;
  const RowsPart part(walk, gridDim.x - 1 - blockIdx.x);
  const auto without_sums = [&](int, std::uint32_t c) { return channel_gradient<S>(args, c, {}, false); };
  const auto gradients = numbers ? read_columns(walk, part, numbers) : of_columns(walk, part, without_sums);
  apply_backward<T, kRows, kWhich>(args, walk, part, gradients, nullptr);
}

}  // namespace fastlayers::cuda
