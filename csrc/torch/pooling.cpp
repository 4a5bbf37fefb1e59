// What the pooled operators ask of their arguments on every device: the window, and what is as large as their output.
#include "pooling.h"

#include <string>

namespace fastlayers {
namespace {

constexpr std::size_t kWindowNumbers = 8;

PoolAxis axis_of(const std::vector<std::int64_t>& window, std::size_t dim, std::int64_t size, bool ceil_mode) {
  PoolAxis axis;
  axis.input = size;
  axis.kernel = window[dim];
  axis.stride = window[2 + dim];
  axis.padding = window[4 + dim];
  axis.dilation = window[6 + dim];
  STD_TORCH_CHECK(axis.kernel >= 1 && axis.stride >= 1 && axis.dilation >= 1,
                  "window should have a kernel, a stride and a dilation of at least 1, not ", axis.kernel, ", ",
                  axis.stride, " and ", axis.dilation);
  STD_TORCH_CHECK(axis.padding >= 0 && 2 * axis.padding <= axis.kernel,
                  "window should have a padding of at least 0 and at most half of the kernel's size, not ",
                  axis.padding, " with a kernel of size ", axis.kernel);
  axis.output = PoolAxis::output_size(axis, ceil_mode);
  STD_TORCH_CHECK(axis.output >= 1, "window should fit into the input: a size of ", size, " leaves an output of size ",
                  axis.output);
  // Windows that begin inside have the element where they begin.
  for (std::int64_t o = 0; o < axis.output && axis.start(o) < 0; ++o)
    STD_TORCH_CHECK(axis.first(o) < axis.end(o), "window should leave no output without elements, but number ", o,
                    " of a size of ", size, " has none");
  return axis;
}

std::vector<std::int64_t> pooled_sizes(const Pool& pool, const Tensor& input) {
  std::vector<std::int64_t> sizes{input.size(0), input.size(1)};
  if (input.dim() == 4) sizes.push_back(pool.height.output);
  sizes.push_back(pool.width.output);
  return sizes;
}

}  // namespace

Pool pool_of(const std::vector<std::int64_t>& window, bool ceil_mode, const std::vector<std::int64_t>& sizes) {
  STD_TORCH_CHECK(sizes.size() == 3 || sizes.size() == 4, "input should be (N, C, L) or (N, C, H, W), not of ",
                  sizes.size(), " dimensions");
  STD_TORCH_CHECK(window.size() == kWindowNumbers, "window should have ", kWindowNumbers, " numbers, not ",
                  window.size());
  const bool flat = sizes.size() == 3;
  const Pool pool{axis_of(window, 0, flat ? 1 : sizes[2], ceil_mode), axis_of(window, 1, sizes.back(), ceil_mode)};
  STD_TORCH_CHECK(!flat || (pool.height.kernel == 1 && pool.height.padding == 0),
                  "window should have height 1 for an input of 3 dimensions, not ", pool.height.kernel);
  STD_TORCH_CHECK(pool.positions() <= Pool::kMostPositions, "window should have at most ", Pool::kMostPositions,
                  " elements, not ", pool.positions());
  return pool;
}

Pool pool_of(const std::vector<std::int64_t>& window, bool ceil_mode, const Tensor& input) {
  const auto sizes = input.sizes();
  return pool_of(window, ceil_mode, {sizes.begin(), sizes.end()});
}

Shape shape_of_result(const Tensor& t) {
  return shape_of(is_dense(t) ? t : torch::stable::empty_like(t));
}

Tensor empty_pooled(const Pool& pool, const Shape& shape, const Tensor& input, ScalarType dtype) {
  const std::vector<std::int64_t> sizes = pooled_sizes(pool, input);
  std::vector<std::int64_t> strides(sizes.size());
  std::int64_t stride = shape.rows ? shape.channels : 1;
  for (std::size_t d = sizes.size(); d-- > 2;) {
    strides[d] = stride;
    stride *= sizes[d];
  }
  strides[1] = shape.rows ? 1 : pool.outputs();
  strides[0] = shape.channels * pool.outputs();
  return empty_strided(input, sizes, strides, dtype);
}

void check_pooled(const char* name, const Tensor& t, const Pool& pool, const Tensor& input, ScalarType dtype) {
  const std::vector<std::int64_t> sizes = pooled_sizes(pool, input);
  bool same = t.dim() == static_cast<std::int64_t>(sizes.size());
  for (std::int64_t d = 0; same && d < t.dim(); ++d) same = t.size(d) == sizes[static_cast<std::size_t>(d)];
  STD_TORCH_CHECK(same, name, " should have the shape of the output");
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, " should have the dtype that batch_norm_act_pool_fwd gives it");
  check_same_device(name, t, input);
}

}  // namespace fastlayers
