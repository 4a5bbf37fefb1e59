// Launches the kernels of one storage type, FASTLAYERS_STORAGE, as planned.
#include "pointwise.h"
#include "storage_launches.h"

namespace fastlayers::cuda {
namespace {

template <Activations kWhich>
Error forward_planes_sums(const ForwardArgs& args, const Plan& plan, Pair* partial, Stream stream) {
  constexpr int kTile = groups_in_hand(sizeof(T), kWhich, false, false);
  return launch(planes_forward_sums<T, kTile>, planes_launch(args.shape.channels, plan), stream, args,
                planes_walk(args.shape, plan, kTile, aligned(args, args.shape)), partial);
}

// The sums of tensors of this `shape`, which may be smaller than the input; also those below.
template <Activations kWhich>
Error backward_planes_sums(const BackwardArgs& args, const Shape& shape, const Plan& plan, Pair* partial,
                           Stream stream) {
  constexpr int kTile = groups_in_hand(sizeof(T), kWhich, true, false);
  return launch(planes_backward_sums<T, kTile, kWhich>, planes_launch(shape.channels, plan), stream, args,
                planes_walk(shape, plan, kTile, aligned(args, shape)), partial);
}

template <Activations kWhich>
Error forward_planes(const ForwardArgs& args, const Plan& plan, Pair* partial, Stream stream) {
  constexpr int kTile = groups_in_hand(sizeof(T), kWhich, false, false);
  const PlanesWalk walk = planes_walk(args.shape, plan, kTile, aligned(args, args.shape));
  const LaunchShape shape = planes_launch(args.shape.channels, plan);
  if (plan.path == Path::planes_on_chip)
    return launch(planes_forward_on_chip<T, kTile, kWhich>, shape, stream, args, walk);
  if (plan.path == Path::planes_split)
    if (const Error error = forward_planes_sums<kWhich>(args, plan, partial, stream)) return error;
  return launch(planes_forward_apply<T, kTile, kWhich>, shape, stream, args, walk, partial);
}

template <Activations kWhich>
Error backward_planes(const BackwardArgs& args, const Plan& plan, Pair* partial, Stream stream) {
  constexpr int kTile = groups_in_hand(sizeof(T), kWhich, true, false);
  const PlanesWalk walk = planes_walk(args.shape, plan, kTile, aligned(args, args.shape));
  const LaunchShape shape = planes_launch(args.shape.channels, plan);
  if (plan.path == Path::planes_on_chip)
    return launch(planes_backward_on_chip<T, kTile, kWhich>, shape, stream, args, walk);
  const bool sums = plan.path == Path::planes_split;
  if (sums)
    if (const Error error = backward_planes_sums<kWhich>(args, args.shape, plan, partial, stream)) return error;
  return launch(planes_backward_apply<T, kTile, kWhich>, shape, stream, args, walk, sums ? partial : nullptr);
}

// The first two of three kernels.
template <Activations kWhich>
Error forward_rows_sums(const ForwardArgs& args, const Plan& plan, Pair* partial, Stream stream) {
  constexpr int kRows = groups_in_hand(sizeof(T), kWhich, false, true);
  const RowsWalk walk = rows_walk(args, args.shape, plan);
  if (const Error error = launch(rows_forward_sums<T, kRows>, rows_launch(plan), stream, args, walk, partial))
    return error;
  return launch(rows_finish<T, ForwardArgs, ChannelAffine<S>>, finish_launch(args.shape.channels), stream, args, walk,
                partial, numbers_behind<ChannelAffine<S>>(partial, walk));
}

template <Activations kWhich>
Error backward_rows_sums(const BackwardArgs& args, const Shape& shape, const Plan& plan, Pair* partial, Stream stream) {
  constexpr int kRows = groups_in_hand(sizeof(T), kWhich, true, true);
  const RowsWalk walk = rows_walk(args, shape, plan);
  if (const Error error = launch(rows_backward_sums<T, kRows, kWhich>, rows_launch(plan), stream, args, walk, partial))
    return error;
  return launch(rows_finish<T, BackwardArgs, Gradient<S>>, finish_launch(shape.channels), stream, args, walk, partial,
                numbers_behind<Gradient<S>>(partial, walk));
}

template <Activations kWhich>
Error forward_rows(const ForwardArgs& args, const Plan& plan, Pair* partial, Stream stream) {
  constexpr int kRows = groups_in_hand(sizeof(T), kWhich, false, true);
  const RowsWalk walk = rows_walk(args, args.shape, plan);
  const LaunchShape shape = rows_launch(plan);
  auto* numbers = numbers_behind<ChannelAffine<S>>(partial, walk);
  if (plan.path == Path::rows_one_block || plan.path == Path::rows_on_chip)
    return launch(rows_forward_on_chip<T, kRows, kWhich>, shape, stream, args, walk, partial, numbers);
  if (plan.path == Path::rows_pointwise)
    return launch(rows_forward_apply<T, kRows, kWhich>, apply_launch(shape), stream, args, walk, nullptr);
  if (const Error error = forward_rows_sums<kWhich>(args, plan, partial, stream)) return error;
  return launch(rows_forward_apply<T, kRows, kWhich>, apply_launch(shape), stream, args, walk, numbers);
}

template <Activations kWhich>
Error backward_rows(const BackwardArgs& args, const Plan& plan, Pair* partial, Stream stream) {
  constexpr int kRows = groups_in_hand(sizeof(T), kWhich, true, true);
  const RowsWalk walk = rows_walk(args, args.shape, plan);
  const LaunchShape shape = rows_launch(plan);
  auto* numbers = numbers_behind<Gradient<S>>(partial, walk);
  if (plan.path == Path::rows_one_block || plan.path == Path::rows_on_chip)
    return launch(rows_backward_on_chip<T, kRows, kWhich>, shape, stream, args, walk, partial, numbers);
  if (plan.path == Path::rows_pointwise)
    return launch(rows_backward_apply<T, kRows, kWhich>, apply_launch(shape), stream, args, walk, nullptr);
  if (const Error error = backward_rows_sums<kWhich>(args, args.shape, plan, partial, stream)) return error;
  return launch(rows_backward_apply<T, kRows, kWhich>, apply_launch(shape), stream, args, walk, numbers);
}

}  // namespace

template <>
Error StorageKernels<T>::forward(const ForwardArgs& args, const Plan& plan, void* workspace, Stream stream) {
  auto* partial = static_cast<Pair*>(workspace);
  return with_activations(args.activation.kind, [&](auto which) {
    return args.shape.rows ? forward_rows<which>(args, plan, partial, stream)
                           : forward_planes<which>(args, plan, partial, stream);
  });
}

template <>
Error StorageKernels<T>::backward(const BackwardArgs& args, const Plan& plan, void* workspace, Stream stream) {
  auto* partial = static_cast<Pair*>(workspace);
  return with_activations(args.activation.kind, [&](auto which) {
    return args.shape.rows ? backward_rows<which>(args, plan, partial, stream)
                           : backward_planes<which>(args, plan, partial, stream);
  });
}

template <>
Error StorageKernels<T>::forward_sums(const ForwardArgs& args, const Plan& plan, Pair* partial, Stream stream) {
  return with_activations(args.activation.kind, [&](auto which) {
    return args.shape.rows ? forward_rows_sums<which>(args, plan, partial, stream)
                           : forward_planes_sums<which>(args, plan, partial, stream);
  });
}

template <>
Error StorageKernels<T>::backward_sums(const BackwardArgs& args, const Shape& shape, const Plan& plan, Pair* partial,
                                       Stream stream) {
  return with_activations(args.activation.kind, [&](auto which) {
    return shape.rows ? backward_rows_sums<which>(args, shape, plan, partial, stream)
                      : backward_planes_sums<which>(args, shape, plan, partial, stream);
  });
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
