// Tensors of torch's stable ABI as the kernels see them: storage types, layouts, allocation, per-channel arrays.
#include "tensors.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <array>
#include <utility>

#include "../kernels/common/activations.h"

namespace fastlayers {
namespace {

using Sizes = std::vector<std::int64_t>;

// The stride with which dims [begin, end) are walked as one, or nothing if they cannot be. 1 where they hold one
// element.
std::optional<std::int64_t> merged_stride(const Sizes& sizes, const Sizes& strides) {
  std::int64_t stride = 1, extent = 1;
  bool found = false;
  for (std::size_t d = sizes.size(); d-- > 0;) {
    if (sizes[d] == 1) continue;
    if (!found)
      stride = strides[d];
    else if (strides[d] != stride * extent)
      return std::nullopt;
    found = true;
    extent *= sizes[d];
  }
  return stride;
}

Sizes dims_after(torch::headeronly::IntHeaderOnlyArrayRef all, std::int64_t first) {
  return {all.begin() + first, all.end()};
}

Sizes without_channels(torch::headeronly::IntHeaderOnlyArrayRef all) {
  Sizes dims = dims_after(all, 2);
  dims.insert(dims.begin(), all[0]);
  return dims;
}

std::int64_t product(const Sizes& sizes) {
  std::int64_t p = 1;
  for (std::int64_t s : sizes) p *= s;
  return p;
}

std::optional<View> view_as(const Walk& walk, const Tensor& t) {
  const Shape& g = walk.shape;
  const auto sizes = t.sizes(), strides = t.strides();
  if (g.rows) {
    const auto row = merged_stride(without_channels(sizes), without_channels(strides));
    const std::int64_t rows = walk.rows_at_once;
    if (row && (g.channels == 1 || strides[1] == 1) && (rows == 1 || *row == g.channels))
      return View{t, rows * *row, 1};
    return std::nullopt;
  }
  const auto inner = merged_stride(dims_after(sizes, 2), dims_after(strides, 2));
  if (!inner || *inner != 1) return std::nullopt;
  if (walk.planes_adjacent && g.channels > 1 && strides[1] != g.spatial) return std::nullopt;
  return View{t, strides[0], strides[1]};
}

// Planes or rows one after the other without gaps, the samples in order.
Sizes strides_in_order(const Shape& g, const Tensor& like) {
  const auto sizes = like.sizes();
  Sizes strides(sizes.size());
  std::int64_t stride = g.rows ? g.channels : 1;
  for (std::size_t d = sizes.size(); d-- > 2;) {
    strides[d] = stride;
    stride *= sizes[d];
  }
  strides[1] = g.rows ? 1 : g.spatial;
  strides[0] = g.channels * g.spatial;
  return strides;
}

Tensor empty_in_order(const Shape& g, const Tensor& like) {
  const auto sizes = like.sizes();
  return empty_strided(like, {sizes.begin(), sizes.end()}, strides_in_order(g, like), like.scalar_type());
}

Tensor copy_in_order(const Shape& g, const Tensor& t) {
  Tensor copy = empty_in_order(g, t);
  torch::stable::copy_(copy, t);
  return copy;
}

}  // namespace

bool is_in_order(const Shape& g, const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  const Sizes expected = strides_in_order(g, t);
  for (std::size_t d = 0; d < expected.size(); ++d)
    if (sizes[d] != 1 && strides[d] != expected[d]) return false;
  return true;
}

bool is_dense(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  std::vector<std::pair<std::int64_t, std::int64_t>> dims;
  for (std::size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] != 1) dims.emplace_back(strides[d], sizes[d]);
  std::sort(dims.begin(), dims.end());
  std::int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

Dtype storage_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::Double: return Dtype::f64;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default:
      STD_TORCH_CHECK(false,
                      "fastlayers: input has a dtype that the kernels do not take; allowed: float32, float64, "
                      "bfloat16, float16");
  }
}

Tensor empty_strided(const Tensor& like, const Sizes& sizes, const Sizes& strides, ScalarType dtype) {
  std::int32_t device_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<std::int64_t>(sizes.size()), sizes.data(), strides.data(),
                               torch::stable::detail::to<std::int32_t>(torch::stable::detail::from(dtype)), device_type,
                               like.get_device_index(), &handle));
  return Tensor(handle);
}

Tensor empty_vector(const Tensor& like, std::int64_t size, ScalarType dtype) {
  return empty_strided(like, {size}, {1}, dtype);
}

Tensor empty_output(const Tensor& like) {
  Tensor output = torch::stable::empty_like(like);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // Memory fresh from the system is paid for page by page at the first write, which costs a large result several times
  // what computing it does. Huge pages make it a fraction. Only advice: where they are off nothing changes.
  constexpr std::uintptr_t kPage = 4096, kWorthwhile = 4 << 20;
  const auto begin = reinterpret_cast<std::uintptr_t>(output.const_data_ptr());
  const std::uintptr_t end = begin + static_cast<std::uintptr_t>(output.numel()) * output.element_size();
  const std::uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  if (end - begin >= kWorthwhile) madvise(reinterpret_cast<void*>(first), end / kPage * kPage - first, MADV_HUGEPAGE);
#endif
  return output;
}

