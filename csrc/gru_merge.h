#pragma once
// The merge of two rows by a GRU cell, averaged over both ways, for every backend. T is float or double, V a T or a SIMD
// vector of T.
//
// With i the row that is the cell's input, s the one that is its state, and W, U, a, c the weights and biases of both:
//   r = sigmoid(W_r i + U_r s + ..), z = sigmoid(W_z i + U_z s + ..), n = tanh(W_n i + a_n + r (U_n s + c_n)),
//   h = n + z (s - n).
#include "segment_softmax.h"

namespace geo {

// What a backend may do in its own way.
template <class T, class V>
struct GRUMath {
  GEO_HD_INLINE V times_power(V v, V n, V shifted) { return TimesPowerOfTwo<T, V>::of(v, n, shifted); }
  GEO_HD_INLINE V power(V shifted) { return power_of_two<T>(shifted); }
  // 1 / d for d from 1 to 1e18
  GEO_HD_INLINE V reciprocal(V d) { return T(1) / d; }
  // x cut to [least, most]; NaN stays
  GEO_HD_INLINE V cut(V x, T least, T most) {
    const V low = V{} + least, high = V{} + most, above = low > x ? low : x;
    return high < above ? high : above;
  }
};

// x = n log(2) + rest, for x cut to [least, most]; as exact as x itself is.
template <class T, class V>
struct Halvings {
  V shifted, n, rest;  // shifted: n + GeluNumbers<T>::shift
  GEO_HD_INLINE Halvings of(V x, T least, T most) {
    using G = GeluNumbers<T>;
    const V cut = GRUMath<T, V>::cut(x, least, most);
    const V shifted = cut * ExpNumbers<T>::log2e + G::shift, n = shifted - G::shift;
    return {shifted, n, cut - n * T(0.693147180559945309417)};
  }
};
constexpr int kFar = 40;  // the gates are 1 beyond, tanh from half of it on

// 1 / (1 + exp(-x))
template <class T, class V>
GEO_HD_INLINE V sigmoid(V x) {
  const auto h = Halvings<T, V>::of(x, ExpNumbers<T>::least, T(kFar));
  const V w = GRUMath<T, V>::times_power(small_exp(h.rest, T{}), h.n, h.shifted);
  return w * GRUMath<T, V>::reciprocal(w + T(1));
}

// (exp(r) - 1) / r for |r| <= log(2) / 2, by the terms of small_exp
template <class V>
GEO_HD_INLINE V small_growth(V r, float) {
  return horner(r, 1.0f, 0.5f, 0.1666657631f, 0.04166655376f, 0.008363292753f, 0.001392632562f);
}
template <class V>
GEO_HD_INLINE V small_growth(V r, double) {
  return horner(r, 1.0, 0.500000000000000104, 0.166666666666666675, 0.0416666666666234768, 0.00833333333333001176,
                0.00138888889175382958, 0.000198412698633032233, 0.0000248015207925726928, 2.75572680728900983e-6,
                2.76203274282682382e-7, 2.51005692758136826e-8);
}
// By w = exp(2 x) - 1, which has all digits where x is small: w / (w + 2)
template <class T, class V>
GEO_HD_INLINE V tanh_value(V x) {
  const auto h = Halvings<T, V>::of(x + x, T(-kFar), T(kFar));
  const V power = GRUMath<T, V>::power(h.shifted), w = h.rest * small_growth(h.rest, T{}) * power + (power - T(1));
  return w * GRUMath<T, V>::reciprocal(w + T(2));
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
