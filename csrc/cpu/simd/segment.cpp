// Leaf kernels of the segment ops, compiled once per SIMD level (see vec.h).
//
// Narrow sorted rows are packed: a vector holds as many whole rows as fit, and their sum is folded at the segment's end.
// Other rows are taken one by one, a tile of columns at a time.
#include "../segment_table.h"

#include "../../segments.h"
#include "vec.h"

namespace geo {
namespace GEO_SIMD_NAMESPACE {
namespace {

constexpr Outcome kFine = {kNoFault, 0};
constexpr int kTile = kRegisters / 2;    // accumulator registers of a sum
constexpr int kExtreme = kRegisters / 4;  // of an extreme, which keeps rows beside values
constexpr int kMaxFolds = 4;

template <class S>
using Acc = typename accumulate<S>::type;
template <class S>
using Vec = typename vec<Acc<S>>::type;
template <class T>
struct lane_int;
template <>
struct lane_int<float> {
  typedef int32_t type;
};
template <>
struct lane_int<double> {
  typedef int64_t type;
};
template <class S>
using Lane = typename lane_int<Acc<S>>::type;
template <class S>
using Int = typename vec<Lane<S>>::type;
template <class S>
constexpr int lanes_of = vec<Acc<S>>::lanes;

template <class S>
GEO_INLINE Int<S> lane_numbers() {
  Int<S> lane;
  GEO_UNROLL(16) for (int l = 0; l < lanes_of<S>; ++l) lane[l] = l;
  return lane;
}

// The first n lanes, 0 <= n <= lanes; the others are 0 and not read.
template <class S>
GEO_INLINE Vec<S> load_first(const S* p, int n) {
  return n == lanes_of<S> ? load(p) : load_n(p, n);
}
// The first n lanes, 0 < n <= lanes.
template <class S>
GEO_INLINE void store_first(S* p, Vec<S> v, int n) {
  if (n == lanes_of<S>)
    store(p, v);
  else
    store_n(p, v, n);
}
#if GEO_SIMD_LEVEL == 2
GEO_INLINE __mmask16 first16(int n) { return (__mmask16)((1u << n) - 1); }
GEO_INLINE vfloat load_first(const float* p, int n) { return (vfloat)_mm512_maskz_loadu_ps(first16(n), p); }
GEO_INLINE vdouble load_first(const double* p, int n) { return (vdouble)_mm512_maskz_loadu_pd((__mmask8)first16(n), p); }
GEO_INLINE vfloat load_first(const bfloat16* p, int n) {
  return (vfloat)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first16(n), p)), 16);
}
GEO_INLINE vfloat load_first(const float16* p, int n) {
  return (vfloat)_mm512_maskz_cvtph_ps((__mmask16)-1, _mm256_maskz_loadu_epi16(first16(n), p));
}
GEO_INLINE void store_first(float* p, vfloat v, int n) { _mm512_mask_storeu_ps(p, first16(n), (__m512)v); }
GEO_INLINE void store_first(double* p, vdouble v, int n) { _mm512_mask_storeu_pd(p, (__mmask8)first16(n), (__m512d)v); }
#elif GEO_SIMD_LEVEL == 1
GEO_INLINE __m256i first8(int n) { return (__m256i)(lane_numbers<float>() < n); }
GEO_INLINE __m256i first4(int n) { return (__m256i)(lane_numbers<double>() < int64_t(n)); }
GEO_INLINE vfloat load_first(const float* p, int n) { return (vfloat)_mm256_maskload_ps(p, first8(n)); }
GEO_INLINE vdouble load_first(const double* p, int n) { return (vdouble)_mm256_maskload_pd(p, first4(n)); }
GEO_INLINE void store_first(float* p, vfloat v, int n) { _mm256_maskstore_ps(p, first8(n), (__m256)v); }
GEO_INLINE void store_first(double* p, vdouble v, int n) { _mm256_maskstore_pd(p, first4(n), (__m256d)v); }
#endif

// Bit l: whether lane l of a comparison holds.
template <class S>
GEO_INLINE uint32_t lane_bits(Int<S> holds) {
  uint32_t bits = 0;
#if GEO_SIMD_LEVEL == 2
  bits = lanes_of<S> == 16 ? _mm512_movepi32_mask((__m512i)holds) : _mm512_movepi64_mask((__m512i)holds);
#elif GEO_SIMD_LEVEL == 1
  bits = lanes_of<S> == 8 ? _mm256_movemask_ps((__m256)holds) : _mm256_movemask_pd((__m256d)holds);
#else
  GEO_UNROLL(16) for (int l = 0; l < lanes_of<S>; ++l) bits |= uint32_t(holds[l] & 1) << l;
#endif
  return bits;
}

