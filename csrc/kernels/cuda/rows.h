// Kernels for channels_last tensors and (N, C): the channels of one sample and position, a row, are adjacent.
//
// Where a row does not fill whole groups of 8 elements, as many rows as do are taken as one long row, a run, whose
// columns are channels several times over; elsewhere a run is one row. Each thread has one group of columns and goes
// down the runs with it; threads beside each other have neighbouring groups, the lanes of a block neighbouring runs.
#pragma once

#include "divisor.h"
#include "elements.h"
#include "philox.h"
#include "planes.h"
#include "sums.h"

namespace fastlayers::cuda {

struct RowsWalk {
  std::int64_t channels = 0, spatial = 0, runs = 0;
  int rows_per_run = 1;
  std::int64_t columns = 0, last_columns = 0;  // of a run, and of the last one
  Divisor by_channels;
  std::int64_t groups = 0;         // of a run
  int tile_groups = 1, tiles = 1;  // how many groups of a run a block is wide, and how many blocks a run
  int lanes = 1;                   // runs that a block has in hand at once
  int splits = 1;                  // blocks that share the runs
  std::int64_t kept_tiles = 0;
  bool aligned_mask = false;  // the 8 values of a group of channels can be read as words
  Aligned aligned;

  // How many channels a block has anything of.
  FL_INLINE int tile_channels() const {
    const std::int64_t width = std::int64_t{tile_groups} * kGroup;
    return static_cast<int>(width < channels ? width : channels);
  }
};

// What one thread of a block does.
struct RowsPart {
  int tile, split, lane;
  std::int64_t group;
  bool active;

  __device__ __forceinline__ RowsPart(const RowsWalk& walk, std::uint32_t block) {
    tile = static_cast<int>(block) % walk.tiles;
    split = static_cast<int>(block) / walk.tiles;
    lane = static_cast<int>(threadIdx.x) / walk.tile_groups;
    group = std::int64_t{tile} * walk.tile_groups + static_cast<int>(threadIdx.x) % walk.tile_groups;
    active = lane < walk.lanes && group < walk.groups;
  }
  // The channel of element e of this thread's group.
  __device__ __forceinline__ std::int64_t channel(const RowsWalk& walk, int e) const {
    const auto column = static_cast<std::uint32_t>(group * kGroup + e);
    return walk.by_channels.remainder(column, walk.by_channels.quotient(column));
  }
};

// Where a group is. kRows groups of each thread are one tile.
struct RowGroup {
  std::int64_t run = 0, column = 0;
  Span valid;
};

template <int kRows>
__device__ __forceinline__ std::int64_t tiles_of(const RowsWalk& walk, const RowsPart& part) {
  const std::int64_t in_all = (walk.runs + std::int64_t{kRows} * walk.lanes - 1) / (std::int64_t{kRows} * walk.lanes);
  return part.split < in_all ? (in_all - part.split - 1) / walk.splits + 1 : 0;
}

template <int kRows>
__device__ __forceinline__ RowGroup row_group(const RowsWalk& walk, const RowsPart& part, std::int64_t i, int u) {
  RowGroup at;
  at.run = ((part.split + i * walk.splits) * kRows + u) * walk.lanes + part.lane;
  at.column = part.group * kGroup;
  if (!part.active || at.run >= walk.runs) return at;
  const std::int64_t left = (at.run == walk.runs - 1 ? walk.last_columns : walk.columns) - at.column;
  at.valid.end = static_cast<int>(left < kGroup ? (left > 0 ? left : 0) : kGroup);
  return at;
}

// Calls f(e, where element e lies from the tensor's start) for a group whose rows have gaps between them.
template <class F>
__device__ __forceinline__ void each_with_gaps(const RowsWalk& walk, std::int64_t row_stride, const RowGroup& g,
                                               F&& f) {
#pragma unroll
  for (int e = 0; e < kGroup; ++e) {
    const auto column = static_cast<std::uint32_t>(g.column + e);
    const std::uint32_t row = walk.by_channels.quotient(column);
    const std::int64_t offset =
        (g.run * walk.rows_per_run + row) * row_stride + walk.by_channels.remainder(column, row);
    if (g.valid.has(e)) f(e, offset);
  }
}

__device__ __forceinline__ bool has_gaps(const RowsWalk& walk, std::int64_t row_stride) {
  return walk.rows_per_run > 1 && row_stride != walk.channels;
}

template <class T>
__device__ __forceinline__ Group<T> load(const Source& from, const RowsWalk& walk, const RowGroup& g, bool aligned) {
  const T* data = static_cast<const T*>(from.data);
  if (!has_gaps(walk, from.outer))
    return load(data + g.run * walk.rows_per_run * from.outer + g.column, g.valid, aligned);
  Group<T> group = zeros<T>();
  each_with_gaps(walk, from.outer, g, [&](int e, std::int64_t offset) { group.elements[e] = data[offset]; });
  return group;
}

// Results have no gaps.
template <class T>
__device__ __forceinline__ void store(const Target& to, const RowsWalk& walk, const RowGroup& g, const Group<T>& group,
                                      bool aligned) {
  store(static_cast<T*>(to.data) + g.run * walk.columns + g.column, group, g.valid, aligned);
}

__device__ __forceinline__ std::int64_t flat_group(const RowsWalk& walk, const RowGroup& g) {
  return (g.run * walk.columns + g.column) / kGroup;
}

// Which of the 8 values from `first` on are not zero, as bits.
template <class Word>
__device__ __forceinline__ unsigned nonzero_bits(const void* values, std::int64_t first, bool aligned) {
  struct alignas(8) Eight {
    Word values[kGroup];
  };
  const Word* from = static_cast<const Word*>(values) + first;
  Eight eight;
  if (aligned) {
    eight = *reinterpret_cast<const Eight*>(from);
  } else {
#pragma unroll
    for (int e = 0; e < kGroup; ++e) eight.values[e] = from[e];
  }
  unsigned bits = 0;
#pragma unroll
  for (int e = 0; e < kGroup; ++e) bits |= static_cast<unsigned>(eight.values[e] != 0) << e;
  return bits;
}

// What dropout keeps of a thread's groups of columns. The channels of a sample have one answer for all its rows.
class KeptColumns {
 public:
  __device__ __forceinline__ unsigned of(const Keep& keep, const RowsWalk& walk, const RowGroup& g) {
    const unsigned valid = g.valid.bits();
    if (keep.planes) return valid ? valid & of_channels(keep, walk, g) : 0;
    if (!keep.seed || !valid) return valid;
    return valid & kept_bits(static_cast<std::uint64_t>(*keep.seed), keep_threshold(keep.scale),
                             static_cast<std::uint64_t>(g.run * walk.columns + g.column));
  }

