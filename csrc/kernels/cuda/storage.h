// Groups of 8 elements: how they are loaded, stored and converted to the type that kernels compute in.
//
// All kernels take tensors in groups of 8 elements that begin at multiples of 8 elements of the output's memory. A
// group is one to four accesses of 16 bytes, and its bits in a mask are one byte.
#pragma once

#include "../common/dtypes.h"
#include "../common/macros.h"
#include "launch_limits.h"
#include "runtime.h"

namespace fastlayers::cuda {

// Which elements of a group are there: [begin, end).
struct Span {
  int begin = 0, end = 0;
  __device__ __forceinline__ bool empty() const { return begin >= end; }
  __device__ __forceinline__ bool whole() const { return begin <= 0 && end >= kGroup; }
  __device__ __forceinline__ bool has(int i) const { return i >= begin && i < end; }
  __device__ __forceinline__ unsigned bits() const {
    return empty() ? 0 : (0xffu << begin) & (0xffu >> (kGroup - end));
  }
};

__device__ __forceinline__ float widen(float v) {
  return v;
}
__device__ __forceinline__ double widen(double v) {
  return v;
}
__device__ __forceinline__ float widen(bf16 v) {
  return __builtin_bit_cast(float, static_cast<std::uint32_t>(v.bits) << 16);
}

// To nearest, ties to even. A NaN stays one.
__device__ __forceinline__ std::uint16_t round_to_bf16(float v) {
  const auto bits = __builtin_bit_cast(std::uint32_t, v);
  if (v != v) return static_cast<std::uint16_t>(bits >> 16 | 0x40);
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#ifdef __CUDACC__
__device__ __forceinline__ float widen(f16 v) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(v.bits));
  return wide;
}
__device__ __forceinline__ void narrow(float v, f16& to) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(v));
}
__device__ __forceinline__ void narrow(float v, bf16& to) {
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(v));
#else
  to.bits = round_to_bf16(v);
#endif
}
#else
inline float widen(f16 v) {
  return static_cast<float>(__builtin_bit_cast(_Float16, v.bits));
}
inline void narrow(float v, f16& to) {
  to.bits = __builtin_bit_cast(std::uint16_t, static_cast<_Float16>(v));
}
inline void narrow(float v, bf16& to) {
  to.bits = round_to_bf16(v);
}
#endif
__device__ __forceinline__ void narrow(float v, float& to) {
  to = v;
}
__device__ __forceinline__ void narrow(double v, double& to) {
  to = v;
}

template <class T>
struct alignas(16) Group {
  static constexpr int kWords = kGroup * sizeof(T) / 16;
  T elements[kGroup];

  __device__ __forceinline__ Compute<T> operator[](int i) const { return widen(elements[i]); }
  __device__ __forceinline__ void set(int i, Compute<T> v) { narrow(v, elements[i]); }
};

// The 16-byte words of a group, as they are moved.
template <class T>
struct Words {
  uint4 words[Group<T>::kWords];
};

template <class T>
__device__ __forceinline__ Group<T> zeros() {
  return __builtin_bit_cast(Group<T>, Words<T>{});
}

template <class T>
__device__ __forceinline__ Group<T> load_whole(const T* p) {
  Words<T> words;
#pragma unroll
  for (int w = 0; w < Group<T>::kWords; ++w) words.words[w] = __ldg(reinterpret_cast<const uint4*>(p) + w);
  return __builtin_bit_cast(Group<T>, words);
}

template <class T>
__device__ __forceinline__ void store_whole(T* p, const Group<T>& group) {
  const auto words = __builtin_bit_cast(Words<T>, group);
  // Not by an assignment: nvcc would split it into what it has in common with the elements' stores in store().
#pragma unroll
  for (int w = 0; w < Group<T>::kWords; ++w) __stwb(reinterpret_cast<uint4*>(p) + w, words.words[w]);
}

// The elements of `valid`, zeros elsewhere. `p` is where the group begins, which may be outside of the tensor; it is a
// multiple of 16 bytes if `aligned`.
template <class T>
__device__ __forceinline__ Group<T> load(const T* p, Span valid, bool aligned) {
  if (aligned && valid.whole()) return load_whole(p);
  Group<T> group = zeros<T>();
#pragma unroll
  for (int i = 0; i < kGroup; ++i)
    if (valid.has(i)) group.elements[i] = p[i];
  return group;
}

template <class T>
__device__ __forceinline__ void store(T* p, const Group<T>& group, Span valid, bool aligned) {
  if (aligned && valid.whole()) return store_whole(p, group);
#pragma unroll
  for (int i = 0; i < kGroup; ++i)
    if (valid.has(i)) p[i] = group.elements[i];
}

// Groups that a block keeps in shared memory between its two passes. Each thread reads what it wrote itself, so that no
// barrier is needed, and neighbouring threads use neighbouring words, so that no banks collide.
template <class T>
class Kept {
 public:
  // `slot` counts the groups of each thread.
  static __device__ __forceinline__ void put(unsigned char* shared, std::int64_t slot, const Group<T>& group) {
    const auto words = __builtin_bit_cast(Words<T>, group);
#pragma unroll
    for (int w = 0; w < Group<T>::kWords; ++w) *at(shared, slot, w) = words.words[w];
  }
  static __device__ __forceinline__ Group<T> get(unsigned char* shared, std::int64_t slot) {
    Words<T> words;
#pragma unroll
    for (int w = 0; w < Group<T>::kWords; ++w) words.words[w] = *at(shared, slot, w);
    return __builtin_bit_cast(Group<T>, words);
  }

 private:
  static __device__ __forceinline__ uint4* at(unsigned char* shared, std::int64_t slot, int word) {
    return reinterpret_cast<uint4*>(shared) + (slot * Group<T>::kWords + word) * blockDim.x + threadIdx.x;
  }
};

}  // namespace fastlayers::cuda
