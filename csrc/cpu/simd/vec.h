#pragma once
// SIMD vectors of the level this file is compiled for. Files in this folder are compiled once per level, with
// GEO_SIMD_LEVEL = 0 (baseline), 1 (AVX2, FMA, F16C) or 2 (AVX-512) and the compiler flags of that level, and everything
// in them lives in the namespace of the level. They include no C++ library header: an inline function of one, compiled
// here with AVX-512, could be the copy that the linker keeps for the whole library.
#include <stdint.h>
#include <string.h>

#include "../../gelu.h"
#include "../../half.h"
#include "../../macros.h"

#if GEO_SIMD_LEVEL == 2
#define GEO_SIMD_NAMESPACE simd_avx512
#define GEO_VECTOR_BYTES 64
#elif GEO_SIMD_LEVEL == 1
#define GEO_SIMD_NAMESPACE simd_avx2
#define GEO_VECTOR_BYTES 32
#else
#define GEO_SIMD_NAMESPACE simd_baseline
#define GEO_VECTOR_BYTES 16
#endif

#if GEO_SIMD_LEVEL >= 1
#include <immintrin.h>
#endif

namespace geo {
namespace GEO_SIMD_NAMESPACE {

constexpr int kRegisters = GEO_SIMD_LEVEL == 2 ? 32 : 16;

template <class T>
struct vec {
  typedef T type __attribute__((vector_size(GEO_VECTOR_BYTES)));
  typedef T loose __attribute__((vector_size(GEO_VECTOR_BYTES), aligned(sizeof(T)), may_alias));
  static constexpr int lanes = GEO_VECTOR_BYTES / int(sizeof(T));
};
typedef vec<float>::type vfloat;
typedef vec<double>::type vdouble;
typedef uint16_t vbits16 __attribute__((vector_size(GEO_VECTOR_BYTES / 2)));
typedef uint16_t vbits16_loose __attribute__((vector_size(GEO_VECTOR_BYTES / 2), aligned(2), may_alias));
typedef uint32_t vbits32 __attribute__((vector_size(GEO_VECTOR_BYTES)));
typedef uint64_t vbits64 __attribute__((vector_size(GEO_VECTOR_BYTES)));

}  // namespace GEO_SIMD_NAMESPACE

template <>
struct bits_of<GEO_SIMD_NAMESPACE::vfloat> {
  typedef GEO_SIMD_NAMESPACE::vbits32 type;
};
template <>
struct bits_of<GEO_SIMD_NAMESPACE::vdouble> {
  typedef GEO_SIMD_NAMESPACE::vbits64 type;
};

namespace GEO_SIMD_NAMESPACE {

// load: lanes of S, widened to the type it is computed in.
GEO_INLINE vfloat load(const float* p) { return *reinterpret_cast<const vec<float>::loose*>(p); }
GEO_INLINE vdouble load(const double* p) { return *reinterpret_cast<const vec<double>::loose*>(p); }
GEO_INLINE vfloat load(const bfloat16* p) {
  const vbits16 h = *reinterpret_cast<const vbits16_loose*>(p);
  return (vfloat)(__builtin_convertvector(h, vbits32) << 16);
}
GEO_INLINE vfloat load(const float16* p) {
#if GEO_SIMD_LEVEL == 2
  return (vfloat)_mm512_maskz_cvtph_ps((__mmask16)-1, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif GEO_SIMD_LEVEL == 1
  return (vfloat)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vfloat v;
  for (int i = 0; i < vec<float>::lanes; ++i) v[i] = widen(p[i]);
  return v;
#endif
}

// store: rounded back to S.
GEO_INLINE void store(float* p, vfloat v) { *reinterpret_cast<vec<float>::loose*>(p) = v; }
GEO_INLINE void store(double* p, vdouble v) { *reinterpret_cast<vec<double>::loose*>(p) = v; }
GEO_INLINE void store(bfloat16* p, vfloat v) {
  const vbits32 u = (vbits32)v, rounded = (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
  const vbits32 nan = (vbits32)(v != v);
  *reinterpret_cast<vbits16_loose*>(p) = __builtin_convertvector((nan & 0x7fc0u) | (~nan & rounded), vbits16);
}
GEO_INLINE void store(float16* p, vfloat v) {
#if GEO_SIMD_LEVEL == 2
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtps_ph((__mmask16)-1, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif GEO_SIMD_LEVEL == 1
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < vec<float>::lanes; ++i) narrow(v[i], p + i);
#endif
}

// The first n lanes (0 < n < lanes); the others are read as 0 and not written.
template <class S>
GEO_INLINE typename vec<typename accumulate<S>::type>::type load_n(const S* p, int n) {
  S buffer[vec<typename accumulate<S>::type>::lanes] = {};
  for (int i = 0; i < n; ++i) buffer[i] = p[i];
  return load(buffer);
}
template <class S>
GEO_INLINE void store_n(S* p, typename vec<typename accumulate<S>::type>::type v, int n) {
  S buffer[vec<typename accumulate<S>::type>::lanes];
  store(buffer, v);
  for (int i = 0; i < n; ++i) p[i] = buffer[i];
}
#if GEO_SIMD_LEVEL == 2
GEO_INLINE vfloat load_n(const float* p, int n) { return (vfloat)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p); }
GEO_INLINE vdouble load_n(const double* p, int n) { return (vdouble)_mm512_maskz_loadu_pd((__mmask8)((1u << n) - 1), p); }
GEO_INLINE void store_n(float* p, vfloat v, int n) { _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v); }
GEO_INLINE void store_n(double* p, vdouble v, int n) { _mm512_mask_storeu_pd(p, (__mmask8)((1u << n) - 1), (__m512d)v); }
#endif

// Store past the caches; p is aligned to the vector. Follow a run of these with stream_fence().
template <class S, class V>
GEO_INLINE void stream(S* p, V v) {
  store(p, v);
}
#if GEO_SIMD_LEVEL == 2
GEO_INLINE void stream(float* p, vfloat v) { _mm512_stream_ps(p, (__m512)v); }
GEO_INLINE void stream(double* p, vdouble v) { _mm512_stream_pd(p, (__m512d)v); }
#elif GEO_SIMD_LEVEL == 1
GEO_INLINE void stream(float* p, vfloat v) { _mm256_stream_ps(p, (__m256)v); }
GEO_INLINE void stream(double* p, vdouble v) { _mm256_stream_pd(p, (__m256d)v); }
#endif
GEO_INLINE void stream_fence() {
#if GEO_SIMD_LEVEL >= 1
  _mm_sfence();
#endif
}

// The sum of all lanes, in a fixed order: halves, then quarters, ...
template <class T>
GEO_INLINE T sum_lanes(typename vec<T>::type v) {
  T lane[vec<T>::lanes];
  store(lane, v);
  for (int width = vec<T>::lanes / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
}

GEO_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

}  // namespace GEO_SIMD_NAMESPACE
}  // namespace geo
