// Packing a mask of one byte per element into bits, and back.
#include "masks.h"

#include "parallel.h"

namespace fastlayers {
namespace {

// Calls f(byte, first, count) for each byte of the packed mask: it stands for `count` elements from `first` on.
template <class F>
void for_each_mask_byte(const Geometry& g, ParallelFor parallel_for, const F& f) {
  const std::int64_t length = g.mask_run(), stride = g.mask_stride();
  const std::int64_t runs = stride ? g.mask_bytes() / stride : 0;
  // One long run is shared out too, in parts of whole bytes.
  constexpr std::int64_t kBytesEach = 1024;
  const std::int64_t parts = (stride + kBytesEach - 1) / kBytesEach;
  parallel_each(parallel_for, runs * parts, length / (parts ? parts : 1), [&](std::int64_t task) {
    const std::int64_t run = task / parts, from = task % parts * kBytesEach;
    const std::int64_t to = from + kBytesEach < stride ? from + kBytesEach : stride;
    for (std::int64_t b = from; b < to; ++b) {
      const std::int64_t left = length - 8 * b;
      f(run * stride + b, run * length + 8 * b, left < 8 ? left : std::int64_t{8});
    }
  });
}

}  // namespace

void pack_bits(const Geometry& geometry, const std::uint8_t* bytes, std::uint8_t* bits, ParallelFor parallel_for) {
  for_each_mask_byte(geometry, parallel_for, [=](std::int64_t byte, std::int64_t first, std::int64_t count) {
    unsigned packed = 0;
    for (std::int64_t i = 0; i < count; ++i) packed |= static_cast<unsigned>(bytes[first + i]) << i;
    bits[byte] = static_cast<std::uint8_t>(packed);
  });
}

void unpack_bits(const Geometry& geometry, const std::uint8_t* bits, std::uint8_t* bytes, ParallelFor parallel_for) {
  for_each_mask_byte(geometry, parallel_for, [=](std::int64_t byte, std::int64_t first, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) bytes[first + i] = bits[byte] >> i & 1;
  });
}

}  // namespace fastlayers
