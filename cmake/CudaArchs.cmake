# Which GPU architectures to compile for.

# fastlayers_cuda_archs(<result> <list> <nvcc version>): CMake's names for the architectures of <list>, which is in the
# syntax of TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX", separated by semicolons, commas or spaces); the default if it is empty.
function(fastlayers_cuda_archs result list nvcc_version)
  if(list STREQUAL "")
    # Code for x.0 also runs on the later x.y; PTX, on every later GPU.
    if(nvcc_version VERSION_LESS 12.8)
      set(list "7.5 8.0 9.0+PTX")
    else()
      set(list "7.5 8.0 9.0 10.0 12.0+PTX")
    endif()
  endif()
  set(archs)
  string(REGEX REPLACE "[ ,;]+" ";" list "${list}")
  foreach(entry IN LISTS list)
    if(NOT entry MATCHES "^([0-9]+)\\.([0-9])([af]?)(\\+PTX)?$")
      message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST: '${entry}' is not a compute capability such as 8.0, 9.0a or 9.0+PTX")
    endif()
    # A plain CMake name stands for machine code and PTX, one with -real for machine code alone.
    set(kind -real)
    if(CMAKE_MATCH_4)
      set(kind "")
    endif()
    list(APPEND archs "${CMAKE_MATCH_1}${CMAKE_MATCH_2}${CMAKE_MATCH_3}${kind}")
  endforeach()
  set(${result} "${archs}" PARENT_SCOPE)
endfunction()

# fastlayers_cuda_targets(<result> <archs>...): the same for people: sm_80 for machine code, compute_80 for PTX.
function(fastlayers_cuda_targets result)
  set(targets)
  foreach(arch IN LISTS ARGN)
    string(REPLACE -real "" number ${arch})
    list(APPEND targets sm_${number})
    if(number STREQUAL arch)
      list(APPEND targets compute_${number})
    endif()
  endforeach()
  set(${result} "${targets}" PARENT_SCOPE)
endfunction()
