# Builds csrc/kernels/cuda as the object library fastlayers_cuda, where that is wanted and nvcc works. Sets
# FASTLAYERS_HAVE_CUDA, FASTLAYERS_CUDA_COMPILER and FASTLAYERS_CUDA_ARCHS, or FASTLAYERS_WHY_NO_CUDA.
include(CheckLanguage)
include(CudaArchs)

if(NOT FASTLAYERS_CUDA MATCHES "^(auto|0|1)$")
  message(FATAL_ERROR "FASTLAYERS_CUDA='${FASTLAYERS_CUDA}': allowed are auto (CUDA kernels where nvcc works), 0 and 1")
endif()

set(FASTLAYERS_HAVE_CUDA 0)
file(GLOB cuda_sources CONFIGURE_DEPENDS csrc/kernels/cuda/*.cu)
if(FASTLAYERS_CUDA STREQUAL 0)
  set(FASTLAYERS_WHY_NO_CUDA "FASTLAYERS_CUDA=0 was set")
elseif(NOT cuda_sources)
  set(FASTLAYERS_WHY_NO_CUDA "this version of fastlayers has no CUDA kernels")
else()
  if(NOT CMAKE_CUDA_COMPILER)
    unset(CMAKE_CUDA_COMPILER CACHE)  # "none", from an earlier look: there may be one by now
  endif()
  find_program(FASTLAYERS_NVCC nvcc HINTS "$ENV{CUDA_HOME}/bin" PATHS /usr/local/cuda/bin)
  if(FASTLAYERS_NVCC AND NOT DEFINED ENV{CUDACXX})
    set(ENV{CUDACXX} "${FASTLAYERS_NVCC}")  # where CMake looks for it
  endif()
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(FASTLAYERS_HAVE_CUDA 1)
  else()
    set(FASTLAYERS_WHY_NO_CUDA "no nvcc works (CUDACXX='$ENV{CUDACXX}', CUDA_HOME='$ENV{CUDA_HOME}')")
  endif()
endif()

if(FASTLAYERS_HAVE_CUDA)
  enable_language(CUDA)
  set(FASTLAYERS_CUDA_COMPILER "${CMAKE_CUDA_COMPILER_ID} ${CMAKE_CUDA_COMPILER_VERSION}")
  fastlayers_cuda_archs(FASTLAYERS_CUDA_ARCHS "${FASTLAYERS_CUDA_ARCH_LIST}" ${CMAKE_CUDA_COMPILER_VERSION})
  add_library(fastlayers_cuda OBJECT ${cuda_sources})
  # The CUDA runtime is linked statically, so that the library also loads beside a CPU-only torch.
  set_target_properties(fastlayers_cuda PROPERTIES
    CUDA_ARCHITECTURES "${FASTLAYERS_CUDA_ARCHS}" CUDA_RUNTIME_LIBRARY Static)
elseif(FASTLAYERS_CUDA STREQUAL 1)
  message(FATAL_ERROR "FASTLAYERS_CUDA=1 asks for CUDA kernels, but ${FASTLAYERS_WHY_NO_CUDA}. "
    "FASTLAYERS_CUDA=auto builds without them.")
else()
  message(STATUS "No CUDA kernels: ${FASTLAYERS_WHY_NO_CUDA}")
endif()
