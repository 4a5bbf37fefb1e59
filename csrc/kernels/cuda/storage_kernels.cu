// Launches the kernels of one storage type, FASTLAYERS_STORAGE, as planned.
#include "pointwise.h"
#include "storage_launches.h"

namespace fastlayers::cuda {
namespace {

// The kernels of each direction, for the activations that a call needs.
template <Activations kWhich>
struct ForwardKernels {
  using Numbers = ChannelAffine<S>;
  static constexpr int kTile = groups_in_hand(sizeof(T), kWhich, false, false);
  static constexpr int kRows = groups_in_hand(sizeof(T), kWhich, false, true);
  static constexpr auto planes_on_chip = planes_forward_on_chip<T, kTile, kWhich>;
  static constexpr auto planes_sums = planes_forward_sums<T, kTile>;
  static constexpr auto planes_apply = planes_forward_apply<T, kTile, kWhich>;
  static constexpr auto rows_on_chip = rows_forward_on_chip<T, kRows, kWhich>;
  static constexpr auto rows_sums = rows_forward_sums<T, kRows>;
  static constexpr auto rows_finish = cuda::rows_finish<T, ForwardArgs, Numbers>;
  static constexpr auto rows_apply = rows_forward_apply<T, kRows, kWhich>;
};

template <Activations kWhich>
struct BackwardKernels {
  using Numbers = Gradient<S>;
  static constexpr int kTile = groups_in_hand(sizeof(T), kWhich, true, false);
  static constexpr int kRows = groups_in_hand(sizeof(T), kWhich, true, true);
  static constexpr auto planes_on_chip = planes_backward_on_chip<T, kTile, kWhich>;
  static constexpr auto planes_sums = planes_backward_sums<T, kTile, kWhich>;
  static constexpr auto planes_apply = planes_backward_apply<T, kTile, kWhich>;
  static constexpr auto rows_on_chip = rows_backward_on_chip<T, kRows, kWhich>;
  static constexpr auto rows_sums = rows_backward_sums<T, kRows, kWhich>;
  static constexpr auto rows_finish = cuda::rows_finish<T, BackwardArgs, Numbers>;
  static constexpr auto rows_apply = rows_backward_apply<T, kRows, kWhich>;
};

// The sums of tensors of this `shape`, which may be smaller than the input; also those below.
template <class Kernels, class Args>
Error sum_planes(const Args& args, const Shape& shape, const Plan& plan, Pair* partial, Stream stream) {
  return launch(Kernels::planes_sums, planes_launch(shape.channels, plan), stream, args,
                planes_walk(shape, plan, Kernels::kTile, aligned(args, shape)), partial);
}

// The first two of three kernels.
template <class Kernels, class Args>
Error sum_rows(const Args& args, const Shape& shape, const Plan& plan, Pair* partial, Stream stream) {
  const RowsWalk walk = rows_walk(args, shape, plan);
  if (const Error error = launch(Kernels::rows_sums, rows_launch(plan), stream, args, walk, partial)) return error;
  return launch(Kernels::rows_finish, finish_launch(shape.channels), stream, args, walk, partial,
                numbers_behind<typename Kernels::Numbers>(partial, walk));
}

template <class Kernels, class Args>
Error run_planes(const Args& args, const Plan& plan, Pair* partial, Stream stream) {
  const PlanesWalk walk = planes_walk(args.shape, plan, Kernels::kTile, aligned(args, args.shape));
  const LaunchShape shape = planes_launch(args.shape.channels, plan);
  if (plan.path == Path::planes_on_chip) return launch(Kernels::planes_on_chip, shape, stream, args, walk);
  const bool sums = plan.path == Path::planes_split;
  if (sums)
    if (const Error error = sum_planes<Kernels>(args, args.shape, plan, partial, stream)) return error;
  return launch(Kernels::planes_apply, shape, stream, args, walk, sums ? partial : nullptr);
}

template <class Kernels, class Args>
Error run_rows(const Args& args, const Plan& plan, Pair* partial, Stream stream) {
  const RowsWalk walk = rows_walk(args, args.shape, plan);
  const LaunchShape shape = rows_launch(plan);
  auto* numbers = numbers_behind<typename Kernels::Numbers>(partial, walk);
  if (plan.path == Path::rows_one_block || plan.path == Path::rows_on_chip)
    return launch(Kernels::rows_on_chip, shape, stream, args, walk, partial, numbers);
  const bool sums = plan.path == Path::rows_split;
  if (sums)
    if (const Error error = sum_rows<Kernels>(args, args.shape, plan, partial, stream)) return error;
  return launch(Kernels::rows_apply, apply_launch(shape), stream, args, walk, sums ? numbers : nullptr);
}

template <template <Activations> class Kernels, class Args>
Error run(const Args& args, const Plan& plan, void* workspace, Stream stream) {
  auto* partial = static_cast<Pair*>(workspace);
  return with_activations(args.activation.kind, [&](auto which) {
    using Which = Kernels<which>;
    return args.shape.rows ? run_rows<Which>(args, plan, partial, stream)
                           : run_planes<Which>(args, plan, partial, stream);
  });
}

template <template <Activations> class Kernels, class Args>
Error sum(const Args& args, const Shape& shape, const Plan& plan, Pair* partial, Stream stream) {
  return with_activations(args.activation.kind, [&](auto which) {
    using Which = Kernels<which>;
    return shape.rows ? sum_rows<Which>(args, shape, plan, partial, stream)
                      : sum_planes<Which>(args, shape, plan, partial, stream);
  });
}

}  // namespace

template <>
Error StorageKernels<T>::forward(const ForwardArgs& args, const Plan& plan, void* workspace, Stream stream) {
  return run<ForwardKernels>(args, plan, workspace, stream);
}

template <>
Error StorageKernels<T>::backward(const BackwardArgs& args, const Plan& plan, void* workspace, Stream stream) {
  return run<BackwardKernels>(args, plan, workspace, stream);
}

template <>
Error StorageKernels<T>::forward_sums(const ForwardArgs& args, const Plan& plan, Pair* partial, Stream stream) {
  return sum<ForwardKernels>(args, args.shape, plan, partial, stream);
}

template <>
Error StorageKernels<T>::backward_sums(const BackwardArgs& args, const Shape& shape, const Plan& plan, Pair* partial,
                                       Stream stream) {
  return sum<BackwardKernels>(args, shape, plan, partial, stream);
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
