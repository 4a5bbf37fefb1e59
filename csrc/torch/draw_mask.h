// fastlayers::draw_channel_mask and draw_element_mask on the CPU. schemas.h has their schemas.
#pragma once

#include <tuple>

#include "tensors.h"

namespace fastlayers {

// Each takes a state of torch's CPU generator, as Generator.get_state() gives it, and returns a mask for `like` and the
// state that follows: both as bernoulli_(keep_probability) would leave them.

// (N, C), bool.
std::tuple<Tensor, Tensor> draw_channel_mask(Tensor state, Tensor like, double keep_probability);
// What pack_mask returns for a bool tensor empty_like(like).
std::tuple<Tensor, Tensor> draw_element_mask(Tensor state, Tensor like, double keep_probability, bool flat);

}  // namespace fastlayers
