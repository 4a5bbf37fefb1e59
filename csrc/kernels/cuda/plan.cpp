// The table of kernels: which path a call takes, and how its kernels are launched. Host code alone.
#include "plan.h"

#include <algorithm>
#include <numeric>
#include <optional>
#include <sstream>

#include "../common/activations.h"
#include "launch_limits.h"

namespace fastlayers::cuda {
namespace {

std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

std::size_t element_bytes(Dtype dtype) {
  return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2;
}

// What each of the blocks that share a processor may have of its shared memory, of which the system takes 1 KB for
// each.
std::size_t share_of_shared(const Device& device, std::size_t blocks) {
  return std::min(device.shared_bytes, device.shared_per_processor / blocks - 1024);
}

// What planning asks of a call, forward or backward.
struct Request {
  Shape shape;
  std::size_t element_bytes;
  Activations activations;
  bool backward;
  bool sums;  // something is summed over channels

  // Of one group that a block keeps: x, and in backward the gradient of the output with it.
  std::size_t kept_group_bytes() const { return kGroup * element_bytes * (backward ? 2 : 1); }
  int in_hand() const { return groups_in_hand(element_bytes, activations, backward, shape.rows); }
};

constexpr const char* kNothingSummed = "nothing is summed, one pass is enough";

class Planes {
 public:
  Planes(const Request& request, const Device& device)
      : request_(request), device_(device), groups_(request.shape.batch * groups_per_plane(request.shape)) {}

  Plan plan() const {
    if (!request_.sums) return split(Path::planes_pointwise, kNothingSummed);
    if (const auto plan = first_on_chip(device_.max_cluster, [&](auto... size) { return in_tiles(size...); }))
      return *plan;
    return sums();
  }
  // In two kernels, of which the first only sums.
  Plan sums() const {
    return split(Path::planes_split, few_channels() ? "so few channels that each needs many blocks"
                                                    : "a channel is larger than what its blocks keep in shared memory");
  }
  // In one kernel, whose blocks keep whole planes.
  std::optional<Plan> whole_planes() const {
    return first_on_chip(std::min<std::int64_t>(device_.max_cluster, request_.shape.batch),
                         [&](auto... size) { return in_planes(size...); });
  }

 private:
  // Up to this many groups one block takes less time than a second kernel.
  static constexpr std::int64_t kSmallGroups = 2048;

  bool few_channels() const { return request_.shape.channels * device_.max_cluster < device_.processors; }
  // Whether blocks of this many for each channel are enough of them, or small enough not to matter.
  bool fills_device(int cluster) const {
    return ceil_div(groups_, cluster) <= kSmallGroups || request_.shape.channels * cluster >= device_.processors;
  }

  int threads(std::int64_t groups_per_block) const {
    const std::int64_t wanted = ceil_div(groups_per_block, request_.in_hand());
    return static_cast<int>(
        std::clamp<std::int64_t>(ceil_div(wanted, 32) * 32, 64, max_threads(request_.element_bytes)));
  }
  std::int64_t tiles(int threads) const { return ceil_div(groups_, std::int64_t{threads} * request_.in_hand()); }
  std::size_t tile_bytes(int threads) const {
    return static_cast<std::size_t>(threads) * static_cast<std::size_t>(request_.in_hand()) *
           request_.kept_group_bytes();
  }

  // The first of those that `make` can do with a cluster of so many blocks, each with so much shared memory.
  template <class Make>
  std::optional<Plan> first_on_chip(std::int64_t max_cluster, Make&& make) const {
    for (const std::size_t budget : {share_of_shared(device_, 2), device_.shared_bytes})
      for (int cluster = 1; cluster <= max_cluster; cluster *= 2)
        if (const auto plan = make(cluster, budget); plan && fills_device(cluster)) return plan;
    return std::nullopt;
  }
  Plan on_chip(int cluster, std::int64_t groups_per_block) const {
    Plan plan;
    plan.path = Path::planes_on_chip;
    plan.why = "a channel fits into the shared memory of a block or cluster";
    plan.splits = plan.cluster = cluster;
    plan.threads = threads(groups_per_block);
    return plan;
  }
  // Each block keeps each of so many tiles.
  std::optional<Plan> in_tiles(int cluster, std::size_t budget) const {
    Plan plan = on_chip(cluster, ceil_div(groups_, cluster));
    const std::size_t room = budget > kPlanesSharedBytes ? budget - kPlanesSharedBytes : 0;
    plan.kept_tiles = std::min<std::int64_t>(static_cast<std::int64_t>(room / tile_bytes(plan.threads)),
                                             ceil_div(tiles(plan.threads), cluster));
    plan.shared_bytes = kPlanesSharedBytes + static_cast<std::size_t>(plan.kept_tiles) * tile_bytes(plan.threads);
    return plan.kept_tiles * cluster >= tiles(plan.threads) ? std::optional(plan) : std::nullopt;
  }
  // Each block keeps so many planes.
  std::optional<Plan> in_planes(int cluster, std::size_t budget) const {
    const std::int64_t groups = ceil_div(request_.shape.batch, cluster) * groups_per_plane(request_.shape);
    Plan plan = on_chip(cluster, groups);
    plan.shared_bytes = kPlanesSharedBytes + static_cast<std::size_t>(groups) * request_.kept_group_bytes();
    return plan.shared_bytes <= budget ? std::optional(plan) : std::nullopt;
  }

