// Kernels with max-pooling for contiguous tensors: planes.h without its last pass, and what pools, or spreads the
// gradients of what was pooled.
#pragma once

#include "planes.h"
#include "pooling.h"

namespace fastlayers::cuda {

// What the pooling kernels have to know besides PlanesWalk.
struct PlanesPoolWalk {
  PoolWalk pool;
  Divisor strips;                      // of a plane: columns of kStripRows windows
  int summed_splits = 1;               // blocks whose sums of a channel wait to be added up
  std::uint32_t batch = 0;             // planes of a channel
  std::uint32_t planes_per_block = 0;  // that a block keeps
  // Windows of a plane that are so many rows or columns apart have no element in common.
  Factor rows_apart, columns_apart;
};

// The part of a channel that one block has: planes one after the other.
struct WholePlanes {
  std::int64_t channel;
  std::uint32_t first, count, begin, end, tiles;  // planes; their groups; tiles of these
  bool leads;

  __device__ __forceinline__ WholePlanes(const PlanesWalk& walk, const PlanesPoolWalk& pooling, std::uint32_t tile) {
    const std::uint32_t splits = static_cast<std::uint32_t>(walk.splits), split = blockIdx.x % splits;
    channel = blockIdx.x / splits;
    first = split * pooling.planes_per_block < pooling.batch ? split * pooling.planes_per_block : pooling.batch;
    count = pooling.batch - first < pooling.planes_per_block ? pooling.batch - first : pooling.planes_per_block;
    begin = first * walk.groups_per_plane.divisor;
    end = begin + count * walk.groups_per_plane.divisor;
    tiles = (end - begin + tile - 1) / tile;
    leads = split == 0 && threadIdx.x == 0;
  }
  template <int kTile>
  __device__ __forceinline__ std::uint32_t tile_begin(const PlanesWalk&, std::uint32_t i) const {
    return begin + i * kTile * blockDim.x;
  }
};

// Pools strips of windows, [begin, end) of those of a channel, the last first: so many rows of one column, so that what
// a column and a plane have in common is worked out once. plane_at(sample) is where a plane begins, in shared or in
// global memory.
template <class T, Activations kWhich, class Offset, int kUnroll, class PlaneAt>
__device__ __forceinline__ void pool_strips(const PooledForwardArgs& args, const PlanesWalk& walk,
                                            const PlanesPoolWalk& pooling, std::int64_t channel, std::uint32_t begin,
                                            std::uint32_t end, const ChannelAffine<Compute<T>>& affine,
                                            PlaneAt&& plane_at) {
  using S = Compute<T>;
  const PoolWalk& pool = pooling.pool;
  const Uniform<ChannelAffine<S>> affines{affine};
  const auto scale = static_cast<S>(args.keep.scale);
  for (std::uint32_t step = (end - begin + blockDim.x - 1) / blockDim.x; step-- > 0;) {
    const std::uint32_t i = begin + step * blockDim.x + threadIdx.x;
    if (i >= end) continue;
    const std::uint32_t sample = pooling.strips.quotient(i), in_plane = pooling.strips.remainder(i, sample);
    const std::uint32_t strip = pool.output_columns.quotient(in_plane);
    const auto column = static_cast<int>(pool.output_columns.remainder(in_plane, strip));
    const int first_row = static_cast<int>(strip) * kStripRows, rows_left = pool.height.output - first_row;
    const int rows = rows_left < kStripRows ? rows_left : kStripRows;
    const std::int64_t plane = plane_of(walk, channel, sample);
    const bool kept = !args.keep.planes || is_kept(args.keep, plane);
    const T* from = plane_at(sample);
    const Reach columns(pool.width, column);
    std::int64_t to = plane * pool.outputs.divisor + first_row * pool.width.output + column;
    for (int row = 0; row < rows; ++row, to += pool.width.output) {
      S output[1] = {}, x[1] = {};
      int position[1] = {};
      if (kept) {
        const Window<Offset> window(pool, Reach(pool.height, first_row + row), columns, 1);
        pooled<kWhich, kUnroll>(
            args, pool, window, affines, [&](Offset at, S(&values)[1]) { values[0] = widen(from[at]); },
            [&](Offset at, int) { return widen(from[at]); }, x, position);
        activated<kWhich>(args.activation, affines, x, output);
      }
      narrow(output[0] * scale, static_cast<T*>(args.output.data)[to]);
      if (args.selected) narrow(x[0], static_cast<T*>(args.selected)[to]);
      if (args.positions) args.positions[to] = static_cast<std::uint8_t>(position[0]);
    }
  }
}

// Forward in one kernel: each channel has one block, or the blocks of a cluster, each of which keeps its planes in
// shared memory from the sums to the pooling.
template <class T, int kTile, Activations kWhich>
__global__ void __launch_bounds__(max_threads(sizeof(T)), pool_blocks_on_chip(sizeof(T)))
    planes_pool_forward_on_chip(const PooledForwardArgs args, const PlanesWalk walk, const PlanesPoolWalk pooling) {
  using S = Compute<T>;
  using Shared = PlanesShared<ChannelAffine<S>>;
  Shared& shared = Shared::here();
  T* staged = reinterpret_cast<T*>(Shared::tiles());
  const WholePlanes part(walk, pooling, kTile * blockDim.x);
  const auto keep = [&](std::uint32_t i, int u, const Group<T>& x) {
    const std::uint32_t group = part.tile_begin<kTile>(walk, i) + u * blockDim.x + threadIdx.x;
    if (group < part.end) *reinterpret_cast<Group<T>*>(staged + (group - part.begin) * kGroup) = x;
  };
  const auto deviations = collect_forward<T, kTile>(args, walk, part, keep);
  const Pair sums = cluster_sum(deviations.sums(), shared.scratch, &shared.total);
  if (threadIdx.x == 0) {
    const Statistics found = batch_statistics(args, part.channel, deviations.origin(), sums, part.leads);
    shared.numbers = channel_affine<S>(args, part.channel, found);
  }
  cluster_sync();  // as in planes_forward_on_chip; besides, the planes are there
  const auto plane_at = [&](std::uint32_t sample) {
    return staged + (sample - part.first) * walk.groups_per_plane.divisor * kGroup +
           skew_of(walk, part.channel, sample);
  };
  const std::uint32_t strips = pooling.strips.divisor;
  pool_strips<T, kWhich, int, 1>(args, walk, pooling, part.channel, part.first * strips,
                                 (part.first + part.count) * strips, shared.numbers, plane_at);
}

// The second of two kernels, behind planes_forward_sums, or the only one in evaluation mode. Begins where the first
// ended. Windows that overlap read from the first-level cache what they have in common.
template <class T, Activations kWhich>
__global__ void __launch_bounds__(kPoolThreads, pool_blocks(sizeof(T)))
    planes_pool_forward(const PooledForwardArgs args, const PlanesWalk walk, const PlanesPoolWalk pooling,
                        const Pair* partial) {
  using Shared = PlanesShared<ChannelAffine<Compute<T>>>;
  Shared& shared = Shared::here();
  const std::uint32_t block = gridDim.x - 1 - blockIdx.x, splits = static_cast<std::uint32_t>(walk.splits);
  const std::int64_t channel = block / splits;
  const std::uint32_t split = block % splits;
  const Pair sums = args.training ? sum_of_parts(channel, pooling.summed_splits, partial, shared.scratch) : Pair{};
  if (threadIdx.x == 0) shared.numbers = finished_affine<T>(args, channel, sums, split == 0);
  __syncthreads();
  const std::uint32_t strips = pooling.batch * pooling.strips.divisor, share = (strips + splits - 1) / splits;
  const std::uint32_t begin = split * share < strips ? split * share : strips;
  const std::uint32_t end = strips - begin < share ? strips : begin + share;
  const T* input = static_cast<const T*>(args.input.data) + channel * args.input.inner;
  pool_strips<T, kWhich, std::int64_t, 2>(args, walk, pooling, channel, begin, end, shared.numbers,
                                          [&](std::uint32_t sample) { return input + sample * args.input.outer; });
}

// Windows that have elements in a tile: some columns of some rows of windows, rows counted through all planes of a
// channel.
struct WindowRange {
  std::uint32_t first_row, first_column, columns, count = 0;

