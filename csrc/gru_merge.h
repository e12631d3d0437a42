#pragma once
// The merge of two rows by a GRU cell, averaged over both ways, for every backend. T is float or double, V a T or a SIMD
// vector of T.
//
// With i the row that is the cell's input, s the one that is its state, and W, U, a, c the weights and biases of both:
//   r = sigmoid(W_r i + U_r s + ..), z = sigmoid(W_z i + U_z s + ..), n = tanh(W_n i + a_n + r (U_n s + c_n)),
//   h = n + z (s - n).
#include "segment_softmax.h"

namespace geo {

// 1 / (1 + exp(-x))
template <class T, class V>
GEO_HD_INLINE V sigmoid(V x) {
  const V w = exp_value<T>(-magnitude<T>(x));
  return (x < V{} ? w : V{} + T(1)) / (w + T(1));
}

// The odd series of tanh to |x| = 1/4, by z = x^2.
template <class V>
GEO_HD_INLINE V tanh_series(V z, float) {
  return horner(z, 1.0f, -0.3333333333f, 0.1333333333f, -0.0539682540f, 0.0218694885f);
}
template <class V>
GEO_HD_INLINE V tanh_series(V z, double) {
  return horner(z, 1.0, -1.0 / 3, 2.0 / 15, -17.0 / 315, 62.0 / 2835, -1382.0 / 155925, 21844.0 / 6081075,
                -929569.0 / 638512875, 6404582.0 / 10854718875, -443861162.0 / 1856156927625);
}
template <class T, class V>
GEO_HD_INLINE V tanh_value(V x) {
  const V a = magnitude<T>(x), w = exp_value<T>(a * T(-2)), far = (T(1) - w) / (w + T(1));
  return a < V{} + T(0.25) ? x * tanh_series(x * x, T{}) : x < V{} ? -far : far;
}

// Of one way: the reset gate r, the update gate z, the new value n, and what r is multiplied with.
template <class V>
struct GRUGates {
  V reset, update, next, scaled;
};
template <class T, class V>
GEO_HD_INLINE GRUGates<V> gru_gates(V reset, V update, V input, V scaled) {
  const V r = sigmoid<T>(reset);
  return {r, sigmoid<T>(update), tanh_value<T>(input + r * scaled), scaled};
}
template <class V>
GEO_HD_INLINE V gru_value(const GRUGates<V>& g, V state) {
  return g.next + g.update * (state - g.next);
}

// The gradients of the arguments of gru_gates, and of the state where it stands alone; grad is that of h.
template <class V>
struct GRUGrads {
  V reset, update, input, scaled, state;
};
template <class T, class V>
GEO_HD_INLINE GRUGrads<V> gru_grads(const GRUGates<V>& g, V state, V grad) {
  const V rest = T(1) - g.update, input = grad * rest * (T(1) - g.next * g.next);
  return {input * g.scaled * g.reset * (T(1) - g.reset), grad * (state - g.next) * g.update * rest, input,
          input * g.reset, grad * g.update};
}

}  // namespace geo
