#pragma once
// The fused tensor product and its gradient, from the form (see ops/gather_tensor_product.py)
//
//   T = sum_{e,p,u,i,j,k} C[p,i,j,k] * w[e,p,u] * x[src(e),p,u,i] * sh[e,p,j] * g[dst(e),p,u,k].
//
// What a kernel does for one edge, path and channel stands here once; V is a number or a SIMD vector of channels. The
// matrices M[p] = sum_j C[p,:,j,:] * sh[p,j] of an edge are shared by its channels. A kernel gathers rows `in` (x, or g when
// it goes along the reversed edges) and has rows `own`, or sums of rows, at the other end.
#include <stdint.h>

#include "macros.h"

namespace geo {

// An entry of an edge's matrix, M += C * sh.
template <class V, class S>
GEO_HD V matrix_step(V sum, V coefficient, S sh) {
  return sum + coefficient * sh;
}

// A row of a matrix times what was gathered: y += M * in. With in = w * in and y = out it is the message itself.
template <class V, class S>
GEO_HD V row_step(V sum, S entry, V in) {
  return sum + entry * in;
}

// The gradients of the own rows and of weight, out += w * y and dw += own * y.
template <class V>
GEO_HD V scaled_step(V sum, V scale, V y) {
  return sum + scale * y;
}

// The gradient of an entry of the matrix, D += (w * own) * in, and from it that of sh, dsh += C * D.
template <class V>
GEO_HD V moment_step(V sum, V weighted_own, V in) {
  return sum + weighted_own * in;
}
template <class V, class S>
GEO_HD V sh_step(V sum, S coefficient, V moment) {
  return sum + coefficient * moment;
}

// A row of the table of paths.
struct TensorPath {
  int64_t x, sh, out;  // first columns
  int64_t mul, d1, d2, d3, has_weight;
};
constexpr int64_t kPathColumns = 8;

// Whether a path lies in tensors of so many columns and takes no more than what is left of weights and coefficients. No
// number in a bad table makes this overflow.
GEO_HD bool path_fits(const TensorPath& p, int64_t dim_x, int64_t dim_sh, int64_t dim_out, int64_t weights,
                      int64_t coefficients) {
  return p.x >= 0 && p.sh >= 0 && p.out >= 0 && p.mul >= 0 && p.d1 >= 1 && p.d2 >= 1 && p.d3 >= 1 &&
         (p.has_weight == 0 || p.has_weight == 1) && p.x <= dim_x && p.out <= dim_out && p.mul <= (dim_x - p.x) / p.d1 &&
         p.mul <= (dim_out - p.out) / p.d3 && p.sh <= dim_sh && p.d2 <= dim_sh - p.sh && p.mul * p.has_weight <= weights &&
         p.d1 <= coefficients / p.d2 / p.d3;
}

}  // namespace geo
