#pragma once
// Products of functions on the sphere, on their coefficients: what ops/gaunt.py computes. Three forms of one formula:
//
//   out_k = sum_ij <Y_i Y_j Y_k> x_i y_j      (or <{Y_i, Y_j} Y_k>, the Poisson bracket)
//
// straight through the nonzero couplings, known when this is compiled (small degrees); by a list of them; or separably: at
// each polar angle of a Gauss-Legendre rule the two functions become Fourier series in the azimuth, these are convolved, and
// the result is summed back over the angles. The last needs O(L^3) operations and no grid in the azimuth. V is a number or
// a SIMD vector of channels.
#include <stdint.h>

#include "macros.h"

namespace geo {

// -- numbers that are also known to the compiler: hence no <cmath> -----------------------------------------------------
constexpr double root(double v) {
  if (v <= 0) return 0;
  double r = v > 1 ? v : 1;
  for (;;) {  // falls until rounding stops it
    const double next = 0.5 * (r + v / r);
    if (next >= r) return r;
    r = next;
  }
}

GEO_HD_CONSTEXPR int square(int l) { return l * l; }
GEO_HD_CONSTEXPR int larger(int a, int b) { return a > b ? a : b; }
GEO_HD_CONSTEXPR int smaller(int a, int b) { return a < b ? a : b; }

// Polar angles that integrate polynomials of `degree` exactly. They lie in mirrored pairs, and a rule stores one of each
// pair, from the pole on; with an odd number the equator comes last and is its own mirror.
GEO_HD_CONSTEXPR int polar_nodes(int degree) { return degree / 2 + 1; }
GEO_HD_CONSTEXPR int polar_half(int degree) { return (polar_nodes(degree) + 1) / 2; }

// Node q of the rule with n nodes: its cosine, and its weight in a mean over the sphere.
constexpr void gauss_node(int n, int q, double* cosine, double* weight) {
  double x = 0;
  if (2 * q + 1 != n) {  // Newton from cos(t), t in (0, pi / 2)
    const double t = 3.14159265358979323846 * (q + 0.75) / (n + 0.5);
    double term = 1;
    for (int k = 1; k < 16; ++k) {
      x += term;
      term *= -t * t / ((2 * k - 1) * (2 * k));
    }
  }
  double slope = 1;
  for (int step = 0; step < 12; ++step) {
    double before = 0, value = 1;
    for (int k = 1; k <= n; ++k) {
      const double next = ((2 * k - 1) * x * value - (k - 1) * before) / k;
      before = value;
      value = next;
    }
    slope = n * (x * value - before) / (x * x - 1);
    if (2 * q + 1 != n) x -= value / slope;
  }
  *cosine = x;
  *weight = 1 / ((1 - x * x) * slope * slope);
}

// Legendre functions of l >= m, normalised to mean square 1 with a complex exponential, and their slopes in the polar
// angle; [m * (lmax + 1) + l].
constexpr void legendre(int lmax, double cosine, double* value, double* slope) {
  const double sine = root(1 - cosine * cosine);
  const int row = lmax + 1;
  for (int m = 0; m <= lmax; ++m) {
    double* v = value + m * row;
    v[m] = m ? value[(m - 1) * row + m - 1] * sine * root((2. * m + 1) / (2. * m)) : 1;
    for (int l = m; l <= lmax; ++l) {
      if (l > m) {
        const double two = l > m + 1 ? v[l - 2] * root((square(l - 1) - m * m) / (4. * square(l - 1) - 1)) : 0;
        v[l] = root((4. * l * l - 1) / (l * l - m * m)) * (cosine * v[l - 1] - two);
      }
      const double below = l > m ? root((2. * l + 1) / (2. * l - 1) * (l * l - m * m)) * v[l - 1] : 0;
      slope[m * row + l] = (l * cosine * v[l] - below) / sine;
    }
  }
}

// The mean of t_a t_b t_c over the azimuth, t_m = 1, sqrt(2) cos(m phi) for m > 0, sqrt(2) sin(|m| phi) for m < 0; with
// `slope` = 1 or 2 the first or the second factor is differentiated.
constexpr double azimuthal_mean(int a, int b, int c, int slope) {
  constexpr double half = root(0.5);
  const int m[3] = {a, b, c};
  double sum = 0;
  for (int signs = 0; signs < 8; ++signs) {  // t_m is a sum of two exponentials
    int total = 0;
    bool twice = false;
    double re = 1, im = 0;
    for (int i = 0; i < 3; ++i) {
      const int order = m[i] < 0 ? -m[i] : m[i], sign = signs >> i & 1 ? -1 : 1;
      twice = twice || (order == 0 && sign < 0);
      total += sign * order;
      double fr = order ? half : 1, fi = 0;
      if (m[i] < 0) {
        fi = -sign * fr;
        fr = 0;
      }
      if (slope == i + 1) {  // times i * sign * order
        const double turned = -fi * sign * order;
        fi = fr * sign * order;
        fr = turned;
      }
      const double product = re * fr - im * fi;
      im = re * fi + im * fr;
      re = product;
    }
    if (total == 0 && !twice) sum += re;
  }
  return sum;
}

// What the couplings are summed from: the rule of a product and the Legendre functions at its nodes.
template <int kMax, int kHalf>
struct PolarRule {
  int lmax = 0, half = 0;
  double weight[kHalf] = {}, sine[kHalf] = {};
  double value[kHalf][(kMax + 1) * (kMax + 1)] = {}, slope[kHalf][(kMax + 1) * (kMax + 1)] = {};
};

// The coupling of components (l, m) of both inputs and the output; T is a PolarRule or has its members.
template <class T>
constexpr double coupling(const T& rule, bool bracket, int l1, int m1, int l2, int m2, int l3, int m3) {
  const int a = m1 < 0 ? -m1 : m1, b = m2 < 0 ? -m2 : m2, c = m3 < 0 ? -m3 : m3;
  if (c != a + b && c != a - b && c != b - a) return 0;
  if ((l1 + l2 + l3 + a + b + c + bracket) % 2) return 0;  // odd under the mirror
  const double turn = azimuthal_mean(m1, m2, m3, bracket ? 2 : 0), other = bracket ? azimuthal_mean(m1, m2, m3, 1) : 0;
  if (turn == 0 && other == 0) return 0;
  const int row = rule.lmax + 1;
  double sum = 0;
  for (int q = 0; q < rule.half; ++q) {
    const double f = rule.value[q][a * row + l1], h = rule.value[q][b * row + l2];
    double term = turn * f * h;
    if (bracket)
      term = (turn * rule.slope[q][a * row + l1] * h - other * f * rule.slope[q][b * row + l2]) / rule.sine[q];
    sum += rule.weight[q] * term * rule.value[q][c * row + l3];
  }
  return sum;
}

// -- couplings known to the compiler -----------------------------------------------------------------------------------
// In float32: all degrees up to the first have kernels of their own, and three equal ones up to the second.
constexpr int kStraightDegree = 2, kStraightEqual = 4;
constexpr bool has_straight(int L1, int L2, int L3) {
  const int most = larger(L1, larger(L2, L3));
  return most <= kStraightDegree || (most <= kStraightEqual && L1 == L2 && L2 == L3);
}

struct CouplingTerm {
  int out;
  double value;
};
struct CouplingPair {  // x_i y_j, and with `both` x_j y_i in the same (product) or the opposite (bracket) measure
  int i, j, begin, end;
  bool both;
};

template <int L1, int L2, int L3, bool kBracket>
struct Couplings {
  static constexpr int kIn1 = square(L1 + 1), kIn2 = square(L2 + 1), kOut = square(L3 + 1);
  CouplingPair pair[kIn1 * kIn2] = {};
  CouplingTerm term[kIn1 * kIn2 * kOut / 4 + 8] = {};
  int num_pairs = 0, num_terms = 0;

