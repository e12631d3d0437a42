// Leaf of gru_merge: panels of pairs whose rows are gathered once. Of some pairs and one vector of features, four sums at a
// time stay in registers along the depth of the products, and the gates follow from them there.
#include "../gru_merge_table.h"

#include "../../gru_merge.h"
#include "exponentials.h"
#include "products.h"

namespace geo {

namespace GEO_SIMD_NAMESPACE {
namespace {

constexpr int kTile = 6;                         // rows of a tile of products
constexpr int kRows = kRegisters == 32 ? 6 : 3;  // pairs of a tile of gates
constexpr int kGroup = kRegisters == 32 ? 3 : 1;  // pairs whose gates are computed side by side: registers are few
static_assert(kMergePairs % kTile == 0 && kTile % kRows == 0 && kRows % kGroup == 0);

// Both ways of some pairs, side by side: a gate is a chain of operations that wait for each other. The compiler would put
// one chain behind the other again, but sums stay where an asm stands.
template <class T>
struct Ways {
  using V = typename vec<T>::type;
  static constexpr int count = 2 * kGroup;
  V way[count];
};
template <class V>
GEO_INLINE V settled(V v) {
#if GEO_SIMD_LEVEL == 2
  asm("" : "+v"(v));
#endif
  return v;
}
// Ways whose i-th one is the value
#define GEO_WAYS(value)                                                      \
  Ways<T> out;                                                               \
  GEO_UNROLL(6) for (int i = 0; i < Ways<T>::count; ++i) out.way[i] = value; \
  return out

template <class T>
GEO_INLINE Ways<T> operator+(const Ways<T>& a, const Ways<T>& b) {
  GEO_WAYS(settled(a.way[i] + b.way[i]));
}
template <class T>
GEO_INLINE Ways<T> operator-(const Ways<T>& a, const Ways<T>& b) {
  GEO_WAYS(settled(a.way[i] - b.way[i]));
}
template <class T>
GEO_INLINE Ways<T> operator*(const Ways<T>& a, const Ways<T>& b) {
  GEO_WAYS(a.way[i] * b.way[i]);
}
template <class T>
GEO_INLINE Ways<T> operator+(const Ways<T>& a, T b) {
  GEO_WAYS(settled(a.way[i] + b));
}
template <class T>
GEO_INLINE Ways<T> operator-(const Ways<T>& a, T b) {
  GEO_WAYS(settled(a.way[i] - b));
}
template <class T>
GEO_INLINE Ways<T> operator*(const Ways<T>& a, T b) {
  GEO_WAYS(a.way[i] * b);
}

// GRUMath of them
template <class V, class T>
GEO_INLINE V cut(V x, T least, T most) {
  const V low = V{} + least, high = V{} + most, above = low > x ? low : x;
  return high < above ? high : above;
}
template <class T>
GEO_INLINE Ways<T> reciprocal(const Ways<T>& d) {
  GEO_WAYS(settled(T(1) / d.way[i]));
}
#if GEO_SIMD_LEVEL == 2
GEO_INLINE vfloat cut(vfloat x, float least, float most) {  // both give the second operand where one is NaN
  const __m512 above = _mm512_maskz_max_ps((__mmask16)-1, (__m512)(vfloat{} + least), (__m512)x);
  return (vfloat)_mm512_maskz_min_ps((__mmask16)-1, (__m512)(vfloat{} + most), above);
}
GEO_INLINE vdouble cut(vdouble x, double least, double most) {
  const __m512d above = _mm512_maskz_max_pd((__mmask8)-1, (__m512d)(vdouble{} + least), (__m512d)x);
  return (vdouble)_mm512_maskz_min_pd((__mmask8)-1, (__m512d)(vdouble{} + most), above);
}
GEO_INLINE Ways<float> near_reciprocal(const Ways<float>& d) {
  using T = float;
  GEO_WAYS(settled((vfloat)_mm512_maskz_rcp14_ps((__mmask16)-1, (__m512)d.way[i])));
}
GEO_INLINE Ways<float> reciprocal(const Ways<float>& d) {  // 14 bits, and twice as many by a step of Newton's
  const Ways<float> near = near_reciprocal(d);
  return near + near * (Ways<float>{} + 1.0f - d * near);
}
#endif

}  // namespace
}  // namespace GEO_SIMD_NAMESPACE

template <class T>
struct GRUMath<T, GEO_SIMD_NAMESPACE::Ways<T>> {
  template <class U>
  using Ways = GEO_SIMD_NAMESPACE::Ways<U>;
  using V = typename Ways<T>::V;
  GEO_INLINE Ways<T> times_power(const Ways<T>& v, const Ways<T>& n, const Ways<T>& shifted) {
    GEO_WAYS(GEO_SIMD_NAMESPACE::settled(TimesPowerOfTwo<T, V>::of(v.way[i], n.way[i], shifted.way[i])));
  }
  GEO_INLINE Ways<T> power(const Ways<T>& shifted) { GEO_WAYS(power_of_two<T>(shifted.way[i])); }
  GEO_INLINE Ways<T> cut(const Ways<T>& x, T least, T most) {
    GEO_WAYS(GEO_SIMD_NAMESPACE::settled(GEO_SIMD_NAMESPACE::cut(x.way[i], least, most)));
  }
  GEO_INLINE Ways<T> reciprocal(const Ways<T>& d) { return GEO_SIMD_NAMESPACE::reciprocal(d); }
};

namespace GEO_SIMD_NAMESPACE {
namespace {

// sum[i] += x[i] @ (w0, w1) and y[i] @ (w2, w3), where kSame holds (w0, w1) again
template <bool kSame, class T>
GEO_INLINE void add_columns(typename vec<T>::type (&sum)[kRows][4], const T* x, const T* y, int64_t pitch, int64_t depth,
                            const T* weight) {
  using V = typename vec<T>::type;
  constexpr int64_t L = vec<T>::lanes, kColumns = kSame ? 2 : 4;
  GEO_UNROLL(1) for (int64_t d = 0; d < depth; ++d, weight += kColumns * L) {
    V w[4];
    GEO_UNROLL(4) for (int k = 0; k < 4; ++k) w[k] = load(weight + k % kColumns * L);
    GEO_UNROLL(6) for (int i = 0; i < kRows; ++i) {
      const T left = x[i * pitch + d], right = y[i * pitch + d];
      sum[i][0] += left * w[0];
      sum[i][1] += left * w[1];
      sum[i][2] += right * w[2];
      sum[i][3] += right * w[3];
    }
  }
}

// y[r] += x[r] @ weight for `rows` rows, filled up to whole tiles.
template <class T, int NC>
void add_product(const T* x, int64_t x_pitch, int64_t depth, const T* weight, T* y, int64_t pitch, int64_t rows) {
  using V = typename vec<T>::type;
  constexpr int64_t L = vec<T>::lanes;
  for (int64_t r = 0; r < rows; r += kTile, x += kTile * x_pitch, y += kTile * pitch) {
    V sum[kTile][NC];
    GEO_UNROLL(6) for (int i = 0; i < kTile; ++i) {
      GEO_UNROLL(4) for (int j = 0; j < NC; ++j) sum[i][j] = load(y + i * pitch + j * L);
    }
    const T* w = weight;
    GEO_UNROLL(1) for (int64_t d = 0; d < depth; ++d, w += pitch) {
      V column[NC];
      GEO_UNROLL(4) for (int j = 0; j < NC; ++j) column[j] = load(w + j * L);
      GEO_UNROLL(6) for (int i = 0; i < kTile; ++i) {
        const T scale = x[i * x_pitch + d];
        GEO_UNROLL(4) for (int j = 0; j < NC; ++j) sum[i][j] += scale * column[j];
      }
    }
    GEO_UNROLL(6) for (int i = 0; i < kTile; ++i) {
      GEO_UNROLL(4) for (int j = 0; j < NC; ++j) store(y + i * pitch + j * L, sum[i][j]);
    }
  }
}

// Rows of a panel, `full` of each: a + b, a - b, a and b of its pairs (a, b).
template <class T>
struct Panels {
  using V = typename vec<T>::type;
  static constexpr int64_t L = vec<T>::lanes;
  const GRUMergeJob& job;
  const int64_t features, wide, gates_pitch;
  T *const rows, *const grads, *const row_grads, *const gates;
  int64_t first = 0, count = 0, full = 0;

