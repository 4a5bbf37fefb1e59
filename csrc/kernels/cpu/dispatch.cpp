// Chooses, at run time, among the kernels that were compiled for several instruction sets.
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

#ifndef FASTLAYERS_HAVE_AVX2
#define FASTLAYERS_HAVE_AVX2 0
#endif
#ifndef FASTLAYERS_HAVE_AVX512
#define FASTLAYERS_HAVE_AVX512 0
#endif

namespace fastlayers {

// Defined by isa_kernels.cpp, once for each instruction set and storage type.
#define FASTLAYERS_DECLARE(isa) \
  extern const Kernels kernels_##isa##_f32, kernels_##isa##_f64, kernels_##isa##_bf16, kernels_##isa##_f16;
FASTLAYERS_DECLARE(baseline)
#if FASTLAYERS_HAVE_AVX2
FASTLAYERS_DECLARE(avx2)
#endif
#if FASTLAYERS_HAVE_AVX512
FASTLAYERS_DECLARE(avx512)
#endif
#undef FASTLAYERS_DECLARE

namespace {

bool runs_here(Capability capability) {
  switch (capability) {
    case Capability::baseline: return true;
    case Capability::avx2:
#if FASTLAYERS_HAVE_AVX2
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
      return false;
#endif
    case Capability::avx512:
#if FASTLAYERS_HAVE_AVX512
      return runs_here(Capability::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
      return false;
#endif
  }
  return false;
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
#define FASTLAYERS_TABLE(isa)                                                               \
  {                                                                                         \
    &kernels_##isa##_f32, &kernels_##isa##_f64, &kernels_##isa##_bf16, &kernels_##isa##_f16 \
  }
  static const Kernels* const baseline[] = FASTLAYERS_TABLE(baseline);
  const auto index = static_cast<int>(dtype);
  switch (capability()) {
#if FASTLAYERS_HAVE_AVX512
    case Capability::avx512: {
      static const Kernels* const avx512[] = FASTLAYERS_TABLE(avx512);
      return *avx512[index];
    }
#endif
#if FASTLAYERS_HAVE_AVX2
    case Capability::avx2: {
      static const Kernels* const avx2[] = FASTLAYERS_TABLE(avx2);
      return *avx2[index];
    }
#endif
    default: return *baseline[index];
  }
#undef FASTLAYERS_TABLE
}

}  // namespace fastlayers
