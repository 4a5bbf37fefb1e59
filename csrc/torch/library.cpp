// The operators, and what implements them on each device.
#include <torch/csrc/stable/library.h>

#include <string>

#include "../kernels/cpu/kernels.h"
#include "../kernels/cuda/plan.h"
#include "batch_norm_act.h"
#include "batch_norm_act_pool.h"
#include "cuda_ops.h"
#include "draw_mask.h"
#include "dropout.h"
#include "schemas.h"

namespace fastlayers {
namespace {

constexpr const char* kCapabilityNames[] = {"baseline", "avx2", "avx512"};

std::string cpu_capability() {
  return kCapabilityNames[static_cast<int>(capability())];
}

void set_cpu_capability(std::string name) {
  for (int i = 0; i < 3; ++i) {
    if (name != kCapabilityNames[i]) continue;
    STD_TORCH_CHECK(set_capability(static_cast<Capability>(i)), "cpu capability ", name,
                    " was not compiled or is not offered by this processor");
    return;
  }
  STD_TORCH_CHECK(false, "cpu capability should be baseline, avx2 or avx512, not ", name);
}

// What planning has to know of a GPU of this machine.
std::vector<std::int64_t> cuda_device(std::int64_t index) {
#if FASTLAYERS_HAVE_CUDA
  const cuda::Device gpu = cuda::device(static_cast<int>(index));
  return {gpu.processors, static_cast<std::int64_t>(gpu.shared_bytes),
          static_cast<std::int64_t>(gpu.shared_per_processor), gpu.max_cluster};
#else
  STD_TORCH_CHECK(false, "fastlayers was compiled without CUDA kernels and cannot ask for GPU ", index);
#endif
}

// Which CUDA kernels would run, and why, for a tensor of (batch, channels, spatial) elements.
std::string cuda_plan(std::vector<std::int64_t> shape, bool rows, torch::headeronly::ScalarType dtype,
                      std::int64_t activation, bool training, bool backward, std::vector<std::int64_t> device) {
  STD_TORCH_CHECK(shape.size() == 3, "shape should have 3 sizes, not ", shape.size());
  STD_TORCH_CHECK(device.size() == 4, "device should have 4 numbers, not ", device.size());
  const cuda::Device gpu{static_cast<int>(device[0]), static_cast<std::size_t>(device[1]),
                         static_cast<std::size_t>(device[2]), static_cast<int>(device[3])};
  const Shape tensor{rows, shape[0], shape[1], shape[2]};
  const auto plan = [&](auto args, auto make) {
    args.shape = tensor;
    args.dtype = storage_dtype(dtype);
    args.activation.kind = static_cast<Activation>(activation);
    args.training = training;
    return cuda::describe(make(args, gpu));
  };
  return backward ? plan(cuda::BackwardArgs{}, cuda::plan_backward) : plan(cuda::ForwardArgs{}, cuda::plan_forward);
}

}  // namespace
}  // namespace fastlayers

STABLE_TORCH_LIBRARY(fastlayers, m) {
  namespace schemas = fastlayers::schemas;
  m.def(schemas::batch_norm_act_fwd);
  m.def(schemas::batch_norm_act_bwd);
  m.def(schemas::batch_norm_act_pool_fwd);
  m.def(schemas::batch_norm_act_pool_bwd);
  m.def(schemas::dropout);
  m.def(schemas::pack_mask);
  m.def(schemas::unpack_mask);
  m.def(schemas::element_mask);
  m.def(schemas::draw_channel_mask);
  m.def(schemas::draw_element_mask);
  m.def("cpu_capability() -> str");
  m.def("set_cpu_capability(str name) -> ()");
  m.def("set_last_level_cache_bytes(int bytes) -> int");
  m.def("cuda_device(int index) -> int[]");
  m.def(
      "cuda_plan(int[] shape, bool rows, ScalarType dtype, int activation, bool training, bool backward, int[] device) "
      "-> str");
}

STABLE_TORCH_LIBRARY_IMPL(fastlayers, CPU, m) {
  m.impl("batch_norm_act_fwd", TORCH_BOX(&fastlayers::batch_norm_act_fwd));
  m.impl("batch_norm_act_bwd", TORCH_BOX(&fastlayers::batch_norm_act_bwd));
  m.impl("batch_norm_act_pool_fwd", TORCH_BOX(&fastlayers::batch_norm_act_pool_fwd));
  m.impl("batch_norm_act_pool_bwd", TORCH_BOX(&fastlayers::batch_norm_act_pool_bwd));
  m.impl("dropout", TORCH_BOX(&fastlayers::dropout));
  m.impl("pack_mask", TORCH_BOX(&fastlayers::pack_mask));
  m.impl("unpack_mask", TORCH_BOX(&fastlayers::unpack_mask));
  m.impl("draw_channel_mask", TORCH_BOX(&fastlayers::draw_channel_mask));
  m.impl("draw_element_mask", TORCH_BOX(&fastlayers::draw_element_mask));
}

#if FASTLAYERS_HAVE_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastlayers, CUDA, m) {
  m.impl("batch_norm_act_fwd", TORCH_BOX(&fastlayers::cuda_ops::batch_norm_act_fwd));
  m.impl("batch_norm_act_bwd", TORCH_BOX(&fastlayers::cuda_ops::batch_norm_act_bwd));
  m.impl("batch_norm_act_pool_fwd", TORCH_BOX(&fastlayers::cuda_ops::batch_norm_act_pool_fwd));
  m.impl("batch_norm_act_pool_bwd", TORCH_BOX(&fastlayers::cuda_ops::batch_norm_act_pool_bwd));
  m.impl("dropout", TORCH_BOX(&fastlayers::cuda_ops::dropout));
  m.impl("unpack_mask", TORCH_BOX(&fastlayers::cuda_ops::unpack_mask));
  m.impl("element_mask", TORCH_BOX(&fastlayers::cuda_ops::element_mask));
}
#endif

STABLE_TORCH_LIBRARY_IMPL(fastlayers, CompositeExplicitAutograd, m) {
  m.impl("cuda_device", TORCH_BOX(&fastlayers::cuda_device));
  m.impl("cuda_plan", TORCH_BOX(&fastlayers::cuda_plan));
  m.impl("cpu_capability", TORCH_BOX(&fastlayers::cpu_capability));
  m.impl("set_cpu_capability", TORCH_BOX(&fastlayers::set_cpu_capability));
  m.impl("set_last_level_cache_bytes", TORCH_BOX(&fastlayers::set_last_level_cache_bytes));
}