 private:
  __device__ __forceinline__ unsigned of_channels(const Keep& keep, const RowsWalk& walk, const RowGroup& g) {
    if (walk.rows_per_run > 1) return of_several_rows(keep, walk, g);
    const std::int64_t sample = g.run / walk.spatial;
    if (sample != sample_) {
      sample_ = sample;
      bits_ = nonzero(keep, sample * walk.channels + g.column, walk.aligned_mask);
    }
    return bits_;
  }
  static __device__ __forceinline__ unsigned nonzero(const Keep& keep, std::int64_t first, bool aligned) {
    switch (keep.plane_bytes) {
      case 1: return nonzero_bits<std::uint8_t>(keep.planes, first, aligned);
      case 2: return nonzero_bits<std::uint16_t>(keep.planes, first, aligned);
      case 4: return nonzero_bits<std::uint32_t>(keep.planes, first, aligned);
      default: return nonzero_bits<std::uint64_t>(keep.planes, first, aligned);
    }
  }
  static __device__ __forceinline__ unsigned of_several_rows(const Keep& keep, const RowsWalk& walk,
                                                             const RowGroup& g) {
    unsigned bits = 0;
#pragma unroll
    for (int e = 0; e < kGroup; ++e) {
      const auto column = static_cast<std::uint32_t>(g.column + e);
      const std::uint32_t row = walk.by_channels.quotient(column);
      const std::int64_t sample = (g.run * walk.rows_per_run + row) / walk.spatial;
      if (g.valid.has(e) && is_kept(keep, sample * walk.channels + walk.by_channels.remainder(column, row)))
        bits |= 1u << e;
    }
    return bits;
  }

  std::int64_t sample_ = -1;
  unsigned bits_ = 0;
};

// A block's shared memory: two doubles for each thread and element of a group, room for the sums of its channels, what
// it works out of them, then the tiles that it keeps.
template <class Numbers>
struct RowsShared {
  double* sums;      // [2 * kGroup][threads]
  Pair* parts;       // [threads]
  Numbers* numbers;  // [tile_channels]
  unsigned char* tiles;

