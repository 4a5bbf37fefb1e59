// fastlayers::dropout and the packing of masks on the CPU.
#include "dropout.h"

#include "../kernels/cpu/masks.h"

namespace fastlayers {
namespace {

DropoutArgs dropout_args(const Geometry& g, const Tensor& mask, double scale) {
  DropoutArgs args;
  args.geometry = g;
  args.keep = keep_of(g, mask, scale);
  args.parallel_for = torch_parallel_for;
  return args;
}

// Element by element the shape does not matter, only the order in memory.
Tensor dropout_elements(const Tensor& input, const Tensor& mask, double scale) {
  DropoutArgs args = dropout_args(flat_geometry(input), mask, scale);
  const Tensor source = dense(input);
  Tensor output = empty_output(source);
  args.input.data = source.const_data_ptr();
  args.output.data = output.mutable_data_ptr();
  kernels(storage_dtype(input)).dropout(args);
  return output;
}

Tensor dropout_channels(const Tensor& input, const Tensor& mask, double scale) {
  STD_TORCH_CHECK(input.dim() >= 2, "input should have at least 2 dimensions (N, C, ...), not ", input.dim());
  Tensor output = empty_output(input);
  const Geometry g = geometry_of(output);
  DropoutArgs args = dropout_args(g, mask, scale);
  const View source = as_source(g, input);
  args.input = source.source();
  Output out(g, output);
  args.output = out.target();
  kernels(storage_dtype(input)).dropout(args);
  return out.finish();
}

}  // namespace

Geometry mask_geometry(const Tensor& dense, bool flat) {
  STD_TORCH_CHECK(flat || dense.dim() >= 2, "a mask of rows or planes should have at least 2 dimensions");
  return flat ? flat_geometry(dense) : geometry_of(dense);
}

Tensor dropout(Tensor input, Tensor mask, double scale) {
  STD_TORCH_CHECK(input.is_cpu(), "input should be on the CPU");
  if (input.numel() == 0) return torch::stable::empty_like(input);
  return mask.scalar_type() == ScalarType::Bool ? dropout_channels(input, mask, scale)
                                                : dropout_elements(input, mask, scale);
}

Tensor pack_mask(Tensor mask, bool flat) {
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool && mask.is_cpu(), "mask should be a bool tensor on the CPU");
  const Tensor filled = dense(mask);
  const Geometry g = mask_geometry(filled, flat);
  Tensor bits = empty_vector(mask, g.mask_bytes(), ScalarType::Byte);
  const Tensor ordered = flat ? filled : in_order(g, filled);
  pack_bits(g, static_cast<const std::uint8_t*>(ordered.const_data_ptr()),
            static_cast<std::uint8_t*>(bits.mutable_data_ptr()), torch_parallel_for);
  return bits;
}

Tensor unpack_mask(Tensor bits, Tensor like, bool flat) {
  Tensor mask = empty_like(like, ScalarType::Bool);
  const Geometry g = mask_geometry(mask, flat);
  STD_TORCH_CHECK(
      bits.scalar_type() == ScalarType::Byte && bits.numel() == g.mask_bytes() && bits.is_contiguous() && bits.is_cpu(),
      "bits should be ", g.mask_bytes(), " contiguous bytes of uint8 on the CPU");
  Tensor target = flat ? mask : in_order(g, mask);
  unpack_bits(g, static_cast<const std::uint8_t*>(bits.const_data_ptr()),
              static_cast<std::uint8_t*>(target.mutable_data_ptr()), torch_parallel_for);
  if (target.get() != mask.get()) torch::stable::copy_(mask, target);
  return mask;
}

}  // namespace fastlayers
