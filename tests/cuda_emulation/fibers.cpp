// Switches between fibers, and tells the sanitizers.
//
// Under the thread sanitizer this file and launch.cpp are compiled without it, and FASTLAYERS_THREAD_SANITIZER is set:
// the emulator's own variables are seen by all fibers, and only the kernels are to be watched.
#include "fibers.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef FASTLAYERS_THREAD_SANITIZER
#include <sanitizer/tsan_interface.h>
#endif

#if defined(__x86_64__)
// Saves what a function has to keep (System V ABI), and the stack with it; loads that of the other one. Much faster
// than swapcontext, which calls the system to save signal masks.
extern "C" void fastlayers_switch_stacks(void** save, void* load);
asm(R"(
.text
.globl fastlayers_switch_stacks
.hidden fastlayers_switch_stacks
.type fastlayers_switch_stacks,@function
fastlayers_switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastlayers_switch_stacks, . - fastlayers_switch_stacks
)");
#endif

namespace fastlayers::cuda::emulation {

void prepare(Context& context, char* stack, std::size_t bytes, void (*entry)()) {
#if defined(__x86_64__)
  constexpr int kSavedRegisters = 6;
  // A function finds the stack 8 bytes off a multiple of 16: its caller has pushed the return address, here zero.
  void** top = reinterpret_cast<void**>(stack + bytes) - 2;
  top[0] = reinterpret_cast<void*>(entry);
  top[1] = nullptr;
  context.stack_pointer = top - kSavedRegisters;
#else
  getcontext(&context.saved);
  context.saved.uc_stack.ss_sp = stack;
  context.saved.uc_stack.ss_size = bytes;
  context.saved.uc_link = nullptr;
  makecontext(&context.saved, entry, 0);
#endif
  context.stack_bottom = stack;
  context.stack_bytes = bytes;
#ifdef FASTLAYERS_THREAD_SANITIZER
  // A new one each time: what one fiber does is in order, but threads of two blocks are not.
  if (context.tsan_fiber) __tsan_destroy_fiber(context.tsan_fiber);
  context.tsan_fiber = __tsan_create_fiber(0);
#endif
}

void entered([[maybe_unused]] Context& from) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &from.stack_bottom, &from.stack_bytes);
#endif
}

void switch_context(Context& from, Context& to, [[maybe_unused]] bool finished) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(finished ? nullptr : &from.fake_stack, to.stack_bottom, to.stack_bytes);
#endif
#ifdef FASTLAYERS_THREAD_SANITIZER
  __tsan_switch_to_fiber(to.tsan_fiber, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__x86_64__)
  fastlayers_switch_stacks(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.saved, &to.saved);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void adopt_current([[maybe_unused]] Context& context) {
#ifdef FASTLAYERS_THREAD_SANITIZER
  context.tsan_fiber = __tsan_get_current_fiber();
#endif
}

std::size_t stack_bytes() {
#if defined(__SANITIZE_ADDRESS__) || defined(FASTLAYERS_THREAD_SANITIZER)
  return 256 * 1024;  // instrumented functions take more
#else
  return 64 * 1024;
#endif
}

char* allocate_stacks(std::size_t count) {
  // Without MAP_NORESERVE systems that do not overcommit would count pages that nobody touches.
  void* memory = mmap(nullptr, count * stack_bytes(), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return static_cast<char*>(memory);
}

void abandon_stack(char* stack) {
  permit_access(stack, stack_bytes());
}

void happens_before([[maybe_unused]] void* place) {
#ifdef FASTLAYERS_THREAD_SANITIZER
  __tsan_release(place);
#endif
}

void happens_after([[maybe_unused]] void* place) {
#ifdef FASTLAYERS_THREAD_SANITIZER
  __tsan_acquire(place);
#endif
}

void forbid_access([[maybe_unused]] void* begin, [[maybe_unused]] std::size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  __asan_poison_memory_region(begin, bytes);
#endif
}

void permit_access([[maybe_unused]] void* begin, [[maybe_unused]] std::size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(begin, bytes);
#endif
}

}  // namespace fastlayers::cuda::emulation
