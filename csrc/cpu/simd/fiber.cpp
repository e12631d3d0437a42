// Leaf of the sum over orientations: for each vector of channels, products of small matrices in register tiles. A block of
// nodes is taken at a time, so that its slice and the kernel's stay in the first-level cache.
#include "../fiber_table.h"

#include "../../fiber.h"
#include "vec.h"

namespace geo {
namespace GEO_SIMD_NAMESPACE {
namespace {

constexpr int kRows = kRegisters == 32 ? 4 : 2;  // of a tile
constexpr int kCols = 4;
constexpr int kBlock = 16;  // nodes

// The vector of channels that starts at c: all lanes, or the first n.
template <bool kWhole>
struct Lanes {
  int n;
  template <class S>
  inline __attribute__((always_inline)) auto get(const S* p) const {
    if constexpr (kWhole)
      return load(p);
    else
      return load_n(p, n);
  }
  template <class S, class V>
  inline __attribute__((always_inline)) void put(S* p, V v) const {
    if constexpr (kWhole)
      store(p, v);
    else
      store_n(p, v, n);
  }
};

// f(c, Lanes) for each vector of channels
template <class T, class F>
GEO_INLINE void for_channels(int64_t C, F&& f) {
  int64_t c = 0;
  for (; c + vec<T>::lanes <= C; c += vec<T>::lanes) f(c, Lanes<true>{});
  if (c < C) f(c, Lanes<false>{int(C - c)});
}

// f(i, j, Size<rows>, Size<columns>) for the tiles of a matrix
template <int N>
struct Size {
  static constexpr int value = N;
};
template <class F>
GEO_INLINE void for_tiles(int64_t rows, int64_t columns, F&& f) {
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows) {
    int64_t j = 0;
    for (; j + kCols <= columns; j += kCols) f(i, j, Size<kRows>(), Size<kCols>());
    for (; j < columns; ++j) f(i, j, Size<kRows>(), Size<1>());
  }
  for (; i < rows; ++i) {
    int64_t j = 0;
    for (; j + kCols <= columns; j += kCols) f(i, j, Size<1>(), Size<kCols>());
    for (; j < columns; ++j) f(i, j, Size<1>(), Size<1>());
  }
}

// sum[i][j] += over d < depth of a[i * a_row + d * a_step] * b[j * b_row + d * b_step]
template <class S, int NR, int NC, class L, class V>
GEO_INLINE void accumulate_tile(const S* a, int64_t a_row, int64_t a_step, const S* b, int64_t b_row, int64_t b_step,
                                int64_t depth, L lanes, V (&sum)[NR][NC]) {
  GEO_UNROLL(1) for (int64_t d = 0; d < depth; ++d) {
    V w[NC];
    GEO_UNROLL(4) for (int j = 0; j < NC; ++j) w[j] = lanes.get(b + j * b_row);
    GEO_UNROLL(4) for (int i = 0; i < NR; ++i) {
      const V v = lanes.get(a + i * a_row);
      GEO_UNROLL(4) for (int j = 0; j < NC; ++j) sum[i][j] = fiber_step(sum[i][j], v, w[j]);
    }
    a += a_step;
    b += b_step;
  }
}

template <class S>
void sum(const FiberSum& job, int64_t begin, int64_t end) {
  using T = typename accumulate<S>::type;
  using V = typename vec<T>::type;
  const S *x = static_cast<const S*>(job.x), *kernel = static_cast<const S*>(job.kernel);
  S* out = static_cast<S*>(job.out);
  const int64_t x_row = job.O * job.C, out_row = job.P * job.C;
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t nodes = end - first < kBlock ? end - first : kBlock;
    for_channels<T>(job.C, [&](int64_t c, auto lanes) {
      for_tiles(nodes, job.P, [&](int64_t i, int64_t p, auto rows, auto columns) {
        constexpr int NR = decltype(rows)::value, NC = decltype(columns)::value;
        V tile[NR][NC];
        GEO_UNROLL(4) for (int r = 0; r < NR; ++r) {
          GEO_UNROLL(4) for (int q = 0; q < NC; ++q) tile[r][q] = V{};
        }
        accumulate_tile<S>(x + (first + i) * x_row + c, x_row, job.C, kernel + p * job.stride_p + c, job.stride_p,
                           job.stride_o, job.O, lanes, tile);
        S* to = out + (first + i) * out_row + p * job.C + c;
        GEO_UNROLL(4) for (int r = 0; r < NR; ++r) {
          GEO_UNROLL(4) for (int q = 0; q < NC; ++q) lanes.put(to + r * out_row + q * job.C, tile[r][q]);
        }
      });
    });
  }
}

template <class S>
void outer(const FiberOuter& job, int64_t begin, int64_t end, void* sum_) {
  using T = typename accumulate<S>::type;
  using V = typename vec<T>::type;
  const S *a = static_cast<const S*>(job.a), *b = static_cast<const S*>(job.b);
  T* sum = static_cast<T*>(sum_);
  memset(sum, 0, sizeof(T) * job.P * job.O * job.C);
  const int64_t a_row = job.P * job.C, b_row = job.O * job.C;
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t nodes = end - first < kBlock ? end - first : kBlock;
    for_channels<T>(job.C, [&](int64_t c, auto lanes) {
      for_tiles(job.P, job.O, [&](int64_t p, int64_t o, auto rows, auto columns) {
        constexpr int NR = decltype(rows)::value, NC = decltype(columns)::value;
        T* to = sum + p * b_row + o * job.C + c;
        V tile[NR][NC];
        GEO_UNROLL(4) for (int r = 0; r < NR; ++r) {
          GEO_UNROLL(4) for (int q = 0; q < NC; ++q) tile[r][q] = lanes.get(to + r * b_row + q * job.C);
        }
        accumulate_tile<S>(a + first * a_row + p * job.C + c, job.C, a_row, b + first * b_row + o * job.C + c, job.C,
                           b_row, nodes, lanes, tile);
        GEO_UNROLL(4) for (int r = 0; r < NR; ++r) {
          GEO_UNROLL(4) for (int q = 0; q < NC; ++q) lanes.put(to + r * b_row + q * job.C, tile[r][q]);
        }
      });
    });
  }
}

template <class S>
constexpr FiberTable table() {
  return {sum<S>, outer<S>};
}

}  // namespace

const FiberTable fiber_float = table<float>();
const FiberTable fiber_double = table<double>();
const FiberTable fiber_bfloat16 = table<bfloat16>();
const FiberTable fiber_float16 = table<float16>();

}  // namespace GEO_SIMD_NAMESPACE
}  // namespace geo