  Plan split(Path path, const char* why) const {
    Plan plan;
    plan.path = path;
    plan.why = why;
    plan.threads = threads(groups_);
    const std::int64_t wanted =
        ceil_div(std::int64_t{device_.processors} * kBlocksPerProcessor, request_.shape.channels);
    plan.splits = static_cast<int>(std::clamp<std::int64_t>(wanted, 1, tiles(plan.threads)));
    plan.shared_bytes = kPlanesSharedBytes;
    if (path == Path::planes_split)
      plan.workspace_bytes = static_cast<std::size_t>(request_.shape.channels * plan.splits) * kPairBytes;
    return plan;
  }

  static constexpr int kBlocksPerProcessor = 8;

  Request request_;
  Device device_;
  std::int64_t groups_;  // of a channel
};

class Rows {
 public:
  Rows(const Request& request, const Device& device)
      : request_(request),
        device_(device),
        rows_per_run_(rows_per_run(request.shape)),
        runs_(ceil_div(request.shape.count_per_channel(), rows_per_run_)),
        groups_(groups_per_run(request.shape)) {}

  Plan plan() const {
    if (!request_.sums) return split(Path::rows_pointwise, kNothingSummed);
    if (const Plan plan = one_block(); fits(plan)) return plan;
    if (const Plan plan = on_chip(); fits(plan)) return plan;
    return sums("the tensor is larger than what all blocks together keep in shared memory");
  }
  // In three kernels, of which the first two only sum.
  Plan sums(const char* why) const { return split(Path::rows_split, why); }

 private:
  // One block that goes down all rows of some channels may have so many groups in a row for each thread.
  static constexpr std::int64_t kRunsPerLane = 16;
  static constexpr int kNarrowTile = 8, kWideTile = 32, kBlocksPerProcessor = 4;

  void set_tile(Plan& plan, std::int64_t width) const {
    plan.threads = kRowThreads;
    plan.tiles = static_cast<int>(ceil_div(groups_, std::min(width, groups_)));
    plan.tile_groups = static_cast<int>(ceil_div(groups_, plan.tiles));
    plan.tiles = static_cast<int>(ceil_div(groups_, plan.tile_groups));
  }
  // Whether a channel has columns in several tiles.
  bool is_spread(const Plan& plan) const { return rows_per_run_ > 1 && plan.tiles > 1; }
  std::int64_t lanes(const Plan& plan) const { return plan.threads / plan.tile_groups; }
  std::int64_t row_tiles(const Plan& plan) const { return ceil_div(runs_, lanes(plan) * request_.in_hand()); }
  bool fits(const Plan& plan) const { return plan.threads > 0 && plan.kept_tiles * plan.splits >= row_tiles(plan); }

  // Keeps as many of its tiles as there is room for.
  void keep(Plan& plan) const {
    const std::size_t fixed = rows_shared_bytes(static_cast<unsigned>(plan.threads));
    const std::size_t tile = static_cast<std::size_t>(plan.threads) * static_cast<std::size_t>(request_.in_hand()) *
                             request_.kept_group_bytes();
    const std::size_t budget = share_of_shared(device_, row_blocks(request_.element_bytes));
    const std::size_t room = budget > fixed ? budget - fixed : 0;
    plan.kept_tiles =
        std::min<std::int64_t>(static_cast<std::int64_t>(room / tile), ceil_div(row_tiles(plan), plan.splits));
    plan.shared_bytes = fixed + static_cast<std::size_t>(plan.kept_tiles) * tile;
    plan.workspace_bytes = workspace_bytes(plan);
  }
  // The sums of all columns in each split, and what is worked out for each channel.
  std::size_t workspace_bytes(const Plan& plan) const {
    return static_cast<std::size_t>(plan.splits * groups_ * kGroup) * kPairBytes +
           static_cast<std::size_t>(request_.shape.channels) * kMaxNumbersBytes;
  }

