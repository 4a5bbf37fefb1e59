// fastlayers::draw_channel_mask and draw_element_mask on the CPU.
#include "draw_mask.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "../kernels/cpu/random_masks.h"
#include "dropout.h"

namespace fastlayers {
namespace {

// How the bytes of a state begin: CPUGeneratorImplStateLegacy in torch's CPUGeneratorImpl.cpp. Behind it are what randn
// keeps for its next call.
struct EngineState {
  std::uint64_t seed;
  std::int32_t left;  // one more than there are words left of the block
  std::int32_t seeded;
  std::uint64_t next;
  std::uint64_t words[MersenneTwister::kWords];
};
constexpr std::int64_t kStateBytes = 5056;

void check_state(const Tensor& state) {
  STD_TORCH_CHECK(state.scalar_type() == ScalarType::Byte && state.is_cpu() && state.is_contiguous() &&
                      state.numel() == kStateBytes,
                  "state should be what get_state() of torch's CPU generator returns: ", kStateBytes,
                  " bytes of uint8, contiguous, on the CPU");
}

// A state's generator, and the state once numbers were drawn from it.
class Generator {
 public:
  explicit Generator(const Tensor& state) : state_(empty_vector(state, kStateBytes, ScalarType::Byte)) {
    std::memcpy(state_.mutable_data_ptr(), state.const_data_ptr(), kStateBytes);
    const EngineState& engine = *engine_state();
    // A block is due where nothing is left; only after seeding does `next` say otherwise.
    twister.next = engine.left == 1 ? MersenneTwister::kWords : static_cast<std::int64_t>(engine.next);
    STD_TORCH_CHECK(engine.left > 0 && twister.next >= 0 && twister.next + engine.left == MersenneTwister::kWords + 1,
                    "state is not one that torch's CPU generator can be in");
    std::copy(std::begin(engine.words), std::end(engine.words), twister.words);
  }

  Tensor state() {
    EngineState& engine = *engine_state();
    std::copy(std::begin(twister.words), std::end(twister.words), engine.words);
    engine.next = static_cast<std::uint64_t>(twister.next);
    engine.left = static_cast<std::int32_t>(MersenneTwister::kWords + 1 - twister.next);
    return state_;
  }

  MersenneTwister twister;

 private:
  EngineState* engine_state() { return static_cast<EngineState*>(state_.mutable_data_ptr()); }

  Tensor state_;
};

void check_arguments(const Tensor& state, const Tensor& like, double keep_probability) {
  check_state(state);
  STD_TORCH_CHECK(like.is_cpu(), "like should be on the CPU");
  STD_TORCH_CHECK(keep_probability >= 0 && keep_probability <= 1, "keep_probability should be in [0, 1], not ",
                  keep_probability);
}

std::uint8_t* bytes_of(const Tensor& t) {
  return static_cast<std::uint8_t*>(t.mutable_data_ptr());
}

}  // namespace

std::tuple<Tensor, Tensor> draw_channel_mask(Tensor state, Tensor like, double keep_probability) {
  check_arguments(state, like, keep_probability);
  STD_TORCH_CHECK(like.dim() >= 2, "like should have at least 2 dimensions (N, C, ...), not ", like.dim());
  const std::int64_t batch = like.size(0), channels = like.size(1);
  Tensor mask = empty_strided(like, {batch, channels}, {channels, 1}, ScalarType::Bool);
  Generator generator(state);
  draw_bytes(generator.twister, keep_probability, batch * channels, bytes_of(mask));
  return {std::move(mask), generator.state()};
}

std::tuple<Tensor, Tensor> draw_element_mask(Tensor state, Tensor like, double keep_probability, bool flat) {
  check_arguments(state, like, keep_probability);
  const Tensor shape = is_dense(like) ? like : empty_like(like, ScalarType::Bool);
  const Geometry g = mask_geometry(shape, flat);
  Generator generator(state);
  if (flat || is_in_order(g, shape)) {
    Tensor bits = empty_vector(like, g.mask_bytes(), ScalarType::Byte);
    draw_bits(generator.twister, keep_probability, g, bytes_of(bits));
    return {std::move(bits), generator.state()};
  }
  // Numbers are drawn in the order of memory, which here is not that of the mask.
  Tensor kept = empty_like(shape, ScalarType::Bool);
  draw_bytes(generator.twister, keep_probability, kept.numel(), bytes_of(kept));
  return {pack_mask(kept, false), generator.state()};
}

}  // namespace fastlayers
