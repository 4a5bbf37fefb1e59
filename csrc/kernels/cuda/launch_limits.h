// Sizes that planning on the host and the kernels have in common. Needs no CUDA header.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastlayers::cuda {

inline constexpr int kGroup = 8;         // elements that are moved together
inline constexpr int kMaxThreads = 512;  // of a block of the planes kernels
inline constexpr int kRowThreads = 256;  // of a block of the rows kernels, of which a processor holds kRowBlocks
inline constexpr int kRowBlocks = 2;
inline constexpr int kWarp = 32;
inline constexpr int kMaxWarps = 32;

inline constexpr std::size_t kPairBytes = 16;        // two doubles: what is summed over a channel
inline constexpr std::size_t kMaxNumbersBytes = 64;  // what a kernel works out for a channel, at most
// Of a block of the planes kernels, besides the tiles that it keeps.
inline constexpr std::size_t kPlanesSharedBytes = kPairBytes * (kMaxWarps + 1) + kMaxNumbersBytes;
// Of a block of the rows kernels, besides the tiles that it keeps.
constexpr std::size_t rows_shared_bytes(int threads, std::int64_t tile_channels) {
  return kPairBytes * (kGroup + 1) * static_cast<std::size_t>(threads) +
         static_cast<std::size_t>(tile_channels) * kMaxNumbersBytes;
}

}  // namespace fastlayers::cuda
