// Fibers: functions that stop in the middle and go on later, each on a stack of its own, all on one thread of the
// system.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace fastlayers::cuda::emulation {

// The state of a function that has stopped: of a fiber, or of the one that resumes fibers.
struct Context {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t saved;
#endif
  // What the address sanitizer has to know of a stack, and the thread sanitizer's name for it.
  const void* stack_bottom = nullptr;
  std::size_t stack_bytes = 0;
  void* fake_stack = nullptr;
  void* tsan_fiber = nullptr;
};

// Makes `context` one that runs entry() from its start. entry() must never return: its last act is to switch away.
void prepare(Context& context, char* stack, std::size_t bytes, void (*entry)());
// The first thing that entry() does; `from` is what resumed it.
void entered(Context& from);
// Stops `from`, which is what runs now, and continues `to`. A context that is `finished` is not continued again.
void switch_context(Context& from, Context& to, bool finished = false);
// For the one that resumes fibers, before the first of them.
void adopt_current(Context& context);

// Memory for `count` stacks of stack_bytes() each, in one piece; never given back.
char* allocate_stacks(std::size_t count);
std::size_t stack_bytes();
// After a stack was left for good with functions on it.
void abandon_stack(char* stack);

// Tells the thread sanitizer that what was done before happens_before(place) is visible after happens_after(place).
void happens_before(void* place);
void happens_after(void* place);
// Tells the address sanitizer that nobody may touch these bytes.
void forbid_access(void* begin, std::size_t bytes);
void permit_access(void* begin, std::size_t bytes);

#ifdef FASTLAYERS_THREAD_SANITIZER
inline constexpr bool kThreadSanitizer = true;
#else
inline constexpr bool kThreadSanitizer = false;
#endif

}  // namespace fastlayers::cuda::emulation
