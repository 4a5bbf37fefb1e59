// Compiled once for each instruction set and storage type: FASTLAYERS_ISA and FASTLAYERS_STORAGE name them. Defines the
// table kernels_<isa>_<storage> that dispatch.cpp chooses from.
#include "rows.h"

namespace fastlayers {
inline namespace FASTLAYERS_ISA {

namespace {

using Storage = FASTLAYERS_STORAGE;

template <template <class, class> class Planes, template <class, class> class Rows, class Args>
void run_fused(const Args& args) {
  with_activation<SimdMath<Compute<Storage>>>(args.activation.kind, args.activation.params, [&](auto activation) {
    using Act = decltype(activation);
    if (args.geometry.mixed_runs())
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
};

}  // namespace fastlayers