// v where `where` holds, else w.
template <class I, class V>
GEO_INLINE V select(I where, V v, V w) {
  return where ? v : w;
}

struct Sum {
  static constexpr float identity = 0;
  static constexpr bool kEmptyIsZero = false;  // it is the identity
  template <class V>
  GEO_INLINE V apply(V a, V b) {
    return a + b;
  }
};
struct Product {
  static constexpr float identity = 1;
  static constexpr bool kEmptyIsZero = false;
  template <class V>
  GEO_INLINE V apply(V a, V b) {
    return a * b;
  }
};
// b where it takes over from a, which comes before it: the first extreme stays, the first NaN stays for good.
struct Minimum {
  static constexpr float identity = __builtin_inff();
  static constexpr bool kEmptyIsZero = true;
  template <class V>
  GEO_INLINE auto takes_over(V b, V a) {
    return ~(b >= a) & (a == a);
  }
  template <class V>
  GEO_INLINE V apply(V a, V b) {
    return select(takes_over(b, a), b, a);
  }
};
struct Maximum {
  static constexpr float identity = -__builtin_inff();
  static constexpr bool kEmptyIsZero = true;
  template <class V>
  GEO_INLINE auto takes_over(V b, V a) {
    return ~(b <= a) & (a == a);
  }
  template <class V>
  GEO_INLINE V apply(V a, V b) {
    return select(takes_over(b, a), b, a);
  }
};

// The first n lanes, the others neutral.
template <class Op, class S>
GEO_INLINE Vec<S> load_or_neutral(const S* p, int n) {
  const Vec<S> v = load_first(p, n);
  if (Op::identity == 0) return v;
  return select(lane_numbers<S>() < Lane<S>(n), v, Vec<S>{} + Acc<S>(Op::identity));
}

// -- indices that are looked at before they are used -------------------------------------------------------------------
constexpr int64_t kGroup = 64;  // rows at a time

// The first of index[begin, end) that is not in [0, size), or `end`.
GEO_INLINE int64_t first_bad(const int64_t* index, int64_t begin, int64_t end, int64_t size) {
  typedef vec<uint64_t> Vec64;
  Vec64::type bad{};
  int64_t e = begin;
  for (; e + Vec64::lanes <= end; e += Vec64::lanes) {
    const Vec64::type v = *reinterpret_cast<const Vec64::loose*>(index + e);
    bad |= (Vec64::type)(v >= uint64_t(size));
  }
  uint64_t any = 0;
  GEO_UNROLL(8) for (int l = 0; l < Vec64::lanes; ++l) any |= bad[l];
  for (; e < end; ++e) any |= uint64_t(index[e]) >= uint64_t(size);
  if (__builtin_expect(any != 0, 0))
    for (e = begin; e < end; ++e)
      if (uint64_t(index[e]) >= uint64_t(size)) return e;
  return end;
}

// -- packed rows -------------------------------------------------------------------------------------------------------
template <class S>
GEO_INLINE bool packs(const SegmentArgs& a) {
  return !a.perm && 2 * a.width <= lanes_of<S>;
}

// `step` lanes hold whole rows. Fold k brings the rows of the upper half of those left to the lower half; lanes past the
// end take the last lane, which is neutral, or, where all lanes hold rows, is not looked at again.
template <class S>
struct Packing {
  int width, rows, step, folds;
  Int<S> from[kMaxFolds];
  Int<S> repeat;  // the lane of the first row with the same column
  Int<S> row;     // that a lane holds
};
template <class S>
GEO_INLINE Packing<S> packing(int64_t width) {
  constexpr int L = lanes_of<S>;
  Packing<S> p{};
  p.width = int(width);
  p.rows = L / p.width;
  p.step = p.rows * p.width;
  for (int half = L / 2; half; half /= 2) {
    if (half >= p.rows) continue;
    for (int l = 0; l < L; ++l) p.from[p.folds][l] = l + half * p.width < p.step ? l + half * p.width : L - 1;
    ++p.folds;
  }
  for (int l = 0; l < L; ++l) {
    p.repeat[l] = l % p.width;
    p.row[l] = l < p.step ? l / p.width : 1 << 30;
  }
  return p;
}
template <class Op, class S>
GEO_INLINE Vec<S> fold(const Packing<S>& pack, Vec<S> v) {
  GEO_UNROLL(4) for (int k = 0; k < kMaxFolds; ++k)
    if (k < pack.folds) v = Op::apply(v, Vec<S>(__builtin_shuffle(v, pack.from[k])));
  return v;
}

// The lesser, without a branch: lengths of segments are hard to predict.
GEO_INLINE int at_most(int64_t n, int step) {
  const int64_t over = n - step;
  return int(step + (over & over >> 63));
}