  __device__ __forceinline__ explicit RowsShared(const RowsWalk& walk) {
    unsigned char* at = dynamic_shared();
    sums = reinterpret_cast<double*>(at);
    parts = reinterpret_cast<Pair*>(at + blockDim.x * kGroup * sizeof(Pair));
    numbers = reinterpret_cast<Numbers*>(parts + blockDim.x);
    tiles = at + rows_shared_bytes(static_cast<int>(blockDim.x), walk.tile_channels());
    static_assert(sizeof(Numbers) <= kMaxNumbersBytes);
  }
  __device__ __forceinline__ double& first(int e) const { return sums[2 * e * blockDim.x + threadIdx.x]; }
  __device__ __forceinline__ double& second(int e) const { return sums[(2 * e + 1) * blockDim.x + threadIdx.x]; }

  __device__ __forceinline__ void clear() const {
#pragma unroll
    for (int e = 0; e < kGroup; ++e) first(e) = second(e) = 0;
  }
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
                                                const RowsShared<ChannelAffine<Compute<T>>>& shared) {
  using S = Compute<T>;
  shared.clear();
  S origin[kGroup] = {}, deviations[kGroup] = {}, squares[kGroup] = {};
  int rows = 0, partial_end = 0;
  const std::int64_t tiles = tiles_of<kRows>(walk, part);
  for (std::int64_t i = 0; i < tiles; ++i) {
    Group<T> x[kRows];
    Span valid[kRows];
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      const RowGroup g = row_group<kRows>(walk, part, i, u);
      valid[u] = g.valid;
      x[u] = g.valid.empty() ? zeros<T>() : load<T>(args.input, walk, g, walk.aligned.input);
      if (i < walk.kept_tiles) Kept<T>::put(shared.tiles, i * kRows + u, x[u]);
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
template <class Shared>
__device__ __forceinline__ void write_partial(const RowsWalk& walk, const RowsPart& part, const Shared& shared,
                                              Pair* partial) {
  for (int lanes = walk.lanes; lanes > 1; lanes = (lanes + 1) / 2) {
    const int half = (lanes + 1) / 2;
    __syncthreads();
    if (part.lane < lanes - half) {
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
    const std::int64_t column = part.group * kGroup + e;
    if (column < walk.columns) partial[part.split * walk.columns + column] = {shared.first(e), shared.second(e)};
  }
}

// Calls finish(i, channel, sums, leads) for `count` channels, of which i is one, from column `first` on: once for each,
// by some thread of the block. `parts` is shared memory, a Pair for each thread. `leads` holds in one block only.
template <class F>
__device__ __forceinline__ void each_channel(const RowsWalk& walk, std::int64_t first, int count, const Pair* partial,
                                             Pair* parts, F&& finish) {
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const int shares = threads / count, i = thread % count, share = thread / count;
  const auto column = static_cast<std::uint32_t>(first + i);
  const std::int64_t channel = walk.by_channels.remainder(column, walk.by_channels.quotient(column));
  Pair sums;
  if (share < shares) {
    const int entries = walk.splits * walk.rows_per_run;
#pragma unroll 4
    for (int entry = share; entry < entries; entry += shares) {
      const int split = entry / walk.rows_per_run, row = entry % walk.rows_per_run;
      sums.add(partial[split * walk.columns + row * walk.channels + channel]);
    }
  }
  parts[thread] = sums;
  __syncthreads();
  if (share > 0) return;
  for (int s = 1; s < shares; ++s) sums.add(parts[s * count + i]);
  finish(i, channel, sums, first + i < walk.channels);
}

// The numbers of the 8 channels of a thread's group.
template <class Numbers>
__device__ __forceinline__ PerElement<Numbers> of_columns(const RowsWalk& walk, const RowsPart& part,
                                                          const Numbers* numbers, std::int64_t first_column) {
  PerElement<Numbers> mine{};
#pragma unroll
  for (int e = 0; e < kGroup; ++e) {
    if (!part.active) continue;
    // numbers[0] is the channel of first_column; they go round.
    std::int64_t i = part.channel(walk, e);
    if (first_column) {
      const auto column = static_cast<std::uint32_t>(first_column);
      i -= walk.by_channels.remainder(column, walk.by_channels.quotient(column));
      if (i < 0) i += walk.channels;
    }
    mine.values[e] = numbers[i];
  }
  return mine;
}

template <class T, int kRows, Activations kWhich>
__device__ __forceinline__ void apply_forward(const ForwardArgs& args, const RowsWalk& walk, const RowsPart& part,
                                              const PerElement<ChannelAffine<Compute<T>>>& affines,
                                              unsigned char* kept_tiles) {
  KeptColumns columns;
  for (std::int64_t i = tiles_of<kRows>(walk, part); i-- > 0;) {
    Group<T> x[kRows], residual[kRows];
    unsigned kept[kRows];
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      const RowGroup g = row_group<kRows>(walk, part, i, u);
      kept[u] = columns.of(args.keep, walk, g);
      x[u] = residual[u] = zeros<T>();
      if (!kept[u]) continue;
      x[u] = i < walk.kept_tiles ? Kept<T>::get(kept_tiles, i * kRows + u)
                                 : load<T>(args.input, walk, g, walk.aligned.input);
      if (args.residual.data) residual[u] = load<T>(args.residual, walk, g, walk.aligned.residual);
    }
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      const RowGroup g = row_group<kRows>(walk, part, i, u);
      if (g.valid.empty()) continue;
      std::uint8_t* flat = args.flat_bits ? args.flat_bits + flat_group(walk, g) : nullptr;
      const Group<T> output = forward_group<kWhich>(args, x[u], residual[u], affines, kept[u], flat);
      store(args.output, walk, g, output, walk.aligned.output);
    }
  }
}

// The operands of backward at one group.
template <class T>
__device__ __forceinline__ void load_besides(BackwardGroup<T>& group, const BackwardArgs& args, const RowsWalk& walk,
                                             const RowGroup& g) {
  if (args.flat_bits)
    group.flat = args.flat_bits[flat_group(walk, g)];
  else if (args.residual.data)
    group.residual = load<T>(args.residual, walk, g, walk.aligned.residual);
}

template <class T, int kRows, Activations kWhich>
__device__ __forceinline__ void collect_backward(const BackwardArgs& args, const RowsWalk& walk, const RowsPart& part,
                                                 const RowsShared<Gradient<Compute<T>>>& shared) {
  using S = Compute<T>;
  shared.clear();
  PerElement<ChannelAffine<S>> affines{};
#pragma unroll
  for (int e = 0; e < kGroup; ++e)
    if (part.active) affines.values[e] = saved_affine<T>(args, part.channel(walk, e));
  S grad[kGroup] = {}, grad_deviation[kGroup] = {};
  int rows = 0;
  KeptColumns columns;
  const std::int64_t tiles = tiles_of<kRows>(walk, part);
  for (std::int64_t i = 0; i < tiles; ++i) {
    BackwardGroup<T> group[kRows];
    unsigned kept[kRows];
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      const RowGroup g = row_group<kRows>(walk, part, i, u);
      kept[u] = columns.of(args.keep, walk, g);
      if (!kept[u]) continue;
      group[u].grad_output = load<T>(args.grad_output, walk, g, walk.aligned.grad_output);
      group[u].x = load<T>(args.input, walk, g, walk.aligned.input);
      load_besides(group[u], args, walk, g);
      if (i < walk.kept_tiles) {
        Kept<T>::put(shared.tiles, 2 * (i * kRows + u), group[u].grad_output);
        Kept<T>::put(shared.tiles, 2 * (i * kRows + u) + 1, group[u].x);
      }
    }
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      S g[kGroup];
      backward_group<kWhich>(args, group[u].grad_output, group[u].x, group[u].residual, group[u].flat, affines, kept[u],
                             g);
#pragma unroll
      for (int e = 0; e < kGroup; ++e) {
        grad[e] += g[e];
        grad_deviation[e] += g[e] * (group[u].x[e] - affines[e].mean);
      }
    }
    rows += kRows;
    if (rows + kRows <= kFloatRows && i + 1 < tiles) continue;
#pragma unroll
    for (int e = 0; e < kGroup; ++e) {
      shared.first(e) += static_cast<double>(grad[e]);
      shared.second(e) += static_cast<double>(grad_deviation[e]);
      grad[e] = grad_deviation[e] = 0;
    }
    rows = 0;
  }
}

