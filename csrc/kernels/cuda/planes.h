// Kernels for contiguous tensors: the positions of one sample and channel, a plane, are adjacent.
//
// A channel belongs to one block, to a cluster of blocks, or to several blocks that meet between two kernels. Its
// groups are numbered through all its planes; a tile is what a block takes at a time, some groups for each thread.
// Blocks walk their tiles once for the sums and then back, so that what was read last, and is still in a cache, is read
// first. In between, the first tiles stay in shared memory as far as it reaches.
#pragma once

#include "divisor.h"
#include "keep.h"
#include "sums.h"
#include "tiles.h"

namespace fastlayers::cuda {

struct PlaneGroup;
class KeptPlanes;

struct PlanesWalk {
  using Place = PlaneGroup;
  using Dropout = KeptPlanes;

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

template <int kTile>
__device__ __forceinline__ std::uint32_t tiles_of(const PlanesWalk&, const PlanesPart& part) {
  return part.tiles;
}

// The u-th group of this thread in tile i of a block's part, of kTile groups for each thread.
template <int kTile, class Part>
__device__ __forceinline__ PlaneGroup group_at(const PlanesWalk& walk, const Part& part, std::uint32_t i,
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

// Where a group of a channel begins in a tensor's memory; may be before its start.
template <class Tensor>
__device__ __forceinline__ std::int64_t offset_in(const Tensor& tensor, std::int64_t channel, const PlaneGroup& g) {
  return g.sample * tensor.outer + channel * tensor.inner + g.first();
}

template <class T, class Part>
__device__ __forceinline__ Group<T> load(const Source& from, const PlanesWalk&, const Part& part, const PlaneGroup& g,
                                         bool aligned) {
  return load(static_cast<const T*>(from.data) + offset_in(from, part.channel, g), g.valid, aligned);
}

template <class T>
__device__ __forceinline__ void store(const Target& to, const PlanesWalk&, const PlanesPart& part, const PlaneGroup& g,
                                      const Group<T>& group, bool aligned) {
  store(static_cast<T*>(to.data) + offset_in(to, part.channel, g), group, g.valid, aligned);
}

__device__ __forceinline__ std::int64_t flat_byte_of(const PlanesWalk& walk, const PlanesPart& part,
                                                     const PlaneGroup& g) {
  return plane_of(walk, part.channel, g.sample) * walk.groups_per_plane.divisor + g.number;
}

// What dropout keeps of a thread's groups.
class KeptPlanes {
 public:
  __device__ __forceinline__ unsigned of(const Keep& keep, const PlanesWalk& walk, const PlanesPart& part,
                                         const PlaneGroup& g) const {
    const unsigned valid = g.valid.bits();
    if (!valid || !(keep.planes || keep.seed)) return valid;
    const std::int64_t plane = plane_of(walk, part.channel, g.sample);
    if (keep.planes) return is_kept(keep, plane) ? valid : 0;
    return valid & KeptElements(keep).from(plane * walk.spatial + g.first());
  }
};

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
      const PlaneGroup g = group_at<kTile>(walk, part, i, u);
      valid[u] = g.valid;
      count += g.valid.empty() ? 0 : g.valid.end - g.valid.begin;
      x[u] = load<T>(args.input, walk, part, g, walk.aligned.input);
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

// Sums of a channel's gradients: those of a tile, of which the type that elements are computed in has digits enough,
// and of all.
template <class S>
class GradientsOfChannel {
 public:
  __device__ __forceinline__ void add(int, S grad, S deviation) {
    grad_ += grad;
    grad_deviation_ += grad * deviation;
  }
  __device__ __forceinline__ void end_tile(bool) {
    sums_.add({static_cast<double>(grad_), static_cast<double>(grad_deviation_)});
    grad_ = grad_deviation_ = 0;
  }
  __device__ __forceinline__ const Pair& sums() const { return sums_; }

 private:
  S grad_ = 0, grad_deviation_ = 0;
  Pair sums_;
};

// The sums of a block's part of a channel, which this thread has a part in.
template <class T, int kTile, Activations kWhich>
__device__ __forceinline__ Pair sum_backward(const BackwardArgs& args, const PlanesWalk& walk, const PlanesPart& part,
                                             unsigned char* kept_tiles) {
  using S = Compute<T>;
  const Uniform<ChannelAffine<S>> affines{saved_affine<S>(args, part.channel)};
  GradientsOfChannel<S> gradients;
  collect_backward<T, kTile, kWhich>(args, walk, part, affines, kept_tiles, gradients);
  return gradients.sums();
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
  apply_forward<T, kTile, kWhich>(args, walk, part, Uniform<ChannelAffine<S>>{shared.numbers}, Shared::tiles());
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
  apply_forward<T, kTile, kWhich>(args, walk, part, Uniform<ChannelAffine<S>>{shared.numbers}, nullptr);
}

template <class T, int kTile, Activations kWhich>
__global__ void __launch_bounds__(max_threads(sizeof(T)), blocks_wanted(kWhich == Activations::all))
    planes_backward_on_chip(const BackwardArgs args, const PlanesWalk walk) {
  using S = Compute<T>;
  using Shared = PlanesShared<Gradient<S>>;
  Shared& shared = Shared::here();
  const PlanesPart part(walk, blockIdx.x);
  const Pair mine = sum_backward<T, kTile, kWhich>(args, walk, part, Shared::tiles());
  const Pair sums = cluster_sum(mine, shared.scratch, &shared.total);
  if (threadIdx.x == 0) shared.numbers = channel_gradient<S>(args, part.channel, sums, part.leads);
  cluster_sync();
  apply_backward<T, kTile, kWhich>(args, walk, part, Uniform<Gradient<S>>{shared.numbers}, Shared::tiles());
}

template <class T, int kTile, Activations kWhich>
__global__ void __launch_bounds__(max_threads(sizeof(T)), blocks_wanted(kWhich == Activations::all))
    planes_backward_sums(const BackwardArgs args, const PlanesWalk walk, Pair* partial) {
  using Shared = PlanesShared<Gradient<Compute<T>>>;
  const PlanesPart part(walk, blockIdx.x);
  const Pair mine = sum_backward<T, kTile, kWhich>(args, walk, part, nullptr);
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
  apply_backward<T, kTile, kWhich>(args, walk, part, Uniform<Gradient<S>>{shared.numbers}, nullptr);
}

}  // namespace fastlayers::cuda