// All rows of a segment in one vector, not folded.
template <class Op, class S>
GEO_INLINE Vec<S> stack_packed(int step, const S* p, int64_t num) {
  const int first = at_most(num, step);
  for (int line = 0; line < 2; ++line) prefetch(reinterpret_cast<const char*>(p) + 1024 + 64 * line);
  Vec<S> v = load_or_neutral<Op>(p, first);
  v = Op::apply(v, load_or_neutral<Op>(p + first, at_most(num - first, step)));
  for (int64_t c = 2 * step; c < num; c += step) v = Op::apply(v, load_or_neutral<Op>(p + c, at_most(num - c, step)));
  return v;
}
template <class Op, class S>
GEO_INLINE Vec<S> reduce_packed(const Packing<S>& pack, const S* p, int64_t num) {
  return fold<Op>(pack, stack_packed<Op>(pack.step, p, num));
}

// Of each run of 2 * half lanes: the lower halves of two vectors, and the upper halves of both.
template <class S, int half>
struct Halves {
  Lane<S> low[lanes_of<S>]{}, high[lanes_of<S>]{};
  constexpr Halves() {
    for (int l = 0; l < lanes_of<S>; ++l) {
      low[l] = l & half ? lanes_of<S> + l - half : l;
      high[l] = low[l] + half;
    }
  }
};
// Lane s: the fold of v[s]. The additions are those of fold() with one column, at a third of its shuffles.
template <class Op, class S, int half = lanes_of<S> / 2>
GEO_INLINE Vec<S> fold_all(Vec<S>* v) {
  static constexpr Halves<S, half> halves;
  Int<S> low, high;
  memcpy(&low, halves.low, sizeof(low));
  memcpy(&high, halves.high, sizeof(high));
  GEO_UNROLL(8) for (int s = 0; s < half; ++s)
    v[s] = Op::apply(Vec<S>(__builtin_shuffle(v[s], v[s + half], low)),
                     Vec<S>(__builtin_shuffle(v[s], v[s + half], high)));
  if constexpr (half > 1)
    return fold_all<Op, S, half / 2>(v);
  else
    return v[0];
}

// The row (counted from 0) that first attains `value`.
template <class Op, class S>
GEO_INLINE Int<S> find_packed(const Packing<S>& pack, const S* p, int64_t num, Vec<S> value) {
  const Vec<S> wanted = __builtin_shuffle(value, pack.repeat);
  Int<S> row = pack.row, at = Int<S>{} + Lane<S>(1 << 30);
  for (int64_t c = 0; c < num; c += pack.step) {
    const Vec<S> v = load_or_neutral<Op>(p + c, at_most(num - c, pack.step));
    const auto hit = (v == wanted) | (v != v);  // a NaN among the rows is the extreme
    at = select(hit & (row < at), row, at);
    row += Lane<S>(pack.rows);
  }
  GEO_UNROLL(4) for (int k = 0; k < kMaxFolds; ++k) {
    if (k >= pack.folds) continue;
    const Int<S> other = __builtin_shuffle(at, pack.from[k]);
    at = select(other < at, other, at);
  }
  return at;
}
// The same for a single column, where lanes are rows: one of them attains the value.
template <class Op, class S>
GEO_INLINE int64_t find_in_column(const S* p, int64_t num, Acc<S> value) {
  constexpr int L = lanes_of<S>;
  for (int64_t c = 0;; c += 2 * L) {
    const int n = at_most(num - c, 2 * L), first = at_most(n, L);
    const Vec<S> v = load_or_neutral<Op>(p + c, first), w = load_or_neutral<Op>(p + c + first, n - first);
    const uint32_t hits = lane_bits<S>((v == value) | (v != v)) | lane_bits<S>((w == value) | (w != w)) << L;
    if (hits) return c + __builtin_ctz(hits);
  }
}

// -- rows one by one ---------------------------------------------------------------------------------------------------
// Each tile goes over all rows. The first one prefetches whole rows ahead, also those of the segments that follow.
struct Ahead {
  int64_t rows, bytes;
};
template <class S>
GEO_INLINE Ahead ahead_of(const SegmentArgs& a) {
  const int64_t bytes = a.width * int64_t(sizeof(S)), rows = 4096 / (bytes + 1);
  return {rows < 2 ? 2 : rows > 32 ? 32 : rows, bytes < 4096 ? bytes : 4096};
}
template <class S>
GEO_INLINE void prefetch_row(const SegmentArgs& a, int64_t place, int64_t bytes) {
  if (place >= a.num_rows) return;
  const int64_t e = a.perm ? a.perm[place] : place;
  if (uint64_t(e) >= uint64_t(a.num_rows)) return;
  const char* p = reinterpret_cast<const char*>(static_cast<const S*>(a.src) + e * a.width);
  for (int64_t b = 0; b < bytes; b += 64) prefetch(p + b);
  prefetch(p + bytes - 1);
}
template <class S>
GEO_INLINE const S* row_at(const SegmentArgs& a, int64_t place, int64_t f) {
  return static_cast<const S*>(a.src) + (a.perm ? a.perm[place] : place) * a.width + f;
}

