// Leaf of the products of functions on the sphere. Operands are staged, a vector of channels or of samples at a time, with
// their factors; then one of the three forms works in the first-level cache.
#include "../gaunt_table.h"

#include "transpose.h"
#include "vec.h"

namespace geo {
namespace GEO_SIMD_NAMESPACE {
namespace {

constexpr int kTile = 4;  // nodes whose sums stay in registers
constexpr int kRows = 4;  // degrees likewise, on the way back

// The rows of an operand for one vector of channels: where they are in memory, or staged one after the other.
template <class T>
struct Rows {
  T* data;
  int64_t stride;
  inline __attribute__((always_inline)) typename vec<T>::loose& operator[](int i) const {
    return *reinterpret_cast<typename vec<T>::loose*>(data + i * stride);
  }
};

// -- separable ---------------------------------------------------------------------------------------------------------
enum class Field { kPlain, kTurn, kMinusTurn };  // kTurn: times -i m, the slope in the azimuth

// The series of x at kNodes nodes from q on and at their mirrors: `grid` has one a node, the mirrors behind.
template <int kNodes, bool kWide, class T, class V>
GEO_NOINLINE void to_polar(Rows<T> x, int lmax, const T* table, int half, int q, bool slope, Field field, V* grid) {
  const int size = kWide ? wide_size(lmax) : series_size(lmax), second = kWide ? wide_part(lmax) : lmax + 1;
  if (kWide) grid += wide_zero(lmax);
  const bool swap = field != Field::kPlain;
  GEO_UNROLL(1) for (int m = 0; m <= lmax; ++m) {
    for (int part = 0; part < (m ? 2 : 1); ++part) {
      V even[kNodes], odd[kNodes];  // in l - m
      GEO_UNROLL(8) for (int t = 0; t < kNodes; ++t) even[t] = odd[t] = V{};
      const T* row = table + polar_row(lmax, m, m) * half + q;
      const int sign = part ? -m : m;
      int l = m;
      GEO_UNROLL(1) for (; l < lmax; l += 2) {
        const V a = x[l * l + l + sign], b = x[(l + 1) * (l + 1) + l + 1 + sign];
        GEO_UNROLL(8) for (int t = 0; t < kNodes; ++t) {
          even[t] += a * row[t];
          odd[t] += b * row[half + t];
        }
        row += 2 * half;
      }
      if (l == lmax) {
        const V a = x[l * l + l + sign];
        GEO_UNROLL(8) for (int t = 0; t < kNodes; ++t) even[t] += a * row[t];
      }
      const bool minus = swap && (part == 0) == (field == Field::kTurn);
      const bool imaginary = (part == 1) != swap;
      V* to = grid + (imaginary ? second : 0);
      GEO_UNROLL(8) for (int t = 0; t < kNodes; ++t) {
        V sum = even[t] + odd[t], difference = slope ? odd[t] - even[t] : even[t] - odd[t];
        if (minus) {
          sum = -sum;
          difference = -difference;
        }
        to[t * size + m] = sum;
        to[(kNodes + t) * size + m] = difference;
        if (kWide && m) {
          to[t * size - m] = imaginary ? -sum : sum;
          to[(kNodes + t) * size - m] = imaginary ? -difference : difference;
        }
      }
    }
  }
  V* rest = grid + (swap ? 0 : second);  // where m = 0 was not written
  GEO_UNROLL(1) for (int t = 0; t < 2 * kNodes; ++t) rest[t * size] = V{};
}

// out_l for kCount degrees l, l + 2, ...: the sum over the nodes of their Legendre functions times one part of the series.
template <int kCount, class T, class V>
GEO_NOINLINE void from_polar(const V* series, int size, const T* table, int half, Rows<T> out, int l, int m) {
  V sum[kCount];
  GEO_UNROLL(4) for (int t = 0; t < kCount; ++t) sum[t] = V{};
  GEO_UNROLL(1) for (int q = 0; q < half; ++q) {
    const V v = series[q * size];
    GEO_UNROLL(4) for (int t = 0; t < kCount; ++t) sum[t] += v * table[2 * t * half + q];
  }
  GEO_UNROLL(4) for (int t = 0; t < kCount; ++t) out[square(l + 2 * t) + l + 2 * t + m] = sum[t];
}

// Where the series of a tile of nodes stand in the scratch.
template <class T, class V>
struct Grid {
  V *x[2], *y[2];
  Grid(const GauntProduct<T>& job, V* scratch) {
    const int fields = job.bracket ? 2 : 1;
    for (int f = 0; f < fields; ++f) {
      y[f] = scratch + f * 2 * kTile * wide_size(job.L2);
      x[f] = scratch + fields * 2 * kTile * wide_size(job.L2) + f * 2 * kTile * series_size(job.L1);
    }
  }
};

template <int kCount, class T, class V>
GEO_INLINE void convolve(const GauntProduct<T>& job, const Grid<T, V>& grid, int node, int c, V* re, V* im) {
  GEO_UNROLL(4) for (int k = 0; k < kCount; ++k) re[k] = im[k] = V{};
  const int size1 = series_size(job.L1), size2 = wide_size(job.L2);
  series_product<kCount>(grid.x[0] + node * size1, job.L1, grid.y[0] + node * size2, job.L2, c, re, im);
  if (job.bracket)
    series_product<kCount>(grid.x[1] + node * size1, job.L1, grid.y[1] + node * size2, job.L2, c, re, im);
}

// Coefficients c, ... of the products at node t of the tile and at its mirror, as their sum and difference.
template <int kCount, class T, class V>
GEO_NOINLINE void convolve_pair(const GauntProduct<T>& job, const Grid<T, V>& grid, int t, int mirror, int c, V* even, V* odd) {
  V re[kCount], im[kCount], re_[kCount], im_[kCount];
  convolve<kCount>(job, grid, t, c, re, im);
  if (mirror)
    convolve<kCount>(job, grid, mirror, c, re_, im_);
  else
    GEO_UNROLL(4) for (int k = 0; k < kCount; ++k) re_[k] = im_[k] = V{};
  GEO_UNROLL(4) for (int k = 0; k < kCount; ++k) {
    even[c + k] = re[k] + re_[k];
    odd[c + k] = re[k] - re_[k];
    even[job.L3 + 1 + c + k] = im[k] + im_[k];
    odd[job.L3 + 1 + c + k] = im[k] - im_[k];
  }
}

template <int kNodes, class T, class V>
GEO_INLINE void nodes(const GauntProduct<T>& job, Rows<T> x, Rows<T> y, int q, int half, int equator,
                      const Grid<T, V>& grid, V* series) {
  const bool bracket = job.bracket;
  to_polar<kNodes, false>(x, job.L1, job.in[0][0], half, q, bracket, Field::kPlain, grid.x[0]);
  to_polar<kNodes, true>(y, job.L2, job.in[1][bracket], half, q, false, bracket ? Field::kTurn : Field::kPlain, grid.y[0]);
  if (bracket) {
    to_polar<kNodes, false>(x, job.L1, job.in[0][1], half, q, false, Field::kMinusTurn, grid.x[1]);
    to_polar<kNodes, true>(y, job.L2, job.in[1][0], half, q, true, Field::kPlain, grid.y[1]);
  }
  GEO_UNROLL(1) for (int t = 0; t < kNodes; ++t) {
    V *even = series + (q + t) * series_size(job.L3), *odd = even + half * series_size(job.L3);
    const int mirror = q + t == equator ? 0 : kNodes + t;
    int c = 0;
    GEO_UNROLL(1) for (; c + kSeriesTile <= job.L3 + 1; c += kSeriesTile)
      convolve_pair<kSeriesTile>(job, grid, t, mirror, c, even, odd);
    switch (job.L3 + 1 - c) {
      case 1: convolve_pair<1>(job, grid, t, mirror, c, even, odd); break;
      case 2: convolve_pair<2>(job, grid, t, mirror, c, even, odd); break;
      case 3: convolve_pair<3>(job, grid, t, mirror, c, even, odd); break;
    }
  }
}

template <class T, class V>
void separable_product(const GauntProduct<T>& job, Rows<T> x, Rows<T> y, Rows<T> out, V* scratch) {
  const int L3 = job.L3, degree = job.L1 + job.L2 + L3, half = polar_half(degree), size = series_size(L3);
  const int equator = polar_nodes(degree) % 2 ? half - 1 : half;
  V* series = scratch;  // even parts at all nodes, then odd parts
  const Grid<T, V> grid(job, series + 2 * half * size);
  const int tiles = (half + kTile - 1) / kTile;
  for (int tile = 0, q = 0; tile < tiles; ++tile) {
    const int count = half * (tile + 1) / tiles - q;
    switch (count) {
      case 1: nodes<1>(job, x, y, q, half, equator, grid, series); break;
      case 2: nodes<2>(job, x, y, q, half, equator, grid, series); break;
      case 3: nodes<3>(job, x, y, q, half, equator, grid, series); break;
      case 4: nodes<4>(job, x, y, q, half, equator, grid, series); break;
    }
    q += count;
  }
  for (int m = 0; m <= L3; ++m)
    for (int part = 0; part < (m ? 2 : 1); ++part)
      for (int parity = 0; parity < 2 && m + parity <= L3; ++parity) {
        const V* from = series + parity * half * size + part * (L3 + 1) + m;
        const int sign = part ? -m : m;
        int l = m + parity;
        const T* table = job.polar_out + polar_row(L3, l, m) * half;
        for (; l + 2 * (kRows - 1) <= L3; l += 2 * kRows, table += 2 * kRows * half)
          from_polar<kRows>(from, size, table, half, out, l, sign);
        switch (l <= L3 ? (L3 - l) / 2 + 1 : 0) {
          case 1: from_polar<1>(from, size, table, half, out, l, sign); break;
          case 2: from_polar<2>(from, size, table, half, out, l, sign); break;
          case 3: from_polar<3>(from, size, table, half, out, l, sign); break;
        }
      }
}

// -- sparse ------------------------------------------------------------------------------------------------------------
template <class T, class V>
void sparse_product(const GauntProduct<T>& job, Rows<T> x, Rows<T> y, Rows<T> out, V* scratch) {
  for (int p = 0; p < job.num_pairs; ++p) {
    const int i = job.i[p], j = job.j[p];
    V product = x[i] * y[j];
    if (job.both[p]) product = job.bracket ? product - x[j] * y[i] : product + x[j] * y[i];
    scratch[p] = product;
  }
  for (int k = 0; k < square(job.L3 + 1); ++k) {
    V sum = V{}, other = V{};
    int t = job.ptr[k];
    for (; t + 1 < job.ptr[k + 1]; t += 2) {
      sum += scratch[job.pair[t]] * job.value[t];
      other += scratch[job.pair[t + 1]] * job.value[t + 1];
    }
    if (t < job.ptr[k + 1]) sum += scratch[job.pair[t]] * job.value[t];
    out[k] = sum + other;
  }
}

template <class T, class V>
using Product = void (*)(const GauntProduct<T>&, Rows<T> x, Rows<T> y, Rows<T> out, V* scratch);

template <int L1, int L2, int L3, bool kBracket>
void straight(const GauntProduct<float>&, Rows<float> x, Rows<float> y, Rows<float> out, vfloat*) {
  straight_product<L1, L2, L3, kBracket, float, vfloat>(x, y, out);
}

// The kernel of degrees that has_straight.
Product<float, vfloat> straight_kernel(const GauntProduct<float>& job) {
  constexpr int n = kStraightDegree + 1;
  Product<float, vfloat> found = nullptr;
  if (larger(job.L1, larger(job.L2, job.L3)) > kStraightDegree) {
    unrolled<n, kStraightEqual + 1>([&](auto degree) GEO_INLINED {
      constexpr int L = degree.value;
      if (job.L1 == L) found = job.bracket ? straight<L, L, L, true> : straight<L, L, L, false>;
    });
    return found;
  }
  const int wanted = (job.L1 * n + job.L2) * n + job.L3;
  unrolled<0, n * n * n>([&](auto at) GEO_INLINED {
    constexpr int i = at.value, L1 = i / n / n, L2 = i / n % n, L3 = i % n;
    if (i == wanted) found = job.bracket ? straight<L1, L2, L3, true> : straight<L1, L2, L3, false>;
  });
  return found;
}
Product<double, vdouble> straight_kernel(const GauntProduct<double>&) { return nullptr; }

// -- staging -----------------------------------------------------------------------------------------------------------
// Where component m (from 0 on) of degree l and channel c stands in a row.
template <class S>
GEO_INLINE int64_t place_of(const GauntOperand<S>& at, int l, int m, int64_t c) {
  return at.starts ? at.starts[l] + c * (2 * l + 1) + m : (l * l + m) * at.channels + c;
}

// Channels c .. c + n of a row in e3nn's layout, the others zero.
template <class S, class V>
GEO_INLINE void stage_blocks(const GauntOperand<S>& from, const S* data, int64_t c, int n, V* to) {
  using T = typename accumulate<S>::type;
  constexpr int lanes = vec<T>::lanes;
  for (int l = 0; l <= from.lmax; ++l) {
    const int N = 2 * l + 1;
    V* rows = to + l * l;
    const S* block = data + from.starts[l] + c * N;
#if GEO_SIMD_LEVEL == 2
    if constexpr (sizeof(S) == 4) {
      if (n == lanes && from.starts[l] >= 0 && l <= kRouteDegree) {
        unrolled<0, kRouteDegree + 1>([&](auto degree) GEO_INLINED {
          if (l == degree.value)
            transpose_route<2 * degree.value + 1, false>(
                [&](int j) GEO_INLINED { return _mm512_loadu_si512(block + j * lanes); },
                [&](int i, __m512i v) GEO_INLINED { rows[i] = (V)v; });
        });
        continue;
      }
    }
#endif
    for (int m = 0; m < N; ++m) rows[m] = V{};
    if (from.starts[l] < 0) continue;
    T* elements = reinterpret_cast<T*>(rows);
    for (int k = 0; k < n; ++k)
      for (int m = 0; m < N; ++m) elements[m * lanes + k] = widen(block[k * N + m]);
  }
}

template <class S, class V>
GEO_INLINE void unstage_blocks(const GauntOperand<S>& at, const V* from, int64_t c, int n, S* data) {
  using T = typename accumulate<S>::type;
  constexpr int lanes = vec<T>::lanes;
  for (int l = 0; l <= at.lmax; ++l) {
    if (at.starts[l] < 0) continue;
    const int N = 2 * l + 1;
    const V* rows = from + l * l;
    S* block = data + at.starts[l] + c * N;
#if GEO_SIMD_LEVEL == 2
    if constexpr (sizeof(S) == 4) {
      if (n == lanes && l <= kRouteDegree) {
        unrolled<0, kRouteDegree + 1>([&](auto degree) GEO_INLINED {
          if (l == degree.value)
            transpose_route<2 * degree.value + 1, true>(
                [&](int j) GEO_INLINED { return (__m512i)rows[j]; },
                [&](int i, __m512i v) GEO_INLINED { _mm512_storeu_si512(block + i * lanes, v); });
        });
        continue;
      }
    }
#endif
    const T* elements = reinterpret_cast<const T*>(rows);
    for (int k = 0; k < n; ++k)
      for (int m = 0; m < N; ++m) narrow(elements[m * lanes + k], block + k * N + m);
  }
}

// Channels c .. c + n of a row: all lanes, or (n < lanes) the first n and zeros.
template <class S, class V>
GEO_INLINE void stage_row(const GauntOperand<S>& from, const S* data, int64_t c, int n, V* to) {
  constexpr int lanes = vec<typename accumulate<S>::type>::lanes;
  const int size = square(from.lmax + 1);
  if (from.starts && from.channels > 1) {
    stage_blocks(from, data, c, n, to);
  } else if (from.channels == 1) {
    for (int l = 0; l <= from.lmax; ++l)
      for (int m = 0; m < 2 * l + 1; ++m)
        to[l * l + m] = from.starts && from.starts[l] < 0 ? V{} : V{} + widen(data[place_of(from, l, m, 0)]);
  } else if (n == lanes) {
    for (int i = 0; i < size; ++i) to[i] = load(data + i * from.channels + c);
  } else {
    for (int i = 0; i < size; ++i) to[i] = load_n(data + i * from.channels + c, n);
  }
}

template <class S, class V>
GEO_INLINE V scale_of(const GauntOperand<S>& from, int64_t row, int64_t c, int n, int l) {
  const S* scale = from.scale + row * from.scale_row + l * from.scale_channels;
  if (from.scale_channels == 1) return V{} + widen(*scale);
  return n == vec<typename accumulate<S>::type>::lanes ? load(scale + c) : load_n(scale + c, n);
}

template <class S, class V>
GEO_INLINE void scale_row(const GauntOperand<S>& from, int64_t row, int64_t c, int n, V* to) {
  if (!from.scale) return;
  for (int l = 0; l <= from.lmax; ++l) {
    const V scale = scale_of<S, V>(from, row, c, n, l);
    for (int i = l * l; i < (l + 1) * (l + 1); ++i) to[i] *= scale;
  }
}

// The rows as they are in memory where nothing is to be done to them, else staged at `to`.
template <class S, class V>
GEO_INLINE Rows<typename accumulate<S>::type> rows_of(const GauntOperand<S>& from, int64_t row, int64_t c, int n, V* to) {
  using T = typename accumulate<S>::type;
  const S* data = from.data + row * from.row;
  if (n == vec<T>::lanes && from.channels != 1) {
    const S* next = data + from.row + square(from.lmax + 1) * c;  // a share of the row after this, in the order of memory
    for (int i = 0; i < square(from.lmax + 1); ++i) prefetch(next + i * vec<T>::lanes);
    if constexpr (sizeof(S) == sizeof(T))
      if (!from.scale && !from.starts) return {const_cast<T*>(data) + c, from.channels};
  }
  stage_row(from, data, c, n, to);
  scale_row(from, row, c, n, to);
  return {reinterpret_cast<T*>(to), vec<T>::lanes};
}

template <class S>
GEO_INLINE bool is_shared(const GauntOperand<S>& from) {  // by all channels of a row
  return from.channels == 1 && (!from.scale || from.scale_channels == 1);
}

// f(lane, count, row, c) for runs of lanes that are neighbouring channels of one row: samples `first` .. `first + n`.
template <class F>
GEO_INLINE void for_runs(int64_t first, int n, int64_t C, F&& f) {
  int64_t row = first / C, c = first % C;
  for (int lane = 0; lane < n;) {
    const int count = int(C - c < n - lane ? C - c : n - lane);
    f(lane, count, row, c);
    lane += count;
    c = 0;
    ++row;
  }
}

template <class S, class T>
GEO_INLINE void stage_samples(const GauntOperand<S>& from, int64_t first, int n, int64_t C, T* to) {
  constexpr int lanes = vec<T>::lanes;
  for_runs(first, n, C, [&](int lane, int count, int64_t row, int64_t c) {
    const S* data = from.data + row * from.row;
    for (int l = 0; l <= from.lmax; ++l)
      for (int m = 0; m < 2 * l + 1; ++m)
        for (int k = 0; k < count; ++k) {
          const bool absent = from.starts && from.starts[l] < 0;
          T v = absent ? T(0) : T(widen(data[place_of(from, l, m, from.channels == 1 ? 0 : c + k)]));
          if (from.scale) {
            const S* scale = from.scale + row * from.scale_row + l * from.scale_channels;
            v *= widen(scale[from.scale_channels == 1 ? 0 : c + k]);
          }
          to[(l * l + m) * lanes + lane + k] = v;
        }
  });
}

template <class S>
void run(const Gaunt<S>& job, int64_t begin, int64_t end, typename accumulate<S>::type* scratch_) {
  using T = typename accumulate<S>::type;
  using V = typename vec<T>::type;
  constexpr int lanes = vec<T>::lanes;
  const int d1 = square(job.x.lmax + 1), d2 = square(job.y.lmax + 1), d3 = square(job.z.lmax + 1);
  V *x = reinterpret_cast<V*>(scratch_), *y = x + d1, *z = y + d2, *total = z + d3, *scratch = total + d3;
  const Product<T, V> product = job.product.form == GauntForm::kStraight ? straight_kernel(job.product)
                                : job.product.form == GauntForm::kSparse ? sparse_product<T, V>
                                                                 : separable_product<T, V>;
  const auto staged = [](V* rows) { return Rows<T>{reinterpret_cast<T*>(rows), lanes}; };
  if (job.samples) {
    for (int i = 0; i < d1 + d2; ++i) x[i] = V{};  // the lanes that the last vector does not fill
    for (int64_t first = begin; first < end; first += lanes) {
      const int n = int(end - first < lanes ? end - first : lanes);
      stage_samples(job.x, first, n, job.C, reinterpret_cast<T*>(x));
      stage_samples(job.y, first, n, job.C, reinterpret_cast<T*>(y));
      const T* from = reinterpret_cast<const T*>(z);
      product(job.product, staged(x), staged(y), staged(z), scratch);
      for_runs(first, n, job.C, [&](int lane, int count, int64_t row, int64_t c) {
        S* out = job.out + row * job.z.row;
        for (int l = 0; l <= job.z.lmax; ++l) {
          if (job.z.starts && job.z.starts[l] < 0) continue;
          for (int m = 0; m < 2 * l + 1; ++m)
            for (int k = 0; k < count; ++k) {
              T v = from[(l * l + m) * lanes + lane + k];
              if (job.z.scale) {
                const S* scale = job.z.scale + row * job.z.scale_row + l * job.z.scale_channels;
                v *= widen(scale[job.z.scale_channels == 1 ? 0 : c + k]);
              }
              narrow(v, out + place_of(job.z, l, m, c + k));
            }
        }
      });
    }
    return;
  }
  const bool x_shared = is_shared(job.x), y_shared = is_shared(job.y);
  for (int64_t row = begin; row < end; ++row) {
    Rows<T> first{}, second{};
    for (int64_t c = 0; c < job.C; c += lanes) {
      const int n = int(job.C - c < lanes ? job.C - c : lanes);
      if (c == 0 || !x_shared) first = rows_of(job.x, row, c, n, x);
      if (c == 0 || !y_shared) second = rows_of(job.y, row, c, n, y);
      S* out = job.out + row * job.z.row;
      if constexpr (sizeof(S) == sizeof(T)) {
        if (n == lanes && !job.sum && !job.z.scale && !job.z.starts) {
          product(job.product, first, second, {out + c, job.C}, scratch);
          continue;
        }
      }
      product(job.product, first, second, staged(z), scratch);
      scale_row(job.z, row, c, n, z);
      if (job.sum) {
        for (int i = 0; i < d3; ++i) total[i] = c ? total[i] + z[i] : z[i];
      } else if (job.z.starts) {
        unstage_blocks(job.z, z, c, n, out);
      } else if (n == lanes) {
        for (int i = 0; i < d3; ++i) store(out + i * job.C + c, z[i]);
      } else {
        for (int i = 0; i < d3; ++i) store_n(out + i * job.C + c, z[i], n);
      }
    }
    if (job.sum)
      for (int l = 0; l <= job.z.lmax; ++l)
        for (int m = 0; m < 2 * l + 1 && !(job.z.starts && job.z.starts[l] < 0); ++m)
          narrow(sum_lanes<T>(total[l * l + m]), job.out + row * job.z.row + place_of(job.z, l, m, 0));
  }
}

template <class S>
int64_t scratch(const Gaunt<S>& job) {
  using T = typename accumulate<S>::type;
  const int L1 = job.x.lmax, L2 = job.y.lmax, L3 = job.z.lmax;
  int64_t vectors = square(L1 + 1) + square(L2 + 1) + 2 * square(L3 + 1);
  if (job.product.form == GauntForm::kSparse) vectors += job.product.num_pairs;
  if (job.product.form == GauntForm::kSeparable)
    vectors += 2 * polar_half(L1 + L2 + L3) * series_size(L3) + 4 * kTile * (series_size(L1) + wide_size(L2));
  return vectors * vec<T>::lanes;
}

template <class S>
constexpr GauntTable<S> table() {
  return {vec<typename accumulate<S>::type>::lanes, scratch<S>, run<S>};
}

}  // namespace

const GauntTable<float> gaunt_float = table<float>();
const GauntTable<double> gaunt_double = table<double>();
const GauntTable<bfloat16> gaunt_bfloat16 = table<bfloat16>();
const GauntTable<float16> gaunt_float16 = table<float16>();

}  // namespace GEO_SIMD_NAMESPACE
}  // namespace geo
