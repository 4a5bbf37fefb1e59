// The threads that kernels run on: torch's. A file of its own, in whose place the thread sanitizer's build has another.
#include <torch/csrc/stable/ops.h>

#include "tensors.h"

namespace fastlayers {

void torch_parallel_for(std::int64_t count, std::int64_t grain, const void* context,
                        void (*task)(const void* context, std::int64_t begin, std::int64_t end)) {
  torch::stable::parallel_for(0, count, grain,
                              [=](std::int64_t begin, std::int64_t end) { task(context, begin, end); });
}

}  // namespace fastlayers
