# fastlayers_cpp_tests: a Python module by which the tests call kernels and C++ helpers directly. It is for the Python
# that it was built with alone, and ends up in the folder `tests` of the build folder.
execute_process(COMMAND "${Python_EXECUTABLE}" -m pybind11 --cmakedir
  OUTPUT_VARIABLE pybind11_DIR OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE failed)
if(failed)
  message(FATAL_ERROR "The C++ tests need pybind11: pip install -e \".[test]\"")
endif()
find_package(pybind11 CONFIG REQUIRED)

file(GLOB test_sources CONFIGURE_DEPENDS tests/cpp/*.cpp)
list(FILTER test_sources EXCLUDE REGEX "/isa_[^/]*$")
pybind11_add_module(fastlayers_cpp_tests MODULE NO_EXTRAS ${test_sources})
set_target_properties(fastlayers_cpp_tests PROPERTIES LIBRARY_OUTPUT_DIRECTORY "${PROJECT_BINARY_DIR}/tests")
target_compile_options(fastlayers_cpp_tests PRIVATE ${FASTLAYERS_WARNINGS})
target_include_directories(fastlayers_cpp_tests PRIVATE csrc)
target_link_libraries(fastlayers_cpp_tests PRIVATE fastlayers_cpu)

# Sources named isa_*.cpp are compiled as the kernels are, once per instruction set.
file(GLOB isa_test_sources CONFIGURE_DEPENDS tests/cpp/isa_*.cpp)
set(each_isa)
foreach(isa IN LISTS FASTLAYERS_ISAS)
  set(object fastlayers_cpp_tests_${isa})
  add_library(${object} OBJECT ${isa_test_sources})
  target_compile_definitions(${object} PRIVATE FASTLAYERS_ISA=${isa})
  target_compile_options(${object} PRIVATE ${kernel_flags} ${isa_flags_${isa}})
  target_include_directories(${object} PRIVATE csrc)
  target_sources(fastlayers_cpp_tests PRIVATE $<TARGET_OBJECTS:${object}>)
  string(APPEND each_isa " FASTLAYERS_DO(${isa})")
endforeach()
target_compile_definitions(fastlayers_cpp_tests PRIVATE "FASTLAYERS_EACH_ISA=${each_isa}")
