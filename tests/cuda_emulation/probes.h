// Small kernels by which the emulator itself is tested, some of them wrong on purpose.
#pragma once

#include <string>
#include <vector>

#include "kernels/cuda/runtime.h"

namespace fastlayers::cuda {

struct Probe {
  const char* name;
  void (*kernel)(int* data, int size);
};

const std::vector<Probe>& probes();

}  // namespace fastlayers::cuda
