// What the CUDA kernels offer to whoever binds them. Knows nothing of torch, and needs no CUDA header.
//
// A call is planned first (plan.h says which kernels run, how they are launched and how much workspace they need), then
// run on a stream. Everything is asynchronous: pointers are device pointers, unless said otherwise.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/dtypes.h"
#include "../common/operands.h"
#include "../common/pooling.h"

namespace fastlayers::cuda {

using Stream = void*;  // a cudaStream_t
using Error = int;     // a cudaError_t; 0 is success

// One value per channel, in any floating dtype. `data` may be null: then it stands for weight 1, bias 0, no statistics.
template <class Pointer>
struct PerChannel {
  Pointer data = nullptr;
  Dtype dtype = Dtype::f32;
  std::int64_t stride = 1;  // counts elements
};
using ChannelSource = PerChannel<const void*>;
using ChannelTarget = PerChannel<void*>;

struct ActivationCall {
  Activation kind{};
  double params[3] = {};
};

// Which elements dropout keeps: at most one of the two is given. Kept elements are multiplied by `scale`, 1 / (1 - p),
// or 0 where nothing is kept.
struct Keep {
  const void* planes = nullptr;        // (batch, channels); an element of any type is kept where it is not zero
  int plane_bytes = 1;                 // the size of that type: 1, 2, 4 or 8
  const std::int64_t* seed = nullptr;  // of the elements' random numbers (philox.h)
  double scale = 1;
};

struct ForwardArgs {
  Shape shape;
  Dtype dtype{};
  ActivationCall activation;
  Keep keep;
  Source input, residual;             // residual.data may be null
  Target output;                      // dense, in order
  std::uint8_t* flat_bits = nullptr;  // flat_bits_bytes() of them, for backward; may be null
  ChannelSource weight, bias;
  ChannelTarget running_mean, running_var;  // data may be null in training; read only in evaluation
  std::int64_t* num_batches_tracked = nullptr;
  bool training = false;
  double momentum = 0, eps = 0;
  bool cumulative = false;  // the running statistics are those of all batches alike; momentum is not used
  double *mean = nullptr, *invstd = nullptr;  // written: what backward needs
};

struct BackwardArgs {
  Shape shape;
  Dtype dtype{};
  ActivationCall activation;
  Keep keep;
  Source grad_output, input, residual;      // residual.data may be null
  const std::uint8_t* flat_bits = nullptr;  // instead of the residual, for two-valued derivatives
  Target grad_input, grad_residual;         // dense, in order; data may be null where not wanted
  ChannelTarget grad_weight, grad_bias;     // data may be null where not wanted
  ChannelSource weight, bias;
  const double *mean = nullptr, *invstd = nullptr;
  bool training = false;
};

// Forward with max-pooling behind it. `shape` and `input` are of what is pooled, `output` of what comes out. Without a
// residual, flat bits, or dropout of elements.
struct PooledForwardArgs : ForwardArgs {
  Pool pool;
  bool monotone = false;  // the activation nowhere falls
  // For backward, both in the output's order; null where not wanted: the input's elements that were the largest, in its
  // dtype, and their places in their windows. Where dropout drops, zeros.
  void* selected = nullptr;
  std::uint8_t* positions = nullptr;
};

// Its backward. `shape` and `grad_input` are of what was pooled; `grad_output` and `input`, the `selected` of forward,
// of what came out.
struct PooledBackwardArgs : BackwardArgs {
  Pool pool;
  Source whole_input;  // read in training only
  const std::uint8_t* positions = nullptr;
};

// output = keep(input); also its own gradient. Both dense, in the same order in memory.
struct DropoutArgs {
  Shape shape;  // of one plane where `keep` counts elements
  Dtype dtype{};
  Keep keep;
  const void* input = nullptr;
  void* output = nullptr;
};

// Size of the bit mask `flat_bits`: bit i of a byte belongs to element 8 k + i in the output's memory. Where planes do
// not begin at multiples of 8 elements, each plane has its own bytes, so that no two threads write one.
std::int64_t flat_bits_bytes(const Shape&);

struct Plan;        // plan.h
struct PooledPlan;  // plan.h

// `workspace` has the plan's workspace_bytes, aligned to 16 bytes; it is free again when what the stream holds is done.
Error batch_norm_act_forward(const ForwardArgs&, const Plan&, void* workspace, Stream);
Error batch_norm_act_backward(const BackwardArgs&, const Plan&, void* workspace, Stream);
Error batch_norm_act_pool_forward(const PooledForwardArgs&, const PooledPlan&, void* workspace, Stream);
Error batch_norm_act_pool_backward(const PooledBackwardArgs&, const PooledPlan&, void* workspace, Stream);
Error dropout(const DropoutArgs&, Stream);
Error count_batch(std::int64_t* num_batches_tracked, Stream);
// One bool for each element, in the order of memory: of flat_bits, or of what element dropout keeps.
Error unpack_flat_bits(const Shape&, const std::uint8_t* flat_bits, bool* mask, Stream);
Error element_mask(std::int64_t numel, const Keep&, bool* mask, Stream);

const char* error_text(Error);

}  // namespace fastlayers::cuda
