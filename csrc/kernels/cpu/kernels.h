// What the CPU kernels offer to whoever binds them. Knows nothing of torch.
#pragma once

#include <cstdint>

#include "../common/dtypes.h"
#include "../common/operands.h"
#include "../common/pooling.h"

namespace fastlayers {

// The kernels sweep runs of adjacent elements: a plane, or all planes of a sample where these are small; a row, or
// several where these are narrow. Runs of several planes or rows have no gaps inside, and one step takes all channels.
struct Geometry : Shape {
  static constexpr std::int64_t kSmallPlane = 128, kNarrowRow = 32, kRowsPerRun = 16;
  // Whether a run holds all channels, or the planes of one.
  bool mixed_runs() const { return rows || spatial <= kSmallPlane; }
  // How many positions of each of its channels a run holds.
  std::int64_t positions_per_run() const {
    if (!rows) return spatial;
    return channels < kNarrowRow && spatial % kRowsPerRun == 0 ? kRowsPerRun : 1;
  }
  std::int64_t run_length() const { return (mixed_runs() ? channels : 1) * positions_per_run(); }
  std::int64_t runs() const { return numel() ? numel() / run_length() : 0; }

  // A bit mask starts each run at a byte of its own, so that no two threads write one byte.
  std::int64_t mask_stride() const { return (run_length() + 7) / 8; }
  std::int64_t mask_bytes() const { return runs() * mask_stride(); }
};

// Which elements dropout keeps: at most one of the two is given. Kept elements are multiplied by `scale`.
struct Keep {
  const std::uint8_t* planes = nullptr;  // (batch, channels), 0 or 1
  const std::uint8_t* bits = nullptr;    // a bit mask over all elements
  double scale = 1;
};

// Runs task(context, begin, end) over parts of [0, count), in parallel where a part has at least `grain` items.
using ParallelFor = void (*)(std::int64_t count, std::int64_t grain, const void* context,
                             void (*task)(const void* context, std::int64_t begin, std::int64_t end));

// Arrays of double have one element per channel.

struct ForwardArgs {
  Geometry geometry;
  ActivationSpec activation;
  Keep keep;
  Source input, residual;  // residual.data may be null
  Target output;
  std::uint8_t* flat_bits = nullptr;  // where a two-valued derivative is small, for backward; may be null
  const double *weight = nullptr, *bias = nullptr;
  double *mean = nullptr, *invstd = nullptr;  // written in training, read otherwise
  double* variance = nullptr;                 // biased; written in training
  bool training = false;
  double eps = 0;
  ParallelFor parallel_for = nullptr;
};

struct BackwardArgs {
  Geometry geometry;
  ActivationSpec activation;
  Keep keep;
  Source grad_output, input, residual;                  // residual.data may be null
  const std::uint8_t* flat_bits = nullptr;              // instead of the residual, for two-valued derivatives
  Target grad_input, grad_residual;                     // data may be null where not wanted
  double *grad_weight = nullptr, *grad_bias = nullptr;  // null where not wanted
  const double *weight = nullptr, *bias = nullptr, *mean = nullptr, *invstd = nullptr;
  bool training = false;
  ParallelFor parallel_for = nullptr;
};

// With max-pooling behind the dropout of planes. `geometry` and `input` are full-size. What is pooled holds nothing but
// its planes or rows, as the input has them: the output, and for backward the elements that were the largest of their
// windows and their numbers inside these.
struct PoolForwardArgs : ForwardArgs {
  Pool pool;
  bool monotone = true;      // the activation nowhere falls
  void* selected = nullptr;  // may be null, as positions
  std::uint8_t* positions = nullptr;
};

// `grad_output` is pooled. Its strides are what the layout allows; in evaluation mode `input` is not read.
struct PoolBackwardArgs : BackwardArgs {
  Pool pool;
  const void* selected = nullptr;
  const std::uint8_t* positions = nullptr;
};

// output = keep(input); also its own gradient.
struct DropoutArgs {
  Geometry geometry;
  Keep keep;
  Source input;
  Target output;
  ParallelFor parallel_for = nullptr;
};

struct Kernels {
  void (*batch_norm_act_forward)(const ForwardArgs&);
  void (*batch_norm_act_backward)(const BackwardArgs&);
  void (*dropout)(const DropoutArgs&);
  void (*batch_norm_act_pool_forward)(const PoolForwardArgs&);
  void (*batch_norm_act_pool_backward)(const PoolBackwardArgs&);
};

enum class Capability { baseline, avx2, avx512 };

// The best instruction set that was compiled, that this processor has, and that FASTLAYERS_CPU_CAPABILITY (baseline,
// avx2 or avx512) allows. Read once; set_capability changes it for tests and returns false where it cannot run.
Capability capability();
bool set_capability(Capability);

const Kernels& kernels(Dtype);

// Of the processor that this runs on, or a guess where the system does not tell. Results that it cannot hold are
// written past it. The setter is for tests and returns what was in force.
std::int64_t last_level_cache_bytes();
std::int64_t set_last_level_cache_bytes(std::int64_t bytes);

}  // namespace fastlayers
