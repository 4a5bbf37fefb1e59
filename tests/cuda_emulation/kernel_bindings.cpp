// kernels.h and plan.h in Python, member by member. Addresses are integers; whoever passes one keeps the memory alive.
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.h"
#include "kernels/common/activations.h"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/plan.h"

namespace py = pybind11;

namespace fastlayers::cuda {

namespace {

using Address = std::uintptr_t;

template <class T>
T* as_pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

template <class Owner, class... Bases, class T>
void def_address(py::class_<Owner, Bases...>& c, const char* name, T* Owner::* member) {
  c.def_property(
      name, [member](const Owner& owner) { return reinterpret_cast<Address>(owner.*member); },
      [member](Owner& owner, Address address) { owner.*member = as_pointer<T>(address); });
}

template <class T>
void bind_tensor(py::module_& m, const char* name) {
  using Tensor = Strided<T*>;
  py::class_<Tensor> c(m, name);
  c.def(py::init([](Address data, std::int64_t outer, std::int64_t inner) {
          return Tensor{as_pointer<T>(data), outer, inner};
        }),
        py::arg("data"), py::arg("outer"), py::arg("inner"));
  def_address(c, "data", &Tensor::data);
}

template <class T>
void bind_channels(py::module_& m, const char* name) {
  using Channels = PerChannel<T*>;
  py::class_<Channels>(m, name).def(py::init([](Address data, Dtype dtype, std::int64_t stride) {
                                      return Channels{as_pointer<T>(data), dtype, stride};
                                    }),
                                    py::arg("data"), py::arg("dtype"), py::arg("stride"));
}

void bind_operands(py::module_& m) {
  py::enum_<Dtype>(m, "Dtype")
      .value("f32", Dtype::f32)
      .value("f64", Dtype::f64)
      .value("bf16", Dtype::bf16)
      .value("f16", Dtype::f16);
  py::class_<Shape>(m, "Shape")
      .def(py::init<bool, std::int64_t, std::int64_t, std::int64_t>(), py::arg("rows"), py::arg("batch"),
           py::arg("channels"), py::arg("spatial"));
  bind_tensor<const void>(m, "Source");
  bind_tensor<void>(m, "Target");
  bind_channels<const void>(m, "ChannelSource");
  bind_channels<void>(m, "ChannelTarget");
  py::class_<ActivationCall>(m, "ActivationCall")
      .def(py::init([](std::int64_t kind, const std::array<double, kActivationParams>& params) {
             ActivationCall call{static_cast<Activation>(kind), {}};
             std::ranges::copy(params, call.params);
             return call;
           }),
           py::arg("kind"), py::arg("params"));
  py::class_<Keep> keep(m, "Keep");
  keep.def(py::init<>()).def_readwrite("plane_bytes", &Keep::plane_bytes).def_readwrite("scale", &Keep::scale);
  def_address(keep, "planes", &Keep::planes);
  def_address(keep, "seed", &Keep::seed);
}

// What forward and backward have alike.
template <class Args>
py::class_<Args> bind_arguments(py::module_& m, const char* name) {
  py::class_<Args> c(m, name);
  c.def(py::init<>())
      .def_readwrite("shape", &Args::shape)
      .def_readwrite("dtype", &Args::dtype)
      .def_readwrite("activation", &Args::activation)
      .def_readwrite("keep", &Args::keep)
      .def_readwrite("input", &Args::input)
      .def_readwrite("residual", &Args::residual)
      .def_readwrite("weight", &Args::weight)
      .def_readwrite("bias", &Args::bias)
      .def_readwrite("training", &Args::training);
  def_address(c, "flat_bits", &Args::flat_bits);
  def_address(c, "mean", &Args::mean);
  def_address(c, "invstd", &Args::invstd);
  return c;
}

// One dimension of `window`, which is what the operators take (csrc/torch/schemas.h).
PoolAxis pool_axis(std::int64_t input, const std::array<std::int64_t, 8>& window, std::size_t dim, bool ceil_mode) {
  PoolAxis axis{input, 0, window[dim], window[2 + dim], window[4 + dim], window[6 + dim]};
  axis.output = PoolAxis::output_size(axis, ceil_mode);
  return axis;
}

void bind_pooled_arguments(py::module_& m) {
  py::class_<Pool>(m, "Pool").def(
      py::init([](std::int64_t height, std::int64_t width, const std::array<std::int64_t, 8>& window, bool ceil_mode) {
        return Pool{pool_axis(height, window, 0, ceil_mode), pool_axis(width, window, 1, ceil_mode)};
      }),
      py::arg("height"), py::arg("width"), py::arg("window"), py::arg("ceil_mode"));
  py::class_<PooledForwardArgs, ForwardArgs> forward(m, "PooledForwardArgs");
  forward.def(py::init<>())
      .def_readwrite("pool", &PooledForwardArgs::pool)
      .def_readwrite("monotone", &PooledForwardArgs::monotone);
  def_address(forward, "selected", &PooledForwardArgs::selected);
  def_address(forward, "positions", &PooledForwardArgs::positions);
  py::class_<PooledBackwardArgs, BackwardArgs> backward(m, "PooledBackwardArgs");
  backward.def(py::init<>())
      .def_readwrite("pool", &PooledBackwardArgs::pool)
      .def_readwrite("whole_input", &PooledBackwardArgs::whole_input);
  def_address(backward, "positions", &PooledBackwardArgs::positions);
}

void bind_all_arguments(py::module_& m) {
  auto forward = bind_arguments<ForwardArgs>(m, "ForwardArgs");
  forward.def_readwrite("output", &ForwardArgs::output)
      .def_readwrite("running_mean", &ForwardArgs::running_mean)
      .def_readwrite("running_var", &ForwardArgs::running_var)
      .def_readwrite("momentum", &ForwardArgs::momentum)
      .def_readwrite("cumulative", &ForwardArgs::cumulative)
      .def_readwrite("eps", &ForwardArgs::eps);
  def_address(forward, "num_batches_tracked", &ForwardArgs::num_batches_tracked);
  bind_arguments<BackwardArgs>(m, "BackwardArgs")
      .def_readwrite("grad_output", &BackwardArgs::grad_output)
      .def_readwrite("grad_input", &BackwardArgs::grad_input)
      .def_readwrite("grad_residual", &BackwardArgs::grad_residual)
      .def_readwrite("grad_weight", &BackwardArgs::grad_weight)
      .def_readwrite("grad_bias", &BackwardArgs::grad_bias);
  bind_pooled_arguments(m);
  py::class_<DropoutArgs> dropout_args(m, "DropoutArgs");
  dropout_args.def(py::init<>())
      .def_readwrite("shape", &DropoutArgs::shape)
      .def_readwrite("dtype", &DropoutArgs::dtype)
      .def_readwrite("keep", &DropoutArgs::keep);
  def_address(dropout_args, "input", &DropoutArgs::input);
  def_address(dropout_args, "output", &DropoutArgs::output);
}

void bind_plan(py::module_& m) {
  py::class_<Device>(m, "Device")
      .def(py::init<int, std::size_t, std::size_t, int>(), py::arg("processors"), py::arg("shared_bytes"),
           py::arg("shared_per_processor"), py::arg("max_cluster"));
  py::class_<Plan>(m, "Plan")
      .def_property_readonly("path", [](const Plan& plan) { return std::string(name(plan.path)); })
      .def_property_readonly("why", [](const Plan& plan) { return std::string(plan.why); })
      .def_readonly("threads", &Plan::threads)
      .def_readonly("splits", &Plan::splits)
      .def_readonly("cluster", &Plan::cluster)
      .def_readonly("tile_groups", &Plan::tile_groups)
      .def_readonly("tiles", &Plan::tiles)
      .def_readonly("kept_tiles", &Plan::kept_tiles)
      .def_readonly("shared_bytes", &Plan::shared_bytes)
      .def_readonly("workspace_bytes", &Plan::workspace_bytes)
      .def("__str__", [](const Plan& plan) { return describe(plan); });
  py::class_<PooledPlan>(m, "PooledPlan")
      .def_readonly("last", &PooledPlan::last)
      .def_readonly("sums", &PooledPlan::sums)
      .def_property_readonly("workspace_bytes", [](const PooledPlan& plan) { return plan.sums.workspace_bytes; })
      .def("__str__", [](const PooledPlan& plan) { return describe(plan); });
  m.def("path_names", [] {
    std::vector<std::string> names;
    for (int path = 0; path <= static_cast<int>(Path::rows_pointwise); ++path)
      names.emplace_back(name(static_cast<Path>(path)));
    return names;
  });
  m.def("plan_forward", plan_forward);
  m.def("plan_backward", plan_backward);
  m.def("plan_pooled_forward", plan_pooled_forward);
  m.def("plan_pooled_backward", plan_pooled_backward);
}

void check(Error error) {
  if (error) throw std::runtime_error(error_text(error));
}

}  // namespace

void bind_kernels(py::module_& m) {
  bind_operands(m);
  bind_all_arguments(m);
  bind_plan(m);
  m.def("flat_bits_bytes", flat_bits_bytes);
  m.def("batch_norm_act_forward", [](const ForwardArgs& args, const Plan& plan, Address workspace) {
    check(batch_norm_act_forward(args, plan, as_pointer<void>(workspace), nullptr));
  });
  m.def("batch_norm_act_backward", [](const BackwardArgs& args, const Plan& plan, Address workspace) {
    check(batch_norm_act_backward(args, plan, as_pointer<void>(workspace), nullptr));
  });
  m.def("batch_norm_act_pool_forward", [](const PooledForwardArgs& args, const PooledPlan& plan, Address workspace) {
    check(batch_norm_act_pool_forward(args, plan, as_pointer<void>(workspace), nullptr));
  });
  m.def("batch_norm_act_pool_backward", [](const PooledBackwardArgs& args, const PooledPlan& plan, Address workspace) {
    check(batch_norm_act_pool_backward(args, plan, as_pointer<void>(workspace), nullptr));
  });
  m.def("dropout", [](const DropoutArgs& args) { check(dropout(args, nullptr)); });
  m.def("unpack_flat_bits", [](const Shape& shape, Address flat_bits, Address mask) {
    check(unpack_flat_bits(shape, as_pointer<const std::uint8_t>(flat_bits), as_pointer<bool>(mask), nullptr));
  });
  m.def("element_mask", [](std::int64_t numel, const Keep& keep, Address mask) {
    check(element_mask(numel, keep, as_pointer<bool>(mask), nullptr));
  });
}

}  // namespace fastlayers::cuda
