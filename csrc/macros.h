#pragma once
// Marks of functions that stand once and are compiled for host and device, and of the loops that must be unrolled:
// gcc spills an array of accumulators to memory unless every loop over it, also those that zero and store it, is.
// Both are static: each file keeps the copy compiled with its own flags.
#ifdef __CUDACC__
#define GEO_HD static __host__ __device__ __forceinline__
#define GEO_HD_INLINE GEO_HD
#define GEO_HD_CONSTEXPR constexpr __host__ __device__
#define GEO_HD_CALLER GEO_PRAGMA(nv_exec_check_disable)  // of a template: calls what it is given, on either side
#define GEO_UNROLL(n) GEO_PRAGMA(unroll n)
#else
#define GEO_HD static inline
#define GEO_HD_INLINE GEO_INLINE
#define GEO_HD_CONSTEXPR constexpr
#define GEO_HD_CALLER
#define GEO_UNROLL(n) GEO_PRAGMA(GCC unroll n)
#endif
#define GEO_INLINED __attribute__((always_inline))  // of a lambda
#define GEO_INLINE static inline __attribute__((always_inline))
#define GEO_NOINLINE static __attribute__((noinline))  // one copy of a template's instance, where many would follow
#define GEO_PRAGMA(text) _Pragma(#text)
