// Temporary arrays inside a kernel call.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#include "../common/macros.h"

namespace fastlayers {
inline namespace FASTLAYERS_ISA {

// Uninitialised room for trivial types, aligned for vectors. Not std::vector: its functions would be shared, by the
// linker, between code compiled for different instruction sets.
template <class E>
class Scratch {
 public:
  explicit Scratch(std::int64_t size) {
    const std::size_t bytes = (static_cast<std::size_t>(size) * sizeof(E) + kAlignment) / kAlignment * kAlignment;
    data_ = static_cast<E*>(std::aligned_alloc(kAlignment, bytes));
    if (!data_) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  FL_INLINE E* data() const { return data_; }
  FL_INLINE E& operator[](std::int64_t i) const { return data_[i]; }

 private:
  static constexpr std::size_t kAlignment = 64;
  E* data_;
};

}  // namespace FASTLAYERS_ISA
}  // namespace fastlayers