Outcome check_rows(const SegmentArgs& a, int64_t begin, int64_t end) {
  const int64_t bad = a.perm ? first_bad(a.perm, begin, end, a.num_rows) : end;
  return bad < end ? Outcome{kEdgePerm, bad} : kFine;
}

// Columns f ... f + N vectors, of which the last has n lanes, to `to` divided by `divisor`.
template <class S, class Op, int N, class Out>
GEO_INLINE void reduce_tile(const SegmentArgs& a, int64_t begin, int64_t end, int64_t f, int n, Out* to, Acc<S> divisor,
                            const Ahead& ahead) {
  constexpr int L = lanes_of<S>;
  Vec<S> sum[N];
  GEO_UNROLL(16) for (int j = 0; j < N; ++j) sum[j] = Vec<S>{} + Acc<S>(Op::identity);
  GEO_UNROLL(1) for (int64_t k = begin; k < end; ++k) {
    const S* p = row_at<S>(a, k, f);
    if (f == 0) prefetch_row<S>(a, k + ahead.rows, ahead.bytes);
    GEO_UNROLL(16) for (int j = 0; j < N; ++j)
      sum[j] = Op::apply(sum[j], N == 1 ? load_first(p, n) : load(p + j * L));
  }
  GEO_UNROLL(16) for (int j = 0; j < N; ++j) {
    if (divisor != 1) sum[j] /= divisor;
    if (N == 1)
      store_first(to + f, sum[j], n);
    else
      store(to + f + j * L, sum[j]);
  }
}
template <class S, class Op, class Out>
GEO_INLINE void reduce_wide(const SegmentArgs& a, int64_t begin, int64_t end, Out* to, Acc<S> divisor) {
  constexpr int L = lanes_of<S>;
  const Ahead ahead = ahead_of<S>(a);
  int64_t f = 0;
  for (; f + kTile * L <= a.width; f += kTile * L) reduce_tile<S, Op, kTile>(a, begin, end, f, L, to, divisor, ahead);
  for (; f + 4 * L <= a.width; f += 4 * L) reduce_tile<S, Op, 4>(a, begin, end, f, L, to, divisor, ahead);
  for (; f + 2 * L <= a.width; f += 2 * L) reduce_tile<S, Op, 2>(a, begin, end, f, L, to, divisor, ahead);
  for (; f < a.width; f += L) reduce_tile<S, Op, 1>(a, begin, end, f, at_most(a.width - f, L), to, divisor, ahead);
}

// Likewise the extremes and their rows; begin < end.
template <class S, class Op, int N>
GEO_INLINE void extreme_tile(const SegmentArgs& a, int64_t begin, int64_t end, int64_t f, int n, S* to, int64_t* arg,
                             const Ahead& ahead) {
  constexpr int L = lanes_of<S>;
  Vec<S> best[N];
  Int<S> at[N];
  const S* p = row_at<S>(a, begin, f);
  GEO_UNROLL(16) for (int j = 0; j < N; ++j) {
    best[j] = N == 1 ? load_first(p, n) : load(p + j * L);
    at[j] = Int<S>{};
  }
  if (f == 0) prefetch_row<S>(a, begin + ahead.rows, ahead.bytes);
  GEO_UNROLL(1) for (int64_t k = begin + 1; k < end; ++k) {
    p = row_at<S>(a, k, f);
    if (f == 0) prefetch_row<S>(a, k + ahead.rows, ahead.bytes);
    const Int<S> row = Int<S>{} + Lane<S>(k - begin);
    GEO_UNROLL(16) for (int j = 0; j < N; ++j) {
      const Vec<S> v = N == 1 ? load_first(p, n) : load(p + j * L);
      const auto better = Op::takes_over(v, best[j]);
      best[j] = select(better, v, best[j]);
      at[j] = select(better, row, at[j]);
    }
  }
  Lane<S> rows[N * L];
  GEO_UNROLL(16) for (int j = 0; j < N; ++j) {
    if (N == 1)
      store_first(to + f, best[j], n);
    else
      store(to + f + j * L, best[j]);
    memcpy(rows + j * L, &at[j], sizeof(at[j]));
  }
  const int num = N == 1 ? n : N * L;
  if (a.perm)
    for (int l = 0; l < num; ++l) arg[f + l] = a.perm[begin + rows[l]];
  else
    for (int l = 0; l < num; ++l) arg[f + l] = begin + rows[l];
}
template <class S, class Op>
GEO_INLINE void extreme_wide(const SegmentArgs& a, int64_t begin, int64_t end, S* to, int64_t* arg) {
  constexpr int L = lanes_of<S>;
  const Ahead ahead = ahead_of<S>(a);
  int64_t f = 0;
  for (; f + kExtreme * L <= a.width; f += kExtreme * L)
    extreme_tile<S, Op, kExtreme>(a, begin, end, f, L, to, arg, ahead);
  for (; f + 2 * L <= a.width; f += 2 * L) extreme_tile<S, Op, 2>(a, begin, end, f, L, to, arg, ahead);
  for (; f < a.width; f += L) extreme_tile<S, Op, 1>(a, begin, end, f, at_most(a.width - f, L), to, arg, ahead);
}

