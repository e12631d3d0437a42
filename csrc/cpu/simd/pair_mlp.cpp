// Leaf of pair_mlp: panels of pairs that stay in the first-level cache from the first layer to the last, and back.
//
// All products are tiles of some rows (pairs, or features of a weight's gradient) times a few vectors of features, which
// stay in registers along the depth of the product.
#include "../pair_mlp_table.h"

#include "../../pair_mlp.h"
#include "products.h"

namespace geo {
namespace GEO_SIMD_NAMESPACE {
namespace {

constexpr int kPairs = 24;                        // pairs of a panel: a multiple of this, and of the rows of all tiles
constexpr int kMostPairs = 96;
constexpr int64_t kPanelBytes = 24 << 10;

GEO_INLINE constexpr int pair_rows(int vectors) {
  return kRegisters == 32 ? (vectors == 4 ? 6 : vectors == 3 ? 8 : 12) : vectors == 2 ? 6 : 12;
}

// -- products ---------------------------------------------------------------------------------------------------------

enum class Then { kStore, kRelu, kMask };

// y[p] = x[p] @ weight + bias for `rows` pairs, filled up to whole tiles; with kMask, 0 where y was not above 0.
template <class T, int NC, Then kThen>
void multiply(const T* x, int64_t x_pitch, int64_t depth, const T* weight, int64_t pitch, const T* bias, T* y, int rows) {
  using V = typename vec<T>::type;
  constexpr int64_t L = vec<T>::lanes;
  constexpr int R = pair_rows(NC);
  for (int r = 0; r < rows; r += R, x += R * x_pitch, y += R * pitch) {
    V sum[R][NC];
    GEO_UNROLL(4) for (int j = 0; j < NC; ++j) {
      const V start = load(bias + j * L);
      GEO_UNROLL(12) for (int i = 0; i < R; ++i) sum[i][j] = start;
    }
    const T* w = weight;
    const T* a = x;
    GEO_UNROLL(1) for (int64_t d = 0; d < depth; ++d, ++a, w += pitch) {
      V column[NC];
      GEO_UNROLL(4) for (int j = 0; j < NC; ++j) column[j] = load(w + j * L);
      GEO_UNROLL(12) for (int i = 0; i < R; ++i) {
        const T scale = a[i * x_pitch];
        GEO_UNROLL(4) for (int j = 0; j < NC; ++j) sum[i][j] = layer_step(sum[i][j], scale, column[j]);
      }
    }
    GEO_UNROLL(12) for (int i = 0; i < R; ++i) {
      GEO_UNROLL(4) for (int j = 0; j < NC; ++j) {
        T* to = y + i * pitch + j * L;
        if constexpr (kThen == Then::kRelu)
          store(to, relu(sum[i][j]));
        else if constexpr (kThen == Then::kMask)
          store(to, relu_grad(load(to), sum[i][j]));
        else
          store(to, sum[i][j]);
      }
    }
  }
}

template <class T, Then kThen>
GEO_INLINE void layer(const T* x, int64_t x_pitch, int64_t depth, const T* weight, int64_t pitch, const T* bias, T* y,
                      int rows) {
  for_features<T>(pitch, [&](int64_t f, auto width) {
    multiply<T, decltype(width)::value, kThen>(x, x_pitch, depth, weight + f, pitch, bias + f, y + f, rows);
  });
}

// The gradients of weight [in, pitch] and, in the row behind, of the bias.
template <class T>
GEO_INLINE void weight_grad(const T* x, int64_t x_pitch, int64_t in, const T* grad, int64_t pitch, int rows, T* sum) {
  const T one = T(1);
  for_features<T>(pitch, [&](int64_t f, auto width) {
    constexpr int NC = decltype(width)::value, NB = outer_rows(NC);
    int64_t b = 0;
    for (; b + NB <= in; b += NB) outer<T, NB, NC>(x + b, x_pitch, grad + f, pitch, rows, sum + b * pitch + f);
    for (; b < in; ++b) outer<T, 1, NC>(x + b, x_pitch, grad + f, pitch, rows, sum + b * pitch + f);
    outer<T, 1, NC>(&one, 0, grad + f, pitch, rows, sum + in * pitch + f);
  });
}

// -- panels -----------------------------------------------------------------------------------------------------------

// Pairs [begin, end) of a panel: a row with columns from `column` on.
struct Run {
  int64_t row, column;
  int begin, end;
};
struct Panel {
  int count = 0, runs = 0;
  Run run[kMostPairs];
};

// Moves through the pairs of a block.
struct Cursor {
  const PairBlock& block;
  const bool triangle;
  int64_t row, column;
  explicit Cursor(const PairBlock& b)
      : block(b), triangle(b.row == b.column), row(b.row), column(b.column) {}

