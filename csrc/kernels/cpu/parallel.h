// Lambdas over the plain-function ParallelFor that the caller hands in.
#pragma once

#include "../common/macros.h"
#include "kernels.h"
#include "simd.h"

namespace fastlayers {
inline namespace FASTLAYERS_ISA {

// A thread is worth waking for about this many elements.
inline constexpr std::int64_t kElementsPerThread = 16 * 1024;

// Calls f(begin, end) for parts of [0, count), in parallel when `elements_each` times count is worth it.
template <class F>
void parallel_parts(ParallelFor parallel_for, std::int64_t count, std::int64_t elements_each, const F& f) {
  const auto part = [&](std::int64_t begin, std::int64_t end) {
    f(begin, end);
    finish_streaming();  // before other threads read what this one wrote
  };
  const std::int64_t grain = 1 + kElementsPerThread / (elements_each + 1);
  if (count <= grain) return part(0, count);
  parallel_for(count, grain, &part, [](const void* context, std::int64_t begin, std::int64_t end) {
    (*static_cast<const decltype(part)*>(context))(begin, end);
  });
}

// Calls f(i) for i in [0, count) likewise. Each thread takes its share in the order of `walk`.
template <class F>
void parallel_each(ParallelFor parallel_for, std::int64_t count, std::int64_t elements_each, Walk walk, const F& f) {
  parallel_parts(parallel_for, count, elements_each, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) f(walk == Walk::forward ? i : begin + end - 1 - i);
  });
}
template <class F>
void parallel_each(ParallelFor parallel_for, std::int64_t count, std::int64_t elements_each, const F& f) {
  parallel_each(parallel_for, count, elements_each, Walk::forward, f);
}

}  // namespace FASTLAYERS_ISA
}  // namespace fastlayers
