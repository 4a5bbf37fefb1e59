// The GPU of a tensor, from torch.
#include "gpu.h"

#if FASTLAYERS_HAVE_CUDA

#include <map>
#include <mutex>

// In libtorch_cuda: null beside a torch for CPUs, where no CUDA tensor can come from either.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace fastlayers::cuda_ops {

Gpu::Gpu(const Tensor& t) {
  STD_TORCH_CHECK(t.is_cuda(), "input should be on a CUDA device");
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA");
  guard_.emplace(t.get_device_index());
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_));
}

const cuda::Device& Gpu::sizes(const Tensor& t) {
  static std::mutex mutex;
  static std::map<std::int32_t, cuda::Device> known;
  const std::lock_guard lock(mutex);
  const auto [at, is_new] = known.try_emplace(t.get_device_index());
  if (is_new) at->second = cuda::device(t.get_device_index());
  return at->second;
}

}  // namespace fastlayers::cuda_ops

#endif
