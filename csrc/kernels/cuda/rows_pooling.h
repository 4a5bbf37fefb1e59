// Kernels with max-pooling for channels_last tensors: the last ones, behind those of rows.h that sum over channels, or
// the only ones where nothing is summed. Each thread has 8 channels and goes from position to position with them;
// threads beside each other have neighbouring channels, the lanes of a block neighbouring positions.
#pragma once

#include "pooling.h"
#include "rows.h"

namespace fastlayers::cuda {

struct RowsPoolWalk {
  PoolWalk pool;
  std::int64_t channels = 0;
  std::uint32_t positions = 0;     // to be written, in all samples
  int tile_groups = 1, tiles = 1;  // how many groups of channels a block is wide, and how many blocks a row is
  int lanes = 1;                   // positions that a block has in hand at once
  int splits = 1;                  // blocks that share the positions
  // What can be moved in words: 8 values of the mask, 8 places, groups.
  bool aligned_mask = false, aligned_positions = false, aligned_input = false;
  bool aligned_output = false, aligned_selected = false;         // forward
  bool aligned_grad_output = false, aligned_grad_input = false;  // backward, besides input and selected
};

// What one thread of a block does: some channels of each lanes-th position of [begin, end).
struct RowsPoolPart {
  std::uint32_t lane, begin, end, steps;
  std::int64_t channel;
  Span valid;
  bool leads;

  __device__ __forceinline__ RowsPoolPart(const RowsPoolWalk& walk, std::uint32_t block) {
    const auto tiles = static_cast<std::uint32_t>(walk.tiles), width = static_cast<std::uint32_t>(walk.tile_groups);
    const auto splits = static_cast<std::uint32_t>(walk.splits), lanes = static_cast<std::uint32_t>(walk.lanes);
    const std::uint32_t split = block / tiles, share = (walk.positions + splits - 1) / splits;
    lane = threadIdx.x / width;
    begin = split * share < walk.positions ? split * share : walk.positions;
    end = walk.positions - begin < share ? walk.positions : begin + share;
    steps = (end - begin + lanes - 1) / lanes;
    channel = std::int64_t{block % tiles * width + threadIdx.x % width} * kGroup;
    const std::int64_t left = lane < lanes ? walk.channels - channel : 0;
    valid.end = static_cast<int>(left < kGroup ? (left > 0 ? left : 0) : kGroup);
    leads = split == 0 && lane == 0;
  }
};

// What numbers(c) has of the channels of a thread.
template <class Numbers, class F>
__device__ __forceinline__ PerElement<Numbers> of_channels(const RowsPoolPart& part, F&& numbers) {
  PerElement<Numbers> mine{};
#pragma unroll
  for (int e = 0; e < kGroup; ++e)
    if (part.valid.has(e)) mine.values[e] = numbers(part.channel + e);
  return mine;
}

// Calls f(i, sample, place, kept) for each position of a thread's part, the last first: its number in all samples and
// in its own one, and, as bits, what dropout keeps of its channels.
template <class F>
__device__ __forceinline__ void each_position(const Keep& keep, const RowsPoolWalk& walk, const RowsPoolPart& part,
                                              const Divisor& per_sample, F&& f) {
  std::uint32_t kept_sample = ~0u;
  unsigned kept = part.valid.bits();
  for (std::uint32_t step = part.steps; step-- > 0;) {
    const std::uint32_t i = part.begin + step * static_cast<std::uint32_t>(walk.lanes) + part.lane;
    if (i >= part.end) continue;
    const std::uint32_t sample = per_sample.quotient(i);
    if (keep.planes && sample != kept_sample) {
      kept_sample = sample;
      kept = kept_channels(keep, sample * walk.channels + part.channel, part.valid, walk.aligned_mask);
    }
    f(i, sample, per_sample.remainder(i, sample), kept);
  }
}

// The places of 8 windows' largest elements, a byte each.
class Places {
 public:
  Places() = default;
  __device__ __forceinline__ Places(const std::uint8_t* from, Span valid, bool aligned) {
    if (aligned && valid.whole()) {
      const uint2 both = __ldg(reinterpret_cast<const uint2*>(from));
      words_[0] = both.x;
      words_[1] = both.y;
      return;
    }
#pragma unroll
    for (int e = 0; e < kGroup; ++e)
      if (valid.has(e)) set(e, from[e]);
  }
  __device__ __forceinline__ void set(int e, unsigned place) { words_[e / 4] |= place << (8 * (e % 4)); }

