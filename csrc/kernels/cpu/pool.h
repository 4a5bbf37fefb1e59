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

// Pieces of memory that are fetched while something else is computed, a few lines at each of `steps` steps.
class FetchAhead {
 public:
  FetchAhead() = default;
  FetchAhead(const void* first, std::int64_t bytes_each, std::int64_t pieces, std::int64_t distance, std::int64_t steps)
      : piece_(static_cast<const char*>(first)),
        bytes_(bytes_each),
        pieces_(steps > 0 ? pieces : 0),
        distance_(distance),
        lines_(steps > 0 ? (pieces * (bytes_each / kLine + 1) + steps - 1) / steps : 0) {}

  FL_INLINE void step(std::int64_t steps = 1) {
    for (std::int64_t i = 0; i < lines_ * steps && pieces_ > 0; ++i) {
      prefetch(piece_ + at_);
      at_ += kLine;
      if (at_ < bytes_) continue;
      at_ = 0;
      piece_ += distance_;
      --pieces_;
    }
  }

 private:
  static constexpr std::int64_t kLine = 64;
  const char* piece_ = nullptr;
  std::int64_t bytes_ = 0, pieces_ = 0, distance_ = 0, lines_ = 0, at_ = 0;
};

// Has lines that are about to be written fetched.
FL_INLINE void prefetch_run_for_writing(const void* to, std::int64_t bytes) {
  for (std::int64_t i = 0; i < bytes; i += 64) prefetch_for_writing(static_cast<const char*>(to) + i);
}

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