  __device__ __forceinline__ WindowRange(const PlanesWalk& walk, const PoolWalk& pool, std::int64_t channel,
                                         std::uint32_t first_group, std::uint32_t last_group) {
    const Place first(walk, pool, channel, first_group, 0), last(walk, pool, channel, last_group, kGroup - 1);
    const std::uint32_t rows = pool.output_rows.divisor;
    first_row = first.sample * rows + static_cast<std::uint32_t>(pool.height.first_window(first.row));
    const std::uint32_t end_row = last.sample * rows + static_cast<std::uint32_t>(pool.height.windows_end(last.row));
    int from = 0, to = pool.width.output;
    if (first.sample == last.sample && first.row == last.row) {
      from = pool.width.first_window(first.column);
      to = pool.width.windows_end(last.column);
    }
    first_column = static_cast<std::uint32_t>(from);
    columns = to > from ? static_cast<std::uint32_t>(to - from) : 0;
    if (end_row > first_row) count = (end_row - first_row) * columns;
  }
  __device__ __forceinline__ std::uint32_t row_of(const PoolWalk& pool, std::uint32_t i) const {
    return columns == pool.output_columns.divisor ? pool.output_columns.quotient(i) : i / columns;
  }

 private:
  // Of element e of a group; of the nearest one in the plane where that is outside.
  struct Place {
    std::uint32_t sample;
    int row, column;

