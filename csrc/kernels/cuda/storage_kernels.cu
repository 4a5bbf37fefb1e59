// Launches the kernels of one storage type, FASTLAYERS_STORAGE, as planned.
#include "planes.h"
#include "pointwise.h"
#include "rows.h"
#include "storage_kernels.h"

namespace fastlayers::cuda {
namespace {

using T = FASTLAYERS_STORAGE;
using S = Compute<T>;

bool is_aligned(const void* data) {
  return reinterpret_cast<std::uintptr_t>(data) % 16 == 0;
}
bool is_aligned(std::int64_t elements) {
  return elements * static_cast<std::int64_t>(sizeof(T)) % 16 == 0;
}

// Groups begin at multiples of 8 elements of a dense tensor; the same has to hold where the strides are others.
template <class Pointer>
bool is_aligned(const Shape& shape, const Strided<Pointer>& t) {
  if (!t.data || !is_aligned(t.data)) return false;
  if (shape.rows) return rows_per_run(shape) > 1 ? t.outer == shape.channels : is_aligned(t.outer);
  return (shape.batch == 1 || is_aligned(t.outer - shape.channels * shape.spatial)) &&
         (shape.channels == 1 || is_aligned(t.inner - shape.spatial));
}

Aligned aligned(const ForwardArgs& args) {
  Aligned flags;
  flags.input = is_aligned(args.shape, args.input);
  flags.residual = is_aligned(args.shape, args.residual);
  flags.output = is_aligned(args.output.data);
  return flags;
}
Aligned aligned(const BackwardArgs& args) {
  Aligned flags;
  flags.input = is_aligned(args.shape, args.input);
  flags.residual = is_aligned(args.shape, args.residual);
  flags.grad_output = is_aligned(args.shape, args.grad_output);
  flags.grad_input = is_aligned(args.grad_input.data);
  flags.grad_residual = is_aligned(args.grad_residual.data);
  return flags;
}

template <class Args>
PlanesWalk planes_walk(const Args& args, const Plan& plan, int in_hand) {
  PlanesWalk walk;
  walk.channels = args.shape.channels;
  walk.spatial = args.shape.spatial;
  walk.groups_per_plane = Divisor(static_cast<std::uint32_t>(groups_per_plane(args.shape)));
  walk.groups = static_cast<std::uint32_t>(args.shape.batch) * walk.groups_per_plane.divisor;
  walk.whole_groups = args.shape.spatial % kGroup == 0;
  const auto tile = static_cast<std::uint32_t>(plan.threads * in_hand);
  walk.tiles = (walk.groups + tile - 1) / tile;
  walk.splits = plan.splits;
  walk.kept_tiles = static_cast<std::uint32_t>(plan.kept_tiles);
  walk.aligned = aligned(args);
  return walk;
}

template <class Args>
RowsWalk rows_walk(const Args& args, const Plan& plan) {
  const Shape& shape = args.shape;
  RowsWalk walk;
  walk.channels = shape.channels;
  walk.by_spatial = Divisor(static_cast<std::uint32_t>(shape.spatial));
  walk.rows_per_run = static_cast<int>(rows_per_run(shape));
  walk.columns = walk.rows_per_run * shape.channels;
  const std::int64_t rows = shape.count_per_channel();
  walk.runs = static_cast<std::uint32_t>((rows + walk.rows_per_run - 1) / walk.rows_per_run);
  walk.last_columns = (rows - std::int64_t{walk.runs - 1} * walk.rows_per_run) * shape.channels;
  walk.by_channels = Divisor(static_cast<std::uint32_t>(shape.channels));
  walk.groups = groups_per_run(shape);
  walk.tile_groups = plan.tile_groups;
  walk.tiles = plan.tiles;
  walk.lanes = plan.threads / plan.tile_groups;
  walk.splits = plan.splits;
  walk.kept_tiles = static_cast<std::uint32_t>(plan.kept_tiles);
  walk.aligned_mask = is_aligned(args.keep.planes);
  walk.aligned = aligned(args);
  return walk;
}

template <class Args>
LaunchShape planes_launch(const Args& args, const Plan& plan) {
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(args.shape.channels * plan.splits));
  shape.block = dim3(static_cast<unsigned>(plan.threads));
  shape.shared_bytes = plan.shared_bytes;
  shape.cluster = plan.cluster;
  return shape;
}

// Of the kernels that sum.
LaunchShape rows_launch(const Plan& plan) {
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(plan.tiles) * static_cast<unsigned>(plan.splits));
  shape.block = dim3(static_cast<unsigned>(plan.threads));
  shape.shared_bytes = plan.shared_bytes;
  shape.cooperative = plan.path == Path::rows_on_chip && plan.splits > 1;
  return shape;
}

