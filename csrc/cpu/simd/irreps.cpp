// Leaf of the change of layout of irreps: transposes of [channels, 2l+1], with AVX-512 16 channels at a time.
#include "../irreps_table.h"

#include "transpose.h"

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
template <int N, bool kInverse>
int64_t transpose_vectors(uint32_t* blocks, uint32_t* rows, int64_t mul) {
  int64_t c = 0;
  for (; c + kRouteLanes <= mul; c += kRouteLanes)
    transpose_route<N, kInverse>(
        [&](int j) GEO_INLINED { return _mm512_loadu_si512(kInverse ? rows + j * mul + c : blocks + c * N + j * kRouteLanes); },
        [&](int i, __m512i v) GEO_INLINED {
          _mm512_storeu_si512(kInverse ? blocks + c * N + i * kRouteLanes : rows + i * mul + c, v);
        });
  return c;
}

int64_t transpose_vectors(uint32_t* blocks, uint32_t* rows, int64_t mul, int64_t n, bool inverse) {
  int64_t done = 0;
  unrolled<1, kRouteDegree + 1>([&](auto degree) GEO_INLINED {
    constexpr int N = 2 * degree.value + 1;
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
