// What a block does with its tiles, one after the other, whatever the layout: the walk that sums backward's gradients,
// and the walks back that write results.
//
// planes.h and rows.h say, in functions of the same names, where the groups of a tile are and how they are moved. A
// Walk is what all blocks of a launch have in common, a Part what one block has, or one thread of it, and a Place, g,
// is where a group is; g.valid has its elements that are there.
//   group_at<kTile>(walk, part, i, u)  the place of this thread's u-th group of kTile in tile i
//   tiles_of<kTile>(walk, part)        how many tiles the part has
//   load<T>(source, walk, part, g, aligned), store(target, walk, part, g, group, aligned)
//   flat_byte_of(walk, part, g)        the number of its byte in the flat bits
//   Walk::Dropout::of(keep, walk, part, g)  which of its elements dropout keeps, as bits; none that are not there
#pragma once

#include "elements.h"
#include "plan.h"

namespace fastlayers::cuda {

// Which tensors can be moved in words of 16 bytes: those whose groups begin at multiples of it.
struct Aligned {
  bool input = false, residual = false, output = false;                 // forward
  bool grad_output = false, grad_input = false, grad_residual = false;  // backward, besides input and residual
};

// How many of a tile's groups are in hand at once where their outputs are computed: the residual is loaded besides.
constexpr int applied_at_once(int groups) {
  return groups > 2 ? groups / 2 : groups;
}

// Writes the output of a part, its last tile first.
template <class T, int kTile, Activations kWhich, class Walk, class Part, class Affines>
__device__ __forceinline__ void apply_forward(const ForwardArgs& args, const Walk& walk, const Part& part,
                                              const Affines& affines, unsigned char* kept_tiles) {
  constexpr int kHand = applied_at_once(kTile);
  typename Walk::Dropout dropout;
  for (std::uint32_t step = tiles_of<kTile>(walk, part) * (kTile / kHand); step-- > 0;) {
    const std::uint32_t i = step / (kTile / kHand), first = step % (kTile / kHand) * kHand;
    typename Walk::Place g[kHand];
    Group<T> x[kHand], residual[kHand];
    unsigned kept[kHand];
#pragma unroll
    for (int u = 0; u < kHand; ++u) {
      g[u] = group_at<kTile>(walk, part, i, first + u);
      kept[u] = dropout.of(args.keep, walk, part, g[u]);
      x[u] = residual[u] = zeros<T>();
      if (!kept[u]) continue;
      x[u] = i < walk.kept_tiles ? Kept<T>::get(kept_tiles, i * kTile + first + u)
                                 : load<T>(args.input, walk, part, g[u], walk.aligned.input);
      if (args.residual.data) residual[u] = load<T>(args.residual, walk, part, g[u], walk.aligned.residual);
    }
#pragma unroll
    for (int u = 0; u < kHand; ++u) {
      if (g[u].valid.empty()) continue;
      std::uint8_t* flat = args.flat_bits ? args.flat_bits + flat_byte_of(walk, part, g[u]) : nullptr;
      const Group<T> output = forward_group<kWhich>(args, x[u], residual[u], affines, kept[u], flat);
      store(args.output, walk, part, g[u], output, walk.aligned.output);
    }
  }
}

// The operands of backward that are in memory only, of a group of which something is kept.
template <class T, class Walk, class Part>
__device__ __forceinline__ void load_besides(BackwardGroup<T>& group, const BackwardArgs& args, const Walk& walk,
                                             const Part& part, const typename Walk::Place& g) {
  if (args.flat_bits)
    group.flat = args.flat_bits[flat_byte_of(walk, part, g)];
  else if (args.residual.data)
    group.residual = load<T>(args.residual, walk, part, g, walk.aligned.residual);
}

// Where backward keeps the gradient of the output, and behind it the input, of a thread's u-th group of a tile.
template <int kTile>
__device__ __forceinline__ std::uint32_t backward_slot(std::uint32_t tile, std::uint32_t u) {
  return 2 * (tile * kTile + u);
}

// Sums the gradients of a part: calls sums.add(e, gradient, deviation of the input from the mean) for each element of
// its groups, and sums.end_tile(whether it was the last) behind each tile. Keeps the gradients of the output and the
// inputs of its first tiles.
template <class T, int kTile, Activations kWhich, class Walk, class Part, class Affines, class Sums>
__device__ __forceinline__ void collect_backward(const BackwardArgs& args, const Walk& walk, const Part& part,
                                                 const Affines& affines, unsigned char* kept_tiles, Sums& sums) {
  typename Walk::Dropout dropout;
  const std::uint32_t tiles = tiles_of<kTile>(walk, part);
  for (std::uint32_t i = 0; i < tiles; ++i) {
    BackwardGroup<T> group[kTile];
#pragma unroll
    for (int u = 0; u < kTile; ++u) {
      const auto g = group_at<kTile>(walk, part, i, u);
      group[u].kept = dropout.of(args.keep, walk, part, g);
      if (!group[u].kept) continue;
      group[u].grad_output = load<T>(args.grad_output, walk, part, g, walk.aligned.grad_output);
      group[u].x = load<T>(args.input, walk, part, g, walk.aligned.input);
      load_besides(group[u], args, walk, part, g);
      if (i < walk.kept_tiles) {
        Kept<T>::put(kept_tiles, backward_slot<kTile>(i, u), group[u].grad_output);
        Kept<T>::put(kept_tiles, backward_slot<kTile>(i, u) + 1, group[u].x);
      }
    }
#pragma unroll
    for (int u = 0; u < kTile; ++u) {
      Compute<T> before[kGroup];
      backward_group<kWhich>(args, group[u], affines, before);
#pragma unroll
      for (int e = 0; e < kGroup; ++e) sums.add(e, before[e], group[u].x[e] - affines[e].mean);
    }
    sums.end_tile(i + 1 == tiles);
  }
}

// Writes the gradients of a part, its last tile first.
template <class T, int kTile, Activations kWhich, class Walk, class Part, class Gradients>
__device__ __forceinline__ void apply_backward(const BackwardArgs& args, const Walk& walk, const Part& part,
                                               const Gradients& gradients, unsigned char* kept_tiles) {
  const AffinesOf<Gradients> affines{gradients};
  typename Walk::Dropout dropout;
  for (std::uint32_t i = tiles_of<kTile>(walk, part); i-- > 0;) {
    BackwardGroup<T> group[kTile];
#pragma unroll
    for (int u = 0; u < kTile; ++u) {
      const auto g = group_at<kTile>(walk, part, i, u);
      const unsigned kept = group[u].kept = dropout.of(args.keep, walk, part, g);
      if (g.valid.empty()) continue;
      if (kept && i < walk.kept_tiles) {
        group[u].grad_output = Kept<T>::get(kept_tiles, backward_slot<kTile>(i, u));
        group[u].x = Kept<T>::get(kept_tiles, backward_slot<kTile>(i, u) + 1);
      } else {
        if (kept) group[u].grad_output = load<T>(args.grad_output, walk, part, g, walk.aligned.grad_output);
        if (kept || args.training) group[u].x = load<T>(args.input, walk, part, g, walk.aligned.input);
      }
      if (kept) load_besides(group[u], args, walk, part, g);
    }
#pragma unroll
    for (int u = 0; u < kTile; ++u) {
      const auto g = group_at<kTile>(walk, part, i, u);  // again: keeping it would cost registers
      if (g.valid.empty()) continue;
      Compute<T> before[kGroup];
      backward_group<kWhich>(args, group[u], affines, before);
      if (args.grad_input.data)
        store(args.grad_input, walk, part, g, input_gradient_group<T>(args, gradients, before, group[u].x),
              walk.aligned.grad_input);
      if (args.grad_residual.data)
        store(args.grad_residual, walk, part, g, narrowed<T>(before), walk.aligned.grad_residual);
    }
  }
}

}  // namespace fastlayers::cuda
