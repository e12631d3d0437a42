#pragma once
// Derivatives of the exact GELU x * Phi(x), of any order to kGeluOrders, without a branch: T is float or double, V a T or
// a SIMD vector of T.
//
// With a = |x|, e = exp(-a^2 / 2) and the scaled tail R(a) = (1 - Phi(a)) / e = erfcx(a / sqrt 2) / 2:
//   gelu   = max(x, 0) - a e R,
//   gelu'  = [x >= 0] + sign(x) e (a / sqrt(2 pi) - R),
//   gelu'' and on: e / sqrt(2 pi) * p_n(x), p_2 = 2 - x^2, p_{n+1} = p_n' - x p_n.
// In the tails none of them cancels, and at infinity each gives its limit. e is 0 where it is below the normal range.
// The constants are polynomials through Chebyshev nodes: exp(r) to 1e-8 (2e-17 in double), R to 1.1e-8 (3.4e-17).
#include <stdint.h>
#include <string.h>

#include "half.h"
#include "macros.h"

namespace geo {

constexpr int kGeluOrders = 8;  // ops/gelu.py: MAX_ORDER

// p_n(x) = (odd ? x : 1) * sum_i c[i] x^(2i)
struct GeluPolynomial {
  double c[kGeluOrders / 2 + 1];
  int terms;
  bool odd;
};

static inline GeluPolynomial gelu_polynomial(int order) {
  double p[kGeluOrders + 2] = {2, 0, -1};
  for (int n = 2; n < order; ++n) {
    double next[kGeluOrders + 2] = {};
    for (int i = 1; i <= n; ++i) next[i - 1] += i * p[i];
    for (int i = 0; i <= n; ++i) next[i + 1] -= p[i];
    memcpy(p, next, sizeof(p));
  }
  GeluPolynomial out{};
  out.odd = order % 2;
  for (int i = order % 2; i <= order && order >= 2; i += 2) out.c[out.terms++] = p[i];
  return out;
}

// The unsigned integers of the size of a number, or of the lanes of a vector.
template <class V>
struct bits_of;
template <>
struct bits_of<float> {
  typedef uint32_t type;
};
template <>
struct bits_of<double> {
  typedef uint64_t type;
};

template <class T>
struct GeluNumbers;
template <>
struct GeluNumbers<float> {
  static constexpr float largest = 13.2f;  // e is normal up to here
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float shift = 12582912.0f;  // n + 1.5 * 2^mantissa: the last bits are those of n
  static constexpr int mantissa = 23;
  static constexpr uint32_t one = 0x3f800000u, not_sign = 0x7fffffffu;
};
template <>
struct GeluNumbers<double> {
  static constexpr double largest = 37.6;
  static constexpr double ln2_high = 6.93147180369123816490e-01, ln2_low = 1.90821492927058770002e-10;
  static constexpr double shift = 6755399441055744.0;
  static constexpr int mantissa = 52;
  static constexpr uint64_t one = 0x3ff0000000000000u, not_sign = 0x7fffffffffffffffu;
};

// 2^n of n + shift
template <class T, class V>
GEO_HD V power_of_two(V shifted) {
  typename bits_of<V>::type u;
  memcpy(&u, &shifted, sizeof(V));
  u = (u << GeluNumbers<T>::mantissa) + GeluNumbers<T>::one;
  memcpy(&shifted, &u, sizeof(V));
  return shifted;
}
// |v|
template <class T, class V>
GEO_HD V magnitude(V v) {
  typename bits_of<V>::type u;
  memcpy(&u, &v, sizeof(V));
  u &= GeluNumbers<T>::not_sign;
  memcpy(&v, &u, sizeof(V));
  return v;
}

template <class V, class T>
GEO_HD V horner(V, T last) {
  return V{} + last;
}
template <class V, class T, class... Rest>
GEO_HD V horner(V x, T first, Rest... rest) {
  return horner(x, rest...) * x + first;
}

// exp(r) for |r| <= log(2) / 2
template <class V>
GEO_HD V small_exp(V r, float) {
  return horner(r, 1.0f, 1.0f, 0.5f, 0.1666657631f, 0.04166655376f, 0.008363292753f, 0.001392632562f);
}
template <class V>
GEO_HD V small_exp(V r, double) {
  return horner(r, 1.0, 1.0, 0.500000000000000104, 0.166666666666666675, 0.0416666666666234768,
                0.00833333333333001176, 0.00138888889175382958, 0.000198412698633032233, 0.0000248015207925726928, 2.75572680728900983e-6,
                2.76203274282682382e-7, 2.51005692758136826e-8);
}
// R (1 + a / 4) of u = (4 - a) / (4 + a)
template <class V>
GEO_HD V scaled_tail(V u, float) {
  return horner(u, 0.1888212844f, 0.1519741595f, 0.09678417741f, 0.04663053353f, 0.01510171424f, 0.001883257569f,
                -0.0008825637502f, -0.000394652937f, 5.329725948e-5f, 2.879486891e-5f);
}
template <class V>
GEO_HD V scaled_tail(V u, double) {
  return horner(u, 0.188821282603937871, 0.151974160492972939, 0.096784350185554556, 0.0466304644899237098,
                0.0150991437226831416, 0.00188504724138988236, -0.000869923090721874343, -0.000407704610299802812,
                0.0000333360650859486867, 0.0000577737027427778201, -4.76975415684795104e-7, -8.78603405747133022e-6,
                1.78780380342713366e-7, 1.47968151153332591e-6, -1.56339361013885524e-7, -2.5485595655441332e-7,
                6.59789293253025099e-8, 3.84348225813911439e-8, -1.91134885378381424e-8, -3.54536938381689377e-9,
                3.46344770540685524e-9, -5.00314519171302923e-11, -2.28680542311404344e-10);
}

// What all orders share. x is cut to where e is not zero.
template <class T, class V>
struct GeluParts {
  V x, cut, a, e, square;
};
template <class T, class V>
GEO_HD GeluParts<T, V> gelu_parts(V x) {
  using N = GeluNumbers<T>;
  GeluParts<T, V> p;
  const V largest = V{} + N::largest;
  p.x = x;
  const V all = magnitude<T>(x);
  p.a = all > largest ? largest : all;
  p.cut = x < T(0) ? -p.a : p.a;
  p.square = p.a * p.a;
  const V shifted = p.square * T(-0.72134752044448170368) + N::shift, n = shifted - N::shift;  // log2(e) / 2
  const V r = (p.square * T(-0.5) - n * N::ln2_high) - n * N::ln2_low;
  p.e = small_exp(r, T{}) * power_of_two<T>(shifted);
  p.e = all > largest ? V{} : p.e;
  return p;
}
template <class T, class V>
GEO_HD V gelu_tail(V a) {
  const V t = (V{} + T(4)) / (a + T(4));
  return t * scaled_tail(t * T(2) - T(1), T{});
}

// The derivative of order kOrder; kOrder 3 stands for all from 3 on, given by their polynomial.
template <int kOrder, class T, class V>
GEO_HD V gelu_value(const GeluParts<T, V>& p, const GeluPolynomial& poly) {
  constexpr T c = T(0.39894228040143267794);  // 1 / sqrt(2 pi)
  if constexpr (kOrder == 0) {
    return (p.x > T(0) ? p.x : V{}) - p.a * p.e * gelu_tail<T>(p.a);
  } else if constexpr (kOrder == 1) {
    const V v = p.e * (p.a * c - gelu_tail<T>(p.a));
    return p.x < T(0) ? -v : v + T(1);
  } else if constexpr (kOrder == 2) {
    return (p.e * c) * (T(2) - p.square);
  } else {
    V sum = V{};
    for (int i = poly.terms - 1; i >= 0; --i) sum = sum * p.square + T(poly.c[i]);
    return (p.e * c) * (poly.odd ? sum * p.cut : sum);
  }
}

// f(Order<n>) with the n of gelu_value for this order.
template <int N>
struct GeluOrder {
  static constexpr int value = N;
};
template <class F>
void dispatch_gelu_order(int64_t order, F&& f) {
  switch (order) {
    case 0: return f(GeluOrder<0>{});
    case 1: return f(GeluOrder<1>{});
    case 2: return f(GeluOrder<2>{});
    default: return f(GeluOrder<3>{});
  }
}

}  // namespace geo