template <class T, int kRows, Activations kWhich>
__device__ __forceinline__ void apply_backward(const BackwardArgs& args, const RowsWalk& walk, const RowsPart& part,
                                               const PerElement<Gradient<Compute<T>>>& gradients,
                                               unsigned char* kept_tiles) {
  using S = Compute<T>;
  PerElement<ChannelAffine<S>> affines;
#pragma unroll
  for (int e = 0; e < kGroup; ++e) affines.values[e] = gradients[e].affine;
  KeptColumns columns;
  for (std::int64_t i = tiles_of<kRows>(walk, part); i-- > 0;) {
    BackwardGroup<T> group[kRows];
    unsigned kept[kRows];
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      const RowGroup g = row_group<kRows>(walk, part, i, u);
      kept[u] = columns.of(args.keep, walk, g);
      if (g.valid.empty()) continue;
      if (kept[u] && i < walk.kept_tiles) {
        group[u].grad_output = Kept<T>::get(kept_tiles, 2 * (i * kRows + u));
        group[u].x = Kept<T>::get(kept_tiles, 2 * (i * kRows + u) + 1);
      } else {
        if (kept[u]) group[u].grad_output = load<T>(args.grad_output, walk, g, walk.aligned.grad_output);
        if (kept[u] || args.training) group[u].x = load<T>(args.input, walk, g, walk.aligned.input);
      }
      if (kept[u]) load_besides(group[u], args, walk, g);
    }
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      const RowGroup g = row_group<kRows>(walk, part, i, u);
      if (g.valid.empty()) continue;
      S before[kGroup];
      backward_group<kWhich>(args, group[u].grad_output, group[u].x, group[u].residual, group[u].flat, affines, kept[u],
                             before);
      Group<T> result;
      if (args.grad_input.data) {
#pragma unroll
        for (int e = 0; e < kGroup; ++e)
          result.set(e, input_gradient_at<S>(args, gradients, e, before[e], group[u].x[e]));
        store(args.grad_input, walk, g, result, walk.aligned.grad_input);
      }
      if (args.grad_residual.data) {
#pragma unroll
        for (int e = 0; e < kGroup; ++e) result.set(e, before[e]);
        store(args.grad_residual, walk, g, result, walk.aligned.grad_residual);
      }
    }
  }
}

