// What the pooled operators ask of their arguments on every device: the window, and what is as large as their output.
#pragma once

#include <tuple>
#include <vector>

#include "../kernels/common/pooling.h"
#include "tensors.h"

namespace fastlayers {

using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;
using FiveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// The pool that `window` (schemas.h) means for an input (N, C, L) or (N, C, H, W). Checks both: every window then has
// at least one element, and there is at least one window.
Pool pool_of(const std::vector<std::int64_t>& window, bool ceil_mode, const std::vector<std::int64_t>& input_sizes);
Pool pool_of(const std::vector<std::int64_t>& window, bool ceil_mode, const Tensor& input);

// The shape that a result like `t` has (shape_of), whatever strides `t` has itself.
Shape shape_of_result(const Tensor& t);

// Uninitialised, with a value for each window: planes or rows, as the input's `shape` has them, one after the other.
Tensor empty_pooled(const Pool& pool, const Shape& shape, const Tensor& input, ScalarType dtype);

// That `t` has a value of `dtype` for each window.
void check_pooled(const char* name, const Tensor& t, const Pool& pool, const Tensor& input, ScalarType dtype);

}  // namespace fastlayers