  Plan one_block() const {
    Plan plan;
    plan.path = Path::rows_one_block;
    plan.why = "few rows: a block takes all of them for its channels";
    // Narrow, for many blocks, but no less than the 32 bytes that memory is read by.
    const std::int64_t sector =
        std::max<std::int64_t>(1, 32 / static_cast<std::int64_t>(kGroup * request_.element_bytes));
    set_tile(plan, rows_per_run_ > 1 ? std::min<std::int64_t>(groups_, kWideTile) : sector);
    if (runs_ > lanes(plan) * kRunsPerLane || is_spread(plan)) return {};
    keep(plan);
    return plan;
  }

  Plan on_chip() const {
    Plan plan;
    plan.path = Path::rows_on_chip;
    plan.why = "the tensor fits into the shared memory of all blocks together";
    set_tile(plan, kNarrowTile);
    const std::int64_t blocks = std::int64_t{device_.processors} * row_blocks(request_.element_bytes);
    if (plan.tiles > blocks) return {};
    plan.splits = static_cast<int>(std::min(blocks / plan.tiles, row_tiles(plan)));
    plan.cooperative = plan.splits > 1 || is_spread(plan);
    keep(plan);
    return plan;
  }

  Plan split(Path path, const char* why) const {
    Plan plan;
    plan.path = path;
    plan.why = why;
    set_tile(plan, kWideTile);
    const std::int64_t wanted = ceil_div(std::int64_t{device_.processors} * kBlocksPerProcessor, plan.tiles);
    plan.splits = static_cast<int>(std::clamp<std::int64_t>(wanted, 1, row_tiles(plan)));
    if (path == Path::rows_pointwise) return plan;
    plan.shared_bytes = rows_shared_bytes(static_cast<unsigned>(plan.threads));
    plan.workspace_bytes = workspace_bytes(plan);
    return plan;
  }