  __device__ __forceinline__ void store(std::uint8_t* to, Span valid, bool aligned) const {
    if (aligned && valid.whole()) {
      *reinterpret_cast<uint2*>(to) = make_uint2(words_[0], words_[1]);
      return;
    }
#pragma unroll
    for (int e = 0; e < kGroup; ++e)
      if (valid.has(e)) to[e] = static_cast<std::uint8_t>(words_[e / 4] >> (8 * (e % 4)));
  }

  // Which of them are `place`, as bits.
  __device__ __forceinline__ unsigned equal_to(unsigned place) const {
    return zero_bytes(words_[0] ^ place * 0x01010101u) | zero_bytes(words_[1] ^ place * 0x01010101u) << 4;
  }

 private:
  // A carry into a byte's highest bit is missing where the rest of it is zero.
  static __device__ __forceinline__ unsigned zero_bytes(unsigned word) {
    const unsigned highest = ~(((word & 0x7f7f7f7fu) + 0x7f7f7f7fu) | word | 0x7f7f7f7fu);
    // The highest bits of the four bytes, side by side.
    return (highest >> 7) * 0x00204081u >> 21 & 0xf;
  }

  std::uint32_t words_[2] = {};
};

// `numbers` is null in evaluation mode: each thread works them out itself. Begins where the sums before it ended.
template <class T, Activations kWhich>
__global__ void __launch_bounds__(kRowThreads, row_blocks(sizeof(T)))
    rows_pool_forward(const PooledForwardArgs args, const RowsPoolWalk walk, const ChannelAffine<Compute<T>>* numbers) {
  using S = Compute<T>;
  const PoolWalk& pool = walk.pool;
  const RowsPoolPart part(walk, gridDim.x - 1 - blockIdx.x);
  if (part.valid.empty()) return;
  const auto affines = of_channels<ChannelAffine<S>>(part, [&](std::int64_t c) {
    return numbers ? numbers[c] : channel_affine<S>(args, c, running_statistics(args, c, part.leads));
  });
  const T* input = static_cast<const T*>(args.input.data) + part.channel;
  const auto pool_one = [&](std::uint32_t i, std::uint32_t sample, std::uint32_t place, unsigned kept) {
    Group<T> output = zeros<T>(), selected = zeros<T>();
    Places places;
    if (kept) {
      const std::uint32_t row = pool.output_columns.quotient(place);
      const auto column = static_cast<int>(pool.output_columns.remainder(place, row));
      const Window<std::int64_t> window(pool, Reach(pool.height, static_cast<int>(row)), Reach(pool.width, column),
                                        args.input.outer);
      const T* from = input + sample * (pool.inputs.divisor * args.input.outer);
      const auto load_at = [&](std::int64_t at, S(&values)[kGroup]) {
        const Group<T> group = load(from + at, part.valid, walk.aligned_input);
#pragma unroll
        for (int e = 0; e < kGroup; ++e) values[e] = group[e];
      };
      const auto element = [&](std::int64_t at, int e) { return part.valid.has(e) ? widen(from[at + e]) : S(0); };
      S x[kGroup], values[kGroup];
      int position[kGroup];
      pooled<kWhich, 2>(args, pool, window, affines, load_at, element, x, position);
      activated<kWhich>(args.activation, affines, x, values);
#pragma unroll
      for (int e = 0; e < kGroup; ++e) {
        if (!(kept >> e & 1)) continue;
        output.set(e, values[e] * static_cast<S>(args.keep.scale));
        selected.set(e, x[e]);
        places.set(e, static_cast<unsigned>(position[e]));
      }
    }
    const std::int64_t to = i * walk.channels + part.channel;
    store(static_cast<T*>(args.output.data) + to, output, part.valid, walk.aligned_output);
    if (args.selected) store(static_cast<T*>(args.selected) + to, selected, part.valid, walk.aligned_selected);
    if (args.positions) places.store(args.positions + to, part.valid, walk.aligned_positions);
  };
  each_position(args.keep, walk, part, pool.outputs, pool_one);
}

// Adds to `sums` the gradients, before the activation, of those windows whose largest element is at (h, w), of the
// channels that are `kept`.
template <class T>
__device__ __forceinline__ void gather_gradients(const PooledBackwardArgs& args, const RowsPoolWalk& walk,
                                                 const RowsPoolPart& part,
                                                 const PerElement<Gradient<Compute<T>>>& gradients,
                                                 std::uint32_t sample, int h, int w, unsigned kept,
                                                 Compute<T> (&sums)[kGroup]) {
  using S = Compute<T>;
  const auto &height = walk.pool.height, &width = walk.pool.width;
  for (int row = height.first_window(h); row < height.windows_end(h); ++row) {
    const int down = h - height.start(row), kh = down / height.dilation;
    if (kh * height.dilation != down) continue;
    for (int column = width.first_window(w); column < width.windows_end(w); ++column) {
      const int across = w - width.start(column), kw = across / width.dilation;
      if (kw * width.dilation != across) continue;
      const std::int64_t i = (std::int64_t{sample} * height.output + row) * width.output + column;
      const Places places(args.positions + i * walk.channels + part.channel, part.valid, walk.aligned_positions);
      const unsigned here = kept & places.equal_to(static_cast<unsigned>(kh * width.kernel + kw));
      if (!here) continue;
      const Group<T> grad_output =
          load(static_cast<const T*>(args.grad_output.data) + i * args.grad_output.outer + part.channel, part.valid,
               walk.aligned_grad_output);
      const Group<T> selected = load(static_cast<const T*>(args.input.data) + i * args.input.outer + part.channel,
                                     part.valid, walk.aligned_selected);
      const auto scale = static_cast<S>(args.keep.scale);
      each_element<Activations::all, S>(args.activation, [&](auto activation, int e) {
        const auto& affine = gradients[e].affine;
        const S z = normalize<S>(selected[e], affine.mean, affine.scale, affine.shift);
        const S g = activation.gradient(grad_output[e] * scale, z);
        if (here >> e & 1) sums[e] += g;
      });
    }
  }
}

// Writes the input's gradient. `numbers` is null where nothing was summed.
template <class T>
__global__ void __launch_bounds__(kRowThreads, row_blocks(sizeof(T)))
    rows_pool_backward(const PooledBackwardArgs args, const RowsPoolWalk walk, const Gradient<Compute<T>>* numbers) {
  using S = Compute<T>;
  const RowsPoolPart part(walk, gridDim.x - 1 - blockIdx.x);
  if (part.valid.empty()) return;
  const auto gradients = of_channels<Gradient<S>>(
      part, [&](std::int64_t c) { return numbers ? numbers[c] : channel_gradient<S>(args, c, {}, false); });
  const auto write_one = [&](std::uint32_t i, std::uint32_t sample, std::uint32_t place, unsigned kept) {
    Group<T> x = zeros<T>();
    if (args.training)
      x = load(static_cast<const T*>(args.whole_input.data) + i * args.whole_input.outer + part.channel, part.valid,
               walk.aligned_input);
    const std::uint32_t h = walk.pool.input_columns.quotient(place);
    const auto w = static_cast<int>(walk.pool.input_columns.remainder(place, h));
    S before[kGroup] = {};
    if (kept) gather_gradients<T>(args, walk, part, gradients, sample, static_cast<int>(h), w, kept, before);
    store(static_cast<T*>(args.grad_input.data) + i * walk.channels + part.channel,
          input_gradient_group<T>(args, gradients, before, x), part.valid, walk.aligned_grad_input);
  };
  each_position(args.keep, walk, part, walk.pool.inputs, write_one);
}

}  // namespace fastlayers::cuda
