# The op library fastlayers/_C.abi3.so: csrc/torch on torch's stable ABI, with the kernels in it.
file(GLOB op_sources CONFIGURE_DEPENDS csrc/torch/*.cpp)
add_library(fastlayers_ops MODULE csrc/torch/module.c ${op_sources})
set_target_properties(fastlayers_ops PROPERTIES OUTPUT_NAME _C PREFIX "" SUFFIX .abi3.so)
target_compile_options(fastlayers_ops PRIVATE ${FASTLAYERS_WARNINGS})
target_compile_definitions(fastlayers_ops PRIVATE
  TORCH_TARGET_VERSION=${FASTLAYERS_TORCH_TARGET_HEX} FASTLAYERS_HAVE_CUDA=${FASTLAYERS_HAVE_CUDA})
# SYSTEM: the warnings of these headers are not ours.
target_include_directories(fastlayers_ops SYSTEM PRIVATE "${FASTLAYERS_TORCH_ROOT}/include" ${Python_INCLUDE_DIRS})

target_link_libraries(fastlayers_ops PRIVATE fastlayers_cpu fastlayers_cuda_plan $<TARGET_NAME_IF_EXISTS:fastlayers_cuda>)
# Not find_package(Torch): it wants the whole CUDA toolkit of a CUDA torch, and links more than the stable ABI.
target_link_directories(fastlayers_ops PRIVATE "${FASTLAYERS_TORCH_ROOT}/lib")
# no-as-needed: the function for CUDA's current stream is weak and resolves only through libtorch, of which nothing else
# is used. exclude-libs: the symbols of static libraries stay inside.
target_link_libraries(fastlayers_ops PRIVATE
  -Wl,--no-as-needed torch torch_cpu c10 -Wl,--as-needed -Wl,--exclude-libs,ALL)

install(TARGETS fastlayers_ops DESTINATION . COMPONENT fastlayers_ops)
install(FILES "${PROJECT_BINARY_DIR}/build_info.json" DESTINATION . COMPONENT fastlayers_ops)
