// The Python module fastlayers_cpp_tests: vector code of the kernels, called on NumPy arrays.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/cpu/kernels.h"
#include "simd.h"

namespace py = pybind11;

namespace fastlayers {

// FASTLAYERS_EACH_ISA is FASTLAYERS_DO(isa) for each that was compiled. The tables are defined by isa_simd.cpp.
#define FASTLAYERS_DO(isa) extern const SimdFunctions simd_##isa;
FASTLAYERS_EACH_ISA
#undef FASTLAYERS_DO

namespace {

struct InstructionSet {
  const char* name;
  Capability capability;
  const SimdFunctions* functions;
};

const std::vector<InstructionSet>& compiled() {
#define FASTLAYERS_DO(isa) {#isa, Capability::isa, &simd_##isa},
  static const std::vector<InstructionSet> all{FASTLAYERS_EACH_ISA};
#undef FASTLAYERS_DO
  return all;
}

// Those that this processor has.
std::vector<std::string> instruction_sets() {
  const Capability before = capability();
  std::vector<std::string> names;
  for (const auto& isa : compiled())
    if (set_capability(isa.capability)) names.emplace_back(isa.name);
  set_capability(before);
  return names;
}

const SimdFunctions& functions_of(const std::string& isa) {
  for (const auto& entry : compiled())
    if (isa == entry.name) return *entry.functions;
  throw std::invalid_argument("not compiled: " + isa);
}

template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class From, class To>
void define(py::module_& m, const char* name, void (*SimdFunctions::*function)(const From*, To*, std::int64_t)) {
  m.def(name, [function](const std::string& isa, const Array<From>& x) {
    Array<To> result(x.size());
    (functions_of(isa).*function)(x.data(), result.mutable_data(), x.size());
    return result;
  });
}

}  // namespace
}  // namespace fastlayers

PYBIND11_MODULE(fastlayers_cpp_tests, m) {
  using namespace fastlayers;
  m.def("instruction_sets", instruction_sets);
  define(m, "exp", &SimdFunctions::exp);
  define(m, "expm1", &SimdFunctions::expm1);
  define(m, "log1p", &SimdFunctions::log1p);
  define(m, "tanh", &SimdFunctions::tanh);
  define(m, "erf", &SimdFunctions::erf);
  define(m, "from_bf16", &SimdFunctions::from_bf16);
  define(m, "from_f16", &SimdFunctions::from_f16);
  define(m, "to_bf16", &SimdFunctions::to_bf16);
  define(m, "to_f16", &SimdFunctions::to_f16);
}
