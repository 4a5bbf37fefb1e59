// Sizes that planning on the host and the kernels have in common. Needs no CUDA header.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastlayers::cuda {

inline constexpr int kGroup = 8;         // elements that are moved together
inline constexpr int kMaxThreads = 512;  // of a block of the planes kernels
inline constexpr int kRowThreads = 128;  // of a block of the rows kernels, of which a processor holds kRowBlocks
inline constexpr int kRowBlocks = 3;
inline constexpr int kFinishedChannels = 2;  // that a block of them sums up at a time
inline constexpr int kWarp = 32;
inline constexpr int kMaxWarps = 32;

inline constexpr std::size_t kPairBytes = 16;        // two doubles: what is summed over a channel
inline constexpr std::size_t kMaxNumbersBytes = 64;  // what a kernel works out for a channel, at most
// Of a block of the planes kernels, besides the tiles that it keeps.
inline constexpr std::size_t kPlanesSharedBytes = kPairBytes * (kMaxWarps + 1) + kMaxNumbersBytes;
// Of a block of the rows kernels, besides the tiles that it keeps.
constexpr std::size_t rows_shared_bytes(unsigned threads) {
  return kPairBytes * (kGroup + 1) * threads;
}

}  // namespace fastlayers::cuda
