#pragma once
// Blocks of [16 channels, 2l+1] to vectors of channels and back, in registers: each vector of the result takes its elements
// from the 2l+1 vectors of the source by one permutation of each, under a mask.
#include "../../gaunt.h"
#include "vec.h"

#if GEO_SIMD_LEVEL == 2
namespace geo {
namespace GEO_SIMD_NAMESPACE {

constexpr int kRouteLanes = 16, kRouteDegree = 6;  // highest degree, of 13 components

// Lane k of vector i of the result is lane `lane[i][k]` of the source j with bit k of mask[i][j] set.
template <int N, bool kInverse>
struct Route {
  int32_t lane[N][kRouteLanes] = {};
  uint16_t mask[N][N] = {};
  constexpr Route() {
    for (int i = 0; i < N; ++i)
      for (int k = 0; k < kRouteLanes; ++k) {
        const int e = kInverse ? i * kRouteLanes + k : k * N + i;
        lane[i][k] = kInverse ? e / N : e % kRouteLanes;
        mask[i][kInverse ? e % N : e / kRouteLanes] |= uint16_t(1u << k);
      }
  }
};
template <int N, bool kInverse>
struct RouteTable {
  static constexpr Route<N, kInverse> value{};
};

// N vectors from from(j), j < N, to put(i, vector): blocks to rows or, with kInverse, rows to blocks.
template <int N, bool kInverse, class From, class Put>
GEO_INLINE void transpose_route(From&& from, Put&& put) {
  using Table = RouteTable<N, kInverse>;
  __m512i source[N];
  unrolled<0, N>([&](auto j) GEO_INLINED { source[j.value] = from(j.value); });
  unrolled<0, N>([&](auto out) GEO_INLINED {
    constexpr int i = out.value;
    const __m512i lane = _mm512_loadu_si512(Table::value.lane[i]);
    __m512i to = _mm512_setzero_si512();
    unrolled<0, N>([&](auto j) GEO_INLINED {
      constexpr uint16_t mask = Table::value.mask[i][j.value];
      if constexpr (mask != 0) to = _mm512_mask_permutexvar_epi32(to, mask, lane, source[j.value]);
    });
    put(i, to);
  });
}

}  // namespace GEO_SIMD_NAMESPACE
}  // namespace geo
#endif
