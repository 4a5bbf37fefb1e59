// Max-pooling, whatever the layout: the numbers of its geometry, and the largest element of a window.
#pragma once

#include <limits>

#include "../common/pooling.h"
#include "divisor.h"
#include "elements.h"

namespace fastlayers::cuda {

// Geometry, in 32 bits and without divisions.
struct PoolWalk {
  BasicPoolAxis<int, Factor> height, width;
  Divisor inputs, outputs;  // elements of a plane, before and behind the pool
  Divisor input_columns, output_columns, output_rows, kernel_columns;
};

// One value, for what is written for several.
template <class S>
struct Single {
  S value;
  __device__ __forceinline__ S operator[](int) const { return value; }
};

// The elements that windows of kCount planes side by side take, by their keys.
template <class S, int kCount>
struct Largest {
  S key[kCount], x[kCount];
  int position[kCount];  // in the window
};

// Of equal keys the first is taken, of NaN the last, as torch does. load(h, w) has what lies there in the input, a
// value for each plane; keys(x, k) works out by what it is compared.
template <class S, int kCount, class Load, class Keys>
__device__ __forceinline__ Largest<S, kCount> largest_of_window(const PoolWalk& pool, int row, int column, Load&& load,
                                                                Keys&& keys) {
  const int top = pool.height.start(row), left = pool.width.start(column);
  const int first_row = pool.height.first(row), first_column = pool.width.first(column);
  const int rows_end = pool.height.end(row), columns_end = pool.width.end(column);
  constexpr S kLowest = -std::numeric_limits<S>::infinity();
  Largest<S, kCount> best;
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    best.key[e] = kLowest;
    best.x[e] = 0;
    best.position[e] = first_row * pool.width.kernel + first_column;
  }
  for (int kh = first_row; kh < rows_end; ++kh) {
#pragma unroll 2
    for (int kw = first_column; kw < columns_end; ++kw) {
      const auto x = load(top + kh * pool.height.dilation, left + kw * pool.width.dilation);
      S k[kCount];
      keys(x, k);
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        if (!(k[e] > best.key[e] || k[e] != k[e])) continue;
        best.key[e] = k[e];
        best.x[e] = x[e];
        best.position[e] = kh * pool.width.kernel + kw;
      }
    }
  }
  // Nothing is larger than the smallest there is: then it is the first element.
  bool none = false;
#pragma unroll
  for (int e = 0; e < kCount; ++e) none |= best.key[e] == kLowest;
  if (none) {
    const auto x = load(top + first_row * pool.height.dilation, left + first_column * pool.width.dilation);
#pragma unroll
    for (int e = 0; e < kCount; ++e)
      if (best.key[e] == kLowest) best.x[e] = x[e];
  }
  return best;
}

// What a monotone activation of the normalised value rises with, times x: all are alike where the scale is 0, and NaN
// where it is NaN.
template <class S>
__device__ __forceinline__ S direction(S scale) {
  return scale > 0 ? S(1) : scale < 0 ? S(-1) : scale;
}

// act(z) for each of kCount values.
template <int kCount, class S, class Affines>
__device__ __forceinline__ void activated(const ActivationCall& call, const Affines& affine, const S (&x)[kCount],
                                          S (&values)[kCount]) {
  const auto one = [&](auto activation, int e) {
    values[e] = activation.value(normalize<S>(x[e], affine[e].mean, affine[e].scale, affine[e].shift));
  };
  each_element<Activations::all, S, kCount>(call, one);
}

// The largest elements of kCount windows side by side by their activated values.
template <class S, int kCount, class Affines, class Load>
__device__ __forceinline__ Largest<S, kCount> pooled(const PooledForwardArgs& args, const PoolWalk& pool,
                                                     const Affines& affine, int row, int column, Load&& load) {
  if (args.monotone)
    return largest_of_window<S, kCount>(pool, row, column, load, [&](const auto& x, S(&k)[kCount]) {
#pragma unroll
      for (int e = 0; e < kCount; ++e) k[e] = x[e] * direction(affine[e].scale);
    });
  return largest_of_window<S, kCount>(pool, row, column, load, [&](const auto& x, S(&k)[kCount]) {
    S values[kCount];
#pragma unroll
    for (int e = 0; e < kCount; ++e) values[e] = x[e];
    activated(args.activation, affine, values, k);
  });
}

}  // namespace fastlayers::cuda
