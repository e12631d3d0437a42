#pragma once
// Softmax, log-sum-exp and standard deviation of a segment, for every backend. T is float or double, V a T or a SIMD
// vector of T.
//
// A part of a segment is summed up by two numbers per column: the maximum and the sum of exponentials below it, the mean
// and the sum of squares about it, or one sum. Parts are merged in order.
#include "gelu.h"
#include "macros.h"

namespace geo {

template <class T>
struct ExpNumbers;
template <>
struct ExpNumbers<float> {
  static constexpr float least = -104.0f, most = 89.0f, log2e = 1.44269504f;  // exp is 0 and infinity beyond
  static constexpr float infinity = __builtin_huge_valf();
  static constexpr uint32_t bias = 127, shift = 0x4b400000u;                   // bits of GeluNumbers::shift
  static constexpr uint32_t half_sqrt = 0x3f3504f3u;                           // bits of sqrt(1/2)
};
template <>
struct ExpNumbers<double> {
  static constexpr double least = -746.0, most = 710.0, log2e = 1.44269504088896340736;
  static constexpr double infinity = __builtin_huge_val();
  static constexpr uint64_t bias = 1023, shift = 0x4338000000000000u;
  static constexpr uint64_t half_sqrt = 0x3fe6a09e667f3bcdu;
};

template <class V, class U>
GEO_HD V from_bits(U u) {
  V v;
  memcpy(&v, &u, sizeof(V));
  return v;
}
template <class V>
GEO_HD typename bits_of<V>::type to_bits(V v) {
  typename bits_of<V>::type u;
  memcpy(&u, &v, sizeof(V));
  return u;
}

// v 2^n as two factors, since n may be below the normal range or one above it; `shifted` is n + GeluNumbers<T>::shift.
template <class T, class V>
struct TimesPowerOfTwo {
  GEO_HD V of(V v, V, V shifted) {
    using N = ExpNumbers<T>;
    using G = GeluNumbers<T>;
    const auto biased = to_bits(shifted) - (N::shift - 2 * N::bias), first = biased >> 1;
    return v * from_bits<V>(first << G::mantissa) * from_bits<V>((biased - first) << G::mantissa);
  }
};

// exp(x) for all x, within 1.5 units in the last place. Far below, where masked entries and lanes are, no number gets
// subnormal on the way to 0: that would cost the processor a hundred cycles.
template <class T, class V>
GEO_HD V exp_value(V x) {
  using N = ExpNumbers<T>;
  using G = GeluNumbers<T>;
  const V most = V{} + N::most, above = x < N::least ? V{} : x, cut = above > most ? most : above;  // NaN stays
  const V shifted = cut * N::log2e + G::shift, n = shifted - G::shift;
  const V r = (cut - n * G::ln2_high) - n * G::ln2_low;
  return x < N::least ? V{} : TimesPowerOfTwo<T, V>::of(small_exp(r, T{}), n, shifted);
}

template <class V>
GEO_HD V log_series(V z, float) {
  return horner(z, 0.66666662693f, 0.40000972152f, 0.28498786688f, 0.24279078841f);
}
template <class V>
GEO_HD V log_series(V z, double) {
  return horner(z, 6.666666666666735130e-01, 3.999999999940941908e-01, 2.857142874366239149e-01, 2.222219843214978396e-01,
                1.818357216161805012e-01, 1.531383769920937332e-01, 1.479819860511658591e-01);
}

// log(x) for x normal, 0, infinite or NaN, within 1 unit in the last place: x = 2^k (1 + f) with sqrt(1/2) <= 1 + f <
// sqrt(2), and log(1 + f) by its odd series in f / (2 + f) (fdlibm's).
template <class T, class V>
GEO_HD V log_value(V x) {
  using N = ExpNumbers<T>;
  using G = GeluNumbers<T>;
  const auto u = to_bits(x), biased = (u - N::half_sqrt + (N::bias << G::mantissa)) >> G::mantissa;
  const V k = from_bits<V>(biased + (N::shift - N::bias)) - G::shift;
  const V f = from_bits<V>(u - ((biased - N::bias) << G::mantissa)) - T(1);
  const V s = f / (f + T(2)), z = s * s, half = f * f * T(0.5);
  const V log = k * G::ln2_high - ((half - (s * (half + z * log_series(z, T{})) + k * G::ln2_low)) - f);
  const V positive = x > T(0) ? log : V{} - N::infinity;
  return x < N::infinity ? positive : x;
}

// The maximum of a part (NaN left out, -inf where it is empty) and the sum of exp(x - finite(maximum)).
template <class V>
struct MaxSum {
  V max, sum;
};
template <class T, class V>
GEO_HD V finite(V max) {  // an infinite maximum is not taken off: less itself it would be NaN
  return max - max == T(0) ? max : V{};
}
template <class V>
GEO_HD V greater(V a, V b) {  // a where b is NaN
  return b > a ? b : a;
}
template <class T, class V>
GEO_HD MaxSum<V> merge(const MaxSum<V>& a, const MaxSum<V>& b) {
  const V max = greater(a.max, b.max), below = finite<T>(max);
  return {max, a.sum * exp_value<T>(a.max - below) + b.sum * exp_value<T>(b.max - below)};
}

// What a segment's rows are multiplied by (log: lessened by) beside the maximum. NaN where the maximum is infinite.
template <class T, class V>
GEO_HD V softmax_scale(const MaxSum<V>& s, bool log) {
  const V sum = s.sum + (s.max - s.max);
  return log ? log_value<T>(sum) : (V{} + T(1)) / sum;
}
template <class T, class V>
GEO_HD V softmax_value(V x, V max, V scale, bool log) {
  return log ? (x - max) - scale : exp_value<T>(x - max) * scale;
}

// With y the output and s the sum over the segment: y (g - s(g y)), and for the logarithm g - exp(y) s(g).
template <class V>
GEO_HD V softmax_grad_term(V g, V y, bool log) {
  return log ? g : g * y;
}
template <class T, class V>
GEO_HD V softmax_grad_value(V g, V y, V sum, bool log) {
  return log ? g - exp_value<T>(y) * sum : y * (g - sum);
}

// Log-sum-exp is right to a few eps of max(1, |result|), with a maximum or, where the sum allows it, without: log(sum)
// takes the relative error of the sum for an absolute one. One row is its own log-sum-exp, bit for bit. So it comes out
// here, where its sum is 1 and log(1) is 0, taken off so that -0 stays. Without maximum log(exp(x)) is not x, and x is put
// in its place.
template <class T, class V>
GEO_HD V logsumexp_value(const MaxSum<V>& s) {
  return -(-log_value<T>(s.sum) - finite<T>(s.max));
}
// g exp(x - out); 0 g where out is -inf
template <class T, class V>
GEO_HD V logsumexp_grad_value(V g, V x, V out) {
  return g * (out == -ExpNumbers<T>::infinity ? V{} : exp_value<T>(x - out));
}

// Mean of a part and sum of the squares about it.
template <class V>
struct Moments {
  V mean, squares;
};
template <class T, class V>
GEO_HD Moments<V> merge(const Moments<V>& a, T count_a, const Moments<V>& b, T count_b) {
  const T share = count_b / (count_a + count_b);
  const V step = b.mean - a.mean;
  return {a.mean + step * share, a.squares + b.squares + step * step * (share * count_a)};
}
// What the sum of squares over `count` rows is divided by.
GEO_HD int64_t degrees_of_freedom(int64_t count, bool unbiased) {
  return count - unbiased > 1 ? count - unbiased : 1;
}

}  // namespace geo