// Of those that write results and keep nothing.
LaunchShape apply_launch(LaunchShape shape) {
  shape.shared_bytes = 0;
  return shape;
}

LaunchShape finish_launch(const Shape& tensor) {
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>((tensor.channels + kFinishedChannels - 1) / kFinishedChannels));
  shape.block = dim3(kRowThreads);
  shape.shared_bytes = rows_shared_bytes(kRowThreads);
  return shape;
}

// Where the rows kernels keep what they work out for each channel: behind the partial sums.
template <class Numbers>
Numbers* numbers_behind(Pair* partial, const RowsWalk& walk) {
  return reinterpret_cast<Numbers*>(partial + walk.splits * walk.columns);
}

template <Activations kWhich>
Error forward_planes(const ForwardArgs& args, const Plan& plan, Pair* partial, Stream stream) {
  constexpr int kTile = groups_in_hand(sizeof(T), kWhich, false, false);
  const PlanesWalk walk = planes_walk(args, plan, kTile);
  const LaunchShape shape = planes_launch(args, plan);
  if (plan.path == Path::planes_on_chip)
    return launch(planes_forward_on_chip<T, kTile, kWhich>, shape, stream, args, walk);
  if (plan.path == Path::planes_split)
    if (const Error error = launch(planes_forward_sums<T, kTile>, shape, stream, args, walk, partial)) return error;
  return launch(planes_forward_apply<T, kTile, kWhich>, shape, stream, args, walk, partial);
}

template <Activations kWhich>
Error backward_planes(const BackwardArgs& args, const Plan& plan, Pair* partial, Stream stream) {
  constexpr int kTile = groups_in_hand(sizeof(T), kWhich, true, false);
  const PlanesWalk walk = planes_walk(args, plan, kTile);
  const LaunchShape shape = planes_launch(args, plan);
  if (plan.path == Path::planes_on_chip)
    return launch(planes_backward_on_chip<T, kTile, kWhich>, shape, stream, args, walk);
  const bool sums = plan.path == Path::planes_split;
  if (sums)
    if (const Error error = launch(planes_backward_sums<T, kTile, kWhich>, shape, stream, args, walk, partial))
      return error;
  return launch(planes_backward_apply<T, kTile, kWhich>, shape, stream, args, walk, sums ? partial : nullptr);
}

template <Activations kWhich>
Error forward_rows(const ForwardArgs& args, const Plan& plan, Pair* partial, Stream stream) {
  constexpr int kRows = groups_in_hand(sizeof(T), kWhich, false, true);
  const RowsWalk walk = rows_walk(args, plan);
  const LaunchShape shape = rows_launch(plan);
  auto* numbers = numbers_behind<ChannelAffine<S>>(partial, walk);
  if (plan.path == Path::rows_one_block || plan.path == Path::rows_on_chip)
    return launch(rows_forward_on_chip<T, kRows, kWhich>, shape, stream, args, walk, partial, numbers);
  if (plan.path == Path::rows_pointwise)
    return launch(rows_forward_apply<T, kRows, kWhich>, apply_launch(shape), stream, args, walk, nullptr);
  if (const Error error = launch(rows_forward_sums<T, kRows>, shape, stream, args, walk, partial)) return error;
  if (const Error error = launch(rows_finish<T, ForwardArgs, ChannelAffine<S>>, finish_launch(args.shape), stream, args,
                                 walk, partial, numbers))
    return error;
  return launch(rows_forward_apply<T, kRows, kWhich>, apply_launch(shape), stream, args, walk, numbers);
}

