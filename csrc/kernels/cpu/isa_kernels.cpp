// Compiled once for each instruction set and storage type: FASTLAYERS_ISA and FASTLAYERS_STORAGE name them. Defines the
// table kernels_<isa>_<storage> that dispatch.cpp chooses from.
#include "pool.h"
#include "rows.h"

namespace fastlayers {
inline namespace FASTLAYERS_ISA {

// For isa_pool.cpp too.
template Moments plane_moments<FASTLAYERS_STORAGE>(const ForwardArgs&, std::int64_t, Span);
template TileMoments tile_moments<FASTLAYERS_STORAGE>(const ForwardArgs&, const Tile&, const Columns&);

namespace {

using Storage = FASTLAYERS_STORAGE;

// Whether runs of all channels are swept as rows. Where nothing is summed and no mask of bits is involved, small planes
// are walked one by one instead, in the order of memory, unless they are tiny.
bool swept_as_rows(const ForwardArgs& args) {
  constexpr std::int64_t kTinyPlane = 32;
  const Geometry& g = args.geometry;
  const bool one_by_one = !args.training && !g.rows && g.spatial > kTinyPlane && !args.flat_bits && !args.keep.bits;
  return g.mixed_runs() && !one_by_one;
}
bool swept_as_rows(const BackwardArgs& args) {
  return args.geometry.mixed_runs();
}

template <template <class, class> class Planes, template <class, class> class Rows, class Args>
void run_fused(const Args& args) {
  with_activation<SimdMath<Compute<Storage>>>(args.activation.kind, args.activation.params, [&](auto activation) {
    using Act = decltype(activation);
    if (swept_as_rows(args))
      Rows<Storage, Act>(args, activation).run();
    else
      Planes<Storage, Act>(args, activation).run();
  });
}

void run_dropout(const DropoutArgs& args) {
  args.geometry.mixed_runs() ? dropout_rows<Storage>(args) : dropout_planes<Storage>(args);
}

}  // namespace

}  // namespace FASTLAYERS_ISA

#define FASTLAYERS_JOIN_(a, b, c, d) a##b##c##d
#define FASTLAYERS_JOIN(a, b, c, d) FASTLAYERS_JOIN_(a, b, c, d)

extern const Kernels FASTLAYERS_JOIN(kernels_, FASTLAYERS_ISA, _, FASTLAYERS_STORAGE);
const Kernels FASTLAYERS_JOIN(kernels_, FASTLAYERS_ISA, _, FASTLAYERS_STORAGE){
    run_fused<PlanesForward, RowsForward, ForwardArgs>,
    run_fused<PlanesBackward, RowsBackward, BackwardArgs>,
    run_dropout,
    pool_forward<Storage>,
    pool_backward<Storage>,
};

}  // namespace fastlayers
