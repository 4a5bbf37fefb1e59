// The parts of the Python module fastlayers_cuda_emulated.
#pragma once

#include <pybind11/pybind11.h>

namespace fastlayers::cuda {

void bind_kernels(pybind11::module_& m);

}  // namespace fastlayers::cuda
