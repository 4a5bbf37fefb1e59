// Which kernels a call runs, and how they are launched: one table for each direction, in plan.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "kernels.h"
#include "launch_limits.h"

namespace fastlayers::cuda {

// What a plan has to know of the GPU.
struct Device {
  int processors = 0;            // streaming multiprocessors
  std::size_t shared_bytes = 0;  // that one block may use
  std::size_t shared_per_processor = 0;
  int max_cluster = 1;  // blocks of one cluster: 1 before compute capability 9.0, else 8
};
// Of a GPU of this machine, by its index.
Device device(int index);

enum class Path {
  planes_on_chip,    // a block or cluster for each channel, which keeps its data between its two passes
  planes_split,      // several blocks for each channel, in two kernels
  rows_one_block,    // a block for some channels, which keeps its data between its two passes
  rows_on_chip,      // one cooperative kernel, whose blocks keep their rows between its two passes
  rows_split,        // many blocks, in three kernels
  planes_pointwise,  // one pass over planes: nothing is summed
  rows_pointwise,    // one pass over rows
};
const char* name(Path);

// Which activations a kernel is compiled for: a switch over all of them inside a loop costs registers and code that the
// plainest do not need.
enum class Activations { rectifiers, all };
Activations activations_for(Activation kind);

// How many groups of 8 elements each thread loads before it uses the first: enough for up to four loads of 16 bytes
// that are under way, from one tensor in forward and from two in backward, but no more than there are registers for.
constexpr int groups_in_hand(std::size_t element_bytes, Activations which, bool backward, bool rows) {
  const int words = static_cast<int>(element_bytes * 8 / 16);
  const int loads = which == Activations::rectifiers ? 4 : 2;
  const int tensors = backward ? (rows ? 2 : 4) : 1;
  return loads > words * tensors ? loads / (words * tensors) : 1;
}

struct Plan {
  Path path{};
  const char* why = "";
  int threads = 0;
  // Blocks along a channel's data (planes: of one channel, rows: of the rows), and how many of them form a cluster.
  int splits = 1, cluster = 1;
  // rows: whether all blocks meet in one kernel, since each has only part of a channel's sums.
  bool cooperative = false;
  // rows: how many groups of 8 elements one block is wide, and how many blocks a run of rows is.
  int tile_groups = 1, tiles = 1;
  // How many of its tiles each block keeps in shared memory between its passes, and all shared memory of a block.
  std::int64_t kept_tiles = 0;
  std::size_t shared_bytes = 0, workspace_bytes = 0;
};

// How many rows are taken as one run, so that it fills whole groups of 8 elements.
std::int64_t rows_per_run(const Shape&);
// Groups of 8 elements: of a plane, and of a run of rows.
std::int64_t groups_per_plane(const Shape&);
std::int64_t groups_per_run(const Shape&);

Plan plan_forward(const ForwardArgs&, const Device&);
Plan plan_backward(const BackwardArgs&, const Device&);

// With max-pooling, what is summed and what is written have different sizes.
struct PooledPlan {
  Plan last;  // of the kernel that pools, or spreads the gradients of what was pooled
  Plan sums;  // of those before it that sum over channels; no threads where there are none
};
PooledPlan plan_pooled_forward(const PooledForwardArgs&, const Device&);
PooledPlan plan_pooled_backward(const PooledBackwardArgs&, const Device&);

// How many groups of 8 elements each thread of a pooling kernel spreads gradients over: 64 bytes of these.
constexpr int spread_in_hand(std::size_t element_bytes) {
  return element_bytes == 8 ? 1 : 2;
}

// A line for people.
std::string describe(const Plan&);
std::string describe(const PooledPlan&);

}  // namespace fastlayers::cuda