template <Activations kWhich>
Error backward_rows(const BackwardArgs& args, const Plan& plan, Pair* partial, Stream stream) {
  constexpr int kRows = groups_in_hand(sizeof(T), kWhich, true, true);
  const RowsWalk walk = rows_walk(args, plan);
  const LaunchShape shape = rows_launch(plan);
  auto* numbers = numbers_behind<Gradient<S>>(partial, walk);
  if (plan.path == Path::rows_one_block || plan.path == Path::rows_on_chip)
    return launch(rows_backward_on_chip<T, kRows, kWhich>, shape, stream, args, walk, partial, numbers);
  if (plan.path == Path::rows_pointwise)
    return launch(rows_backward_apply<T, kRows, kWhich>, apply_launch(shape), stream, args, walk, nullptr);
  if (const Error error = launch(rows_backward_sums<T, kRows, kWhich>, shape, stream, args, walk, partial))
    return error;
  if (const Error error = launch(rows_finish<T, BackwardArgs, Gradient<S>>, finish_launch(args.shape), stream, args,
                                 walk, partial, numbers))
    return error;
  return launch(rows_backward_apply<T, kRows, kWhich>, apply_launch(shape), stream, args, walk, numbers);
}

}  // namespace

template <>
Error StorageKernels<T>::forward(const ForwardArgs& args, const Plan& plan, void* workspace, Stream stream) {
  auto* partial = static_cast<Pair*>(workspace);
  const bool all = activations_for(args.activation.kind) == Activations::all;
  if (args.shape.rows)
    return all ? forward_rows<Activations::all>(args, plan, partial, stream)
               : forward_rows<Activations::rectifiers>(args, plan, partial, stream);
  return all ? forward_planes<Activations::all>(args, plan, partial, stream)
             : forward_planes<Activations::rectifiers>(args, plan, partial, stream);
}

template <>
Error StorageKernels<T>::backward(const BackwardArgs& args, const Plan& plan, void* workspace, Stream stream) {
  auto* partial = static_cast<Pair*>(workspace);
  const bool all = activations_for(args.activation.kind) == Activations::all;
  if (args.shape.rows)
    return all ? backward_rows<Activations::all>(args, plan, partial, stream)
               : backward_rows<Activations::rectifiers>(args, plan, partial, stream);
  return all ? backward_planes<Activations::all>(args, plan, partial, stream)
             : backward_planes<Activations::rectifiers>(args, plan, partial, stream);
}

template <>
Error StorageKernels<T>::dropout(const DropoutArgs& args, Stream stream) {
  const std::int64_t numel = args.shape.numel();
  DropoutWalk walk;
  walk.numel = numel;
  walk.channels = args.shape.channels;
  walk.by_channels = PositionDivisor(args.shape.channels, numel);
  walk.by_spatial = PositionDivisor(args.shape.spatial, numel);
  walk.rows = args.shape.rows;
  walk.aligned = is_aligned(args.input) && is_aligned(args.output);
  walk.whole = (args.shape.rows ? args.shape.channels : args.shape.spatial) % kGroup == 0;
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>((numel + kGroup * kPointwiseThreads - 1) / (kGroup * kPointwiseThreads)));
  shape.block = dim3(kPointwiseThreads);
  return launch(dropout_groups<T>, shape, stream, args, walk);
}

}  // namespace fastlayers::cuda