  constexpr Couplings() {
    constexpr int kDegree = L1 + L2 + L3, kMax = larger(L1, larger(L2, L3)), kHalf = polar_half(kDegree);
    PolarRule<kMax, kHalf> rule;
    rule.lmax = kMax;
    rule.half = kHalf;
    for (int q = 0; q < kHalf; ++q) {
      double cosine = 0;
      gauss_node(polar_nodes(kDegree), q, &cosine, &rule.weight[q]);
      if (2 * q + 1 != polar_nodes(kDegree)) rule.weight[q] *= 2;  // its mirror too
      rule.sine[q] = root(1 - cosine * cosine);
      legendre(kMax, cosine, rule.value[q], rule.slope[q]);
    }
    for (int l1 = 0; l1 <= L1; ++l1)
      for (int m1 = -l1; m1 <= l1; ++m1)
        for (int l2 = 0; l2 <= L2; ++l2)
          for (int m2 = -l2; m2 <= l2; ++m2) add(rule, l1, m1, l2, m2);
  }

  template <class R>
  constexpr void add(const R& rule, int l1, int m1, int l2, int m2) {
    const int i = l1 * l1 + l1 + m1, j = l2 * l2 + l2 + m2;
    const bool both = i != j && i < kIn2 && j < kIn1;
    if (both && i > j) return;  // stands with (j, i)
    const int begin = num_terms;
    for (int l3 = (l1 > l2 ? l1 - l2 : l2 - l1); l3 <= smaller(L3, l1 + l2); ++l3)
      for (int m3 = -l3; m3 <= l3; ++m3) {
        const double value = coupling(rule, kBracket, l1, m1, l2, m2, l3, m3);
        if (value > 1e-9 || value < -1e-9) term[num_terms++] = {l3 * l3 + l3 + m3, value};  // the others are exactly zero
      }
    if (num_terms > begin) pair[num_pairs++] = {i, j, begin, num_terms, both};
  }
};

template <int L1, int L2, int L3, bool kBracket>
struct StraightTable {
  static constexpr Couplings<L1, L2, L3, kBracket> value{};
};

template <int I>
struct Index {
  static constexpr int value = I;
};
// f(Index<kBegin>()), ..., f(Index<kEnd - 1>()), each a copy of its own
GEO_HD_CALLER template <int kBegin, int kEnd, class F>
GEO_HD_INLINE void unrolled(F&& f) {
  if constexpr (kEnd - kBegin == 1) {
    f(Index<kBegin>());
  } else if constexpr (kEnd > kBegin) {
    unrolled<kBegin, (kBegin + kEnd) / 2>(f);
    unrolled<(kBegin + kEnd) / 2, kEnd>(f);
  }
}

// out = the product of x and y, which are pointers to V or have its operator[]. T is the type of the couplings.
template <int L1, int L2, int L3, bool kBracket, class T, class V, class X, class Y, class Out>
GEO_HD_INLINE void straight_product(const X& x, const Y& y, const Out& out) {
  using Table = StraightTable<L1, L2, L3, kBracket>;
  V sum[square(L3 + 1)];
  unrolled<0, square(L3 + 1)>([&](auto k) GEO_INLINED { sum[k.value] = V{}; });
  unrolled<0, Table::value.num_pairs>([&](auto p) GEO_INLINED {
    constexpr CouplingPair pair = Table::value.pair[p.value];
    V product = x[pair.i] * y[pair.j];
    if constexpr (pair.both) product = kBracket ? product - x[pair.j] * y[pair.i] : product + x[pair.j] * y[pair.i];
    unrolled<pair.begin, pair.end>([&](auto t) GEO_INLINED {
      constexpr CouplingTerm term = Table::value.term[t.value];
      sum[term.out] = sum[term.out] + product * T(term.value);
    });
  });
  unrolled<0, square(L3 + 1)>([&](auto k) GEO_INLINED { out[k.value] = sum[k.value]; });
}

// -- separable ---------------------------------------------------------------------------------------------------------
// A function at one polar angle is sum_m F_m exp(-i m phi) over |m| <= L, F_-m = conj(F_m); its coefficients of cos and sin
// times sqrt(2) are sqrt(2) times the parts of F_m. A series is kept as the real parts and then the imaginary ones; that
// of the second factor with both signs of m and zeros around, as many as outputs of a convolution are taken at a time.
constexpr int kSeriesTile = 4;
GEO_HD_CONSTEXPR int series_size(int lmax) { return 2 * (lmax + 1); }
GEO_HD_CONSTEXPR int wide_zero(int lmax) { return lmax + kSeriesTile - 1; }  // where m = 0 stands
GEO_HD_CONSTEXPR int wide_part(int lmax) { return 2 * wide_zero(lmax) + 1; }
GEO_HD_CONSTEXPR int wide_size(int lmax) { return 2 * wide_part(lmax); }

// Legendre functions of l >= m in a table: m = 0 first, each with l rising.
GEO_HD_CONSTEXPR int polar_row(int lmax, int l, int m) { return m * (lmax + 1) - m * (m - 1) / 2 + l - m; }
GEO_HD_CONSTEXPR int polar_rows(int lmax) { return (lmax + 1) * (lmax + 2) / 2; }

// Coefficients c, ..., c + kCount - 1 of a convolution, added to re and im: z_c = sum_a x_a y_{c - a} over both signs of a;
// y is wide.
template <int kCount, class V>
GEO_HD_INLINE void series_product(const V* x, int L1, const V* y, int L2, int c, V* re, V* im) {
  const V *xi = x + L1 + 1, *yr = y + wide_zero(L2) + c, *yi = yr + wide_part(L2);
  const int last = smaller(L1, c + kCount - 1 + L2), mirrored = smaller(L1, L2 - c);
  GEO_UNROLL(1) for (int a = larger(0, c - L2); a <= last; ++a) {
    const V xa = x[a], xb = xi[a];
    GEO_UNROLL(4) for (int k = 0; k < kCount; ++k) {
      const V ya = yr[k - a], yb = yi[k - a];
      re[k] = re[k] + xa * ya;
      im[k] = im[k] + xa * yb;
      re[k] = re[k] - xb * yb;
      im[k] = im[k] + xb * ya;
    }
  }
  GEO_UNROLL(1) for (int a = 1; a <= mirrored; ++a) {  // x_-a = conj(x_a)
    const V xa = x[a], xb = xi[a];
    GEO_UNROLL(4) for (int k = 0; k < kCount; ++k) {
      const V ya = yr[k + a], yb = yi[k + a];
      re[k] = re[k] + xa * ya;
      im[k] = im[k] + xa * yb;
      re[k] = re[k] + xb * yb;
      im[k] = im[k] - xb * ya;
    }
  }
}

}  // namespace geo
