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

// What a window has in one dimension: from where, before the input if padded, and which of its numbers exist.
struct Reach {
  int start, first, end;
  __device__ __forceinline__ Reach(const BasicPoolAxis<int, Factor>& axis, int window)
      : start(axis.start(window)), first(axis.first(window)), end(axis.end(window)) {}
};

// Where the elements of a window are: (kh, kw) is at `origin` + kh * `down` + kw * `across` from the start of its
// plane.
template <class Offset>
struct Window {
  Reach rows, columns;
  Offset origin, down, across;

  // `step` leads from one element of a plane to the next.
  __device__ __forceinline__ Window(const PoolWalk& pool, const Reach& rows_, const Reach& columns_, Offset step)
      : rows(rows_),
        columns(columns_),
        origin((rows.start * pool.width.input + columns.start) * step),
        down(pool.height.dilation * pool.width.input * step),
        across(pool.width.dilation * step) {}

  __device__ __forceinline__ Offset at(int kh, int kw) const { return origin + kh * down + kw * across; }
};

// The elements that windows of kCount planes side by side take: their keys and their numbers in the window.
template <class S, int kCount>
struct Largest {
  S key[kCount];
  int position[kCount];
};

// Of equal keys the first is taken, of NaN the last, as torch does. keys(at, k) works out by what the elements there
// are compared.
template <class S, int kCount, int kUnroll, class Offset, class Keys>
__device__ __forceinline__ Largest<S, kCount> largest_of(const Window<Offset>& window, int kernel_columns,
                                                         Keys&& keys) {
  Largest<S, kCount> best;
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    best.key[e] = -std::numeric_limits<S>::infinity();
    best.position[e] = window.rows.first * kernel_columns + window.columns.first;
  }
  for (int kh = window.rows.first; kh < window.rows.end; ++kh) {
    Offset at = window.at(kh, window.columns.first);
    const int number = kh * kernel_columns;
#pragma unroll kUnroll
    for (int kw = window.columns.first; kw < window.columns.end; ++kw, at += window.across) {
      S k[kCount];
      keys(at, k);
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        if (!(k[e] > best.key[e] || k[e] != k[e])) continue;
        best.key[e] = k[e];
        best.position[e] = number + kw;
      }
    }
  }
  return best;
}

// act(z) for each of kCount values.
template <Activations kWhich, class S, int kCount, class Affines>
__device__ __forceinline__ void activated(const ActivationCall& call, const Affines& affine, const S (&x)[kCount],
                                          S (&values)[kCount]) {
  const auto one = [&](auto activation, int e) {
    values[e] = activation.value(normalize<S>(x[e], affine[e].mean, affine[e].scale, affine[e].shift));
  };
  each_element<kWhich, S, kCount>(call, one);
}

// The elements, x, that kCount windows side by side take, and their numbers in their windows. load(at, x) has what lies
// there; element(at, e) has it of one plane.
//
// A monotone activation of the normalised value rises with x or falls with it, as the sign of the scale says; where
// that is 0 all are alike, and where it is NaN all are NaN.
template <Activations kWhich, int kUnroll, class S, int kCount, class Affines, class Offset, class Load, class Element>
__device__ __forceinline__ void pooled(const PooledForwardArgs& args, const PoolWalk& pool,
                                       const Window<Offset>& window, const Affines& affine, Load&& load,
                                       Element&& element, S (&x)[kCount], int (&position)[kCount]) {
  S sign[kCount];
#pragma unroll
  for (int e = 0; e < kCount; ++e) sign[e] = affine[e].scale > 0 ? S(1) : affine[e].scale < 0 ? S(-1) : affine[e].scale;
  const bool monotone = kWhich == Activations::rectifiers || args.monotone;
  Largest<S, kCount> found;
  if (monotone)
    found = largest_of<S, kCount, kUnroll>(window, pool.width.kernel, [&](Offset at, S(&k)[kCount]) {
      load(at, k);
#pragma unroll
      for (int e = 0; e < kCount; ++e) k[e] *= sign[e];
    });
  else
    found = largest_of<S, kCount, 1>(window, pool.width.kernel, [&](Offset at, S(&k)[kCount]) {
      S values[kCount];
      load(at, values);
      activated<kWhich>(args.activation, affine, values, k);
    });
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    position[e] = found.position[e];
    // Almost always the key says which it was.
    if (monotone && sign[e] * sign[e] == 1) {
      x[e] = found.key[e] * sign[e];
    } else {
      const auto number = static_cast<std::uint32_t>(position[e]);
      const std::uint32_t kh = pool.kernel_columns.quotient(number);
      x[e] = element(window.at(static_cast<int>(kh), static_cast<int>(pool.kernel_columns.remainder(number, kh))), e);
    }
  }
}

}  // namespace fastlayers::cuda
