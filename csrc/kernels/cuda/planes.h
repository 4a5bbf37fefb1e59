// Kernels for contiguous tensors: the positions of one sample and channel, a plane, are adjacent.
//
// A channel belongs to one block, to a cluster of blocks, or to several blocks that meet between two kernels. Its
// groups are numbered through all its planes; a tile is what a block takes at a time, some groups for each thread.
// Blocks walk their tiles once for the sums and then back, so that what was read last, and is still in a cache, is read
// first. In between, the first tiles stay in shared memory as far as it reaches.
#pragma once

#include "divisor.h"
#include "elements.h"
#include "philox.h"
#include "plan.h"
#include "sums.h"

namespace fastlayers::cuda {

// Which tensors can be moved in words of 16 bytes: those whose groups begin at multiples of it.
struct Aligned {
  bool input = false, residual = false, output = false;                 // forward
  bool grad_output = false, grad_input = false, grad_residual = false;  // backward, besides input and residual
};

struct PlanesWalk {
  std::int64_t channels = 0, spatial = 0;
  std::uint32_t groups = 0;  // of a channel
  Divisor groups_per_plane;
  bool whole_groups = false;  // each plane begins and ends with a group
  std::uint32_t tiles = 0;    // of a channel
  int splits = 1;             // blocks of a channel
  std::uint32_t kept_tiles = 0;
  Aligned aligned;
};

// Where a group is: in few registers, since several are in hand at once.
struct PlaneGroup {
  std::uint32_t sample = 0, number = 0;  // number: in the plane
  int skew = 0;                          // how many elements before the plane its first group begins
  Span valid;

  // The position in the plane where the group begins; may be before its start.
  __device__ __forceinline__ std::int64_t first() const { return static_cast<std::int64_t>(number) * kGroup - skew; }
};

// The part of a channel that one block has: each of so many tiles.
struct PlanesPart {
  std::int64_t channel;
  std::uint32_t split, tiles, end;  // end: the number behind the channel's last group
  bool leads;

  __device__ __forceinline__ PlanesPart(const PlanesWalk& walk, std::uint32_t block) {
    channel = block / static_cast<std::uint32_t>(walk.splits);
    split = block % static_cast<std::uint32_t>(walk.splits);
    tiles = split < walk.tiles ? (walk.tiles - split - 1) / static_cast<std::uint32_t>(walk.splits) + 1 : 0;
    end = walk.groups;
    leads = split == 0 && threadIdx.x == 0;
  }
  // The number of the first group of tile i, each of kTile groups for each thread.
  template <int kTile>
  __device__ __forceinline__ std::uint32_t tile_begin(const PlanesWalk& walk, std::uint32_t i) const {
    return (split + i * static_cast<std::uint32_t>(walk.splits)) * kTile * blockDim.x;
  }
};

// Planes are numbered sample by sample.
__device__ __forceinline__ std::int64_t plane_of(const PlanesWalk& walk, std::int64_t channel, std::uint32_t sample) {
  return sample * walk.channels + channel;
}

// How many elements before a plane its first group begins: those that do not fill whole groups begin in the middle of
// one.
__device__ __forceinline__ int skew_of(const PlanesWalk& walk, std::int64_t channel, std::uint32_t sample) {
  return walk.whole_groups ? 0 : static_cast<int>(plane_of(walk, channel, sample) * walk.spatial & (kGroup - 1));
}

// The u-th group of this thread in tile i of a block's part, of kTile groups for each thread.
template <int kTile, class Part>
__device__ __forceinline__ PlaneGroup plane_group(const PlanesWalk& walk, const Part& part, std::uint32_t i,
                                                  std::uint32_t u) {
  const std::uint32_t group = part.template tile_begin<kTile>(walk, i) + u * blockDim.x + threadIdx.x;
  PlaneGroup at;
  if (group >= part.end) return at;
  at.sample = walk.groups_per_plane.quotient(group);
  at.number = walk.groups_per_plane.remainder(group, at.sample);
  at.valid.end = kGroup;
  if (walk.whole_groups) return at;
  at.skew = skew_of(walk, part.channel, at.sample);
  at.valid.begin = at.number == 0 ? at.skew : 0;
  const std::int64_t left = walk.spatial - at.first();
  if (left < kGroup) at.valid.end = static_cast<int>(left > 0 ? left : 0);
  return at;
}

template <class T>
__device__ __forceinline__ const T* at(const Source& from, const PlaneGroup& g, std::int64_t channel) {
  return static_cast<const T*>(from.data) + (g.sample * from.outer + channel * from.inner + g.first());
}
template <class T>
__device__ __forceinline__ T* at(const Target& to, const PlaneGroup& g, std::int64_t channel) {
  return static_cast<T*>(to.data) + (g.sample * to.outer + channel * to.inner + g.first());
}

template <class P>
__device__ __forceinline__ P* flat_byte(P* flat_bits, const PlanesWalk& walk, std::int64_t channel,
                                        const PlaneGroup& g) {
  return flat_bits ? flat_bits + (plane_of(walk, channel, g.sample) * walk.groups_per_plane.divisor + g.number)
                   : nullptr;
}

__device__ __forceinline__ bool is_kept(const Keep& keep, std::int64_t plane) {
  switch (keep.plane_bytes) {
    case 1: return static_cast<const std::uint8_t*>(keep.planes)[plane] != 0;
    case 2: return static_cast<const std::uint16_t*>(keep.planes)[plane] != 0;
    case 4: return static_cast<const std::uint32_t*>(keep.planes)[plane] != 0;
    default: return static_cast<const std::uint64_t*>(keep.planes)[plane] != 0;
  }
}

// Which elements of a group dropout keeps, as bits; none that are not there.
__device__ __forceinline__ unsigned kept_of(const Keep& keep, const PlanesWalk& walk, std::int64_t channel,
                                            const PlaneGroup& g) {
  const unsigned valid = g.valid.bits();
  if (!valid || !(keep.planes || keep.seed)) return valid;
  const std::int64_t plane = plane_of(walk, channel, g.sample);
  if (keep.planes) return is_kept(keep, plane) ? valid : 0;
  const auto first = static_cast<std::uint64_t>(plane * walk.spatial + g.first());
  return valid & kept_bits(static_cast<std::uint64_t>(*keep.seed), keep_threshold(keep.scale), first);
}

// A block's shared memory: room for its sums and what it works out of them, then the tiles that it keeps.
template <class Numbers>
struct PlanesShared {
  Pair scratch[kMaxWarps];
  Pair total;
  Numbers numbers;