  // The next pairs, at most `most`; false where there are none left.
  bool next(Panel& panel, int most) {
    panel.count = panel.runs = 0;
    while (row < block.row_end && panel.count < most) {
      const int64_t left = block.column_end - column, room = most - panel.count;
      const int length = int(left < room ? left : room);
      if (length) panel.run[panel.runs++] = {row, column, panel.count, panel.count + length};
      panel.count += length;
      column += length;
      if (column == block.column_end) {
        ++row;
        column = triangle ? row : block.column;
      }
    }
    return panel.count > 0;
  }
};

template <class T>
struct Runner {
  using V = typename vec<T>::type;
  static constexpr int64_t L = vec<T>::lanes;
  const PairJob& job;
  const PairBlock& block;
  const PairLayer* const layers;
  const int64_t num_layers, rank, width;  // rows of eigenvectors and of values
  const int most;
  T* scratch;
  Panel panel;

  static int64_t numbers(const PairJob& job, bool backward) {  // of a pair, not 0
    int64_t total = job.layers[0].wide_in, widest = total;
    for (int64_t l = 0; l < job.num_layers; ++l) {
      total += job.layers[l].wide_out;
      widest = job.layers[l].wide_out > widest ? job.layers[l].wide_out : widest;
    }
    return backward ? total + 1 : 2 * widest;
  }
  static int pairs(const PairJob& job, bool backward) {
    const int64_t fit = kPanelBytes / int64_t(sizeof(T)) / numbers(job, backward) / kPairs * kPairs;
    return int(fit < kPairs ? kPairs : fit > kMostPairs ? kMostPairs : fit);
  }

  Runner(const PairJob& j, const PairBlock& b, bool backward, void* memory)
      : job(j), block(b), layers(j.layers), num_layers(j.num_layers), rank(j.layers[0].wide_in),
        width(j.layers[j.num_layers - 1].wide_out), most(pairs(j, backward)), scratch(static_cast<T*>(memory)) {}

  const T* matrix(int64_t l) const {
    const PairLayer& at = layers[l];
    return static_cast<const T*>(at.weight) + (l ? 0 : block.graph * at.in * at.wide_out);
  }

  void inputs(T* x) const {
    const T* eigvecs = static_cast<const T*>(job.eigvecs);
    for_features<T>(rank, [&](int64_t f, auto vectors) {
      constexpr int NC = decltype(vectors)::value;
      for (int r = 0; r < panel.runs; ++r) {
        const Run& run = panel.run[r];
        V left[NC];
        GEO_UNROLL(4) for (int j = 0; j < NC; ++j) left[j] = load(eigvecs + run.row * rank + f + j * L);
        const T* from = eigvecs + run.column * rank + f;
        for (int p = run.begin; p < run.end; ++p, from += rank) {
          GEO_UNROLL(4) for (int j = 0; j < NC; ++j) store(x + p * rank + f + j * L, pair_input(left[j], load(from + j * L)));
        }
      }
    });
    const int full = (panel.count + kPairs - 1) / kPairs * kPairs;
    memset(x + panel.count * rank, 0, sizeof(T) * rank * (full - panel.count));
  }

  void apply(int64_t l, const T* x, T* y) const {
    const PairLayer& at = layers[l];
    const T* bias = static_cast<const T*>(at.bias);
    if (at.relu)
      layer<T, Then::kRelu>(x, at.wide_in, at.in, matrix(l), at.wide_out, bias, y, panel.count);
    else
      layer<T, Then::kStore>(x, at.wide_in, at.in, matrix(l), at.wide_out, bias, y, panel.count);
  }

  void add_values(const T* y) const {
    T* out = static_cast<T*>(job.out);
    for_features<T>(width, [&](int64_t f, auto vectors) {
      constexpr int NC = decltype(vectors)::value;
      for (int r = 0; r < panel.runs; ++r) {
        const Run& run = panel.run[r];
        V sum[NC];
        GEO_UNROLL(4) for (int j = 0; j < NC; ++j) sum[j] = V{};
        T* to = out + run.column * width + f;
        for (int p = run.begin; p < run.end; ++p, to += width) {
          const bool once = p == run.begin && run.row == run.column;
          GEO_UNROLL(4) for (int j = 0; j < NC; ++j) {
            const V value = load(y + p * width + f + j * L);
            sum[j] += value;
            if (!once) store(to + j * L, load(to + j * L) + value);
          }
        }
        to = out + run.row * width + f;
        GEO_UNROLL(4) for (int j = 0; j < NC; ++j) store(to + j * L, load(to + j * L) + sum[j]);
      }
    });
  }

