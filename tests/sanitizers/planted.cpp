// Mistakes on purpose, as operators: what the sanitizers have to report before their silence means something.
#include <cstdint>
#include <vector>

#include "torch/tensors.h"

namespace fastlayers {
namespace {

// Reads one element behind those of the tensor.
double planted_overrun(Tensor t) {
  return static_cast<const float*>(t.const_data_ptr())[t.numel()];
}

std::int64_t planted_overflow(std::int64_t n) {
  return static_cast<std::int32_t>(n) + INT32_MAX;
}

// Every part adds to one number.
std::int64_t planted_race(std::int64_t count) {
  std::int64_t sum = 0;
  torch_parallel_for(count, 1, &sum, [](const void* context, std::int64_t begin, std::int64_t end) {
    *static_cast<std::int64_t*>(const_cast<void*>(context)) += end - begin;
  });
  return sum;
}

}  // namespace
}  // namespace fastlayers

STABLE_TORCH_LIBRARY(fastlayers_planted, m) {
  m.def("overrun(Tensor t) -> float");
  m.def("overflow(int n) -> int");
  m.def("race(int count) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(fastlayers_planted, CompositeExplicitAutograd, m) {
  m.impl("overrun", TORCH_BOX(&fastlayers::planted_overrun));
  m.impl("overflow", TORCH_BOX(&fastlayers::planted_overflow));
  m.impl("race", TORCH_BOX(&fastlayers::planted_race));
}
