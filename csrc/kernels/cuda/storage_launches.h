// What launching the kernels of one storage type, FASTLAYERS_STORAGE, takes: how they walk over the tensors of a call.
#pragma once

#include <type_traits>

#include "planes.h"
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

// `shape` is that of the tensors that are walked over.
[[maybe_unused]] Aligned aligned(const ForwardArgs& args, const Shape& shape) {
  Aligned flags;
  flags.input = is_aligned(shape, args.input);
  flags.residual = is_aligned(shape, args.residual);
  flags.output = is_aligned(args.output.data);
  return flags;
}
[[maybe_unused]] Aligned aligned(const BackwardArgs& args, const Shape& shape) {
  Aligned flags;
  flags.input = is_aligned(shape, args.input);
  flags.residual = is_aligned(shape, args.residual);
  flags.grad_output = is_aligned(shape, args.grad_output);
  flags.grad_input = is_aligned(args.grad_input.data);
  flags.grad_residual = is_aligned(args.grad_residual.data);
  return flags;
}

[[maybe_unused]] PlanesWalk planes_walk(const Shape& shape, const Plan& plan, int in_hand, const Aligned& aligned) {
  PlanesWalk walk;
  walk.channels = shape.channels;
  walk.spatial = shape.spatial;
  walk.groups_per_plane = Divisor(static_cast<std::uint32_t>(groups_per_plane(shape)));
  walk.groups = static_cast<std::uint32_t>(shape.batch) * walk.groups_per_plane.divisor;
  walk.whole_groups = shape.spatial % kGroup == 0;
  const auto tile = static_cast<std::uint32_t>(plan.threads * in_hand);
  walk.tiles = (walk.groups + tile - 1) / tile;
  walk.splits = plan.splits;
  walk.kept_tiles = static_cast<std::uint32_t>(plan.kept_tiles);
  walk.aligned = aligned;
  return walk;
}

template <class Args>
RowsWalk rows_walk(const Args& args, const Shape& shape, const Plan& plan) {
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
  walk.cooperative = plan.cooperative;
  walk.kept_tiles = static_cast<std::uint32_t>(plan.kept_tiles);
  walk.aligned_mask = is_aligned(args.keep.planes);
  walk.aligned = aligned(args, shape);
  return walk;
}

[[maybe_unused]] LaunchShape planes_launch(std::int64_t channels, const Plan& plan) {
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(channels * plan.splits));
  shape.block = dim3(static_cast<unsigned>(plan.threads));
  shape.shared_bytes = plan.shared_bytes;
  shape.cluster = plan.cluster;
  return shape;
}

[[maybe_unused]] LaunchShape rows_launch(const Plan& plan) {
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(plan.tiles) * static_cast<unsigned>(plan.splits));
  shape.block = dim3(static_cast<unsigned>(plan.threads));
  shape.shared_bytes = plan.shared_bytes;
  shape.cooperative = plan.cooperative;
  return shape;
}

// Of kernels that write results and keep nothing.
[[maybe_unused]] LaunchShape apply_launch(LaunchShape shape) {
  shape.shared_bytes = 0;
  return shape;
}

[[maybe_unused]] LaunchShape finish_launch(std::int64_t channels) {
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>((channels + kFinishedChannels - 1) / kFinishedChannels));
  shape.block = dim3(kRowThreads);
  shape.shared_bytes = rows_shared_bytes(kRowThreads);
  return shape;
}

// Calls f with Activations as a constant: those that `kind` needs.
template <class F>
Error with_activations(Activation kind, F&& f) {
  if (activations_for(kind) == Activations::all) return f(std::integral_constant<Activations, Activations::all>{});
  return f(std::integral_constant<Activations, Activations::rectifiers>{});
}

// Where the rows kernels keep what they work out for each channel: behind the partial sums.
template <class Numbers>
Numbers* numbers_behind(Pair* partial, const RowsWalk& walk) {
  return reinterpret_cast<Numbers*>(partial + walk.splits * walk.columns);
}

}  // namespace
}  // namespace fastlayers::cuda
