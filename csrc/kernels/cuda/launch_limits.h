// Sizes that planning on the host and the kernels have in common. Needs no CUDA header.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastlayers::cuda {

inline constexpr int kGroup = 8;  // elements that are moved together
// Threads of a block of the planes kernels, at most, and blocks of that size that a processor shall hold; the compiler
// limits registers accordingly. double needs twice as many.
constexpr int max_threads(std::size_t element_bytes) {
  return element_bytes == 8 ? 256 : 512;
}
constexpr int blocks_wanted(bool all_activations) {
  return all_activations ? 1 : 2;
}
// The same for the rows kernels, whose blocks have this size always.
inline constexpr int kRowThreads = 128;
constexpr int row_blocks(std::size_t element_bytes) {
  return element_bytes == 8 ? 2 : 3;
}
// Blocks of the pooling kernels of planes that a processor shall hold: of those that keep planes, and of those that
// keep none, which are smaller. double needs twice as many registers.
constexpr int pool_blocks_on_chip(std::size_t element_bytes) {
  return element_bytes == 8 ? 1 : 2;
}
constexpr int pool_blocks(std::size_t element_bytes) {
  return element_bytes == 8 ? 1 : 4;
}
inline constexpr int kPoolThreads = 256;  // of these
inline constexpr int kStripRows = 4;      // windows below each other that a thread pools, at most
inline constexpr int kMaxRowsPerRun = kGroup;
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