// Forward in one kernel. With several splits it has to be launched cooperatively: they meet in `partial`.
template <class T, int kRows, Activations kWhich>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks)
    rows_forward_on_chip(const ForwardArgs args, const RowsWalk walk, Pair* partial) {
  using S = Compute<T>;
  const RowsPart part(walk, blockIdx.x);
  const RowsShared<ChannelAffine<S>> shared(walk);
  collect_forward<T, kRows>(args, walk, part, shared);
  write_partial(walk, part, shared, partial);
  walk.splits > 1 ? grid_sync() : __syncthreads();
  const std::int64_t first = std::int64_t{part.tile} * walk.tile_groups * kGroup;
  each_channel(walk, first, walk.tile_channels(), partial, shared.parts,
               [&](int i, std::int64_t channel, const Pair& sums, bool leads) {
                 const Statistics found =
                     batch_statistics(args, channel, column_origin<T>(args, channel), sums, leads && part.split == 0);
                 shared.numbers[i] = channel_affine<S>(args, channel, found);
               });
  __syncthreads();
  apply_forward<T, kRows, kWhich>(args, walk, part, of_columns(walk, part, shared.numbers, first), shared.tiles);
}

template <class T, int kRows>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks)
    rows_forward_sums(const ForwardArgs args, const RowsWalk walk, Pair* partial) {
  const RowsPart part(walk, blockIdx.x);
  const RowsShared<ChannelAffine<Compute<T>>> shared(walk);
  collect_forward<T, kRows>(args, walk, part, shared);
  write_partial(walk, part, shared, partial);
}

// Each block finishes some channels; without `partial` (evaluation mode) by the running statistics.
inline constexpr int kFinishedChannels = 8;

