// Pooling, compiled once for each instruction set and each type that elements are computed in, of which
// FASTLAYERS_COMPUTES_IN_DOUBLE chooses one: most of it does not know of storage types.
#include "pool_planes.h"
#include "pool_rows.h"

namespace fastlayers {
inline namespace FASTLAYERS_ISA {

template <class T>
void pool_forward(const PoolForwardArgs& args) {
  args.geometry.rows ? RowsPoolForward<T>(args).run() : PlanesPoolForward<T>(args).run();
}
template <class T>
void pool_backward(const PoolBackwardArgs& args) {
  args.geometry.rows ? RowsPoolBackward<T>(args).run() : PlanesPoolBackward<T>(args).run();
}

// The statistics are isa_kernels.cpp's.
#define FASTLAYERS_POOL(T)                                                                      \
  extern template Moments plane_moments<T>(const ForwardArgs&, std::int64_t, Span);             \
  extern template TileMoments tile_moments<T>(const ForwardArgs&, const Tile&, const Columns&); \
  template void pool_forward<T>(const PoolForwardArgs&);                                        \
  template void pool_backward<T>(const PoolBackwardArgs&);
#if FASTLAYERS_COMPUTES_IN_DOUBLE
FASTLAYERS_POOL(f64)
#else
FASTLAYERS_POOL(f32)
FASTLAYERS_POOL(bf16)
FASTLAYERS_POOL(f16)
#endif
#undef FASTLAYERS_POOL

}  // namespace FASTLAYERS_ISA
}  // namespace fastlayers
