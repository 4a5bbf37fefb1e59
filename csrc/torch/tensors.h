// Tensors of torch's stable ABI as the kernels see them: storage types, layouts, allocation, per-channel arrays.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "../kernels/cpu/kernels.h"

namespace fastlayers {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

Dtype storage_dtype(ScalarType dtype);
inline Dtype storage_dtype(const Tensor& t) {
  return storage_dtype(t.scalar_type());
}
inline bool computes_in_double(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double;
}

// Uninitialised, on the device of `like`.
Tensor empty_strided(const Tensor& like, const std::vector<std::int64_t>& sizes,
                     const std::vector<std::int64_t>& strides, ScalarType dtype);
Tensor empty_vector(const Tensor& like, std::int64_t size, ScalarType dtype);
Tensor empty_like(const Tensor& like, ScalarType dtype);

// torch.empty_like for a result of a kernel: where it is large, in huge pages if the system has them.
Tensor empty_output(const Tensor& like);

// A full-size tensor in a layout that kernels take, and its strides in that layout.
struct View {
  Tensor tensor;
  std::int64_t outer = 0, inner = 0;

  Source source() const { return {tensor.const_data_ptr(), outer, inner}; }
  Target target() const { return {tensor.mutable_data_ptr(), outer, inner}; }
};

// How kernels walk over tensors: what they ask of strides.
struct Walk {
  Shape shape;
  std::int64_t rows_at_once = 1;  // so many rows have no gaps between them
  bool planes_adjacent = false;   // nor have the planes of a sample
  bool in_order = false;          // results hold nothing but planes or rows, the samples in order

  Walk(const Shape& s) : shape(s), in_order(true) {}  // the CUDA kernels, which take any strides of what they read
  Walk(const Geometry& g);                            // the CPU kernels
};

// The layout of torch.empty_like(t): rows where channels end up adjacent, planes otherwise. fastlayers/ops.py has the
// same rule for the fake tensors' sizes of bit masks.
Shape shape_of(const Tensor& dense);
Geometry geometry_of(const Tensor& dense);
// All elements as one plane, in the order of memory.
Geometry flat_geometry(const Tensor& t);

// `t` itself where its strides allow it, else a copy.
View as_source(const Walk& walk, const Tensor& t);
// The same for a tensor that may be missing; `holder` keeps the copy alive.
Source optional_source(std::optional<View>& holder, const Walk& walk, const OptionalTensor& t);
// `t` itself, or a copy, whose memory holds nothing but its planes or rows, one after the other.
Tensor in_order(const Shape& g, const Tensor& t);
// Whether the memory of `t` holds nothing but its planes or rows, one after the other.
bool is_in_order(const Shape& g, const Tensor& t);
// Whether the elements of `t` fill its memory without gaps or overlaps.
bool is_dense(const Tensor& t);
// `t` itself if its elements fill its memory without gaps or overlaps, else a copy that does.
Tensor dense(const Tensor& t);

// Room to write a result that is to end up in `result`: the tensor itself, or, where its strides do not fit the layout,
// another one that finish() copies over.
class Output {
 public:
  Output(const Walk& walk, Tensor result);
  Target target() const { return view_.target(); }
  Tensor finish();

 private:
  Tensor result_;
  View view_;
  bool copied_;
};

// A per-channel tensor as doubles; `missing` in every place where there is none.
std::vector<double> channel_values(const OptionalTensor& t, std::int64_t channels, double missing);

// Calls f with a value of the C++ type of a floating dtype.
template <class F>
void with_dtype(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(torch::headeronly::BFloat16{});
    case ScalarType::Half: return f(torch::headeronly::Half{});
    default: STD_TORCH_CHECK(false, "expected a float32, float64, bfloat16 or float16 tensor");
  }
}

// Runs the kernels' loops on torch's threads.
void torch_parallel_for(std::int64_t count, std::int64_t grain, const void* context,
                        void (*task)(const void* context, std::int64_t begin, std::int64_t end));

void check_channel_vector(const char* name, const OptionalTensor& t, const Tensor& input);
// A channel vector that forward returned.
void check_saved_statistics(const char* name, const Tensor& t, const Tensor& input);
void check_full_size(const char* name, const Tensor& t, const Tensor& input);
void check_same_device(const char* name, const Tensor& t, const Tensor& input);
void check_activation(std::int64_t kind, const std::vector<double>& params);

// What a dropout mask tensor means: none, one bool per sample and channel, or a packed bit per element (uint8).
Keep keep_of(const Geometry& g, const OptionalTensor& mask, double scale);

}  // namespace fastlayers