// -- segments ----------------------------------------------------------------------------------------------------------
// One column: as many segments at a time as a vector has lanes.
template <class S, class Op>
GEO_INLINE void reduce_column(const SegmentArgs& a, int64_t first, int64_t last) {
  constexpr int L = lanes_of<S>;
  const S* src = static_cast<const S*>(a.src);
  S* out = static_cast<S*>(a.out);
  for (int64_t i = first; i < last; i += L) {
    const int n = at_most(last - i, L);
    Vec<S> v[L];
    GEO_UNROLL(16) for (int s = 0; s < L; ++s) {
      const int64_t k = i + (s < n ? s : n - 1), begin = a.ptr[k];
      v[s] = stack_packed<Op>(L, src + begin, a.ptr[k + 1] - begin);
    }
    Vec<S> result = fold_all<Op, S>(v);
    if (a.mean || Op::kEmptyIsZero) {
      Acc<S> lengths[L] = {};
      for (int s = 0; s < n; ++s) lengths[s] = Acc<S>(a.ptr[i + s + 1] - a.ptr[i + s]);
      const Vec<S> length = load(lengths);
      if (a.mean) result /= select(length > Acc<S>(1), length, Vec<S>{} + Acc<S>(1));
      if (Op::kEmptyIsZero) result = select(length > Acc<S>(0), result, Vec<S>{});
    }
    store_first(out + i, result, n);
  }
}
template <class S, class Op>
Outcome reduce(const SegmentArgs& a, int64_t first, int64_t last) {
  S* out = static_cast<S*>(a.out);
  if (packs<S>(a)) {
    if (a.width == 1) {
      reduce_column<S, Op>(a, first, last);
      return kFine;
    }
    const Packing<S> pack = packing<S>(a.width);
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = a.ptr[i], length = a.ptr[i + 1] - begin;
      Vec<S> v = reduce_packed<Op>(pack, static_cast<const S*>(a.src) + begin * a.width, length * a.width);
      if (a.mean) v /= Acc<S>(length > 1 ? length : 1);
      store_first(out + i * a.width, Op::kEmptyIsZero && !length ? Vec<S>{} : v, pack.width);
    }
    return kFine;
  }
  for (int64_t i = first; i < last; ++i) {
    const int64_t begin = a.ptr[i], end = a.ptr[i + 1];
    const Outcome outcome = check_rows(a, begin, end);
    if (outcome.fault != kNoFault) return outcome;
    S* to = out + i * a.width;
    if (Op::kEmptyIsZero && begin == end)
      memset(to, 0, size_t(a.width) * sizeof(S));
    else
      reduce_wide<S, Op>(a, begin, end, to, Acc<S>(a.mean && end - begin > 1 ? end - begin : 1));
  }
  return kFine;
}
template <class S, class Op>
Outcome reduce_piece(const SegmentArgs& a, int64_t begin, int64_t end, void* row, int64_t*) {
  Acc<S>* to = static_cast<Acc<S>*>(row);
  if (packs<S>(a)) {
    const Packing<S> pack = packing<S>(a.width);
    const S* p = static_cast<const S*>(a.src) + begin * a.width;
    store_first(to, reduce_packed<Op>(pack, p, (end - begin) * a.width), pack.width);
    return kFine;
  }
  const Outcome outcome = check_rows(a, begin, end);
  if (outcome.fault == kNoFault) reduce_wide<S, Op>(a, begin, end, to, Acc<S>(1));
  return outcome;
}

