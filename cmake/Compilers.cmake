# Enables C and C++20, or says which compiler is missing and how to get it.
include(CheckLanguage)
include(CheckCXXSourceCompiles)

# The leading spaces keep CMake from filling the lines.
set(how_to_get_a_compiler "\n"
  "  Debian, Ubuntu:  apt install g++\n"
  "  Fedora, RHEL:    dnf install gcc-c++   (an old release: gcc-toolset-13)\n"
  "  conda:           conda install -c conda-forge cxx-compiler\n"
  "  another one:     set CC and CXX to it (now: CC='$ENV{CC}', CXX='$ENV{CXX}')\n")

foreach(language C CXX)
  check_language(${language})
  if(NOT CMAKE_${language}_COMPILER)
    string(REPLACE CXX C++ name ${language})
    message(FATAL_ERROR "fastlayers compiles its kernels when it is installed, and no ${name} compiler works here. "
      "To get one:" ${how_to_get_a_compiler})
  endif()
  enable_language(${language})
endforeach()

set(CMAKE_REQUIRED_FLAGS -std=c++20)
check_cxx_source_compiles("
  #include <bit>
  #include <concepts>
  template <std::integral T> float as_float(T bits) { return std::bit_cast<float>(bits); }
  int main() { return as_float(0) > 0; }" FASTLAYERS_CXX20_WORKS)
unset(CMAKE_REQUIRED_FLAGS)
if(NOT FASTLAYERS_CXX20_WORKS)
  message(FATAL_ERROR "fastlayers is written in C++20, which ${CMAKE_CXX_COMPILER} (${CMAKE_CXX_COMPILER_ID} "
    "${CMAKE_CXX_COMPILER_VERSION}) does not compile. To get g++ 11 or clang 14, or a newer one:"
    ${how_to_get_a_compiler})
endif()

set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(FASTLAYERS_WARNINGS -Wall -Wextra)
