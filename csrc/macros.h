#pragma once
// Marks of functions that stand once and are compiled for host and device, and of the loops that must be unrolled:
// gcc spills an array of accumulators to memory unless every loop over it, also those that zero and store it, is.
// Both are static: each file keeps the copy compiled with its own flags.
#ifdef __CUDACC__
#define GEO_HD static __host__ __device__ __forceinline__
#define GEO_HD_INLINE GEO_HD
#else
#define GEO_HD static inline
#define GEO_HD_INLINE GEO_INLINE
#endif
#define GEO_INLINED __attribute__((always_inline))  // of a lambda
#define GEO_INLINE static inline __attribute__((always_inline))
#define GEO_NOINLINE static __attribute__((noinline))  // one copy of a template's instance, where many would follow
#define GEO_PRAGMA(text) _Pragma(#text)
#define GEO_UNROLL(n) GEO_PRAGMA(GCC unroll n)