Tensor empty_like(const Tensor& like, ScalarType dtype) {
  using torch::stable::detail::from;
  // torch::stable::empty_like takes no dtype.
  std::array<StableIValue, 6> stack{from(like),         from(std::optional(dtype)), from(std::nullopt),
                                    from(std::nullopt), from(std::nullopt),         from(std::nullopt)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::empty_like", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Walk::Walk(const Geometry& g)
    : shape(g), rows_at_once(g.rows ? g.positions_per_run() : 1), planes_adjacent(!g.rows && g.mixed_runs()) {}

Shape shape_of(const Tensor& dense) {
  const auto sizes = dense.sizes();
  Shape g;
  g.batch = sizes[0];
  g.channels = sizes[1];
  g.spatial = product(dims_after(sizes, 2));
  g.rows = g.spatial == 1 || (g.channels > 1 && dense.stride(1) == 1);
  return g;
}

Geometry geometry_of(const Tensor& dense) {
  return {shape_of(dense)};
}

Geometry flat_geometry(const Tensor& t) {
  return {{false, 1, 1, t.numel()}};
}

View as_source(const Walk& walk, const Tensor& t) {
  if (auto view = view_as(walk, t)) return *view;
  return *view_as(walk, copy_in_order(walk.shape, t));
}

Source optional_source(std::optional<View>& holder, const Walk& walk, const OptionalTensor& t) {
  if (!t) return {};
  holder = as_source(walk, *t);
  return holder->source();
}

Tensor in_order(const Shape& g, const Tensor& t) {
  return is_in_order(g, t) ? t : copy_in_order(g, t);
}

Tensor dense(const Tensor& t) {
  if (is_dense(t)) return t;
  Tensor copy = torch::stable::empty_like(t);
  torch::stable::copy_(copy, t);
  return copy;
}

Output::Output(const Walk& walk, Tensor result) : result_(result), copied_(false) {
  if (auto view = view_as(walk, result); view && (!walk.in_order || is_in_order(walk.shape, result))) {
    view_ = *view;
    return;
  }
  view_ = *view_as(walk, empty_in_order(walk.shape, result));
  copied_ = true;
}

Tensor Output::finish() {
  if (copied_) torch::stable::copy_(result_, view_.tensor);
  return result_;
}

std::vector<double> channel_values(const OptionalTensor& t, std::int64_t channels, double missing) {
  std::vector<double> values(static_cast<std::size_t>(channels), missing);
  if (!t) return values;
  const std::int64_t stride = t->stride(0);
  with_dtype(t->scalar_type(), [&](auto element) {
    const auto* from = static_cast<const decltype(element)*>(t->const_data_ptr());
    for (std::int64_t c = 0; c < channels; ++c)
      values[static_cast<std::size_t>(c)] = static_cast<double>(from[c * stride]);
  });
  return values;
}

void check_channel_vector(const char* name, const OptionalTensor& t, const Tensor& input) {
  if (!t) return;
  const std::int64_t channels = input.size(1);
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == channels, name, " should contain ", channels, " elements not ",
                  t->numel());
  check_same_device(name, *t, input);
}

void check_saved_statistics(const char* name, const Tensor& t, const Tensor& input) {
  check_channel_vector(name, t, input);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Double && t.is_contiguous(), name,
                  " should be contiguous and float64, as batch_norm_act_fwd returns it");
}

void check_full_size(const char* name, const Tensor& t, const Tensor& input) {
  bool same = t.dim() == input.dim();
  for (std::int64_t d = 0; same && d < t.dim(); ++d) same = t.size(d) == input.size(d);
  STD_TORCH_CHECK(same, name, " should have the shape of input");
  STD_TORCH_CHECK(t.scalar_type() == input.scalar_type(), name, " should have the dtype of input");
  check_same_device(name, t, input);
}

void check_same_device(const char* name, const Tensor& t, const Tensor& input) {
  if (input.is_cpu()) STD_TORCH_CHECK(t.is_cpu(), name, " should be on the input's device, the CPU");
  STD_TORCH_CHECK(input.is_cpu() || (!t.is_cpu() && t.get_device_index() == input.get_device_index()), name,
                  " should be on the input's device, of index ", input.get_device_index());
}

void check_activation(std::int64_t kind, const std::vector<double>& params) {
  STD_TORCH_CHECK(kind >= 0 && kind < kActivationCount, "activation should be in [0, ", kActivationCount, "), not ",
                  kind);
  STD_TORCH_CHECK(params.size() == kActivationParams, "activation_params should have ", kActivationParams,
                  " elements, not ", params.size());
}

Keep keep_of(const Geometry& g, const OptionalTensor& mask, double scale) {
  Keep keep;
  if (!mask) return keep;
  keep.scale = scale;
  const auto* data = static_cast<const std::uint8_t*>(mask->const_data_ptr());
  STD_TORCH_CHECK(mask->is_cpu() && mask->is_contiguous(), "mask should be contiguous and on the CPU");
  if (mask->scalar_type() == ScalarType::Bool) {
    STD_TORCH_CHECK(mask->numel() == g.batch * g.channels, "mask of channels should have ", g.batch * g.channels,
                    " elements, not ", mask->numel());
    keep.planes = data;
  } else {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Byte && mask->numel() == g.mask_bytes(),
                    "mask of elements should be ", g.mask_bytes(), " bytes of uint8, not ", mask->numel());
    keep.bits = data;
  }
  return keep;
}

}  // namespace fastlayers
