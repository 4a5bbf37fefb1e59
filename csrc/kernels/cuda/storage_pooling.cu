// Launches the kernels with max-pooling of one storage type, FASTLAYERS_STORAGE, as planned.
#include "planes_pooling.h"
#include "rows_pooling.h"
#include "storage_launches.h"

namespace fastlayers::cuda {
namespace {

BasicPoolAxis<int, Factor> axis_walk(const PoolAxis& axis) {
  const auto narrow = [](std::int64_t v) { return static_cast<int>(v); };
  return {narrow(axis.input),  narrow(axis.output),  narrow(axis.kernel),
          narrow(axis.stride), narrow(axis.padding), narrow(axis.dilation)};
}

Divisor divisor(std::int64_t d) {
  return Divisor(static_cast<std::uint32_t>(d));
}

PoolWalk pool_walk(const Pool& pool) {
  PoolWalk walk;
  walk.height = axis_walk(pool.height);
  walk.width = axis_walk(pool.width);
  walk.inputs = divisor(pool.height.input * pool.width.input);
  walk.outputs = divisor(pool.outputs());
  walk.input_columns = divisor(pool.width.input);
  walk.output_columns = divisor(pool.width.output);
  walk.output_rows = divisor(pool.height.output);
  walk.kernel_columns = divisor(pool.width.kernel);
  return walk;
}

// Windows that are so many apart have no element in common.
int windows_apart(const PoolAxis& axis) {
  return static_cast<int>(std::min((axis.extent() + axis.stride - 1) / axis.stride, axis.output));
}

template <class Args>
PlanesPoolWalk planes_pool_walk(const Args& args, const PooledPlan& plan) {
  PlanesPoolWalk walk;
  walk.pool = pool_walk(args.pool);
  walk.strips = divisor((args.pool.height.output + kStripRows - 1) / kStripRows * args.pool.width.output);
  walk.summed_splits = plan.sums.splits;
  walk.batch = static_cast<std::uint32_t>(args.shape.batch);
  walk.planes_per_block = (walk.batch + static_cast<std::uint32_t>(plan.last.splits) - 1) / plan.last.splits;
  walk.rows_apart = windows_apart(args.pool.height);
  walk.columns_apart = windows_apart(args.pool.width);
  return walk;
}

template <class Args>
RowsPoolWalk rows_pool_walk(const Args& args, const Plan& plan, std::int64_t positions) {
  RowsPoolWalk walk;
  walk.pool = pool_walk(args.pool);
  walk.channels = args.shape.channels;
  walk.positions = static_cast<std::uint32_t>(args.shape.batch * positions);
  walk.tile_groups = plan.tile_groups;
  walk.tiles = plan.tiles;
  walk.lanes = plan.threads / plan.tile_groups;
  walk.splits = plan.splits;
  walk.aligned_mask = is_aligned(args.keep.planes) && args.shape.channels % kGroup == 0;
  walk.aligned_positions = is_aligned(args.positions) && args.shape.channels % kGroup == 0;
  return walk;
}

// Whether groups of channels can be moved in words.
bool is_row_aligned(const void* data, std::int64_t row_stride) {
  return data && is_aligned(data) && is_aligned(row_stride);
}
template <class Pointer>
bool is_row_aligned(const Strided<Pointer>& t) {
  return is_row_aligned(t.data, t.outer);
}

template <Activations kWhich>
Error forward_planes(const PooledForwardArgs& args, const PooledPlan& plan, Pair* partial, Stream stream) {
  constexpr int kTile = groups_in_hand(sizeof(T), kWhich, false, false);
  const PlanesWalk walk = planes_walk(args.shape, plan.last, kTile, aligned(args, args.shape));
  const LaunchShape shape = planes_launch(args.shape.channels, plan.last);
  const PlanesPoolWalk pooling = planes_pool_walk(args, plan);
  if (plan.last.path == Path::planes_on_chip)
    return launch(planes_pool_forward_on_chip<T, kTile, kWhich>, shape, stream, args, walk, pooling);
  if (plan.last.path == Path::planes_split)
    if (const Error error = StorageKernels<T>::forward_sums(args, plan.sums, partial, stream)) return error;
  return launch(planes_pool_forward<T, kWhich>, shape, stream, args, walk, pooling, partial);
}

template <Activations kWhich>
Error forward_rows(const PooledForwardArgs& args, const PooledPlan& plan, Pair* partial, Stream stream) {
  const std::int64_t channels = args.shape.channels;
  RowsPoolWalk walk = rows_pool_walk(args, plan.last, args.pool.outputs());
  walk.aligned_input = is_row_aligned(args.input);
  walk.aligned_output = is_row_aligned(args.output.data, channels);
  walk.aligned_selected = is_row_aligned(args.selected, channels);
  const ChannelAffine<S>* numbers = nullptr;
  if (plan.last.path == Path::rows_split) {
    if (const Error error = StorageKernels<T>::forward_sums(args, plan.sums, partial, stream)) return error;
    numbers = numbers_behind<ChannelAffine<S>>(partial, rows_walk(args, args.shape, plan.sums));
  }
  return launch(rows_pool_forward<T, kWhich>, rows_launch(plan.last), stream, args, walk, numbers);
}

Error backward_planes(const PooledBackwardArgs& args, const PooledPlan& plan, Pair* partial, Stream stream) {
  constexpr int kTile = spread_in_hand(sizeof(T));
  if (plan.last.path == Path::planes_split) {
    const Shape pooled = pooled_shape(args.pool, args.shape);
    if (const Error error = StorageKernels<T>::backward_sums(args, pooled, plan.sums, partial, stream)) return error;
  } else {
    partial = nullptr;
  }
  Aligned flags;
  flags.input = is_aligned(args.shape, args.whole_input);
  flags.grad_input = is_aligned(args.grad_input.data);
  return launch(planes_pool_backward<T, kTile>, planes_launch(args.shape.channels, plan.last), stream, args,
                planes_walk(args.shape, plan.last, kTile, flags), planes_pool_walk(args, plan), partial);
}

Error backward_rows(const PooledBackwardArgs& args, const PooledPlan& plan, Pair* partial, Stream stream) {
  RowsPoolWalk walk = rows_pool_walk(args, plan.last, args.shape.spatial);
  walk.aligned_input = is_row_aligned(args.whole_input);
  walk.aligned_selected = is_row_aligned(args.input);
  walk.aligned_grad_output = is_row_aligned(args.grad_output);
  walk.aligned_grad_input = is_row_aligned(args.grad_input.data, args.shape.channels);
  const Gradient<S>* numbers = nullptr;
  if (plan.last.path == Path::rows_split) {
    const Shape pooled = pooled_shape(args.pool, args.shape);
    if (const Error error = StorageKernels<T>::backward_sums(args, pooled, plan.sums, partial, stream)) return error;
    numbers = numbers_behind<Gradient<S>>(partial, rows_walk(args, pooled, plan.sums));
  }
  if (!args.grad_input.data) return 0;
  return launch(rows_pool_backward<T>, rows_launch(plan.last), stream, args, walk, numbers);
}

}  // namespace

template <>
Error StorageKernels<T>::pooled_forward(const PooledForwardArgs& args, const PooledPlan& plan, void* workspace,
                                        Stream stream) {
  auto* partial = static_cast<Pair*>(workspace);
  return with_activations(args.activation.kind, [&](auto which) {
    return args.shape.rows ? forward_rows<which>(args, plan, partial, stream)
                           : forward_planes<which>(args, plan, partial, stream);
  });
}

template <>
Error StorageKernels<T>::pooled_backward(const PooledBackwardArgs& args, const PooledPlan& plan, void* workspace,
                                         Stream stream) {
  auto* partial = static_cast<Pair*>(workspace);
  return args.shape.rows ? backward_rows(args, plan, partial, stream) : backward_planes(args, plan, partial, stream);
}

}  // namespace fastlayers::cuda