  static int64_t pitch_of_gates(const GRUMergeJob& job) { return 2 * job.wide + L; }  // rows in different sets of the cache
  static int64_t numbers(const GRUMergeJob& job, bool backward) {
    return kMergePairs * (backward ? 9 * job.wide + 4 * pitch_of_gates(job) : 4 * job.wide);
  }

  Panels(const GRUMergeJob& j, void* scratch)
      : job(j), features(j.features), wide(j.wide), gates_pitch(pitch_of_gates(j)), rows(static_cast<T*>(scratch)),
        grads(rows + 4 * kMergePairs * wide), row_grads(grads + kMergePairs * wide),
        gates(row_grads + 4 * kMergePairs * wide) {}

  T* block(T* of, int64_t k) const { return of + k * full * wide; }

  void fill(T* to, const T* from) const {
    memcpy(to, from, sizeof(T) * features);
    memset(to + features, 0, sizeof(T) * (wide - features));
  }

  MergeOutcome gather(int64_t begin, int64_t end) {
    first = begin;
    count = end - begin < kMergePairs ? end - begin : kMergePairs;
    full = (count + kTile - 1) / kTile * kTile;
    for (int64_t p = 0; p < count; ++p)
      for (int side = 0; side < 2; ++side) {
        const int64_t row = (side ? job.right : job.left)[first + p];
        if (uint64_t(row) >= uint64_t(job.rows)) return {side, first + p};
        fill(block(rows, 2 + side) + p * wide, static_cast<const T*>(job.x) + row * features);
      }
    for (int side = 0; side < 2; ++side) memset(block(rows, 2 + side) + count * wide, 0, sizeof(T) * wide * (full - count));
    for (int64_t i = 0; i < full * wide; i += L) {
      const V a = load(block(rows, 2) + i), b = load(block(rows, 3) + i);
      store(rows + i, a + b);
      store(block(rows, 1) + i, a - b);
    }
    return {-1, 0};
  }

