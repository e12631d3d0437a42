#pragma once
// Formulas of the selective scan, for every backend. T is float or double, V a T or a SIMD vector of T.
//
// Along a segment, h_t = e_t h_{t-1} + v_t B_t u_t and y_t = C_t h_t + D u_t, with e = exp(Delta A) and v = Delta (Euler)
// or (e - 1) / A (zero-order hold). With g_t the gradient of h_t and w_t = g_t e_t h_{t-1}:
//   g_t = C_t dy_t + e_{t+1} g_{t+1},  dC = dy h,  dB = g v u,  du = D dy + g v B,
//   dDelta = w A + g B u v',  dA = w Delta + g B u dv/dA,  v' = dv/dDelta: 1 or e.
// e is computed as 2^(Delta rate), rate = A log2(e).
#include "segment_softmax.h"

namespace geo {

constexpr double kScanLog2 = 0.69314718055994530942;

// (2^r - 1) / r for |r| <= 1/2: 2^r comes out to 1e-7, and with kFine 2^r - 1 to 3e-8 of itself (double: 5e-17).
template <bool kFine, class V>
GEO_HD_INLINE V exp2_slope(V r, float) {
  if constexpr (kFine)
    return horner(r, 0.6931471997f, 0.2402264795f, 0.0555033693f, 0.009618443062f, 0.001339753031f, 0.0001535008288f);
  else
    return horner(r, 0.6931469969f, 0.2402225624f, 0.05550721642f, 0.009670852967f, 0.001326585144f);
}
template <bool kFine, class V>
GEO_HD_INLINE V exp2_slope(V r, double) {
  return horner(r, 0.693147180559945322, 0.240226506959101233, 0.0555041086648202684, 0.00961812910759685425,
                0.00133335581467499542, 0.000154035304540543501, 0.0000152527335057715705, 1.3215436662415047e-6,
                1.01781972998482892e-7, 7.07356546503450568e-9, 4.43480040889203793e-10);
}

// t = n + r with a whole n and |r| <= 1/2; scaled(p) = p 2^n, where 2^n is 0 below the normal range, infinite above it.
template <class T, class V>
struct Exp2Parts {
  V r, power;
  GEO_HD_INLINE Exp2Parts of(V t) {
    using N = ExpNumbers<T>;
    using G = GeluNumbers<T>;
    const V least = V{} - T(N::bias), most = V{} + T(N::bias + 1);
    const V above = t < least ? least : t, cut = above > most ? most : above;  // NaN stays
    const V shifted = cut + G::shift;
    return {cut - (shifted - G::shift), from_bits<V>((to_bits(shifted) - (N::shift - N::bias)) << G::mantissa)};
  }
  GEO_HD_INLINE V scaled(const Exp2Parts& p, V v) { return v * p.power; }
};

// a b + c, in one rounding where the processor has it: always the same, however the loop around it is compiled.
template <class V>
struct MultiplyAdd {
  GEO_HD_INLINE V of(V a, V b, V c) { return a * b + c; }
};
template <class V>
GEO_HD_INLINE V multiply_add(V a, V b, V c) {
  return MultiplyAdd<V>::of(a, b, c);
}

// 2^t for all t.
template <class T, class V>
GEO_HD_INLINE V exp2_value(V t) {
  const auto parts = Exp2Parts<T, V>::of(t);
  return Exp2Parts<T, V>::scaled(parts, multiply_add(parts.r, exp2_slope<false>(parts.r, T{}), V{} + T(1)));
}

// e = 2^(d rate) and v; `inverse` is 1 / A, which is not looked at near A = 0.
template <class V>
struct ScanStep {
  V decay, gain;
};
template <class T, class V>
GEO_HD_INLINE ScanStep<V> zoh_step(V d, V rate, V inverse) {
  const V t = d * rate;
  const auto parts = Exp2Parts<T, V>::of(t);
  const V slope = exp2_slope<true>(parts.r, T{}), decay = Exp2Parts<T, V>::scaled(parts, parts.r * slope + T(1));
  // Near 0, where r is t, no product with A: t may underflow, and then v is d.
  return {decay, magnitude<T>(t) <= V{} + T(0.5) ? d * (slope * T(ExpNumbers<T>::log2e)) : (decay - T(1)) * inverse};
}

// dv/dA = (d e - v) / A of zero-order hold, by its series in d A where that cancels.
template <class V>
GEO_HD_INLINE V zoh_series(V x, float) {
  return horner(x, 0.5f, 0.3333333433f, 0.125f, 0.03333333507f, 0.006944444496f, 0.001190476236f, 0.0001736111124f);
}
template <class V>
GEO_HD_INLINE V zoh_series(V x, double) {
  return horner(x, 1.0 / 2, 1.0 / 3, 1.0 / 8, 1.0 / 30, 1.0 / 144, 1.0 / 840, 1.0 / 5760, 1.0 / 45360, 1.0 / 403200,
                1.0 / 3991680, 1.0 / 43545600, 1.0 / 518918400, 1.0 / 6706022400.0, 1.0 / 93405312000.0);
}
template <class T, class V>
GEO_HD_INLINE V zoh_gain_grad(V d, V rate, V inverse, const ScanStep<V>& step) {
  const V x = d * rate * T(kScanLog2);
  const V near = d * d * zoh_series(x, T{}), far = (d * step.decay - step.gain) * inverse;
  return magnitude<T>(x) < V{} + T(0.4) ? near : far;
}

// softplus(x) (x above 20) and its derivative.
template <class V>
struct Softplus {
  V value, slope;
};
template <class V>
GEO_HD_INLINE V log1p_series(V z, float) {  // log(1 + w) / s with s = w / (2 + w), z = s^2, 0 <= w <= 1
  return horner(z, 2.0f, 0.6666631467f, 0.4002491042f, 0.2796060204f, 0.2817833386f);
}
template <class V>
GEO_HD_INLINE V log1p_series(V z, double) {
  return horner(z, 2.0, 0.666666666666666838, 0.399999999999926831, 0.285714285726487732, 0.22222222117238769,
                0.181818235009784007, 0.153844450018890947, 0.133369114836874965, 0.117148997002937839,
                0.109791344890801068, 0.0697083761463518035, 0.165039351185585503);
}
template <class T, class V>
GEO_HD_INLINE Softplus<V> softplus(V x) {
  const V w = exp_value<T>(-magnitude<T>(x)), s = w / (w + T(2));
  const V value = (x > V{} ? x : V{}) + s * log1p_series(s * s, T{});
  const V slope = (x < V{} ? w : V{} + T(1)) / (w + T(1));
  const V threshold = V{} + T(20);
  return {x > threshold ? x : value, x > threshold ? V{} + T(1) : slope};
}

// The gate SiLU(z) = z sigmoid(z) and its derivative.
template <class V>
struct Gate {
  V value, slope;
};
template <class T, class V>
GEO_HD_INLINE Gate<V> gate(V z) {
  const V w = exp_value<T>(-magnitude<T>(z));
  const V sigmoid = (z < V{} ? w : V{} + T(1)) / (w + T(1));
  return {z * sigmoid, sigmoid * (T(1) + z * (T(1) - sigmoid))};
}

}  // namespace geo
