// The kernels of one storage type, as dispatch.cu calls them. storage_kernels.cu and storage_pooling.cu are compiled
// once for each type.
#pragma once

#include "plan.h"

namespace fastlayers::cuda {

struct Pair;  // sums.h

template <class T>
struct StorageKernels {
  static Error forward(const ForwardArgs&, const Plan&, void* workspace, Stream);
  static Error backward(const BackwardArgs&, const Plan&, void* workspace, Stream);
  static Error pooled_forward(const PooledForwardArgs&, const PooledPlan&, void* workspace, Stream);
  static Error pooled_backward(const PooledBackwardArgs&, const PooledPlan&, void* workspace, Stream);
  static Error dropout(const DropoutArgs&, Stream);

  // The kernels that sum over channels alone. In backward, over tensors of this shape; `args` has the input's.
  static Error forward_sums(const ForwardArgs&, const Plan&, Pair* partial, Stream);
  static Error backward_sums(const BackwardArgs& args, const Shape&, const Plan&, Pair* partial, Stream);
};

}  // namespace fastlayers::cuda