  // finish(pair, gates with a as input, gates with b as input) for kRows pairs and one vector of features.
  template <class F>
  GEO_INLINED void for_gates(int64_t pair, int64_t f, F&& finish) const {
    const T *x = rows + pair * wide, *weight = static_cast<const T*>(job.weight) + f * features * 6;
    const T* bias = static_cast<const T*>(job.bias) + f * 4;
    V both[kRows][4], news[kRows][4];
    GEO_UNROLL(6) for (int i = 0; i < kRows; ++i) {
      both[i][0] = load(bias);
      both[i][1] = load(bias + L);
      both[i][2] = both[i][3] = V{};
    }
    add_columns<false>(both, x, ahead(x, 1), wide, features, weight);
    GEO_UNROLL(6) for (int i = 0; i < kRows; ++i) {
      news[i][0] = news[i][2] = load(bias + 2 * L);
      news[i][1] = news[i][3] = load(bias + 3 * L);
    }
    add_columns<true>(news, ahead(x, 2), ahead(x, 3), wide, features, weight + 4 * features * L);
    if constexpr (kGroup == 1) {
      GEO_UNROLL(6) for (int i = 0; i < kRows; ++i) {
        const V(&s)[4] = both[i], (&n)[4] = news[i];
        finish(pair + i, gru_gates<T>(s[0] + s[2], s[1] + s[3], n[0], n[3]),
               gru_gates<T>(s[0] - s[2], s[1] - s[3], n[2], n[1]));
      }
      return;
    }
    GEO_UNROLL(6) for (int first = 0; first < kRows; first += kGroup) {
      Ways<T> reset, update, input, scaled;
      GEO_UNROLL(3) for (int i = 0; i < kGroup; ++i) {
        const V(&s)[4] = both[first + i], (&n)[4] = news[first + i];
        reset.way[2 * i] = s[0] + s[2];
        reset.way[2 * i + 1] = s[0] - s[2];
        update.way[2 * i] = s[1] + s[3];
        update.way[2 * i + 1] = s[1] - s[3];
        input.way[2 * i] = n[0];
        input.way[2 * i + 1] = n[2];
        scaled.way[2 * i] = n[3];
        scaled.way[2 * i + 1] = n[1];
      }
      const GRUGates<Ways<T>> gates = gru_gates<T>(reset, update, input, scaled);
      GEO_UNROLL(3) for (int i = 0; i < kGroup; ++i) finish(pair + first + i, of_way(gates, 2 * i), of_way(gates, 2 * i + 1));
    }
  }
  GEO_INLINE GRUGates<V> of_way(const GRUGates<Ways<T>>& g, int i) {
    return {g.reset.way[i], g.update.way[i], g.next.way[i], g.scaled.way[i]};
  }
  const T* ahead(const T* x, int64_t k) const { return x + k * full * wide; }