template <class S, class Op>
GEO_INLINE void extreme_packed(const SegmentArgs& a, const Packing<S>& pack, int64_t begin, int64_t end, S* to,
                               int64_t* arg) {
  const S* p = static_cast<const S*>(a.src) + begin * a.width;
  const int64_t num = (end - begin) * a.width;
  const Vec<S> value = reduce_packed<Op>(pack, p, num);
  if (pack.width == 1) {
    const int64_t row = find_in_column<Op>(p, num, value[0]);
    *to = p[row];  // not `value`, which may be a later zero of the other sign
    *arg = begin + row;
    return;
  }
  const Int<S> at = find_packed<Op>(pack, p, num, value);
  Lane<S> row[lanes_of<S>];
  memcpy(row, &at, sizeof(at));
  for (int f = 0; f < pack.width; ++f) {
    to[f] = p[row[f] * pack.width + f];
    arg[f] = begin + row[f];
  }
}
template <class S, class Op>
Outcome extreme(const SegmentArgs& a, int64_t first, int64_t last) {
  const bool packed = packs<S>(a);
  const Packing<S> pack = packing<S>(packed ? a.width : 1);
  for (int64_t i = first; i < last; ++i) {
    const int64_t begin = a.ptr[i], end = a.ptr[i + 1];
    S* to = static_cast<S*>(a.out) + i * a.width;
    int64_t* arg = a.arg + i * a.width;
    if (begin == end) {
      for (int64_t f = 0; f < a.width; ++f) {
        to[f] = S{};
        arg[f] = a.num_rows;
      }
    } else if (packed) {
      extreme_packed<S, Op>(a, pack, begin, end, to, arg);
    } else {
      const Outcome outcome = check_rows(a, begin, end);
      if (outcome.fault != kNoFault) return outcome;
      extreme_wide<S, Op>(a, begin, end, to, arg);
    }
  }
  return kFine;
}
template <class S, class Op>
Outcome extreme_piece(const SegmentArgs& a, int64_t begin, int64_t end, void* row, int64_t* arg) {
  if (packs<S>(a)) {
    extreme_packed<S, Op>(a, packing<S>(a.width), begin, end, static_cast<S*>(row), arg);
    return kFine;
  }
  const Outcome outcome = check_rows(a, begin, end);
  if (outcome.fault == kNoFault) extreme_wide<S, Op>(a, begin, end, static_cast<S*>(row), arg);
  return outcome;
}

// -- rows taken where they belong --------------------------------------------------------------------------------------
constexpr int64_t kLookAhead = 16;  // rows
constexpr int64_t kNear = 1 << 20;  // bytes that stay in the cache without being asked for

// Bring the line of a row of `bytes` bytes to come; prefetching what is not there does no harm.
GEO_INLINE void prefetch_target(const ScatterArgs& a, const void* to, int64_t e, int64_t bytes) {
  if (e >= a.num_rows) return;
  const uintptr_t p = reinterpret_cast<uintptr_t>(to) + uintptr_t(a.index[e]) * uintptr_t(bytes);
  for (int64_t b = 0; b < bytes; b += 64) prefetch(reinterpret_cast<const void*>(p + uintptr_t(b)));
}

template <class S, class Op, int Width, bool kFar>  // 0: any
GEO_INLINE Outcome take_rows_to(const ScatterArgs& args, int64_t begin, int64_t end, Acc<S>* out, int32_t* count) {
  const ScatterArgs a = args;  // a copy, which stores to out cannot change
  constexpr int L = lanes_of<S>;
  const int64_t width = Width ? Width : a.width;
  const S* p = static_cast<const S*>(a.src) + begin * width;
  for (int64_t first = begin; first < end; first += kGroup) {
    const int64_t last = first + kGroup < end ? first + kGroup : end;
    if (const int64_t bad = first_bad(a.index, first, last, a.size); bad < last) return {kDstIndex, bad};
    GEO_UNROLL(4) for (int64_t e = first; e < last; ++e, p += width) {
      Acc<S>* to = out + a.index[e] * width;
      if (kFar) prefetch_target(a, out, e + kLookAhead, width * int64_t(sizeof(Acc<S>)));
      if (Width) {
        GEO_UNROLL(16) for (int c = 0; c < Width; ++c) to[c] = Op::apply(to[c], Acc<S>(widen(p[c])));
        continue;
      }
      int64_t c = 0;
      for (; c + L <= width; c += L) store(to + c, Op::apply(load(to + c), load(p + c)));
      if (c < width) {
        const int n = int(width - c);
        store_first(to + c, Op::apply(load_first(to + c, n), load_first(p + c, n)), n);
      }
    }
    if (count)
      for (int64_t e = first; e < last; ++e) ++count[a.index[e]];
  }
  return kFine;
}
template <class S, class Op, int Width>
GEO_INLINE Outcome take_near_or_far(const ScatterArgs& a, int64_t begin, int64_t end, Acc<S>* out, int32_t* count) {
  if (a.size * a.width * int64_t(sizeof(Acc<S>)) <= kNear) return take_rows_to<S, Op, Width, false>(a, begin, end, out, count);
  return take_rows_to<S, Op, Width, true>(a, begin, end, out, count);
}
template <class S, class Op>
Outcome take_in_place(const ScatterArgs& a, int64_t begin, int64_t end, void* out, int32_t* count) {
  Acc<S>* to = static_cast<Acc<S>*>(out);
  switch (a.width) {
    case 1: return take_near_or_far<S, Op, 1>(a, begin, end, to, count);
    case 2: return take_near_or_far<S, Op, 2>(a, begin, end, to, count);
    case 3: return take_near_or_far<S, Op, 3>(a, begin, end, to, count);
    case 4: return take_near_or_far<S, Op, 4>(a, begin, end, to, count);
    case 8: return take_near_or_far<S, Op, 8>(a, begin, end, to, count);
    default: return take_near_or_far<S, Op, 0>(a, begin, end, to, count);
  }
}

