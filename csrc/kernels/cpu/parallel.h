// Lambdas over the plain-function ParallelFor that the caller hands in.
#pragma once

#include "../common/macros.h"
#include "kernels.h"

namespace fastlayers {
inline namespace FASTLAYERS_ISA {

// A thread is worth waking for about this many elements.
inline constexpr std::int64_t kElementsPerThread = 16 * 1024;

// Calls f(i) for i in [0, count), in parallel when `elements_each` times count is worth it.
template <class F>
void parallel_each(ParallelFor parallel_for, std::int64_t count, std::int64_t elements_each, const F& f) {
  const std::int64_t grain = 1 + kElementsPerThread / (elements_each + 1);
  if (count <= grain) {
    for (std::int64_t i = 0; i < count; ++i) f(i);
    return;
  }
  parallel_for(count, grain, &f, [](const void* context, std::int64_t begin, std::int64_t end) {
    const F& body = *static_cast<const F*>(context);
    for (std::int64_t i = begin; i < end; ++i) body(i);
  });
}

}  // namespace FASTLAYERS_ISA
}  // namespace fastlayers
