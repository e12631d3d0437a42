// Leaf kernels of the gather-multiply ops, compiled once per SIMD level (see vec.h).
#include "../gather_mul_table.h"

#include "../../segments.h"
#include "vec.h"

namespace geo {
namespace GEO_SIMD_NAMESPACE {
namespace {

constexpr Outcome kFine = {kNoFault, 0};
constexpr int kGroup = 64;                    // edges whose rows are looked up at a time
constexpr int kFlat = kRegisters / 2;         // accumulator registers of a flat tile
constexpr int kSquare = kRegisters / 8;       // rows and vectors of a two-dimensional tile
constexpr int kAhead = 2;                     // edges

enum Weight { kOnes, kVector, kScalar };  // w is 1; runs along the columns; is one number for all columns

template <class S>
using Acc = typename accumulate<S>::type;

// acc[r][c] += sum over the group of x[r][c] * w[r][c], for R rows of N vectors, the last one partial when tail > 0.
template <class S, int R, int N, Weight W>
GEO_INLINE void tile(const S* const* x, const S* const* w, int num, Acc<S>* acc, int64_t x_row, int64_t w_row, int tail,
                     bool ahead) {
  typedef typename vec<Acc<S>>::type V;
  constexpr int L = vec<Acc<S>>::lanes;
  V sum[R][N];
  GEO_UNROLL(16) for (int r = 0; r < R; ++r) {
    GEO_UNROLL(16) for (int n = 0; n < N; ++n)
      sum[r][n] = tail ? load_n(acc + r * x_row + n * L, tail) : load(acc + r * x_row + n * L);
  }
  GEO_UNROLL(1) for (int k = 0; k < num; ++k) {
    const S* xe = x[k];
    const S* we = W == kOnes ? nullptr : w[k];
    if (ahead) {
      const S* next = x[k + kAhead];  // the group is padded
      GEO_UNROLL(16) for (int r = 0; r < R; ++r) {
        GEO_UNROLL(16) for (int n = 0; n < N; n += 64 / int(L * sizeof(S)) ? 64 / int(L * sizeof(S)) : 1)
          prefetch(next + r * x_row + n * L);
      }
      if (W == kVector) {
        const S* next_w = w[k + kAhead];
        GEO_UNROLL(16) for (int r = 0; r < R; ++r) {
          GEO_UNROLL(16) for (int n = 0; n < N; n += 64 / int(L * sizeof(S)) ? 64 / int(L * sizeof(S)) : 1)
            prefetch(next_w + r * w_row + n * L);
        }
      }
    }
    GEO_UNROLL(16) for (int r = 0; r < R; ++r) {
      Acc<S> scalar = 0;
      if (W == kScalar) scalar = widen(we[r * w_row]);
      GEO_UNROLL(16) for (int n = 0; n < N; ++n) {
        const V xv = tail ? load_n(xe + r * x_row + n * L, tail) : load(xe + r * x_row + n * L);
        if (W == kOnes)
          sum[r][n] += xv;
        else if (W == kScalar)
          sum[r][n] += xv * scalar;
        else
          sum[r][n] += xv * (tail ? load_n(we + r * w_row + n * L, tail) : load(we + r * w_row + n * L));
      }
    }
  }
  GEO_UNROLL(16) for (int r = 0; r < R; ++r) {
    GEO_UNROLL(16) for (int n = 0; n < N; ++n) {
      if (tail)
        store_n(acc + r * x_row + n * L, sum[r][n], tail);
      else
        store(acc + r * x_row + n * L, sum[r][n]);
    }
  }
}

// Pointers moved to the tile's corner; the two extra entries are for the prefetch.
template <class S>
struct Group {
  const S* x[kGroup + kAhead];
  const S* w[kGroup + kAhead];
  int num;
};

// One plane of the group: rows x cols cut into tiles.
template <class S, Weight W>
void plane(const Group<S>& group, const Planes& p, int64_t x_offset, int64_t w_offset, Acc<S>* acc, bool ahead) {
  constexpr int L = vec<Acc<S>>::lanes;
  const S* x[kGroup + kAhead];
  const S* w[kGroup + kAhead];
  const int num = group.num;
  auto cut = [&](int64_t r, int64_t c) __attribute__((always_inline)) {
    const int64_t xo = x_offset + r * p.cols + c, wo = w_offset + r * p.w_row + c * p.w_col;
    for (int k = 0; k < num + kAhead; ++k) x[k] = group.x[k] + xo;
    if (W != kOnes)
      for (int k = 0; k < num + kAhead; ++k) w[k] = group.w[k] + wo;
    return acc + xo;
  };
  int64_t r = 0;
  for (; r + kSquare <= p.rows; r += kSquare) {
    int64_t c = 0;
    for (; c + kSquare * L <= p.cols; c += kSquare * L)
      tile<S, kSquare, kSquare, W>(x, w, num, cut(r, c), p.cols, p.w_row, 0, ahead);
    for (; c + L <= p.cols; c += L) tile<S, kSquare, 1, W>(x, w, num, cut(r, c), p.cols, p.w_row, 0, ahead);
    if (c < p.cols) tile<S, kSquare, 1, W>(x, w, num, cut(r, c), p.cols, p.w_row, int(p.cols - c), false);
  }
  for (; r < p.rows; ++r) {
    int64_t c = 0;
    for (; c + kFlat * L <= p.cols; c += kFlat * L)
      tile<S, 1, kFlat, W>(x, w, num, cut(r, c), p.cols, p.w_row, 0, ahead);
    for (; c + 4 * L <= p.cols; c += 4 * L) tile<S, 1, 4, W>(x, w, num, cut(r, c), p.cols, p.w_row, 0, ahead);
    for (; c + L <= p.cols; c += L) tile<S, 1, 1, W>(x, w, num, cut(r, c), p.cols, p.w_row, 0, ahead);
    if (c < p.cols) tile<S, 1, 1, W>(x, w, num, cut(r, c), p.cols, p.w_row, int(p.cols - c), false);
  }
}

// Rows too long for the first-level cache to hold a group of them: four edges at a time over the whole row, so that each
// row of w is read in one stream, and the next four are prefetched alongside.
template <class S>
void long_rows(const Group<S>& group, int64_t cols, Acc<S>* acc) {
  typedef typename vec<Acc<S>>::type V;
  constexpr int L = vec<Acc<S>>::lanes, N = 4, B = 4;
  int k = 0;
  for (; k + B <= group.num; k += B) {
    const S *x[B], *w[B], *next_x[B], *next_w[B];
    for (int j = 0; j < B; ++j) {
      const int next = k + B + j < group.num ? k + B + j : k + j;
      x[j] = group.x[k + j];
      w[j] = group.w[k + j];
      next_x[j] = group.x[next];
      next_w[j] = group.w[next];
    }
    int64_t c = 0;
    for (; c + N * L <= cols; c += N * L) {
      V sum[N];
      GEO_UNROLL(4) for (int n = 0; n < N; ++n) sum[n] = load(acc + c + n * L);
      GEO_UNROLL(4) for (int j = 0; j < B; ++j) {
        GEO_UNROLL(4) for (int n = 0; n < N; ++n) {
          sum[n] += load(x[j] + c + n * L) * load(w[j] + c + n * L);
          if (n * L * int(sizeof(S)) % 64 == 0) {
            prefetch(next_x[j] + c + n * L);
            prefetch(next_w[j] + c + n * L);
          }
        }
      }
      GEO_UNROLL(4) for (int n = 0; n < N; ++n) store(acc + c + n * L, sum[n]);
    }
    for (; c < cols; ++c)
      for (int j = 0; j < B; ++j) acc[c] += widen(x[j][c]) * widen(w[j][c]);
  }
  for (; k < group.num; ++k) {
    const S *x = group.x[k], *w = group.w[k];
    int64_t c = 0;
    for (; c + L <= cols; c += L) store(acc + c, load(acc + c) + load(x + c) * load(w + c));
    for (; c < cols; ++c) acc[c] += widen(x[c]) * widen(w[c]);
  }
}

// The same for rows of one number, without groups and tiles: setting those up costs more than a short segment.
template <class S, bool Permuted>
GEO_INLINE Outcome sum_numbers_to(const GatherMulSum& a, int64_t begin, int64_t end, Acc<S>* total) {
  const S* x = static_cast<const S*>(a.x);
  const S* w = static_cast<const S*>(a.w);
  Acc<S> sum = 0;
  for (int64_t k = begin; k < end; ++k) {
    const int64_t e = Permuted ? a.perm[k] : k;
    if (uint64_t(e) >= uint64_t(a.num_edges)) return {kEdgePerm, k};
    const int64_t s = a.src ? a.src[e] : e;
    if (uint64_t(s) >= uint64_t(a.num_src)) return {kSrcIndex, e};
    sum += widen(x[s]) * widen(w[e]);
  }
  *total = sum;
  return kFine;
}

template <class S, bool Permuted>
Outcome sum_numbers(const GatherMulSum& a, int64_t first, int64_t last) {
  S* out = static_cast<S*>(a.out);
  for (int64_t i = first; i < last; ++i) {
    const int64_t begin = a.ptr[i], end = a.ptr[i + 1];
    Acc<S> sum;
    const Outcome outcome = sum_numbers_to<S, Permuted>(a, begin, end, &sum);
    if (outcome.fault != kNoFault) return outcome;
    narrow(a.mean && end - begin > 1 ? sum / Acc<S>(end - begin) : sum, out + i);
  }
  return kFine;
}

// row[f] = sum over the edges at places [begin, end) of the CSR order.
template <class S>
Outcome sum_edges_to(const GatherMulSum& a, int64_t begin, int64_t end, Acc<S>* row) {
  const S* x = static_cast<const S*>(a.x);
  const S* w = static_cast<const S*>(a.w);
  for (int64_t f = 0; f < a.num_features; ++f) row[f] = 0;
  const bool long_row = w && a.num_weights == a.num_features && a.num_features * int64_t(sizeof(S)) >= 2048;
  Group<S> group;
  for (int64_t k = begin; k < end; k += kGroup) {
    group.num = int(end - k < kGroup ? end - k : kGroup);
    for (int j = 0; j < group.num; ++j) {
      const int64_t e = a.perm ? a.perm[k + j] : k + j;
      if (uint64_t(e) >= uint64_t(a.num_edges)) return {kEdgePerm, k + j};
      const int64_t s = a.src ? a.src[e] : e;
      if (uint64_t(s) >= uint64_t(a.num_src)) return {kSrcIndex, e};
      group.x[j] = x + s * a.num_features;
      group.w[j] = w + (w ? e * a.num_weights : 0);
    }
    for (int j = group.num; j < group.num + kAhead; ++j) {
      group.x[j] = group.x[group.num - 1];
      group.w[j] = group.w[group.num - 1];
    }
    if (long_row) {
      long_rows(group, a.num_features, row);
      continue;
    }
    for (int64_t q = 0; q < a.planes.num_planes; ++q) {
      const int64_t xo = a.planes.x_offset[q], wo = a.planes.w_offset[q];
      if (!w)
        plane<S, kOnes>(group, a.planes, xo, wo, row, a.huge_rows);
      else if (a.planes.w_col)
        plane<S, kVector>(group, a.planes, xo, wo, row, a.huge_rows);
      else
        plane<S, kScalar>(group, a.planes, xo, wo, row, a.huge_rows);
    }
  }
  return kFine;
}

template <class S>
void finish_row(const Acc<S>* row, S* out, int64_t num, int64_t length, bool mean) {
  const Acc<S> divisor = mean && length > 1 ? Acc<S>(length) : Acc<S>(1);
  for (int64_t f = 0; f < num; ++f) narrow(row[f] / divisor, out + f);
}
template <class S>
struct same {
  static constexpr bool value = false;
};
template <>
struct same<float> {
  static constexpr bool value = true;
};
template <>
struct same<double> {
  static constexpr bool value = true;
};

template <class S>
Outcome sum_segments(const GatherMulSum& a, int64_t first, int64_t last, void* scratch) {
  if (a.num_features == 1) {
    return a.perm ? sum_numbers<S, true>(a, first, last) : sum_numbers<S, false>(a, first, last);
  }
  S* out = static_cast<S*>(a.out);
  for (int64_t i = first; i < last; ++i) {
    const int64_t begin = a.ptr[i], end = a.ptr[i + 1];
    S* to = out + i * a.num_features;
    const bool direct = same<S>::value && !a.mean;
    Acc<S>* row = direct ? reinterpret_cast<Acc<S>*>(to) : static_cast<Acc<S>*>(scratch);
    const Outcome outcome = sum_edges_to<S>(a, begin, end, row);
    if (outcome.fault != kNoFault) return outcome;
    if (!direct) finish_row(row, to, a.num_features, end - begin, a.mean);
  }
  return kFine;
}

template <class S>
Outcome sum_edges(const GatherMulSum& a, int64_t begin, int64_t end, void* row) {
  return sum_edges_to<S>(a, begin, end, static_cast<Acc<S>*>(row));
}

template <class S>
void sum_rows(const GatherMulSum& a, int64_t i, const void* rows, int64_t count, int64_t length) {
  const Acc<S>* from = static_cast<const Acc<S>*>(rows);
  S* to = static_cast<S*>(a.out) + i * a.num_features;
  const Acc<S> divisor = a.mean && length > 1 ? Acc<S>(length) : Acc<S>(1);
  for (int64_t f = 0; f < a.num_features; ++f) {
    Acc<S> sum = 0;
    for (int64_t k = 0; k < count; ++k) sum += from[k * a.num_features + f];
    narrow(sum / divisor, to + f);
  }
}

template <class S, bool Stream>
GEO_INLINE void product_flat(const S* x, const S* g, S* out, int64_t num) {
  constexpr int L = vec<Acc<S>>::lanes;
  int64_t c = 0;
  for (; c + 4 * L <= num; c += 4 * L) {
    GEO_UNROLL(4) for (int n = 0; n < 4; ++n) {
      const auto v = load(x + c + n * L) * load(g + c + n * L);
      if (Stream)
        stream(out + c + n * L, v);
      else
        store(out + c + n * L, v);
    }
  }
  for (; c + L <= num; c += L) {
    const auto v = load(x + c) * load(g + c);
    if (Stream)
      stream(out + c, v);
    else
      store(out + c, v);
  }
  for (; c < num; ++c) narrow(widen(x[c]) * widen(g[c]), out + c);
}

template <class S>
GEO_INLINE Acc<S> dot(const S* x, const S* g, int64_t num) {
  typedef typename vec<Acc<S>>::type V;
  constexpr int L = vec<Acc<S>>::lanes;
  V s0 = {}, s1 = {};
  int64_t c = 0;
  for (; c + 2 * L <= num; c += 2 * L) {
    s0 += load(x + c) * load(g + c);
    s1 += load(x + c + L) * load(g + c + L);
  }
  if (c + L <= num) {
    s0 += load(x + c) * load(g + c);
    c += L;
  }
  if (c < num) s1 += load_n(x + c, int(num - c)) * load_n(g + c, int(num - c));
  return sum_lanes<Acc<S>>(s0 + s1);
}

// row[c] += sum over r of x[r][c] * g[r][c]
template <class S>
GEO_INLINE void dot_rows(const S* x, const S* g, Acc<S>* row, int64_t rows, int64_t cols) {
  typedef typename vec<Acc<S>>::type V;
  constexpr int L = vec<Acc<S>>::lanes;
  int64_t c = 0;
  for (; c + 4 * L <= cols; c += 4 * L) {
    V sum[4];
    GEO_UNROLL(4) for (int n = 0; n < 4; ++n) sum[n] = load(row + c + n * L);
    for (int64_t r = 0; r < rows; ++r) {
      GEO_UNROLL(4) for (int n = 0; n < 4; ++n)
        sum[n] += load(x + r * cols + c + n * L) * load(g + r * cols + c + n * L);
    }
    GEO_UNROLL(4) for (int n = 0; n < 4; ++n) store(row + c + n * L, sum[n]);
  }
  for (; c < cols; c += L) {
    const int tail = cols - c < L ? int(cols - c) : 0;
    V sum = tail ? load_n(row + c, tail) : load(row + c);
    for (int64_t r = 0; r < rows; ++r) {
      const S *xr = x + r * cols + c, *gr = g + r * cols + c;
      sum += tail ? load_n(xr, tail) * load_n(gr, tail) : load(xr) * load(gr);
    }
    if (tail)
      store_n(row + c, sum, tail);
    else
      store(row + c, sum);
  }
}

template <class S>
Outcome product(const GatherMul& a, int64_t begin, int64_t end, void* scratch) {
  const S* x = static_cast<const S*>(a.x);
  const S* g = static_cast<const S*>(a.g);
  const Planes& p = a.planes;
  const bool flat = p.num_planes == 1 && p.w_col == 1 && a.num_weights == a.num_features;
  const int64_t width = a.num_features;
  for (int64_t e = begin; e < end; ++e) {
    const int64_t s = a.src[e], d = a.dst[e];
    if (uint64_t(s) >= uint64_t(a.num_src)) return {kSrcIndex, e};
    if (uint64_t(d) >= uint64_t(a.num_dst)) return {kDstIndex, e};
    const S *xe = x + s * width, *ge = g + d * width;
    S* to = static_cast<S*>(a.out) + e * a.num_weights;
    if (e + 1 < end) {  // the rows of the next edge: one line in 512 bytes starts the processor's own prefetch
      const int64_t s1 = a.src[e + 1], d1 = a.dst[e + 1];
      if (uint64_t(s1) < uint64_t(a.num_src) && uint64_t(d1) < uint64_t(a.num_dst)) {
        const int64_t bytes = width * int64_t(sizeof(S)) < 4096 ? width * int64_t(sizeof(S)) : 4096;
        for (int64_t b = 0; b < bytes; b += 64) {
          prefetch(reinterpret_cast<const char*>(x + s1 * width) + b);
          prefetch(reinterpret_cast<const char*>(g + d1 * width) + b);
        }
      }
    }
    if (flat) {
      if (a.stream)
        product_flat<S, true>(xe, ge, to, width);
      else
        product_flat<S, false>(xe, ge, to, width);
      continue;
    }
    Acc<S>* row = static_cast<Acc<S>*>(scratch);
    for (int64_t j = 0; j < a.num_weights; ++j) row[j] = 0;
    for (int64_t q = 0; q < p.num_planes; ++q) {
      const S *xq = xe + p.x_offset[q], *gq = ge + p.x_offset[q];
      Acc<S>* wq = row + p.w_offset[q];
      if (!p.w_col) {  // shared along the columns
        for (int64_t r = 0; r < p.rows; ++r) wq[r * p.w_row] += dot(xq + r * p.cols, gq + r * p.cols, p.cols);
      } else if (p.w_row == 0) {  // shared along the rows
        dot_rows(xq, gq, wq, p.rows, p.cols);
      } else {
        for (int64_t r = 0; r < p.rows; ++r)
          dot_rows(xq + r * p.cols, gq + r * p.cols, wq + r * p.w_row, 1, p.cols);
      }
    }
    for (int64_t j = 0; j < a.num_weights; ++j) narrow(row[j], to + j);
  }
  if (a.stream) stream_fence();
  return kFine;
}

}  // namespace

#define GEO_TABLE(name, S) \
  const GatherMulTable name = {sum_segments<S>, sum_edges<S>, sum_rows<S>, product<S>};
GEO_TABLE(gather_mul_float, float)
GEO_TABLE(gather_mul_double, double)
GEO_TABLE(gather_mul_bfloat16, bfloat16)
GEO_TABLE(gather_mul_float16, float16)

}  // namespace GEO_SIMD_NAMESPACE
}  // namespace geo