template <class T>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks)
    rows_forward_finish(const ForwardArgs args, const RowsWalk walk, const Pair* partial,
                        ChannelAffine<Compute<T>>* numbers) {
  const std::int64_t first = std::int64_t{blockIdx.x} * kFinishedChannels;
  const std::int64_t left = walk.channels - first;
  const int count = static_cast<int>(left < kFinishedChannels ? left : kFinishedChannels);
  each_channel(walk, first, count, partial, reinterpret_cast<Pair*>(dynamic_shared()),
               [&](int, std::int64_t channel, const Pair& sums, bool) {
                 const double origin = column_origin<T>(args, channel);
                 numbers[channel] =
                     channel_affine<Compute<T>>(args, channel, batch_statistics(args, channel, origin, sums, true));
               });
}

// In evaluation mode `numbers` is null: each thread works them out of the running statistics.
template <class T, int kRows, Activations kWhich>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks)
    rows_forward_apply(const ForwardArgs args, const RowsWalk walk, const ChannelAffine<Compute<T>>* numbers) {
  using S = Compute<T>;
  const RowsPart part(walk, gridDim.x - 1 - blockIdx.x);
  PerElement<ChannelAffine<S>> affines{};
  if (numbers) {
    affines = of_columns(walk, part, numbers, 0);
  } else {
#pragma unroll
    for (int e = 0; e < kGroup; ++e) {
      if (!part.active) continue;
      const std::int64_t channel = part.channel(walk, e);
      const bool leads = part.split == 0 && part.lane == 0 && part.group * kGroup + e < walk.channels;
      affines.values[e] = channel_affine<S>(args, channel, running_statistics(args, channel, leads));
    }
  }
  apply_forward<T, kRows, kWhich>(args, walk, part, affines, nullptr);
}

template <class T, int kRows, Activations kWhich>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks)
    rows_backward_on_chip(const BackwardArgs args, const RowsWalk walk, Pair* partial) {
  using S = Compute<T>;
  const RowsPart part(walk, blockIdx.x);
  const RowsShared<Gradient<S>> shared(walk);
  collect_backward<T, kRows, kWhich>(args, walk, part, shared);
  write_partial(walk, part, shared, partial);
  walk.splits > 1 ? grid_sync() : __syncthreads();
  const std::int64_t first = std::int64_t{part.tile} * walk.tile_groups * kGroup;
  each_channel(walk, first, walk.tile_channels(), partial, shared.parts,
               [&](int i, std::int64_t channel, const Pair& sums, bool leads) {
                 shared.numbers[i] = channel_gradient<S>(args, channel, sums, leads && part.split == 0);
               });
  __syncthreads();
  apply_backward<T, kRows, kWhich>(args, walk, part, of_columns(walk, part, shared.numbers, first), shared.tiles);
}

template <class T, int kRows, Activations kWhich>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks)
    rows_backward_sums(const BackwardArgs args, const RowsWalk walk, Pair* partial) {
  const RowsPart part(walk, blockIdx.x);
  const RowsShared<Gradient<Compute<T>>> shared(walk);
  collect_backward<T, kRows, kWhich>(args, walk, part, shared);
  write_partial(walk, part, shared, partial);
}

template <class T>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks)
    rows_backward_finish(const BackwardArgs args, const RowsWalk walk, const Pair* partial,
                         Gradient<Compute<T>>* numbers) {
  const std::int64_t first = std::int64_t{blockIdx.x} * kFinishedChannels;
  const std::int64_t left = walk.channels - first;
  const int count = static_cast<int>(left < kFinishedChannels ? left : kFinishedChannels);
  each_channel(walk, first, count, partial, reinterpret_cast<Pair*>(dynamic_shared()),
               [&](int, std::int64_t channel, const Pair& sums, bool) {
                 numbers[channel] = channel_gradient<Compute<T>>(args, channel, sums, true);
               });
}

// `numbers` is null where nothing depends on sums.
template <class T, int kRows, Activations kWhich>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks)
    rows_backward_apply(const BackwardArgs args, const RowsWalk walk, const Gradient<Compute<T>>* numbers) {
  using S = Compute<T>;
  const RowsPart part(walk, gridDim.x - 1 - blockIdx.x);
  PerElement<Gradient<S>> gradients{};
  if (numbers) {
    gradients = of_columns(walk, part, numbers, 0);
  } else {
#pragma unroll
    for (int e = 0; e < kGroup; ++e)
      if (part.active) gradients.values[e] = channel_gradient<S>(args, part.channel(walk, e), {}, false);
  }
  apply_backward<T, kRows, kWhich>(args, walk, part, gradients, nullptr);
}

}  // namespace fastlayers::cuda
