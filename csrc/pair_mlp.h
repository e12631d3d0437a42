#pragma once
// An MLP of all pairs of nodes of a graph, summed over the columns, and its gradient, for every backend.
//
// The input of pair (i, j) is x[k] = V[i, k] V[j, k]; its first layer are the filters of the graph. A layer is
// y = x A + a, with or without a ReLU, and the last one's output v is added to out[i] and, for i != j, to out[j]. So the
// gradient of v is g[i] + g[j], but g[i] on the diagonal; that of x goes to V[i] times V[j] and to V[j] times V[i].
// What is done to one number stands here once; V is a number or a SIMD vector.
#include <stdint.h>

#include "macros.h"

namespace geo {

template <class V>
GEO_HD_INLINE V pair_input(V left, V right) {
  return left * right;
}

// One step of a layer, y[f] += x[c] * A[c, f], and likewise of its gradients.
template <class V, class S>
GEO_HD_INLINE V layer_step(V sum, S x, V weight) {
  return sum + x * weight;
}

// NaN stays NaN, as in PyTorch; the gradient is looked for in the output.
template <class V>
GEO_HD_INLINE V relu(V x) {
  return x < V{} ? V{} : x;
}
template <class V>
GEO_HD_INLINE V relu_grad(V y, V grad) {
  return y <= V{} ? V{} : grad;
}

// The gradient of the value of a pair, from those of its row and its column.
template <class V>
GEO_HD_INLINE V pair_grad(V row, V column) {
  return row + column;
}

}  // namespace geo