// Numbers in the order of the values, NaN last of all; none is 0. Zeros of both signs are one value.
GEO_INLINE vbits32 ranks(vfloat v, bool largest) {
  const vbits32 u = (vbits32)(v + 0.0f), sign = (vbits32)((vec<int32_t>::type)u >> 31);
  const vbits32 up = u ^ (sign | 0x80000000u);
  return (largest ? up : ~up) | (vbits32)(v != v);
}
template <class S, int Width>
GEO_INLINE Outcome rank_rows(const ScatterArgs& args, int64_t begin, int64_t end, bool largest, uint64_t* best) {
  const ScatterArgs a = args;
  constexpr int L = lanes_of<S>;
  const S* p = static_cast<const S*>(a.src) + begin * Width;
  const bool far = a.size * Width * 8 > kNear;
  uint32_t rank[kGroup * Width];
  for (int64_t first = begin; first < end; first += kGroup, p += kGroup * Width) {
    const int64_t last = first + kGroup < end ? first + kGroup : end, num = (last - first) * Width;
    if (const int64_t bad = first_bad(a.index, first, last, a.size); bad < last) return {kDstIndex, bad};
    for (int64_t c = 0; c < num; c += L) {
      const vbits32 r = ranks(load_first(p + c, at_most(num - c, L)), largest);
      memcpy(rank + c, &r, sizeof(r));
    }
    for (int64_t e = first; e < last; ++e) {
      uint64_t* to = best + a.index[e] * Width;
      if (far) prefetch_target(a, best, e + kLookAhead, Width * 8);
      const uint64_t early = uint32_t(~uint64_t(e - begin));
      GEO_UNROLL(4) for (int c = 0; c < Width; ++c) {
        const uint64_t key = uint64_t(rank[(e - first) * Width + c]) << 32 | early;
        to[c] = to[c] > key ? to[c] : key;
      }
    }
  }
  return kFine;
}
template <class S>
Outcome rank(const ScatterArgs& a, int64_t begin, int64_t end, bool largest, uint64_t* best) {
  if constexpr (sizeof(S) < 8) {
    switch (a.width) {
      case 1: return rank_rows<S, 1>(a, begin, end, largest, best);
      case 2: return rank_rows<S, 2>(a, begin, end, largest, best);
      case 3: return rank_rows<S, 3>(a, begin, end, largest, best);
      case 4: return rank_rows<S, 4>(a, begin, end, largest, best);
    }
  }
  return kFine;  // not called
}

#define GEO_TABLE(name, S)                                                                                           \
  const SegmentTable name = {{reduce<S, Sum>, reduce<S, Product>, reduce<S, Minimum>, reduce<S, Maximum>,            \
                              extreme<S, Minimum>, extreme<S, Maximum>},                                             \
                             {reduce_piece<S, Sum>, reduce_piece<S, Product>, reduce_piece<S, Minimum>,              \
                              reduce_piece<S, Maximum>, extreme_piece<S, Minimum>, extreme_piece<S, Maximum>},       \
                             {take_in_place<S, Sum>, take_in_place<S, Product>}, rank<S>};

// -- copies of rows ----------------------------------------------------------------------------------------------------
template <int N>
GEO_INLINE void copy_block(char* to, const char* from) {
  memcpy(to, from, N);
}
// Two blocks that may overlap.
template <int N>
GEO_INLINE void copy_ends(char* to, const char* from, int64_t bytes) {
  copy_block<N>(to, from);
  copy_block<N>(to + bytes - N, from + bytes - N);
}
typedef float vbytes __attribute__((vector_size(GEO_VECTOR_BYTES)));
template <int Bytes, bool Stream>  // 0: any
GEO_INLINE void copy_row(char* to, const char* from, int64_t bytes) {
  constexpr int V = GEO_VECTOR_BYTES;
  if (Bytes) {
    copy_block<Bytes ? Bytes : 1>(to, from);
  } else if (Stream) {  // whole vectors, aligned
    for (int64_t b = 0; b < bytes; b += V)
      stream(reinterpret_cast<float*>(to + b), load(reinterpret_cast<const float*>(from + b)));
  } else if (bytes >= V) {
    int64_t b = 0;
    for (; b + V <= bytes; b += V) copy_block<V>(to + b, from + b);
    if (b < bytes) copy_block<V>(to + bytes - V, from + bytes - V);
  } else if (bytes >= 32) {
    copy_ends<32>(to, from, bytes);
  } else if (bytes >= 16) {
    copy_ends<16>(to, from, bytes);
  } else if (bytes >= 8) {
    copy_ends<8>(to, from, bytes);
  } else if (bytes >= 4) {
    copy_ends<4>(to, from, bytes);
  } else if (bytes >= 2) {
    copy_ends<2>(to, from, bytes);
  } else {
    copy_block<1>(to, from);
  }
}

