// fastlayers::dropout and the packing of masks on the CPU. schemas.h has their schemas.
#pragma once

#include "tensors.h"

namespace fastlayers {

Tensor dropout(Tensor input, Tensor mask, double scale);
Tensor pack_mask(Tensor mask, bool flat);
Tensor unpack_mask(Tensor bits, Tensor like, bool flat);

// Where the bits of a mask go that has the layout of this tensor; in the order of memory if `flat`.
Geometry mask_geometry(const Tensor& dense, bool flat);

}  // namespace fastlayers