  Request request_;
  Device device_;
  std::int64_t rows_per_run_, runs_, groups_;
};

Plan plan_for(const Request& request, const Device& device) {
  return request.shape.rows ? Rows(request, device).plan() : Planes(request, device).plan();
}

Plan plan_sums(const Request& request, const Device& device) {
  return request.shape.rows ? Rows(request, device).sums("what is pooled is summed before")
                            : Planes(request, device).sums();
}

// How many blocks share what each of `others` is done to, `most` at most.
int pool_splits(const Device& device, std::int64_t others, std::int64_t most) {
  constexpr std::int64_t kBlocksPerProcessor = 8;
  return static_cast<int>(std::clamp<std::int64_t>(ceil_div(device.processors * kBlocksPerProcessor, others), 1,
                                                   std::max<std::int64_t>(most, 1)));
}

// Of a kernel that goes through `positions` of rows.
Plan plan_pool_rows(const Shape& shape, std::int64_t positions, const Device& device) {
  Plan plan;
  const std::int64_t groups = ceil_div(shape.channels, kGroup);
  plan.threads = kRowThreads;
  plan.tiles = static_cast<int>(ceil_div(groups, kWarp));
  plan.tile_groups = static_cast<int>(ceil_div(groups, plan.tiles));
  plan.splits = pool_splits(device, plan.tiles, ceil_div(positions, plan.threads / plan.tile_groups));
  return plan;
}

Plan plan_pool_planes(const Shape& shape, const Pool& pool, const Device& device) {
  Plan plan;
  const std::int64_t strips = shape.batch * ceil_div(pool.height.output, kStripRows) * pool.width.output;
  plan.threads = kPoolThreads;
  plan.splits = pool_splits(device, shape.channels, ceil_div(strips, plan.threads));
  plan.shared_bytes = kPlanesSharedBytes;
  return plan;
}

Plan plan_spread_planes(const Shape& shape, std::size_t element_bytes, const Device& device) {
  Plan plan;
  const std::int64_t groups = shape.batch * groups_per_plane(shape), in_hand = spread_in_hand(element_bytes);
  plan.threads = static_cast<int>(
      std::clamp<std::int64_t>(ceil_div(ceil_div(groups, in_hand), kWarp) * kWarp, 2 * kWarp, kPoolThreads));
  plan.splits = pool_splits(device, shape.channels, ceil_div(groups, plan.threads * in_hand));
  const std::size_t computed_bytes = std::max<std::size_t>(element_bytes, sizeof(float));
  plan.shared_bytes = kPlanesSharedBytes + static_cast<std::size_t>(plan.threads * in_hand * kGroup) * computed_bytes;
  return plan;
}

// With the kernels before the last one, if something is summed.
void finish(PooledPlan& plan, const Request& request, const Device& device) {
  const bool rows = request.shape.rows;
  if (request.sums) plan.sums = plan_sums(request, device);
  plan.last.path = request.sums ? plan.sums.path : rows ? Path::rows_pointwise : Path::planes_pointwise;
  plan.last.why = request.sums ? plan.sums.why : kNothingSummed;
}

}  // namespace

const char* name(Path path) {
  switch (path) {
    case Path::planes_on_chip: return "planes_on_chip";
    case Path::planes_split: return "planes_split";
    case Path::rows_one_block: return "rows_one_block";
    case Path::rows_on_chip: return "rows_on_chip";
    case Path::rows_split: return "rows_split";
    case Path::planes_pointwise: return "planes_pointwise";
    case Path::rows_pointwise: return "rows_pointwise";
  }
  return "";
}

Activations activations_for(Activation kind) {
  return kind == Activation::identity || kind == Activation::relu ? Activations::rectifiers : Activations::all;
}

std::int64_t rows_per_run(const Shape& shape) {
  return kGroup / std::gcd(shape.channels, std::int64_t{kGroup});
}

std::int64_t groups_per_plane(const Shape& shape) {
  return shape.spatial % kGroup == 0 ? shape.spatial / kGroup : (shape.spatial + 2 * kGroup - 2) / kGroup;
}

std::int64_t groups_per_run(const Shape& shape) {
  return rows_per_run(shape) * shape.channels / kGroup;
}

std::int64_t flat_bits_bytes(const Shape& shape) {
  if (shape.rows) return ceil_div(shape.numel(), kGroup);
  return shape.batch * shape.channels * groups_per_plane(shape);
}

Plan plan_forward(const ForwardArgs& args, const Device& device) {
  return plan_for({args.shape, element_bytes(args.dtype), activations_for(args.activation.kind), false, args.training},
                  device);
}

Plan plan_backward(const BackwardArgs& args, const Device& device) {
  const bool sums = args.training || args.grad_weight.data || args.grad_bias.data;
  return plan_for({args.shape, element_bytes(args.dtype), activations_for(args.activation.kind), true, sums}, device);
}

PooledPlan plan_pooled_forward(const PooledForwardArgs& args, const Device& device) {
  const Request request{args.shape, element_bytes(args.dtype), activations_for(args.activation.kind), false,
                        args.training};
  const Shape pooled = pooled_shape(args.pool, args.shape);
  PooledPlan plan;
  if (args.training && !args.shape.rows)
    if (const auto on_chip = Planes(request, device).whole_planes()) return {*on_chip, {}};
  plan.last = args.shape.rows ? plan_pool_rows(args.shape, pooled.count_per_channel(), device)
                              : plan_pool_planes(args.shape, args.pool, device);
  finish(plan, request, device);
  return plan;
}

PooledPlan plan_pooled_backward(const PooledBackwardArgs& args, const Device& device) {
  const bool sums = args.training || args.grad_weight.data || args.grad_bias.data;
  const Request request{pooled_shape(args.pool, args.shape), element_bytes(args.dtype),
                        activations_for(args.activation.kind), true, sums};
  PooledPlan plan;
  plan.last = args.shape.rows ? plan_pool_rows(args.shape, args.shape.count_per_channel(), device)
                              : plan_spread_planes(args.shape, request.element_bytes, device);
  finish(plan, request, device);
  return plan;
}

std::string describe(const PooledPlan& plan) {
  return plan.sums.threads ? describe(plan.last) + "; the sums before it: " + describe(plan.sums) : describe(plan.last);
}

std::string describe(const Plan& plan) {
  std::ostringstream text;
  text << name(plan.path) << ": " << plan.why << "; " << plan.threads << " threads a block, ";
  if (plan.cluster > 1)
    text << "clusters of " << plan.cluster << " blocks for each channel, ";
  else
    text << plan.splits << " blocks along the data, ";
  if (plan.tiles > 1) text << plan.tiles << " across it, ";
  text << plan.shared_bytes << " bytes of shared memory a block, " << plan.workspace_bytes << " of workspace";
  return text.str();
}

}  // namespace fastlayers::cuda