  // The gradient of the values, in their place.
  void value_grads(T* y) const {
    const T* grad = static_cast<const T*>(job.grad);
    const bool masked = layers[num_layers - 1].relu;
    for_features<T>(width, [&](int64_t f, auto vectors) {
      constexpr int NC = decltype(vectors)::value;
      for (int r = 0; r < panel.runs; ++r) {
        const Run& run = panel.run[r];
        V left[NC];
        GEO_UNROLL(4) for (int j = 0; j < NC; ++j) left[j] = load(grad + run.row * width + f + j * L);
        const T* from = grad + run.column * width + f;
        for (int p = run.begin; p < run.end; ++p, from += width) {
          const bool once = p == run.begin && run.row == run.column;
          GEO_UNROLL(4) for (int j = 0; j < NC; ++j) {
            T* at = y + p * width + f + j * L;
            const V g = once ? left[j] : pair_grad(left[j], load(from + j * L));
            store(at, masked ? relu_grad(load(at), g) : g);
          }
        }
      }
    });
  }

  void add_input_grads(const T* dx) const {
    const T* eigvecs = static_cast<const T*>(job.eigvecs);
    T* out = static_cast<T*>(job.deigvecs);
    for_features<T>(rank, [&](int64_t f, auto vectors) {
      constexpr int NC = decltype(vectors)::value;
      for (int r = 0; r < panel.runs; ++r) {
        const Run& run = panel.run[r];
        V left[NC], sum[NC];
        GEO_UNROLL(4) for (int j = 0; j < NC; ++j) {
          left[j] = load(eigvecs + run.row * rank + f + j * L);
          sum[j] = V{};
        }
        int64_t at = run.column * rank + f;
        for (int p = run.begin; p < run.end; ++p, at += rank) {
          GEO_UNROLL(4) for (int j = 0; j < NC; ++j) {
            const V d = load(dx + p * rank + f + j * L);
            sum[j] = layer_step(sum[j], load(eigvecs + at + j * L), d);
            store(out + at + j * L, layer_step(load(out + at + j * L), left[j], d));
          }
        }
        at = run.row * rank + f;
        GEO_UNROLL(4) for (int j = 0; j < NC; ++j) store(out + at + j * L, load(out + at + j * L) + sum[j]);
      }
    });
  }

  void forward() {
    T* state[2] = {scratch, scratch + most * numbers(job, false) / 2};
    for (Cursor cursor(block); cursor.next(panel, most);) {
      inputs(state[0]);
      for (int64_t l = 0; l < num_layers; ++l) apply(l, state[l % 2], state[(l + 1) % 2]);
      add_values(state[num_layers % 2]);
    }
  }

  // x of layer l lies where its gradient will
  void backward(T* sums) {
    for (Cursor cursor(block); cursor.next(panel, most);) {
      T* y = scratch;
      inputs(y);
      for (int64_t l = 0; l < num_layers; ++l) {
        T* x = y;
        y += most * layers[l].wide_in;
        apply(l, x, y);
      }
      value_grads(y);
      for (int64_t l = num_layers - 1; l >= 0; --l) {
        const PairLayer& at = layers[l];
        T *grad = y, *sum = sums + at.sum;
        y -= most * at.wide_in;
        weight_grad(y, at.wide_in, at.in, grad, at.wide_out, panel.count, sum);
        if (!at.transposed) break;
        const T* back = static_cast<const T*>(at.transposed) + (l ? 0 : block.graph * at.out * at.wide_in);
        const T* zeros = static_cast<const T*>(job.zeros);
        if (l && layers[l - 1].relu)
          layer<T, Then::kMask>(grad, at.wide_out, at.out, back, at.wide_in, zeros, y, panel.count);
        else
          layer<T, Then::kStore>(grad, at.wide_out, at.out, back, at.wide_in, zeros, y, panel.count);
      }
      if (layers[0].transposed) add_input_grads(y);
    }
  }
};

template <class T>
int64_t scratch(const PairJob& job, bool backward) {
  return Runner<T>::pairs(job, backward) * Runner<T>::numbers(job, backward);
}
template <class T>
void forward(const PairJob& job, const PairBlock& block, void* memory) {
  Runner<T>(job, block, false, memory).forward();
}
template <class T>
void backward(const PairJob& job, const PairBlock& block, void* memory, void* sums) {
  Runner<T>(job, block, true, memory).backward(static_cast<T*>(sums));
}

template <class T>
constexpr PairMLPTable table() {
  return {vec<T>::lanes, scratch<T>, forward<T>, backward<T>};
}

}  // namespace

const PairMLPTable pair_mlp_float = table<float>();
const PairMLPTable pair_mlp_double = table<double>();

}  // namespace GEO_SIMD_NAMESPACE
}  // namespace geo
