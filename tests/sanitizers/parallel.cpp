// In the place of csrc/torch/parallel.cpp where the thread sanitizer watches: threads that it knows.
#include <thread>
#include <vector>

#include "torch/tensors.h"

namespace fastlayers {

void torch_parallel_for(std::int64_t count, std::int64_t grain, const void* context,
                        void (*task)(const void* context, std::int64_t begin, std::int64_t end)) {
  constexpr std::int64_t kThreads = 3;
  const std::int64_t parts = std::max<std::int64_t>(1, std::min(kThreads, count / std::max<std::int64_t>(grain, 1)));
  std::vector<std::thread> threads;
  for (std::int64_t i = 1; i < parts; ++i)
    threads.emplace_back([=] { task(context, count * i / parts, count * (i + 1) / parts); });
  task(context, 0, count / parts);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace fastlayers
