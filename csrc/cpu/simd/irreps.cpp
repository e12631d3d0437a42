// Leaf of the change of layout of irreps: transposes of [channels, 2l+1]. With AVX-512, 16 channels at a time: each vector
// of the result takes its elements from the 2l+1 vectors of the source by one permutation of each, under a mask.
#include "../irreps_table.h"

#include "../../gaunt.h"
#include "vec.h"

namespace geo {
namespace GEO_SIMD_NAMESPACE {
namespace {

template <class S>
void transpose_rest(S* blocks, S* rows, int64_t first, int64_t mul, int64_t n, bool inverse) {
  for (int64_t m = 0; m < n; ++m)
    for (int64_t c = first; c < mul; ++c)
      if (inverse)
        blocks[c * n + m] = rows[m * mul + c];
      else
        rows[m * mul + c] = blocks[c * n + m];
}

#if GEO_SIMD_LEVEL == 2
constexpr int kLanes = 16, kMostComponents = 13;

// Element (out vector i, lane) comes from lane `lane[i][.]` of source j where bit `lane` of mask[i][j] is set.
template <int N, bool kInverse>
struct Route {
  int32_t lane[N][kLanes] = {};
  uint16_t mask[N][N] = {};
  constexpr Route() {
    for (int i = 0; i < N; ++i)
      for (int k = 0; k < kLanes; ++k) {
        const int e = kInverse ? i * kLanes + k : k * N + i;
        lane[i][k] = kInverse ? e / N : e % kLanes;
        mask[i][kInverse ? e % N : e / kLanes] |= uint16_t(1u << k);
      }
  }
};
template <int N, bool kInverse>
struct RouteTable {
  static constexpr Route<N, kInverse> value{};
};

template <int N, bool kInverse>
int64_t transpose_vectors(uint32_t* blocks, uint32_t* rows, int64_t mul) {
  using Table = RouteTable<N, kInverse>;
  int64_t c = 0;
  for (; c + kLanes <= mul; c += kLanes) {
    __m512i from[N];
    unrolled<0, N>([&](auto j) GEO_INLINED {
      constexpr int i = decltype(j)::value;
      from[i] = _mm512_loadu_si512(kInverse ? rows + i * mul + c : blocks + c * N + i * kLanes);
    });
    unrolled<0, N>([&](auto out) GEO_INLINED {
      constexpr int i = decltype(out)::value;
      const __m512i lane = _mm512_loadu_si512(Table::value.lane[i]);
      __m512i to = _mm512_setzero_si512();
      unrolled<0, N>([&](auto j) GEO_INLINED {
        constexpr uint16_t mask = Table::value.mask[i][decltype(j)::value];
        if constexpr (mask != 0) to = _mm512_mask_permutexvar_epi32(to, mask, lane, from[decltype(j)::value]);
      });
      _mm512_storeu_si512(kInverse ? blocks + c * N + i * kLanes : rows + i * mul + c, to);
    });
  }
  return c;
}

int64_t transpose_vectors(uint32_t* blocks, uint32_t* rows, int64_t mul, int64_t n, bool inverse) {
  int64_t done = 0;
  unrolled<1, (kMostComponents + 1) / 2>([&](auto degree) GEO_INLINED {
    constexpr int N = 2 * decltype(degree)::value + 1;
    if (n == N) done = inverse ? transpose_vectors<N, true>(blocks, rows, mul) : transpose_vectors<N, false>(blocks, rows, mul);
  });
  return done;
}
#endif

void transpose(void* blocks, void* rows, int64_t mul, int64_t n, int64_t bytes, bool inverse) {
  if (n == 1) {
    memcpy(inverse ? blocks : rows, inverse ? rows : blocks, size_t(mul * bytes));
    return;
  }
  if (bytes == 8) return transpose_rest(static_cast<uint64_t*>(blocks), static_cast<uint64_t*>(rows), 0, mul, n, inverse);
  if (bytes == 2) return transpose_rest(static_cast<uint16_t*>(blocks), static_cast<uint16_t*>(rows), 0, mul, n, inverse);
  uint32_t *flat = static_cast<uint32_t*>(blocks), *dense = static_cast<uint32_t*>(rows);
  int64_t first = 0;
#if GEO_SIMD_LEVEL == 2
  first = transpose_vectors(flat, dense, mul, n, inverse);
#endif
  transpose_rest(flat, dense, first, mul, n, inverse);
}

}  // namespace

const IrrepsTable irreps = {transpose};

}  // namespace GEO_SIMD_NAMESPACE
}  // namespace geo