    __device__ __forceinline__ Place(const PlanesWalk& walk, const PoolWalk& pool, std::int64_t channel,
                                     std::uint32_t group, int e) {
      PlaneGroup g;
      g.sample = sample = walk.groups_per_plane.quotient(group);
      g.number = walk.groups_per_plane.remainder(group, sample);
      g.skew = skew_of(walk, channel, sample);
      const std::int64_t at = g.first() + e, last = walk.spatial - 1;
      const auto inside = static_cast<std::uint32_t>(at < 0 ? 0 : at < last ? at : last);
      row = static_cast<int>(pool.input_columns.quotient(inside));
      column = static_cast<int>(inside) - row * pool.width.input;
    }
  };
};

// Adds the gradients of a channel's windows, before the activation, to `spread`, which has the elements of a tile of
// groups: each where its window's largest element is. Windows that have elements in common take turns, so that sums are
// the same each time.
template <class T>
__device__ __forceinline__ void spread_gradients(const PooledBackwardArgs& args, const PlanesWalk& walk,
                                                 const PlanesPoolWalk& pooling, std::int64_t channel,
                                                 std::uint32_t first_group, std::uint32_t groups,
                                                 const ChannelAffine<Compute<T>>& affine, Group<Compute<T>>* spread) {
  using S = Compute<T>;
  const PoolWalk& pool = pooling.pool;
  const WindowRange range(walk, pool, channel, first_group, first_group + groups - 1);
  const T* grad_output = static_cast<const T*>(args.grad_output.data) + channel * args.grad_output.inner;
  const T* selected = static_cast<const T*>(args.input.data) + channel * args.input.inner;
  const auto scale = static_cast<S>(args.keep.scale);
  const int turns = pooling.rows_apart * pooling.columns_apart;
  for (std::uint32_t begin = 0; begin < range.count; begin += blockDim.x) {
    int turn = -1;
    std::int64_t at = 0;
    S g = 0;
    if (const std::uint32_t i = begin + threadIdx.x; i < range.count) {
      const std::uint32_t in_range = range.row_of(pool, i), row_of_all = range.first_row + in_range;
      const std::uint32_t sample = pool.output_rows.quotient(row_of_all);
      const auto row = static_cast<int>(pool.output_rows.remainder(row_of_all, sample));
      const auto column = static_cast<int>(range.first_column + i - in_range * range.columns);
      const int window = row * pool.width.output + column;
      const std::int64_t plane = plane_of(walk, channel, sample);
      if (!args.keep.planes || is_kept(args.keep, plane)) {
        const std::uint32_t position = args.positions[plane * pool.outputs.divisor + window];
        const std::uint32_t kh = pool.kernel_columns.quotient(position);
        const auto kw = static_cast<int>(pool.kernel_columns.remainder(position, kh));
        const int h = pool.height.start(row) + static_cast<int>(kh) * pool.height.dilation;
        const int w = pool.width.start(column) + kw * pool.width.dilation;
        at = (std::int64_t{sample} * walk.groups_per_plane.divisor - first_group) * kGroup +
             skew_of(walk, channel, sample) + h * pool.width.input + w;
        if (at >= 0 && at < std::int64_t{groups} * kGroup) {
          turn = row % pooling.rows_apart * pooling.columns_apart + column % pooling.columns_apart;
          const S before = widen(grad_output[sample * args.grad_output.outer + window]) * scale;
          const S z = normalize<S>(widen(selected[sample * args.input.outer + window]), affine.mean, affine.scale,
                                   affine.shift);
          with_call<Activations::all, S>(args.activation, [&](auto act) { g = act.gradient(before, z); });
        }
      }
    }
    for (int now = 0; now < turns; ++now) {
      if (turn == now) spread[at / kGroup].elements[at % kGroup] += g;
      if (turns > 1) __syncthreads();
    }
  }
}

// Writes the input's gradient. The second of two kernels, behind planes_backward_sums of what was pooled; or the only
// one, and `partial` null, where nothing is summed.
template <class T, int kTile>
__global__ void __launch_bounds__(kPoolThreads, pool_blocks(sizeof(T)))
    planes_pool_backward(const PooledBackwardArgs args, const PlanesWalk walk, const PlanesPoolWalk pooling,
                         const Pair* partial) {
  using S = Compute<T>;
  using Shared = PlanesShared<Gradient<S>>;
  Shared& shared = Shared::here();
  const PlanesPart part(walk, gridDim.x - 1 - blockIdx.x);
  const Pair sums = partial ? sum_of_parts(part.channel, pooling.summed_splits, partial, shared.scratch) : Pair{};
  if (threadIdx.x == 0) shared.numbers = channel_gradient<S>(args, part.channel, sums, part.leads);
  __syncthreads();
  if (!args.grad_input.data) return;
  const Uniform<Gradient<S>> gradients{shared.numbers};
  auto* spread = reinterpret_cast<Group<S>*>(Shared::tiles());
  for (std::uint32_t i = part.tiles; i-- > 0;) {
    PlaneGroup g[kTile];
    Group<T> x[kTile];
#pragma unroll
    for (int u = 0; u < kTile; ++u) {
      g[u] = group_at<kTile>(walk, part, i, u);
      x[u] = zeros<T>();
      if (args.training) x[u] = load<T>(args.whole_input, walk, part, g[u], walk.aligned.input);
      spread[u * blockDim.x + threadIdx.x] = zeros<S>();
    }
    __syncthreads();
    const std::uint32_t first = part.tile_begin<kTile>(walk, i), left = part.end - first;
    spread_gradients<T>(args, walk, pooling, part.channel, first, left < kTile * blockDim.x ? left : kTile * blockDim.x,
                        gradients.value.affine, spread);
    __syncthreads();
#pragma unroll
    for (int u = 0; u < kTile; ++u) {
      if (g[u].valid.empty()) continue;
      const Group<S> before = spread[u * blockDim.x + threadIdx.x];
      store(args.grad_input, walk, part, g[u], input_gradient_group<T>(args, gradients, before, x[u]),
            walk.aligned.grad_input);
    }
  }
}

}  // namespace fastlayers::cuda
