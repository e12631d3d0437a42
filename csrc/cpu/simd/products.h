#pragma once
// Tiles of small products: some rows, or features, times a few vectors of features.
#include "vec.h"

namespace geo {
namespace GEO_SIMD_NAMESPACE {
namespace {

constexpr int kPanel = kRegisters == 32 ? 4 : 2;  // vectors of a tile at most
GEO_INLINE constexpr int outer_rows(int vectors) { return vectors * 2 > kPanel ? 4 : 8; }

template <int N>
struct Width {
  static constexpr int value = N;
};
// f(first feature, Width<NC>) for tiles of NC vectors
template <class T, class F>
GEO_INLINE void for_features(int64_t wide, F&& f) {
  constexpr int64_t L = vec<T>::lanes;
  int64_t first = 0;
  for (; first + kPanel * L <= wide; first += kPanel * L) f(first, Width<kPanel>());
  const int64_t left = (wide - first) / L;
  if (left == 3) f(first, Width<(kPanel > 3 ? 3 : 1)>());
  if (left == 2) f(first, Width<(kPanel > 2 ? 2 : 1)>());
  if (left == 1) f(first, Width<1>());
}

// sum[b] += sum over rows of x[p, b] * grad[p], for NB features b
template <class T, int NB, int NC>
void outer(const T* x, int64_t x_pitch, const T* grad, int64_t pitch, int rows, T* sum) {
  using V = typename vec<T>::type;
  constexpr int64_t L = vec<T>::lanes;
  V total[NB][NC];
  GEO_UNROLL(8) for (int i = 0; i < NB; ++i) {
    GEO_UNROLL(4) for (int j = 0; j < NC; ++j) total[i][j] = load(sum + i * pitch + j * L);
  }
  GEO_UNROLL(1) for (int p = 0; p < rows; ++p, x += x_pitch, grad += pitch) {
    V g[NC];
    GEO_UNROLL(4) for (int j = 0; j < NC; ++j) g[j] = load(grad + j * L);
    GEO_UNROLL(8) for (int i = 0; i < NB; ++i) {
      const T scale = x[i];
      GEO_UNROLL(4) for (int j = 0; j < NC; ++j) total[i][j] = total[i][j] + scale * g[j];
    }
  }
  GEO_UNROLL(8) for (int i = 0; i < NB; ++i) {
    GEO_UNROLL(4) for (int j = 0; j < NC; ++j) store(sum + i * pitch + j * L, total[i][j]);
  }
}

}  // namespace
}  // namespace GEO_SIMD_NAMESPACE
}  // namespace geo
