// What the kernels do with one group of elements, whatever the layout: the fused forward and backward arithmetic.
#pragma once

#include "../common/batch_norm.h"
#include "channels.h"
#include "scalar_math.h"
#include "storage.h"

namespace fastlayers::cuda {

// A number per element of a group: the same for all where they are of one channel, or each its own.
template <class V>
struct Uniform {
  V value;
  __device__ __forceinline__ const V& operator[](int) const { return value; }
};
template <class V>
struct PerElement {
  V values[kGroup];
  __device__ __forceinline__ const V& operator[](int i) const { return values[i]; }
};

// The affines in the Gradients of a group's elements.
template <class Gradients>
struct AffinesOf {
  const Gradients& gradients;
  __device__ __forceinline__ const auto& operator[](int i) const { return gradients[i].affine; }
};

// The operands of backward at one group; read only where they matter.
template <class T>
struct BackwardGroup {
  Group<T> grad_output = zeros<T>(), x = zeros<T>(), residual = zeros<T>();
  unsigned flat = 0;  // a bit per element where the flat bits of forward are given instead of the residual
  unsigned kept = 0;  // by dropout: also a bit per element
};

// Calls f(activation, i) for each element of a group. double has no registers for all elements at once.
template <Activations kWhich, class S, int kCount = kGroup, class F>
__device__ __forceinline__ void each_element(const ActivationCall& call, F&& f) {
  if constexpr (sizeof(S) > sizeof(float)) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) with_call<kWhich, S>(call, [&](auto activation) { f(activation, i); });
  } else {
    with_call<kWhich, S>(call, [&](auto activation) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) f(activation, i);
    });
  }
}

// act(normalised + residual), dropped or scaled. Elements that are not in `kept` come out as zeros. Stores the byte of
// flat bits where `flat_bits` is not null.
template <Activations kWhich, class T, class Affines>
__device__ __forceinline__ Group<T> forward_group(const ForwardArgs& args, const Group<T>& x, const Group<T>& residual,
                                                  const Affines& affine, unsigned kept, std::uint8_t* flat_bits) {
  using S = Compute<T>;
  S z[kGroup];
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    z[i] = normalize<S>(x[i], affine[i].mean, affine[i].scale, affine[i].shift);
    if (args.residual.data) z[i] += residual[i];
  }
  const auto scale = static_cast<S>(args.keep.scale);
  Group<T> output;
  with_call<kWhich, S>(args.activation, [&](auto activation) {
    using Act = decltype(activation);
    if constexpr (Act::two_valued) {
      if (flat_bits) {
        unsigned bits = 0;
#pragma unroll
        for (int i = 0; i < kGroup; ++i) bits |= static_cast<unsigned>(static_cast<bool>(activation.flat(z[i]))) << i;
        *flat_bits = static_cast<std::uint8_t>(bits);
      }
    }
#pragma unroll
    for (int i = 0; i < kGroup; ++i) output.set(i, kept >> i & 1 ? activation.value(z[i]) * scale : S(0));
  });
  return output;
}

// The gradients of what goes into the activation, to g; zero where not kept, whatever the gradient there is.
template <Activations kWhich, class T, class Affines>
__device__ __forceinline__ void backward_group(const BackwardArgs& args, const BackwardGroup<T>& group,
                                               const Affines& affine, Compute<T> (&g)[kGroup]) {
  using S = Compute<T>;
  const auto scale = static_cast<S>(args.keep.scale);
  const auto one = [&](auto activation, int i) {
    S z = normalize<S>(group.x[i], affine[i].mean, affine[i].scale, affine[i].shift);
    if (args.residual.data) z += group.residual[i];
    S before;
    if constexpr (decltype(activation)::two_valued) {
      const bool is_flat = args.flat_bits ? group.flat >> i & 1 : static_cast<bool>(activation.flat(z));
      before = activation.gradient_if(group.grad_output[i] * scale, is_flat);
    } else {
      before = activation.gradient(group.grad_output[i] * scale, z);
    }
    g[i] = group.kept >> i & 1 ? before : S(0);
  };
  each_element<kWhich, S>(args.activation, one);
}

template <class T>
__device__ __forceinline__ Group<T> narrowed(const Compute<T> (&values)[kGroup]) {
  Group<T> group;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) group.set(i, values[i]);
  return group;
}

// The gradients of the input from those, `before`, and from the input, x. In evaluation mode the statistics are
// constants.
template <class T, class Gradients, class Before>
__device__ __forceinline__ Group<T> input_gradient_group(const BackwardArgs& args, const Gradients& gradients,
                                                         const Before& before, const Group<T>& x) {
  Group<T> result;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    const auto& k = gradients[i];
    if (args.training)
      result.set(
          i, input_gradient<Compute<T>>(before[i], x[i], k.affine.mean, k.affine.scale, k.by_deviation, k.constant));
    else
      result.set(i, before[i] * k.affine.scale);
  }
  return result;
}

}  // namespace fastlayers::cuda
