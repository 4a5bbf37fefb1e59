# Builds csrc/kernels/cuda: fastlayers_cuda_plan, host code that every build has, and, where that is wanted and nvcc works,
# the static library fastlayers_cuda. Sets FASTLAYERS_HAVE_CUDA, FASTLAYERS_CUDA_COMPILER and FASTLAYERS_CUDA_ARCHS, or
# FASTLAYERS_WHY_NO_CUDA.
include(CheckLanguage)
include(CudaArchs)

set(cuda_folder "${PROJECT_SOURCE_DIR}/csrc/kernels/cuda")
file(GLOB plan_sources CONFIGURE_DEPENDS "${cuda_folder}/*.cpp")
add_library(fastlayers_cuda_plan STATIC ${plan_sources})
target_compile_options(fastlayers_cuda_plan PRIVATE ${FASTLAYERS_WARNINGS})

if(NOT FASTLAYERS_CUDA MATCHES "^(auto|0|1)$")
  message(FATAL_ERROR "FASTLAYERS_CUDA='${FASTLAYERS_CUDA}': allowed are auto (CUDA kernels where nvcc works), 0 and 1")
endif()

set(FASTLAYERS_HAVE_CUDA 0)
if(FASTLAYERS_CUDA STREQUAL 0)
  set(FASTLAYERS_WHY_NO_CUDA "FASTLAYERS_CUDA=0 was set")
else()
  if(NOT CMAKE_CUDA_COMPILER)
    unset(CMAKE_CUDA_COMPILER CACHE)  # "none", from an earlier look: there may be one by now
  endif()
  # FASTLAYERS_NVCC: from cmake_call.py, where one was installed by pip.
  find_program(FASTLAYERS_NVCC nvcc HINTS "$ENV{CUDA_HOME}/bin" PATHS /usr/local/cuda/bin)
  if(FASTLAYERS_NVCC AND NOT DEFINED ENV{CUDACXX})
    set(ENV{CUDACXX} "${FASTLAYERS_NVCC}")  # where CMake looks for it
  endif()
  if(DEFINED ENV{CUDACXX})
    # The packages of PyPI have their libraries in lib; nvcc looks in lib64.
    get_filename_component(cuda_bin "$ENV{CUDACXX}" DIRECTORY)
    get_filename_component(cuda_root "${cuda_bin}" DIRECTORY)
    if(EXISTS "${cuda_root}/lib/libcudart_static.a")
      set(FASTLAYERS_CUDA_LIBRARIES "${cuda_root}/lib")
      set(ENV{LIBRARY_PATH} "${FASTLAYERS_CUDA_LIBRARIES}:$ENV{LIBRARY_PATH}")  # for CMake's own checks
    endif()
  endif()
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(FASTLAYERS_HAVE_CUDA 1)
  else()
    set(FASTLAYERS_WHY_NO_CUDA "no nvcc works (CUDACXX='$ENV{CUDACXX}', CUDA_HOME='$ENV{CUDA_HOME}')")
  endif()
endif()

# fastlayers_add_cuda_kernels(<target> <archs>): a static library of the kernels for these architectures, compiled once
# per storage type, and of what surrounds them.
function(fastlayers_add_cuda_kernels target archs)
  file(GLOB sources CONFIGURE_DEPENDS "${cuda_folder}/*.cu")
  set(storage_sources ${sources})
  list(FILTER storage_sources INCLUDE REGEX "/storage_[^/]*\\.cu$")
  list(REMOVE_ITEM sources ${storage_sources})
  add_library(${target} STATIC ${sources})
  set(parts ${target})
  foreach(storage f32 f64 bf16 f16)
    set(object ${target}_${storage})
    add_library(${object} OBJECT ${storage_sources})
    target_compile_definitions(${object} PRIVATE FASTLAYERS_STORAGE=${storage})
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:${object}>)
    list(APPEND parts ${object})
  endforeach()
  foreach(part IN LISTS parts)
    target_compile_options(${part} PRIVATE ${FASTLAYERS_CUDA_FLAGS})
    set_target_properties(${part} PROPERTIES
      CUDA_ARCHITECTURES "${archs}" CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON CUDA_EXTENSIONS OFF)
  endforeach()
  target_link_libraries(${target} PUBLIC fastlayers_cuda_plan)
  target_link_directories(${target} INTERFACE ${FASTLAYERS_CUDA_LIBRARIES})
endfunction()

if(FASTLAYERS_HAVE_CUDA)
  # The CUDA runtime is linked statically, so that the library also loads beside a CPU-only torch.
  set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
  enable_language(CUDA)
  set(FASTLAYERS_CUDA_COMPILER "${CMAKE_CUDA_COMPILER_ID} ${CMAKE_CUDA_COMPILER_VERSION}")
  set(FASTLAYERS_CUDA_FLAGS
    --expt-relaxed-constexpr  # constexpr functions of the standard library in kernels
    # A kernel whose registers or arrays end up in memory is slow without a word; so it does not compile.
    -Xptxas --warn-on-spills,--warn-on-local-memory-usage,--warning-as-error)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
    # 1.3 instead of 9.8 MB for each architecture.
    list(APPEND FASTLAYERS_CUDA_FLAGS --compress-mode=size)
  endif()
  fastlayers_cuda_archs(FASTLAYERS_CUDA_ARCHS "${FASTLAYERS_CUDA_ARCH_LIST}" ${CMAKE_CUDA_COMPILER_VERSION})
  fastlayers_add_cuda_kernels(fastlayers_cuda "${FASTLAYERS_CUDA_ARCHS}")
elseif(FASTLAYERS_CUDA STREQUAL 1)
  message(FATAL_ERROR "FASTLAYERS_CUDA=1 asks for CUDA kernels, but ${FASTLAYERS_WHY_NO_CUDA}. "
    "FASTLAYERS_CUDA=auto builds without them.")
else()
  message(STATUS "No CUDA kernels: ${FASTLAYERS_WHY_NO_CUDA}")
endif()
