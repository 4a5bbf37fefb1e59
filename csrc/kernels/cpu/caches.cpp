// The size of the processor's caches.
#include <atomic>
#include <cstdint>
#include <fstream>
#include <string>

#include "kernels.h"

namespace fastlayers {
namespace {

// From Linux: sysconf adds up what it should not in virtual machines.
std::int64_t largest_cache_of_first_processor() {
  std::int64_t largest = 0;
  for (int index = 0; index < 8; ++index) {
    std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/size");
    std::int64_t size = 0;
    char unit = 0;
    if (!(file >> size >> unit)) continue;
    const std::int64_t bytes = unit == 'K' ? size << 10 : unit == 'M' ? size << 20 : size;
    if (bytes > largest) largest = bytes;
  }
  return largest;
}

std::atomic<std::int64_t>& last_level() {
  constexpr std::int64_t kGuess = 32 << 20;
  static const std::int64_t found = largest_cache_of_first_processor();
  static std::atomic<std::int64_t> bytes{found > 0 ? found : kGuess};
  return bytes;
}

}  // namespace

std::int64_t last_level_cache_bytes() {
  return last_level().load(std::memory_order_relaxed);
}

std::int64_t set_last_level_cache_bytes(std::int64_t bytes) {
  return last_level().exchange(bytes, std::memory_order_relaxed);
}

}  // namespace fastlayers
