// Leaf of gru_merge: panels of pairs whose rows are gathered once. Of some rows and one vector of features, all four sums
// of the gates stay in registers along the depth of the products, and the gates follow from them there.
#include "../gru_merge_table.h"

#include "../../gru_merge.h"
#include "exponentials.h"
#include "products.h"

namespace geo {
namespace GEO_SIMD_NAMESPACE {
namespace {

constexpr int kTile = 6;                             // rows of a tile of products
constexpr int kRows = kRegisters == 32 ? 6 : 3;      // and of gates
static_assert(kMergePairs % kTile == 0 && kTile % kRows == 0);

// finish(row, gates of that row) for kRows cells and one vector of features.
template <class T, class F>
GEO_INLINE void for_gates(const T* input, const T* state, int64_t pitch, int64_t depth, const T* weight, const T* bias,
                          F&& finish) {
  using V = typename vec<T>::type;
  constexpr int64_t L = vec<T>::lanes;
  V sum[kRows][4];
  GEO_UNROLL(4) for (int k = 0; k < 4; ++k) {
    const V start = load(bias + k * L);
    GEO_UNROLL(6) for (int i = 0; i < kRows; ++i) sum[i][k] = start;
  }
  GEO_UNROLL(1) for (int64_t d = 0; d < depth; ++d, weight += 6 * L) {
    V w[3];
    GEO_UNROLL(3) for (int k = 0; k < 3; ++k) w[k] = load(weight + k * L);
    GEO_UNROLL(6) for (int i = 0; i < kRows; ++i) {
      const T scale = input[i * pitch + d];
      GEO_UNROLL(3) for (int k = 0; k < 3; ++k) sum[i][k] += scale * w[k];
    }
    GEO_UNROLL(3) for (int k = 0; k < 3; ++k) w[k] = load(weight + (3 + k) * L);
    GEO_UNROLL(6) for (int i = 0; i < kRows; ++i) {
      const T scale = state[i * pitch + d];
      sum[i][0] += scale * w[0];
      sum[i][1] += scale * w[1];
      sum[i][3] += scale * w[2];
    }
  }
  GEO_UNROLL(6) for (int i = 0; i < kRows; ++i)
    finish(i, gru_gates<T>(sum[i][0], sum[i][1], sum[i][2], sum[i][3]));
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

// Rows of a panel: `full` left ones, as many right ones, and the left ones again. Row c is the input of cell c, row
// full + c its state: there are 2 full cells, both ways of each pair.
template <class T>
struct Panels {
  using V = typename vec<T>::type;
  static constexpr int64_t L = vec<T>::lanes;
  const GRUMergeJob& job;
  const int64_t features, wide, gates_pitch;
  T *const rows, *const grads, *const row_grads, *const gates;
  int64_t first = 0, count = 0, full = 0;

  static int64_t pitch_of_gates(const GRUMergeJob& job) { return 4 * job.wide + L; }  // rows in different sets of the cache
  static int64_t numbers(const GRUMergeJob& job, bool backward) {
    return kMergePairs * (backward ? 6 * job.wide + 2 * pitch_of_gates(job) : 3 * job.wide);
  }

  Panels(const GRUMergeJob& j, void* scratch)
      : job(j), features(j.features), wide(j.wide), gates_pitch(pitch_of_gates(j)), rows(static_cast<T*>(scratch)),
        grads(rows + 3 * kMergePairs * wide), row_grads(grads + kMergePairs * wide),
        gates(row_grads + 2 * kMergePairs * wide) {}

  void fill(T* to, const T* from) const {
    memcpy(to, from, sizeof(T) * features);
    memset(to + features, 0, sizeof(T) * (wide - features));
  }

  MergeOutcome gather(int64_t begin, int64_t end) {
    first = begin;
    count = end - begin < kMergePairs ? end - begin : kMergePairs;
    full = (count + kTile - 1) / kTile * kTile;
    for (int64_t side = 0; side < 2; ++side) {
      const int64_t* index = (side ? job.right : job.left) + first;
      for (int64_t p = 0; p < count; ++p) {
        if (uint64_t(index[p]) >= uint64_t(job.rows)) return {int(side), first + p};
        fill(rows + (side * full + p) * wide, static_cast<const T*>(job.x) + index[p] * features);
      }
      memset(rows + (side * full + count) * wide, 0, sizeof(T) * wide * (full - count));
    }
    memcpy(rows + 2 * full * wide, rows, sizeof(T) * wide * full);
    return {-1, 0};
  }

  template <class F>
  GEO_INLINED void gates_of(int64_t cell, int64_t f, F&& finish) const {
    for_gates(rows + cell * wide, rows + (full + cell) * wide, wide, features,
              static_cast<const T*>(job.weight) + f * features * 6, static_cast<const T*>(job.bias) + f * 4, finish);
  }

  void forward() const {
    T* out = static_cast<T*>(job.out) + first * features;
    for (int64_t f = 0; f < wide; f += L) {
      const int lanes = int(features - f < L ? features - f : L);
      for (int64_t p = 0; p < full; p += kRows) {
        V total[kRows] = {};
        GEO_UNROLL(1) for (int64_t cell = p; cell < 2 * full; cell += full) {
          const T* state = rows + (full + cell) * wide + f;
          gates_of(cell, f, [&](int i, const GRUGates<V>& g) GEO_INLINED {
            total[i] += gru_value(g, load(state + i * wide));
          });
        }
        for (int64_t i = 0; i < kRows && p + i < count; ++i) {
          T* to = out + (p + i) * features + f;
          if (lanes == L)
            store(to, total[i] * T(0.5));
          else
            store_n(to, total[i] * T(0.5), lanes);
        }
      }
    }
  }

  // The gradients of all gates' sums, [r, z, n, scaled by r], and of the states where they stand alone.
  void gate_grads() const {
    const T* grad = static_cast<const T*>(job.grad) + first * features;
    for (int64_t p = 0; p < count; ++p) fill(grads + p * wide, grad + p * features);
    memset(grads + count * wide, 0, sizeof(T) * wide * (full - count));
    for (int64_t f = 0; f < wide; f += L) {
      for (int64_t side = 0; side < 2; ++side) {
        for (int64_t p = 0; p < full; p += kRows) {
          const int64_t cell = side * full + p;
          const T *state = rows + (full + cell) * wide + f, *from = grads + p * wide + f;
          T *to = gates + cell * gates_pitch + f, *to_state = row_grads + ((1 - side) * full + p) * wide + f;
          gates_of(cell, f, [&](int i, const GRUGates<V>& g) GEO_INLINED {
            const GRUGrads<V> d = gru_grads<T>(g, load(state + i * wide), load(from + i * wide) * T(0.5));
            T* at = to + i * gates_pitch;
            store(at, d.reset);
            store(at + wide, d.update);
            store(at + 2 * wide, d.input);
            store(at + 3 * wide, d.scaled);
            store(to_state + i * wide, d.state);
          });
        }
      }
    }
  }

  // Of gate k of the input (0, 1, 2) or the state (3, 4, 5), where its sum's gradient lies.
  const T* gate(int64_t cell, int64_t k) const {
    return gates + cell * gates_pitch + (k == 5 ? 3 : k % 3) * wide;
  }

  void add_row_grads() const {
    for_features<T>(wide, [&](int64_t f, auto width) {
      constexpr int NC = decltype(width)::value;
      for (int64_t k = 0; k < 6; ++k) {
        const T* weight = static_cast<const T*>(job.back) + k * features * wide + f;
        for (int64_t side = 0; side < 2; ++side) {
          const T* of = gate((k < 3) == (side == 0) ? 0 : full, k);
          add_product<T, NC>(of, gates_pitch, features, weight, row_grads + side * full * wide + f, wide, full);
        }
      }
    });
    for (int64_t side = 0; side < 2; ++side) {
      T* to = static_cast<T*>(job.sides) + (side * job.pairs + first) * features;
      for (int64_t p = 0; p < count; ++p)
        memcpy(to + p * features, row_grads + (side * full + p) * wide, sizeof(T) * features);
    }
  }

  void weight_grads(T* sums) const {
    for (int64_t k = 0; k < 6; ++k) {
      const T *g = gate(0, k), *x = rows + (k < 3 ? 0 : full) * wide;
      T* sum = sums + k * features * wide;
      for_features<T>(wide, [&](int64_t f, auto width) {
        constexpr int NC = decltype(width)::value, NB = outer_rows(NC);
        int64_t b = 0;
        for (; b + NB <= features; b += NB)
          outer<T, NB, NC>(g + b, gates_pitch, x + f, wide, int(2 * full), sum + b * wide + f);
        for (; b < features; ++b) outer<T, 1, NC>(g + b, gates_pitch, x + f, wide, int(2 * full), sum + b * wide + f);
      });
    }
    T* bias = sums + 6 * features * wide;
    for (int64_t f = 0; f < 4 * wide; f += L) {
      V sum = load(bias + f);
      for (int64_t cell = 0; cell < 2 * full; ++cell) sum += load(gates + cell * gates_pitch + f);
      store(bias + f, sum);
    }
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
    panel.weight_grads(static_cast<T*>(sums));
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
