# The CPU kernels: isa_kernels.cpp, compiled once per instruction set and storage type, isa_pool.cpp, once per instruction
# set and type to compute in, and isa_random.cpp, once per instruction set.

if(NOT FASTLAYERS_ISAS)
  set(FASTLAYERS_ISAS baseline)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
    list(PREPEND FASTLAYERS_ISAS avx512 avx2)
  endif()
endif()

set(isa_flags_avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c)
set(isa_flags_avx2 -mavx2 -mfma -mf16c)
set(isa_flags_baseline)
if("avx2" IN_LIST FASTLAYERS_ISAS)
  # Only for processors of before 2013: -O3 takes two and a half times as long to compile, for 2 to 13 % of the time (one forward with GELU: 28 %).
  set(isa_flags_baseline -O1)
endif()

set(kernel_flags
  ${FASTLAYERS_WARNINGS}
  # Nobody reads errno or traps after these kernels; keeping either up forbids vectorising.
  -fno-math-errno -fno-trapping-math -ffp-contract=fast
  # The kernels never pass vectors between files that were compiled for different instruction sets.
  -Wno-psabi
  # gcc 12 warns of its own AVX-512 intrinsics, at every use; clang sees to what these warnings are for.
  $<$<CXX_COMPILER_ID:GNU>:-Wno-uninitialized>
  $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized>
  # Activation and dropout are switches inside the loops: a copy of each loop per case would take
  # minutes to compile. clang does not have this flag.
  $<$<CXX_COMPILER_ID:GNU>:-fno-unswitch-loops>)

# Compiles a source file for an instruction set, as part of a target, with these definitions.
function(fastlayers_add_isa_object target isa name source)
  set(object ${target}_${isa}_${name})
  add_library(${object} OBJECT "${PROJECT_SOURCE_DIR}/csrc/kernels/cpu/${source}")
  target_compile_definitions(${object} PRIVATE FASTLAYERS_ISA=${isa} ${ARGN})
  target_compile_options(${object} PRIVATE ${kernel_flags} ${isa_flags_${isa}})
  target_sources(${target} PRIVATE $<TARGET_OBJECTS:${object}>)
endfunction()

# fastlayers_add_cpu_kernels(<target> <isa>...): a static library of the kernels for these instruction sets, one of which
# has to be `baseline`, and of what surrounds them, such as the dispatcher that chooses among them at run time.
function(fastlayers_add_cpu_kernels target)
  set(folder "${PROJECT_SOURCE_DIR}/csrc/kernels/cpu")
  file(GLOB common_sources CONFIGURE_DEPENDS "${folder}/*.cpp")
  list(FILTER common_sources EXCLUDE REGEX "/isa_[^/]*$")
  add_library(${target} STATIC ${common_sources})
  target_compile_options(${target} PRIVATE ${FASTLAYERS_WARNINGS})
  foreach(isa IN LISTS ARGN)
    string(TOUPPER ${isa} upper)
    target_compile_definitions(${target} PRIVATE FASTLAYERS_HAVE_${upper}=1)
    foreach(storage f32 f64 bf16 f16)
      fastlayers_add_isa_object(${target} ${isa} ${storage} isa_kernels.cpp FASTLAYERS_STORAGE=${storage})
    endforeach()
    fastlayers_add_isa_object(${target} ${isa} pool_float isa_pool.cpp FASTLAYERS_COMPUTES_IN_DOUBLE=0)
    fastlayers_add_isa_object(${target} ${isa} pool_double isa_pool.cpp FASTLAYERS_COMPUTES_IN_DOUBLE=1)
    fastlayers_add_isa_object(${target} ${isa} random isa_random.cpp)
  endforeach()
endfunction()

fastlayers_add_cpu_kernels(fastlayers_cpu ${FASTLAYERS_ISAS})
