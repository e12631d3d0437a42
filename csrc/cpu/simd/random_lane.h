#pragma once
// Lanes of random numbers: see csrc/random.h.
#include "../../random.h"
#include "vec.h"

#if GEO_SIMD_LEVEL == 0 && defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace geo {
namespace GEO_SIMD_NAMESPACE {

struct VectorLane {
  typedef vbits64 type;
  GEO_INLINE type product(type word, uint32_t factor) {
#if GEO_SIMD_LEVEL == 2
    return (type)_mm512_mul_epu32((__m512i)word, _mm512_set1_epi64(factor));
#elif GEO_SIMD_LEVEL == 1
    return (type)_mm256_mul_epu32((__m256i)word, _mm256_set1_epi64x(factor));
#elif defined(__SSE2__)
    return (type)_mm_mul_epu32((__m128i)word, _mm_set1_epi64x(factor));
#else
    return (word & uint64_t(0xffffffffu)) * uint64_t(factor);
#endif
  }
};

GEO_INLINE vbits64& lanes(uint64_t* p) { return *reinterpret_cast<vbits64*>(p); }

}  // namespace GEO_SIMD_NAMESPACE
}  // namespace geo
