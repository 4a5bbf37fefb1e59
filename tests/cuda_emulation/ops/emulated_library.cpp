// torch.ops.fastlayers_emulated: the operators on CUDA tensors, as they are, over the emulated kernels, for CPU
// tensors.
#include <torch/csrc/stable/library.h>

#include "torch/cuda_ops.h"
#include "torch/schemas.h"

STABLE_TORCH_LIBRARY(fastlayers_emulated, m) {
  namespace schemas = fastlayers::schemas;
  m.def(schemas::batch_norm_act_fwd);
  m.def(schemas::batch_norm_act_bwd);
  m.def(schemas::batch_norm_act_pool_fwd);
  m.def(schemas::batch_norm_act_pool_bwd);
  m.def(schemas::dropout);
  m.def(schemas::unpack_mask);
  m.def(schemas::element_mask);
}

STABLE_TORCH_LIBRARY_IMPL(fastlayers_emulated, CPU, m) {
  m.impl("batch_norm_act_fwd", TORCH_BOX(&fastlayers::cuda_ops::batch_norm_act_fwd));
  m.impl("batch_norm_act_bwd", TORCH_BOX(&fastlayers::cuda_ops::batch_norm_act_bwd));
  m.impl("batch_norm_act_pool_fwd", TORCH_BOX(&fastlayers::cuda_ops::batch_norm_act_pool_fwd));
  m.impl("batch_norm_act_pool_bwd", TORCH_BOX(&fastlayers::cuda_ops::batch_norm_act_pool_bwd));
  m.impl("dropout", TORCH_BOX(&fastlayers::cuda_ops::dropout));
  m.impl("unpack_mask", TORCH_BOX(&fastlayers::cuda_ops::unpack_mask));
  m.impl("element_mask", TORCH_BOX(&fastlayers::cuda_ops::element_mask));
}