template <int Bytes, bool Stream>
Outcome take_rows(const RowsArgs& args, int64_t begin, int64_t end) {
  const RowsArgs a = args;  // a copy, which stores to bytes cannot change
  const int64_t bytes = Bytes ? Bytes : a.bytes;
  for (int64_t first = begin; first < end; first += kGroup) {
    const int64_t last = first + kGroup < end ? first + kGroup : end;
    if (const int64_t bad = first_bad(a.index, first, last, a.num_segments); bad < last) return {kDstIndex, bad};
    for (int64_t e = first; e < last; ++e) copy_row<Bytes, Stream>(a.to + e * bytes, a.from + a.index[e] * bytes, bytes);
  }
  if (Stream) stream_fence();
  return kFine;
}

template <int Bytes, bool Stream>
Outcome spread_rows(const RowsArgs& args, int64_t begin, int64_t end) {
  const RowsArgs a = args;  // a copy, which stores to bytes cannot change
  const int64_t bytes = Bytes ? Bytes : a.bytes;
  int64_t low = 0, high = a.num_segments;  // the last segment that starts at or before `begin`
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (a.ptr[middle] <= begin)
      low = middle;
    else
      high = middle;
  }
  for (int64_t k = begin; k < end; ++low) {
    const int64_t stop = a.ptr[low + 1] < end ? a.ptr[low + 1] : end;
    const char* from = a.from + low * bytes;
    if (a.perm) {
      for (; k < stop; ++k) {
        if (uint64_t(a.perm[k]) >= uint64_t(a.num_rows)) return {kEdgePerm, k};
        copy_row<Bytes, false>(a.to + a.perm[k] * bytes, from, bytes);
      }
      continue;
    }
    if (Bytes && Bytes <= 8 && k < stop) {  // whole vectors, where they fit; what comes next overwrites their ends
      constexpr int V = GEO_VECTOR_BYTES, B = Bytes ? Bytes : 1;
      char repeated[V];
      GEO_UNROLL(32) for (int b = 0; b < V; b += B) copy_block<B>(repeated + b, from);
      for (; k < stop && k + V / B <= end; k += V / B) copy_block<V>(a.to + k * B, repeated);
      if (k > stop) k = stop;
    }
    for (; k < stop; ++k) copy_row<Bytes, Stream>(a.to + k * bytes, from, bytes);
  }
  if (Stream) stream_fence();
  return kFine;
}

Outcome take(const RowsArgs& a, int64_t begin, int64_t end) {
  if (a.stream) return take_rows<0, true>(a, begin, end);
  switch (a.bytes) {
    case 1: return take_rows<1, false>(a, begin, end);
    case 2: return take_rows<2, false>(a, begin, end);
    case 4: return take_rows<4, false>(a, begin, end);
    case 8: return take_rows<8, false>(a, begin, end);
    case 16: return take_rows<16, false>(a, begin, end);
    case 32: return take_rows<32, false>(a, begin, end);
    default: return take_rows<0, false>(a, begin, end);
  }
}
Outcome spread(const RowsArgs& a, int64_t begin, int64_t end) {
  if (a.stream) return spread_rows<0, true>(a, begin, end);
  switch (a.bytes) {
    case 2: return spread_rows<2, false>(a, begin, end);
    case 4: return spread_rows<4, false>(a, begin, end);
    case 8: return spread_rows<8, false>(a, begin, end);
    case 16: return spread_rows<16, false>(a, begin, end);
    case 32: return spread_rows<32, false>(a, begin, end);
    default: return spread_rows<0, false>(a, begin, end);
  }
}

}  // namespace

GEO_TABLE(segment_float, float)
GEO_TABLE(segment_double, double)
GEO_TABLE(segment_bfloat16, bfloat16)
GEO_TABLE(segment_float16, float16)
const RowsTable segment_rows = {take, spread};

}  // namespace GEO_SIMD_NAMESPACE
}  // namespace geo
