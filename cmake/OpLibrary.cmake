# The op library fastlayers/_C.abi3.so: csrc/torch on torch's stable ABI, with the kernels in it.

# fastlayers_add_op_library(<target> <library of CPU kernels> <source>...): a library of torch operators.
function(fastlayers_add_op_library target cpu_kernels)
  add_library(${target} MODULE ${ARGN})
  target_compile_options(${target} PRIVATE ${FASTLAYERS_WARNINGS})
  target_compile_definitions(${target} PRIVATE TORCH_TARGET_VERSION=${FASTLAYERS_TORCH_TARGET_HEX})
  # SYSTEM: the warnings of these headers are not ours.
  target_include_directories(${target} SYSTEM PRIVATE "${FASTLAYERS_TORCH_ROOT}/include" ${Python_INCLUDE_DIRS})
  target_link_libraries(${target} PRIVATE ${cpu_kernels} fastlayers_cuda_plan)
  # Not find_package(Torch): it wants the whole CUDA toolkit of a CUDA torch, and links more than the stable ABI.
  target_link_directories(${target} PRIVATE "${FASTLAYERS_TORCH_ROOT}/lib")
  # no-as-needed: the function for CUDA's current stream is weak and resolves only through libtorch, of which nothing
  # else is used. exclude-libs: the symbols of static libraries stay inside.
  target_link_libraries(${target} PRIVATE
    -Wl,--no-as-needed torch torch_cpu c10 -Wl,--as-needed -Wl,--exclude-libs,ALL)
endfunction()

file(GLOB FASTLAYERS_OP_SOURCES CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/csrc/torch/*.c*")
fastlayers_add_op_library(fastlayers_ops fastlayers_cpu ${FASTLAYERS_OP_SOURCES})
set_target_properties(fastlayers_ops PROPERTIES OUTPUT_NAME _C PREFIX "" SUFFIX .abi3.so)
target_compile_definitions(fastlayers_ops PRIVATE FASTLAYERS_HAVE_CUDA=${FASTLAYERS_HAVE_CUDA})
target_link_libraries(fastlayers_ops PRIVATE $<TARGET_NAME_IF_EXISTS:fastlayers_cuda>)

install(TARGETS fastlayers_ops DESTINATION . COMPONENT fastlayers_ops)
install(FILES "${PROJECT_BINARY_DIR}/build_info.json" DESTINATION . COMPONENT fastlayers_ops)
