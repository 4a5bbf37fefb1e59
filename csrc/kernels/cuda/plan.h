// Which kernels a call runs, and how they are launched: one table for each direction, in plan.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "kernels.h"

namespace fastlayers::cuda {

// What a plan has to know of the GPU.
struct Device {
  int processors = 0;              // streaming multiprocessors
  std::size_t shared_bytes = 0;    // that one block may use
  std::size_t shared_per_processor = 0;
  int max_cluster = 1;             // blocks of one cluster: 1 before compute capability 9.0, else 8
};
// Of a GPU of this machine, by its index.
Device device(int index);

enum class Path {
  planes_on_chip,  // a block or cluster for each channel, which keeps its data between its two passes
  planes_split,    // several blocks for each channel, in two kernels
  rows_one_block,  // a block for some channels, which keeps its data between its two passes
  rows_on_chip,    // one cooperative kernel, whose blocks keep their rows between its two passes
  rows_split,      // many blocks, in three kernels
  planes_pointwise,  // one pass over planes: nothing is summed
  rows_pointwise,    // one pass over rows
};
const char* name(Path);

struct Plan {
  Path path{};
  const char* why = "";
  int threads = 0;
  // Blocks along a channel's data (planes: of one channel, rows: of the rows), and how many of them form a cluster.
  int splits = 1, cluster = 1;
  // rows: how many rows are taken as one, so that groups of 8 elements do not straddle two of them; how many groups of
  // 8 elements one block is wide; how many such columns of blocks there are.
  int rows_per_run = 1, tile_groups = 1, tiles = 1;
  // How many of its tiles each block keeps in shared memory between its passes, and all shared memory of a block.
  std::int64_t kept_tiles = 0;
  std::size_t shared_bytes = 0, workspace_bytes = 0;
};

Plan plan_forward(const ForwardArgs&, const Device&);
Plan plan_backward(const BackwardArgs&, const Device&);

// A line for people.
std::string describe(const Plan&);

}  // namespace fastlayers::cuda
