// What pooling does in either layout, and its entry points. isa_pool.cpp defines these.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace fastlayers {
inline namespace FASTLAYERS_ISA {

template <class T>
void pool_forward(const PoolForwardArgs& args);
template <class T>
void pool_backward(const PoolBackwardArgs& args);

// What elements are multiplied by for their keys: with a monotone activation, the largest output of a window is that
// of its largest or smallest element, or, where the channel's scale is zero, of any.
inline double key_sign(double scale) {
  if (scale == 0 || scale != scale) return scale;
  return scale > 0 ? 1 : -1;
}

// Memory that is fetched while something else is computed, a few lines at each of `steps` steps.
class FetchAhead {
 public:
  FetchAhead() = default;
  FL_INLINE FetchAhead(const void* from, std::int64_t bytes, std::int64_t steps)
      : next_(static_cast<const char*>(from)), end_(next_ + bytes), lines_((bytes / kLine + steps) / steps) {}

  FL_INLINE void step() {
    for (std::int64_t i = 0; i < lines_ && next_ < end_; ++i, next_ += kLine) prefetch(next_);
  }

 private:
  static constexpr std::int64_t kLine = 64;
  const char *next_ = nullptr, *end_ = nullptr;
  std::int64_t lines_ = 0;
};

// n elements, into whole vectors; those behind the end are zero.
template <class T>
FL_INLINE void load_run(const T* from, std::int64_t n, Compute<T>* to) {
  for_each_vector(
      n, [&](std::int64_t i, auto lanes) { detail::store_unaligned<Compute<T>>(to + i, load(from + i, lanes)); });
}
template <class T>
FL_INLINE void store_run(const Compute<T>* from, std::int64_t n, T* to) {
  for_each_vector(
      n, [&](std::int64_t i, auto lanes) { store(to + i, detail::load_unaligned<Compute<T>>(from + i), lanes); });
}
template <class T>
FL_INLINE Compute<T> load_one(const T* from) {
  return load(from, FirstLanes{1})[0];
}

}  // namespace FASTLAYERS_ISA
}  // namespace fastlayers
