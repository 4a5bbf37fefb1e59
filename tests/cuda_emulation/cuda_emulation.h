// CUDA C++ for a machine without CUDA: what the kernels use of the language, on the CPU, for tests of their results.
//
// Every CUDA thread is a fiber (fibers.h). It runs until it waits for others, then the next one runs, in an order that
// tests choose. The blocks of one cluster, or of a cooperative grid, run together; all others one after the other.
// launch.cpp has the rules, and what is reported: whatever CUDA leaves undefined and can be seen here is an error.
//
// Not seen: weak memory order and missing fences, waiting for a flag that another thread sets, registers, speed.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __constant__ const
#define __forceinline__ inline
#define __launch_bounds__(...)

// CUDA's alignments: a kernel that loads 16 bytes at once is wrong where they are not at a multiple of 16.
#define FASTLAYERS_VECTOR2(name, element)               \
  struct alignas(2 * sizeof(element)) name##2 {         \
    element x, y;                                       \
  };                                                    \
  inline name##2 make_##name##2(element x, element y) { \
    return {x, y};                                      \
  }
#define FASTLAYERS_VECTOR4(name, element)                                     \
  struct alignas(16) name##4 {                                                \
    element x, y, z, w;                                                       \
  };                                                                          \
  inline name##4 make_##name##4(element x, element y, element z, element w) { \
    return {x, y, z, w};                                                      \
  }
FASTLAYERS_VECTOR2(int, int)
FASTLAYERS_VECTOR2(uint, unsigned)
FASTLAYERS_VECTOR2(float, float)
FASTLAYERS_VECTOR2(double, double)
FASTLAYERS_VECTOR4(int, int)
FASTLAYERS_VECTOR4(uint, unsigned)
FASTLAYERS_VECTOR4(float, float)
#undef FASTLAYERS_VECTOR2
#undef FASTLAYERS_VECTOR4
struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace fastlayers::cuda::emulation {

struct BlockIndices {
  uint3 index{};
  dim3 size, grid;
};
struct ThreadIndices {
  uint3 index{};
  const BlockIndices* block = nullptr;
};
// Of the fiber that runs. Not thread-local: only one thread of the system runs kernels at a time.
extern constinit const ThreadIndices* indices;

// In which order threads, and blocks, get their turns.
enum class Order { up, down, random };
void set_order(Order, unsigned seed);

// Runs body() as every thread of the grid. `cluster` counts blocks along x. Throws std::invalid_argument where CUDA
// would refuse the launch, std::runtime_error where a kernel does what it must not, and what body() throws.
void launch(dim3 grid, dim3 block, std::size_t shared_bytes, int cluster, bool cooperative,
            const std::function<void()>& body);

using Where = std::source_location;

unsigned char* dynamic_shared();
void block_sync(Where);
void grid_sync(Where = Where::current());
int cluster_rank();
int cluster_size();
void cluster_sync(Where = Where::current());
// In the shared memory of the block of that rank, the place that `own` is in that of this block.
void* peer_of(const void* own, int rank);
template <class T>
T* cluster_peer(T* own, int rank) {
  return static_cast<T*>(peer_of(own, rank));
}

// What a lane gives to a collective of its warp, or gets from it.
struct Payload {
  std::uint64_t words[2]{};
};
enum class Collective { shuffle, ballot, sync };

// Waits for all lanes of `mask`. A shuffle returns what the lane `source` gave; a ballot, one bit for each lane whose
// value is not zero.
Payload collect(Collective, unsigned mask, Payload value, unsigned source, Where);
unsigned lane();

template <class T>
T shuffle(unsigned mask, const T& value, unsigned source, Where where) {
  static_assert(sizeof(T) <= sizeof(Payload) && std::is_trivially_copyable_v<T>);
  Payload payload;
  std::memcpy(payload.words, &value, sizeof(T));
  payload = collect(Collective::shuffle, mask, payload, source, where);
  T result;
  std::memcpy(&result, payload.words, sizeof(T));
  return result;
}

// The first lane of the group of `width` lanes that this one is in.
inline unsigned first_lane(int width) {
  return lane() & ~static_cast<unsigned>(width - 1);
}

}  // namespace fastlayers::cuda::emulation

#define threadIdx (::fastlayers::cuda::emulation::indices->index)
#define blockIdx (::fastlayers::cuda::emulation::indices->block->index)
#define blockDim (::fastlayers::cuda::emulation::indices->block->size)
#define gridDim (::fastlayers::cuda::emulation::indices->block->grid)
inline constexpr int warpSize = 32;

// Each remembers where in the source it was called, by which threads that went different ways are told apart.
using FastlayersWhere = fastlayers::cuda::emulation::Where;

inline void __syncthreads(FastlayersWhere where = FastlayersWhere::current()) {
  fastlayers::cuda::emulation::block_sync(where);
}
inline void __syncwarp(unsigned mask = ~0u, FastlayersWhere where = FastlayersWhere::current()) {
  using namespace fastlayers::cuda::emulation;
  collect(Collective::sync, mask, {}, 0, where);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, FastlayersWhere where = FastlayersWhere::current()) {
  using namespace fastlayers::cuda::emulation;
  return static_cast<unsigned>(collect(Collective::ballot, mask, {{predicate != 0, 0}}, 0, where).words[0]);
}
inline int __any_sync(unsigned mask, int predicate, FastlayersWhere where = FastlayersWhere::current()) {
  return __ballot_sync(mask, predicate, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, FastlayersWhere where = FastlayersWhere::current()) {
  return __ballot_sync(mask, !predicate, where) == 0;
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize,
              FastlayersWhere where = FastlayersWhere::current()) {
  using namespace fastlayers::cuda::emulation;
  return shuffle(mask, value, first_lane(width) + (static_cast<unsigned>(source) & (width - 1)), where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize,
                  FastlayersWhere where = FastlayersWhere::current()) {
  using namespace fastlayers::cuda::emulation;
  const unsigned source = lane() ^ static_cast<unsigned>(lane_mask);
  return shuffle(mask, value, source < first_lane(width) + width ? source : lane(), where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                   FastlayersWhere where = FastlayersWhere::current()) {
  using namespace fastlayers::cuda::emulation;
  const unsigned source = lane() + delta;
  return shuffle(mask, value, source < first_lane(width) + width ? source : lane(), where);
}

// One processor's memory needs no fence between fibers of one thread.
inline void __threadfence() {}
inline void __threadfence_block() {}

// Loads and stores with a hint for the caches.
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T value) {
  *p = value;
}
template <class T>
void __stwb(T* p, T value) {
  *p = value;
}
template <class T>
void __stcg(T* p, T value) {
  *p = value;
}

inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((static_cast<std::uint64_t>(a) * b) >> 32);
}
inline int __popc(unsigned x) {
  return std::popcount(x);
}
inline float __uint_as_float(unsigned bits) {
  return std::bit_cast<float>(bits);
}
inline unsigned __float_as_uint(float x) {
  return std::bit_cast<unsigned>(x);
}
inline float rsqrtf(float x) {
  return 1 / std::sqrt(x);
}
inline double rsqrt(double x) {
  return 1 / std::sqrt(x);
}