  void forward() const {
    T* out = static_cast<T*>(job.out) + first * features;
    for (int64_t f = 0; f < wide; f += L) {
      const int lanes = int(features - f < L ? features - f : L);
      const T *left = block(rows, 2) + f, *right = block(rows, 3) + f;
      for (int64_t p = 0; p < full; p += kRows)
        for_gates(p, f, [&](int64_t pair, const GRUGates<V>& there, const GRUGates<V>& back) GEO_INLINED {
          if (pair >= count) return;
          const V sum = gru_value(there, load(right + pair * wide)) + gru_value(back, load(left + pair * wide));
          T* to = out + pair * features + f;
          if (lanes == L)
            store(to, sum * T(0.5));
          else
            store_n(to, sum * T(0.5), lanes);
        });
    }
  }

  // The gradients of the two sums that each row has a part in: of r and z for a + b and a - b, else of n and of what r is
  // multiplied with; and of the states where they stand alone.
  void gate_grads() const {
    const T* grad = static_cast<const T*>(job.grad) + first * features;
    for (int64_t p = 0; p < count; ++p) fill(grads + p * wide, grad + p * features);
    memset(grads + count * wide, 0, sizeof(T) * wide * (full - count));
    memset(row_grads, 0, sizeof(T) * wide * 2 * full);
    for (int64_t f = 0; f < wide; f += L) {
      const T *left = block(rows, 2) + f, *right = block(rows, 3) + f;
      T *to_left = block(row_grads, 2) + f, *to_right = block(row_grads, 3) + f;
      for (int64_t p = 0; p < full; p += kRows)
        for_gates(p, f, [&](int64_t pair, const GRUGates<V>& there, const GRUGates<V>& back) GEO_INLINED {
          const int64_t at = pair * wide;
          const V g = load(grads + at + f) * T(0.5);
          const GRUGrads<V> a = gru_grads<T>(there, load(right + at), g), b = gru_grads<T>(back, load(left + at), g);
          put(0, pair, f, a.reset + b.reset, a.update + b.update);
          put(1, pair, f, a.reset - b.reset, a.update - b.update);
          put(2, pair, f, a.input, b.scaled);
          put(3, pair, f, b.input, a.scaled);
          store(to_left + at, b.state);
          store(to_right + at, a.state);
        });
    }
  }
  GEO_INLINED void put(int64_t k, int64_t pair, int64_t f, V one, V other) const {
    T* to = gates + (k * full + pair) * gates_pitch + f;
    store(to, one);
    store(to + wide, other);
  }

