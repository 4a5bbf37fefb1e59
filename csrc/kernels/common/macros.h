// Marks functions that both host compilers and nvcc compile, and keeps each compilation's copies apart.
#pragma once

#ifdef __CUDACC__
#define FL_INLINE __host__ __device__ __forceinline__
#define FL_DEVICE_TOO __host__ __device__
#else
#define FL_INLINE inline __attribute__((always_inline))
#define FL_DEVICE_TOO
#endif

// The same templates are compiled several times with different instruction sets. Without a namespace
// of its own for each, the linker would merge equal names and could pick code the processor lacks.
#ifndef FASTLAYERS_ISA
#define FASTLAYERS_ISA portable
#endif
