// Chooses, at run time, among the kernels that were compiled for several instruction sets.
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "mersenne_twister.h"

#ifndef FASTLAYERS_HAVE_AVX2
#define FASTLAYERS_HAVE_AVX2 0
#endif
#ifndef FASTLAYERS_HAVE_AVX512
#define FASTLAYERS_HAVE_AVX512 0
#endif

namespace fastlayers {

// Defined by isa_kernels.cpp, once for each instruction set and storage type, and by isa_random.cpp.
#define FASTLAYERS_DECLARE(isa)                                                                             \
  extern const Kernels kernels_##isa##_f32, kernels_##isa##_f64, kernels_##isa##_bf16, kernels_##isa##_f16; \
  extern const RandomKernels random_##isa;
FASTLAYERS_DECLARE(baseline)
#if FASTLAYERS_HAVE_AVX2
FASTLAYERS_DECLARE(avx2)
#endif
#if FASTLAYERS_HAVE_AVX512
FASTLAYERS_DECLARE(avx512)
#endif
#undef FASTLAYERS_DECLARE

namespace {

// All that was compiled for one instruction set.
struct Compiled {
  const Kernels* kernels[4];  // in the order of Dtype
  const RandomKernels* random;
};

bool is_compiled(Capability capability) {
  switch (capability) {
    case Capability::baseline: return true;
    case Capability::avx2: return FASTLAYERS_HAVE_AVX2;
    case Capability::avx512: return FASTLAYERS_HAVE_AVX512;
  }
  return false;
}

bool processor_has(Capability capability) {
#if FASTLAYERS_HAVE_AVX2 || FASTLAYERS_HAVE_AVX512
  switch (capability) {
    case Capability::baseline: return true;
    case Capability::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case Capability::avx512:
      return processor_has(Capability::avx2) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl");
  }
  return false;
#else
  return capability == Capability::baseline;
#endif
}

bool runs_here(Capability capability) {
  return is_compiled(capability) && processor_has(capability);
}

Capability allowed_by_environment() {
  const char* value = std::getenv("FASTLAYERS_CPU_CAPABILITY");
  const std::string name = value ? value : "";
  if (name == "baseline") return Capability::baseline;
  if (name == "avx2") return Capability::avx2;
  if (name == "avx512" || name.empty()) return Capability::avx512;
  throw std::runtime_error("FASTLAYERS_CPU_CAPABILITY: unknown instruction set '" + name +
                           "'; allowed: baseline, avx2, avx512");
}

Capability best() {
  const Capability most = allowed_by_environment();
  for (Capability c : {Capability::avx512, Capability::avx2})
    if (c <= most && runs_here(c)) return c;
  return Capability::baseline;
}

std::atomic<Capability>& chosen() {
  static std::atomic<Capability> value{best()};
  return value;
}

const Compiled& compiled() {
#define FASTLAYERS_COMPILED(isa)                                                                              \
  {                                                                                                           \
    {&kernels_##isa##_f32, &kernels_##isa##_f64, &kernels_##isa##_bf16, &kernels_##isa##_f16}, &random_##isa, \
  }
  static const Compiled baseline = FASTLAYERS_COMPILED(baseline);
  switch (capability()) {
#if FASTLAYERS_HAVE_AVX512
    case Capability::avx512: {
      static const Compiled avx512 = FASTLAYERS_COMPILED(avx512);
      return avx512;
    }
#endif
#if FASTLAYERS_HAVE_AVX2
    case Capability::avx2: {
      static const Compiled avx2 = FASTLAYERS_COMPILED(avx2);
      return avx2;
    }
#endif
    default: return baseline;
  }
#undef FASTLAYERS_COMPILED
}

}  // namespace

Capability capability() {
  return chosen().load(std::memory_order_relaxed);
}

bool set_capability(Capability wanted) {
  if (!runs_here(wanted)) return false;
  chosen().store(wanted, std::memory_order_relaxed);
  return true;
}

const Kernels& kernels(Dtype dtype) {
  return *compiled().kernels[static_cast<int>(dtype)];
}

const RandomKernels& random_kernels() {
  return *compiled().random;
}

}  // namespace fastlayers
