#pragma once
// Marks of functions that stand once and are compiled for host and device, and of the loops that must be unrolled:
// gcc spills an array of accumulators to memory unless every loop over it, also those that zero and store it, is.
// Both are static: each file keeps the copy compiled with its own flags.
#ifdef __CUDACC__
#define GEO_HD static __host__ __device__ __forceinline__
#else
#define GEO_HD static inline
#endif
#define GEO_INLINE static inline __attribute__((always_inline))
#define GEO_PRAGMA(text) _Pragma(#text)
#define GEO_UNROLL(n) GEO_PRAGMA(GCC unroll n)
