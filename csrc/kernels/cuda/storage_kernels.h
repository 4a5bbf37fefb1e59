// The kernels of one storage type, as dispatch.cu calls them. storage_kernels.cu is compiled once for each type.
#pragma once

#include "plan.h"

namespace fastlayers::cuda {

template <class T>
struct StorageKernels {
  static Error forward(const ForwardArgs&, const Plan&, void* workspace, Stream);
  static Error backward(const BackwardArgs&, const Plan&, void* workspace, Stream);
  static Error dropout(const DropoutArgs&, Stream);
};

}  // namespace fastlayers::cuda
