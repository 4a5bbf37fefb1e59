// Dropout masks of the numbers that torch's bernoulli_ would draw next.
#include "random_masks.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace fastlayers {
namespace {

constexpr std::int64_t kWords = MersenneTwister::kWords;

// Calls take(bits, count) with one bit for each of the next values, some hundreds at a time; 8 bytes behind them can be
// read.
template <class Take>
void draw(MersenneTwister& twister, double keep_probability, std::int64_t count, Take take) {
  const RandomKernels& kernels = random_kernels();
  // For an integer x: x * 2^-53 < p where x < ceil(p * 2^53).
  const auto limit = static_cast<std::uint64_t>(std::ceil(keep_probability * 0x1p53));
  // The block in use, the one after it, and one word before them: the first of two where a block ends between both.
  constexpr std::int64_t kBefore = 16;
  alignas(64) std::uint32_t buffer[kBefore + 2 * kWords + 2 * RandomKernels::kReadAhead];
  std::uint32_t* const words = buffer + kBefore;
  std::memcpy(words, twister.words, sizeof(twister.words));
  std::int64_t next = twister.next;
  std::uint8_t bits[kWords / 2 / 8 + 16] = {};
  while (count > 0) {
    if (next + 2 > kWords) {
      kernels.next_block(words);
      words[-1] = words[kWords - 1];
      std::memcpy(words, words + kWords, sizeof(twister.words));
      next -= kWords;
    }
    const std::int64_t values = std::min(count, (kWords - next) / 2);
    kernels.below(words + next, values, limit, bits);
    take(bits, values);
    next += 2 * values;
    count -= values;
  }
  std::memcpy(twister.words, words, sizeof(twister.words));
  twister.next = next;
}

// Bit i as byte i.
std::uint64_t spread(std::uint64_t byte) {
  const std::uint64_t bit_per_byte = byte * 0x0101010101010101u & 0x8040201008040201u;
  return (bit_per_byte + 0x7f7f7f7f7f7f7f7fu) >> 7 & 0x0101010101010101u;
}

// Appends bits to a bit mask.
class MaskWriter {
 public:
  MaskWriter(const Geometry& geometry, std::uint8_t* mask)
      : run_(geometry.run_length()), left_(run_), at_(mask), end_(mask + geometry.mask_bytes()) {}

  void operator()(const std::uint8_t* bits, std::int64_t count) {
    // A word holds what is pending, at most 7, and these; and these where they begin within a byte.
    constexpr std::int64_t kBitsEach = 48;
    for (std::int64_t i = 0; i < count;) {
      const std::int64_t part = std::min({count - i, left_, kBitsEach});
      std::uint64_t word;
      std::memcpy(&word, bits + i / 8, sizeof(word));
      append(word >> i % 8 & ((std::uint64_t{1} << part) - 1), part);
      i += part;
    }
  }

 private:
  void append(std::uint64_t bits, std::int64_t count) {
    pending_ |= bits << pending_count_;
    pending_count_ += count;
    left_ -= count;
    if (left_ == 0) {
      pending_count_ = (pending_count_ + 7) / 8 * 8;
      left_ = run_;
    }
    const std::int64_t bytes = pending_count_ / 8;
    std::memcpy(at_, &pending_, end_ - at_ >= 8 ? 8 : static_cast<std::size_t>(bytes));
    at_ += bytes;
    pending_ >>= 8 * bytes;
    pending_count_ -= 8 * bytes;
  }

  std::int64_t run_, left_;  // elements of a run, and those still to come
  std::uint8_t *at_, *end_;
  std::uint64_t pending_ = 0;
  std::int64_t pending_count_ = 0;
};

}  // namespace

void draw_bytes(MersenneTwister& twister, double keep_probability, std::int64_t count, std::uint8_t* bytes) {
  draw(twister, keep_probability, count, [&](const std::uint8_t* bits, std::int64_t values) {
    for (std::int64_t i = 0; i < values; i += 8) {
      const std::uint64_t eight = spread(bits[i / 8]);
      std::memcpy(bytes + i, &eight, static_cast<std::size_t>(std::min<std::int64_t>(values - i, 8)));
    }
    bytes += values;
  });
}

void draw_bits(MersenneTwister& twister, double keep_probability, const Geometry& geometry, std::uint8_t* bits) {
  draw(twister, keep_probability, geometry.numel(), MaskWriter(geometry, bits));
}

}  // namespace fastlayers