  // f(matrix, its gates, its rows, how many): each matrix of r and z for a + b, of both for a - b, of n and what r is
  // multiplied with for a and b.
  template <class F>
  GEO_INLINED void for_matrices(F&& f) const {
    for (int64_t k = 0; k < 6; ++k) f(k, gates + k / 2 * full * gates_pitch + k % 2 * wide, k / 2 * full, k < 4 ? full : 2 * full);
  }

  void add_row_grads() const {
    for_features<T>(wide, [&](int64_t f, auto width) {
      for_matrices([&](int64_t k, const T* g, int64_t row, int64_t num) {
        const T* weight = static_cast<const T*>(job.back) + k * features * wide + f;
        add_product<T, decltype(width)::value>(g, gates_pitch, features, weight, row_grads + row * wide + f, wide, num);
      });
    });
    for (int64_t i = 0; i < full * wide; i += L) {
      const V sum = load(row_grads + i), difference = load(block(row_grads, 1) + i);
      T *left = block(row_grads, 2) + i, *right = block(row_grads, 3) + i;
      store(left, load(left) + (sum + difference));
      store(right, load(right) + (sum - difference));
    }
    for (int64_t side = 0; side < 2; ++side) {
      T* to = static_cast<T*>(job.sides) + (side * job.pairs + first) * features;
      for (int64_t p = 0; p < count; ++p)
        memcpy(to + p * features, block(row_grads, 2 + side) + p * wide, sizeof(T) * features);
    }
  }

  void weight_grads(T* sums) const {
    for_matrices([&](int64_t k, const T* g, int64_t row, int64_t num) {
      const T* x = rows + row * wide;
      T* sum = sums + k * features * wide;
      for_features<T>(wide, [&](int64_t f, auto width) {
        constexpr int NC = decltype(width)::value, NB = outer_rows(NC);
        int64_t b = 0;
        for (; b + NB <= features; b += NB)
          outer<T, NB, NC>(g + b, gates_pitch, x + f, wide, int(num), sum + b * wide + f);
        for (; b < features; ++b) outer<T, 1, NC>(g + b, gates_pitch, x + f, wide, int(num), sum + b * wide + f);
      });
      if (k == 2 || k == 3) return;
      T* bias = sums + (6 * features + (k < 2 ? k : k - 2)) * wide;
      for (int64_t f = 0; f < wide; f += L) {
        V total = load(bias + f);
        for (int64_t p = 0; p < num; ++p) total += load(g + p * gates_pitch + f);
        store(bias + f, total);
      }
    });
  }
};

template <class T>
int64_t scratch(const GRUMergeJob& job, bool backward) {
  return Panels<T>::numbers(job, backward);
}
template <class T>
MergeOutcome forward(const GRUMergeJob& job, int64_t begin, int64_t end, void* memory) {
  Panels<T> panel(job, memory);
  for (; begin < end; begin += kMergePairs) {
    const MergeOutcome outcome = panel.gather(begin, end);
    if (outcome.fault >= 0) return outcome;
    panel.forward();
  }
  return {-1, 0};
}
template <class T>
MergeOutcome backward(const GRUMergeJob& job, int64_t begin, int64_t end, void* memory, void* sums) {
  Panels<T> panel(job, memory);
  for (; begin < end; begin += kMergePairs) {
    const MergeOutcome outcome = panel.gather(begin, end);
    if (outcome.fault >= 0) return outcome;
    panel.gate_grads();
    if (sums) panel.weight_grads(static_cast<T*>(sums));
    if (job.sides) panel.add_row_grads();
  }
  return {-1, 0};
}

template <class T>
constexpr GRUMergeTable table() {
  return {vec<T>::lanes, scratch<T>, forward<T>, backward<T>};
}

}  // namespace

const GRUMergeTable gru_merge_float = table<float>();
const GRUMergeTable gru_merge_double = table<double>();

}  // namespace GEO_SIMD_NAMESPACE
}  // namespace geo
