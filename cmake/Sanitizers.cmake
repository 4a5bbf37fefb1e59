# fastlayers_ops_address and fastlayers_ops_thread: the op library as .ci/sanitize runs the tests with it, each in a
# folder of its own name.

# fastlayers_add_sanitized_ops(<name> <instruction sets> <flags> <source>...)
function(fastlayers_add_sanitized_ops name isas flags)
  # -O1: what the sanitizers add to -O3 takes several times as long to compile. Seen by the function below.
  list(APPEND kernel_flags -O1 ${flags})
  fastlayers_add_cpu_kernels(fastlayers_cpu_${name} ${isas})
  fastlayers_add_op_library(fastlayers_ops_${name} fastlayers_cpu_${name} ${ARGN})
  target_include_directories(fastlayers_ops_${name} PRIVATE csrc)
  target_compile_definitions(fastlayers_ops_${name} PRIVATE FASTLAYERS_HAVE_CUDA=0)
  foreach(target fastlayers_cpu_${name} fastlayers_ops_${name})
    target_compile_options(${target} PRIVATE -O1 ${flags})
  endforeach()
  target_link_options(fastlayers_ops_${name} PRIVATE ${flags})
  set_target_properties(fastlayers_ops_${name} PROPERTIES
    OUTPUT_NAME _C PREFIX "" SUFFIX .abi3.so LIBRARY_OUTPUT_DIRECTORY "${PROJECT_BINARY_DIR}/fastlayers_ops_${name}")
endfunction()

set(planted "${PROJECT_SOURCE_DIR}/tests/sanitizers/planted.cpp")
fastlayers_add_sanitized_ops(address "${FASTLAYERS_ISAS}"
  "-fsanitize=address,undefined;-fno-sanitize-recover=all;-fno-omit-frame-pointer;-g1"
  ${FASTLAYERS_OP_SOURCES} "${planted}")
# torch's threads are those of OpenMP, whose barriers the thread sanitizer does not know.
set(own_threads ${FASTLAYERS_OP_SOURCES})
list(FILTER own_threads EXCLUDE REGEX "/parallel\\.cpp$")
# One instruction set: the threads are the same in all.
fastlayers_add_sanitized_ops(thread baseline "-fsanitize=thread;-g1"
  ${own_threads} "${PROJECT_SOURCE_DIR}/tests/sanitizers/parallel.cpp" "${planted}")
