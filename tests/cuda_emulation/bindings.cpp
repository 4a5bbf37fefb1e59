// The Python module fastlayers_cuda_emulated: the emulator itself, its probes, and the kernels (bind_kernels).
#include "bindings.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "probes.h"

namespace py = pybind11;

namespace fastlayers::cuda {

namespace {

using Sizes = std::vector<unsigned>;

dim3 as_dim3(const Sizes& sizes) {
  if (sizes.empty() || sizes.size() > 3) throw std::invalid_argument("expected one to three sizes");
  const auto at = [&](std::size_t i) { return i < sizes.size() ? sizes[i] : 1; };
  return {at(0), at(1), at(2)};
}

std::vector<std::string> probe_names() {
  std::vector<std::string> names;
  for (const Probe& probe : probes()) names.emplace_back(probe.name);
  return names;
}

void run_probe(const std::string& name, py::array_t<int>& data, const Sizes& grid, const Sizes& block,
               std::size_t shared_bytes, int cluster, bool cooperative) {
  for (const Probe& probe : probes())
    if (name == probe.name) {
      const LaunchShape shape{as_dim3(grid), as_dim3(block), shared_bytes, cluster, cooperative};
      launch(probe.kernel, shape, nullptr, data.mutable_data(), static_cast<int>(data.size()));
      return;
    }
  throw std::invalid_argument("no probe " + name);
}

}  // namespace
}  // namespace fastlayers::cuda

PYBIND11_MODULE(fastlayers_cuda_emulated, m) {
  using namespace fastlayers::cuda;
  py::enum_<emulation::Order>(m, "Order")
      .value("up", emulation::Order::up)
      .value("down", emulation::Order::down)
      .value("random", emulation::Order::random);
  m.def("set_order", emulation::set_order, py::arg("order"), py::arg("seed") = 0);
  m.def("probe_names", probe_names);
  m.def("run_probe", run_probe, py::arg("name"), py::arg("data").noconvert(), py::kw_only(), py::arg("grid") = Sizes{1},
        py::arg("block") = Sizes{32}, py::arg("shared_bytes") = 0, py::arg("cluster") = 1,
        py::arg("cooperative") = false);
  bind_kernels(m);
}