  static __device__ __forceinline__ PlanesShared& here() {
    static_assert(sizeof(Numbers) <= kMaxNumbersBytes && kPlanesSharedBytes % 16 == 0);
    return *reinterpret_cast<PlanesShared*>(dynamic_shared());
  }
  static __device__ __forceinline__ unsigned char* tiles() { return dynamic_shared() + kPlanesSharedBytes; }
};

// Sums a block's part of a channel. keep(i, u, group) is told the u-th group of this thread in tile i.
template <class T, int kTile, class Part, class KeepGroup>
__device__ __forceinline__ Deviations<Compute<T>> collect_forward(const ForwardArgs& args, const PlanesWalk& walk,
                                                                  const Part& part, KeepGroup&& keep) {
  const T* input = static_cast<const T*>(args.input.data);
  Deviations<Compute<T>> deviations(widen(input[part.channel * args.input.inner]));
  for (std::uint32_t i = 0; i < part.tiles; ++i) {
    Group<T> x[kTile];
    Span valid[kTile];
    int count = 0;
#pragma unroll
    for (int u = 0; u < kTile; ++u) {
      const PlaneGroup g = plane_group<kTile>(walk, part, i, u);
      valid[u] = g.valid;
      count += g.valid.empty() ? 0 : g.valid.end - g.valid.begin;
      x[u] = load(at<T>(args.input, g, part.channel), g.valid, walk.aligned.input);
      keep(i, u, x[u]);
    }
    constexpr int kCount = kTile * kGroup;
    const auto value = [&](int e) { return x[e / kGroup][e % kGroup]; };
    if (count == kCount)
      deviations.template add<kCount>(count, value, [](int) { return true; });
    else
      deviations.template add<kCount>(count, value, [&](int e) { return valid[e / kGroup].has(e % kGroup); });
  }
  return deviations;
}

// How many of a tile's groups are in hand at once where their outputs are computed: the residual is loaded besides.
constexpr int applied_at_once(int groups) {
  return groups > 2 ? groups / 2 : groups;
}

// Writes the output of a block's part of a channel.
template <class T, int kTile, Activations kWhich>
__device__ __forceinline__ void apply_forward(const ForwardArgs& args, const PlanesWalk& walk, const PlanesPart& part,
                                              const ChannelAffine<Compute<T>>& affine, unsigned char* kept_tiles) {
  constexpr int kHand = applied_at_once(kTile);
  const Uniform<ChannelAffine<Compute<T>>> affines{affine};
  for (std::uint32_t step = part.tiles * (kTile / kHand); step-- > 0;) {
    const std::uint32_t i = step / (kTile / kHand), first = step % (kTile / kHand) * kHand;
    PlaneGroup g[kHand];
    Group<T> x[kHand], residual[kHand];
    unsigned kept[kHand];
#pragma unroll
    for (int u = 0; u < kHand; ++u) {
      g[u] = plane_group<kTile>(walk, part, i, first + u);
      kept[u] = kept_of(args.keep, walk, part.channel, g[u]);
      x[u] = residual[u] = zeros<T>();
      if (!kept[u]) continue;
      x[u] = i < walk.kept_tiles ? Kept<T>::get(kept_tiles, i * kTile + first + u)
                                 : load(at<T>(args.input, g[u], part.channel), g[u].valid, walk.aligned.input);
      if (args.residual.data)
        residual[u] = load(at<T>(args.residual, g[u], part.channel), g[u].valid, walk.aligned.residual);
    }
#pragma unroll
    for (int u = 0; u < kHand; ++u) {
      if (g[u].valid.empty()) continue;
      std::uint8_t* flat = flat_byte(args.flat_bits, walk, part.channel, g[u]);
      const Group<T> output = forward_group<kWhich>(args, x[u], residual[u], affines, kept[u], flat);
      store(at<T>(args.output, g[u], part.channel), output, g[u].valid, walk.aligned.output);
    }
  }
}

// The operands of backward at one group; read only where they matter.
template <class T>
struct BackwardGroup {
  Group<T> grad_output = zeros<T>(), x = zeros<T>(), residual = zeros<T>();
  unsigned flat = 0;
};

template <class T>
__device__ __forceinline__ void load_besides(BackwardGroup<T>& group, const BackwardArgs& args, const PlanesWalk& walk,
                                             std::int64_t channel, const PlaneGroup& g) {
  if (args.flat_bits)
    group.flat = *flat_byte(args.flat_bits, walk, channel, g);
  else if (args.residual.data)
    group.residual = load(at<T>(args.residual, g, channel), g.valid, walk.aligned.residual);
}

// Sums the gradients of a block's part of a channel; keeps the gradients of the output and the inputs of its first
// tiles.
template <class T, int kTile, Activations kWhich>
__device__ __forceinline__ Pair collect_backward(const BackwardArgs& args, const PlanesWalk& walk,
                                                 const PlanesPart& part, const ChannelAffine<Compute<T>>& affine,
                                                 unsigned char* kept_tiles) {
  using S = Compute<T>;
  const Uniform<ChannelAffine<S>> affines{affine};
  Pair sums;
  for (std::uint32_t i = 0; i < part.tiles; ++i) {
    BackwardGroup<T> group[kTile];
    unsigned kept[kTile];
#pragma unroll
    for (int u = 0; u < kTile; ++u) {
      const PlaneGroup g = plane_group<kTile>(walk, part, i, u);
      kept[u] = kept_of(args.keep, walk, part.channel, g);
      if (!kept[u]) continue;
      group[u].grad_output = load(at<T>(args.grad_output, g, part.channel), g.valid, walk.aligned.grad_output);
      group[u].x = load(at<T>(args.input, g, part.channel), g.valid, walk.aligned.input);
      load_besides(group[u], args, walk, part.channel, g);
      if (i < walk.kept_tiles) {
        Kept<T>::put(kept_tiles, 2 * (i * kTile + u), group[u].grad_output);
        Kept<T>::put(kept_tiles, 2 * (i * kTile + u) + 1, group[u].x);
      }
    }
    S grad = 0, grad_deviation = 0;
#pragma unroll
    for (int u = 0; u < kTile; ++u) {
      S g[kGroup];
      backward_group<kWhich>(args, group[u].grad_output, group[u].x, group[u].residual, group[u].flat, affines, kept[u],
                             g);
#pragma unroll
      for (int e = 0; e < kGroup; ++e) {
        grad += g[e];
        grad_deviation += g[e] * (group[u].x[e] - affine.mean);
      }
    }
    sums.add({static_cast<double>(grad), static_cast<double>(grad_deviation)});
  }
  return sums;
}

// Writes the gradients of a block's part of a channel.
template <class T, int kTile, Activations kWhich>
__device__ __forceinline__ void apply_backward(const BackwardArgs& args, const PlanesWalk& walk, const PlanesPart& part,
                                               const Gradient<Compute<T>>& gradient, unsigned char* kept_tiles) {
  using S = Compute<T>;
  const Uniform<ChannelAffine<S>> affines{gradient.affine};
  const Uniform<Gradient<S>> gradients{gradient};
  for (std::uint32_t i = part.tiles; i-- > 0;) {
    PlaneGroup g[kTile];
    BackwardGroup<T> group[kTile];
    unsigned kept[kTile];
#pragma unroll
    for (int u = 0; u < kTile; ++u) {
      g[u] = plane_group<kTile>(walk, part, i, u);
      kept[u] = kept_of(args.keep, walk, part.channel, g[u]);
      if (g[u].valid.empty()) continue;
      const bool in_shared = kept[u] && i < walk.kept_tiles;
      if (in_shared) {
        group[u].grad_output = Kept<T>::get(kept_tiles, 2 * (i * kTile + u));
        group[u].x = Kept<T>::get(kept_tiles, 2 * (i * kTile + u) + 1);
      } else {
        if (kept[u])
          group[u].grad_output =
              load(at<T>(args.grad_output, g[u], part.channel), g[u].valid, walk.aligned.grad_output);
        if (kept[u] || args.training)
          group[u].x = load(at<T>(args.input, g[u], part.channel), g[u].valid, walk.aligned.input);
      }
      if (kept[u]) load_besides(group[u], args, walk, part.channel, g[u]);
    }
#pragma unroll
    for (int u = 0; u < kTile; ++u) {
      if (g[u].valid.empty()) continue;
      S before[kGroup];
      backward_group<kWhich>(args, group[u].grad_output, group[u].x, group[u].residual, group[u].flat, affines, kept[u],
                             before);
      Group<T> result;
      if (args.grad_input.data) {
#pragma unroll
        for (int e = 0; e < kGroup; ++e)
          result.set(e, input_gradient_at<S>(args, gradients, e, before[e], group[u].x[e]));
        store(at<T>(args.grad_input, g[u], part.channel), result, g[u].valid, walk.aligned.grad_input);
      }
      if (args.grad_residual.data) {
#pragma unroll
        for (int e = 0; e < kGroup; ++e) result.set(e, before[e]);
        store(at<T>(args.grad_residual, g[u], part.channel), result, g[u].valid, walk.aligned.grad_residual);
      }
    }
  }
}

// Forward in one kernel: each channel has one block, or the blocks of a cluster.
template <class T, int kTile, Activations kWhich>
__global__ void __launch_bounds__(max_threads(sizeof(T)), blocks_wanted(kWhich == Activations::all))
    planes_forward_on_chip(const ForwardArgs args, const PlanesWalk walk) {
  using S = Compute<T>;
  using Shared = PlanesShared<ChannelAffine<S>>;
  Shared& shared = Shared::here();
  const PlanesPart part(walk, blockIdx.x);
  const auto keep = [&](std::uint32_t i, int u, const Group<T>& x) {
    if (i < walk.kept_tiles) Kept<T>::put(Shared::tiles(), i * kTile + u, x);
  };
  const auto deviations = collect_forward<T, kTile>(args, walk, part, keep);
  const Pair sums = cluster_sum(deviations.sums(), shared.scratch, &shared.total);
  if (threadIdx.x == 0) {
    const Statistics found = batch_statistics(args, part.channel, deviations.origin(), sums, part.leads);
    shared.numbers = channel_affine<S>(args, part.channel, found);
  }
  cluster_sync();  // the numbers are there, and no block of the cluster ends while another reads its total
  apply_forward<T, kTile, kWhich>(args, walk, part, shared.numbers, Shared::tiles());
}

// Forward in two kernels: the sums of each block's part of a channel go to `partial`.
template <class T, int kTile>
__global__ void __launch_bounds__(max_threads(sizeof(T)), blocks_wanted(false))
    planes_forward_sums(const ForwardArgs args, const PlanesWalk walk, Pair* partial) {
  using Shared = PlanesShared<ChannelAffine<Compute<T>>>;
  const PlanesPart part(walk, blockIdx.x);
  const auto deviations = collect_forward<T, kTile>(args, walk, part, [](std::uint32_t, int, const Group<T>&) {});
  const Pair sums = block_sum(deviations.sums(), Shared::here().scratch);
  if (threadIdx.x == 0) partial[blockIdx.x] = sums;
}

// The sums of the `splits` blocks of a channel.
__device__ __forceinline__ Pair sum_of_parts(std::int64_t channel, int splits, const Pair* partial, Pair* scratch) {
  Pair sums;
  for (int split = static_cast<int>(threadIdx.x); split < splits; split += static_cast<int>(blockDim.x))
    sums.add(partial[channel * splits + split]);
  return block_sum(sums, scratch);
}

// What the sums of a channel come to in training, and the running statistics in evaluation mode.
template <class T>
__device__ __forceinline__ ChannelAffine<Compute<T>> finished_affine(const ForwardArgs& args, std::int64_t channel,
                                                                     const Pair& sums, bool leads) {
  using S = Compute<T>;
  const T first = static_cast<const T*>(args.input.data)[channel * args.input.inner];
  const double origin = Deviations<S>(widen(first)).origin();
  const Statistics found =
      args.training ? batch_statistics(args, channel, origin, sums, leads) : running_statistics(args, channel, leads);
  return channel_affine<S>(args, channel, found);
}

// The second of them; or, in evaluation mode, the only one. Begins where the first ended.
template <class T, int kTile, Activations kWhich>
__global__ void __launch_bounds__(max_threads(sizeof(T)), blocks_wanted(kWhich == Activations::all))
    planes_forward_apply(const ForwardArgs args, const PlanesWalk walk, const Pair* partial) {
  using S = Compute<T>;
  using Shared = PlanesShared<ChannelAffine<S>>;
  Shared& shared = Shared::here();
  const PlanesPart part(walk, gridDim.x - 1 - blockIdx.x);
  const Pair sums = args.training ? sum_of_parts(part.channel, walk.splits, partial, shared.scratch) : Pair{};
  if (threadIdx.x == 0) shared.numbers = finished_affine<T>(args, part.channel, sums, part.leads);
  __syncthreads();
  apply_forward<T, kTile, kWhich>(args, walk, part, shared.numbers, nullptr);
}

template <class T>
__device__ __forceinline__ ChannelAffine<Compute<T>> saved_affine(const BackwardArgs& args, std::int64_t c) {
  return channel_affine<Compute<T>>(args, c, {args.mean[c], args.invstd[c]});
}

template <class T, int kTile, Activations kWhich>
__global__ void __launch_bounds__(max_threads(sizeof(T)), blocks_wanted(kWhich == Activations::all))
    planes_backward_on_chip(const BackwardArgs args, const PlanesWalk walk) {
  using S = Compute<T>;
  using Shared = PlanesShared<Gradient<S>>;
  Shared& shared = Shared::here();
  const PlanesPart part(walk, blockIdx.x);
  const Pair mine =
      collect_backward<T, kTile, kWhich>(args, walk, part, saved_affine<T>(args, part.channel), Shared::tiles());
  const Pair sums = cluster_sum(mine, shared.scratch, &shared.total);
  if (threadIdx.x == 0) shared.numbers = channel_gradient<S>(args, part.channel, sums, part.leads);
  cluster_sync();
  apply_backward<T, kTile, kWhich>(args, walk, part, shared.numbers, Shared::tiles());
}

template <class T, int kTile, Activations kWhich>
__global__ void __launch_bounds__(max_threads(sizeof(T)), blocks_wanted(kWhich == Activations::all))
    planes_backward_sums(const BackwardArgs args, const PlanesWalk walk, Pair* partial) {
  using Shared = PlanesShared<Gradient<Compute<T>>>;
  const PlanesPart part(walk, blockIdx.x);
  const Pair mine = collect_backward<T, kTile, kWhich>(args, walk, part, saved_affine<T>(args, part.channel), nullptr);
  const Pair sums = block_sum(mine, Shared::here().scratch);
  if (threadIdx.x == 0) partial[blockIdx.x] = sums;
}

// `partial` may be null where nothing depends on the sums.
template <class T, int kTile, Activations kWhich>
__global__ void __launch_bounds__(max_threads(sizeof(T)), blocks_wanted(kWhich == Activations::all))
    planes_backward_apply(const BackwardArgs args, const PlanesWalk walk, const Pair* partial) {
  using S = Compute<T>;
  using Shared = PlanesShared<Gradient<S>>;
  Shared& shared = Shared::here();
  const PlanesPart part(walk, gridDim.x - 1 - blockIdx.x);
  const Pair sums = partial ? sum_of_parts(part.channel, walk.splits, partial, shared.scratch) : Pair{};
  if (threadIdx.x == 0) shared.numbers = channel_gradient<S>(args, part.channel, sums, part.leads);
  __syncthreads();
  apply_backward<T, kTile, kWhich>(args, walk, part, shared.numbers, nullptr);
}

}  // namespace fastlayers::cuda
