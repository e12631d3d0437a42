#pragma once
// What the leaves of softmax by segment and by index share.
#include "../../segment_softmax.h"
#include "vec.h"

namespace geo {

#if GEO_SIMD_LEVEL == 2
template <>
struct TimesPowerOfTwo<float, GEO_SIMD_NAMESPACE::vfloat> {
  using V = GEO_SIMD_NAMESPACE::vfloat;
  GEO_INLINE V of(V v, V n, V) { return (V)_mm512_maskz_scalef_ps((__mmask16)-1, (__m512)v, (__m512)n); }
};
template <>
struct TimesPowerOfTwo<double, GEO_SIMD_NAMESPACE::vdouble> {
  using V = GEO_SIMD_NAMESPACE::vdouble;
  GEO_INLINE V of(V v, V n, V) { return (V)_mm512_maskz_scalef_pd((__mmask8)-1, (__m512d)v, (__m512d)n); }
};
#endif

namespace GEO_SIMD_NAMESPACE {
namespace {

// The sums of exponentials without maximum that are used. A larger one may hold a term that became infinite, and beside a
// smaller one a term might count that lost digits or became 0.
constexpr double kLeastSum = 1e-10, kMostSum = 1e26;

// All lanes of a comparison hold.
template <class I>
GEO_INLINE bool all_of(I holds) {
#if GEO_SIMD_LEVEL == 2
  return sizeof(holds[0]) == 4 ? _mm512_movepi32_mask((__m512i)holds) == 0xffff
                               : _mm512_movepi64_mask((__m512i)holds) == 0xff;
#elif GEO_SIMD_LEVEL == 1
  return _mm256_movemask_epi8((__m256i)holds) == -1;
#else
  bool all = true;
  GEO_UNROLL(4) for (int lane = 0; lane < int(sizeof(I) / sizeof(holds[0])); ++lane) all &= holds[lane] != 0;
  return all;
#endif
}

// f(get, put) for vectors of the entries [begin, end); get and put take the last one's lanes alone.
template <class T, class F>
GEO_INLINE void for_vectors(int64_t begin, int64_t end, F&& f) {
  int64_t k = begin;
  for (; k + vec<T>::lanes <= end; k += vec<T>::lanes)
    f([k](const auto* p) { return load(p + k); }, [k](auto* p, auto v) { store(p + k, v); });
  const int n = int(end - k);
  if (n) f([k, n](const auto* p) { return load_n(p + k, n); }, [k, n](auto* p, auto v) { store_n(p + k, v, n); });
}

}  // namespace
}  // namespace GEO_SIMD_NAMESPACE
}  // namespace geo
