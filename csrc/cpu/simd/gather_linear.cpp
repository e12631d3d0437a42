// Leaf of the fused convolution.
//
// Rows of basis (one per edge and orientation) are taken in blocks and listed by pointers. A tile of kTile rows times a
// panel of up to kPanel vectors of channels stays in registers while it runs down the depth of the product and is then
// multiplied by the gathered rows straight into the output: the kernel K never exists in memory. While a block is
// computed, the rows of the next one are prefetched.
#include "../gather_linear_table.h"

#include "../../gather_linear.h"
#include "../../segments.h"
#include "products.h"

namespace geo {
namespace GEO_SIMD_NAMESPACE {
namespace {

#define GEO_MEMBER inline __attribute__((always_inline))
constexpr int kTile = 6;
constexpr int kBlock = 96;  // rows of basis, a multiple of kTile

template <class A, class B>
struct same {
  static constexpr bool value = false;
};
template <class A>
struct same<A, A> {
  static constexpr bool value = true;
};

GEO_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// -- tiles in registers -----------------------------------------------------------------------------------------------

template <class T, int NC>
GEO_INLINE void multiply(const T* const* a, int64_t depth, const T* panel, typename vec<T>::type (&sum)[kTile][NC]) {
  using V = typename vec<T>::type;
  GEO_UNROLL(6) for (int i = 0; i < kTile; ++i) {
    GEO_UNROLL(4) for (int j = 0; j < NC; ++j) sum[i][j] = V{};
  }
  const T *a0 = a[0], *a1 = a[1], *a2 = a[2], *a3 = a[3], *a4 = a[4], *a5 = a[5];
  GEO_UNROLL(1) for (int64_t d = 0; d < depth; ++d) {
    V w[NC];
    GEO_UNROLL(4) for (int j = 0; j < NC; ++j) w[j] = load(panel + j * vec<T>::lanes);
    panel += NC * vec<T>::lanes;
    GEO_UNROLL(6) for (int i = 0; i < kTile; ++i) {
      const T scale = (i == 0 ? a0 : i == 1 ? a1 : i == 2 ? a2 : i == 3 ? a3 : i == 4 ? a4 : a5)[d];
      GEO_UNROLL(4) for (int j = 0; j < NC; ++j) sum[i][j] = linear_step(sum[i][j], scale, w[j]);
    }
  }
}

template <class T>
struct Block {
  int rows;
  const T* basis[kBlock];
  const T* in[kBlock];
  const T* own[kBlock];
  T* out[kBlock];
  int64_t index[kBlock];  // row of basis
};

// out += (basis W^T) * in and, with kProduct, product = own * in. `reps` orientations share a row of basis.
template <class T, int NC, bool kProduct>
void sum_tile(const Block<T>& block, int first, int64_t column, int64_t depth, const T* panel, int64_t reps,
              int64_t pitch, T* product) {
  using V = typename vec<T>::type;
  constexpr int64_t L = vec<T>::lanes;
  V kernel[kTile][NC];
  multiply<T, NC>(block.basis + first, depth, panel, kernel);
  GEO_UNROLL(6) for (int i = 0; i < kTile; ++i) {
    const T* in = block.in[first + i] + column;
    const T* own = kProduct ? block.own[first + i] + column : nullptr;
    T* out = block.out[first + i] + column;
    V sum[NC];
    GEO_UNROLL(4) for (int j = 0; j < NC; ++j) sum[j] = V{};
    GEO_UNROLL(1) for (int64_t q = 0; q < reps; ++q) {
      GEO_UNROLL(4) for (int j = 0; j < NC; ++j) {
        const V value = load(in + q * pitch + j * L);
        store(out + q * pitch + j * L, message_step(load(out + q * pitch + j * L), kernel[i][j], value));
        if (kProduct) sum[j] = product_step(sum[j], load(own + q * pitch + j * L), value);
      }
    }
    if (kProduct) {
      GEO_UNROLL(4) for (int j = 0; j < NC; ++j) store(product + i * pitch + column + j * L, sum[j]);
    }
  }
}

template <class T, int NC>
void product_tile(const Block<T>& block, int first, int64_t column, int64_t reps, int64_t pitch, T* product) {
  using V = typename vec<T>::type;
  constexpr int64_t L = vec<T>::lanes;
  for (int i = 0; i < kTile; ++i) {
    const T *in = block.in[first + i] + column, *own = block.own[first + i] + column;
    GEO_UNROLL(4) for (int j = 0; j < NC; ++j) {
      V sum{};
      for (int64_t k = j * L; k < reps * pitch; k += pitch) sum = product_step(sum, load(own + k), load(in + k));
      store(product + i * pitch + column + j * L, sum);
    }
  }
}

// to[i] = from[i] @ panel
template <class T, int NC, bool kStream>
void matrix_tile(const T* const* from, T* const* to, int64_t column, int64_t depth, const T* panel) {
  constexpr int64_t L = vec<T>::lanes;
  typename vec<T>::type sum[kTile][NC];
  multiply<T, NC>(from, depth, panel, sum);
  GEO_UNROLL(6) for (int i = 0; i < kTile; ++i) {
    T* row = to[i] + column;
    GEO_UNROLL(4) for (int j = 0; j < NC; ++j) {
      if (kStream)
        stream(row + j * L, sum[i][j]);
      else
        store(row + j * L, sum[i][j]);
    }
  }
}

// dweight[b + i, panel] += sum over rows of basis[row, b + i] * product[row, panel], 0 <= i < NB
template <class T, int NB, int NC>
void outer_tile(const T* const* basis, int64_t b, const T* product, int rows, int64_t pitch, T* dweight) {
  using V = typename vec<T>::type;
  constexpr int64_t L = vec<T>::lanes;
  V sum[NB][NC];
  GEO_UNROLL(6) for (int i = 0; i < NB; ++i) {
    GEO_UNROLL(4) for (int j = 0; j < NC; ++j) sum[i][j] = load(dweight + i * pitch + j * L);
  }
  GEO_UNROLL(1) for (int r = 0; r < rows; ++r) {
    const T* scale = basis[r] + b;
    V p[NC];
    GEO_UNROLL(4) for (int j = 0; j < NC; ++j) p[j] = load(product + j * L);
    product += pitch;
    GEO_UNROLL(6) for (int i = 0; i < NB; ++i) {
      const T s = scale[i];
      GEO_UNROLL(4) for (int j = 0; j < NC; ++j) sum[i][j] = linear_step(sum[i][j], s, p[j]);
    }
  }
  GEO_UNROLL(6) for (int i = 0; i < NB; ++i) {
    GEO_UNROLL(4) for (int j = 0; j < NC; ++j) store(dweight + i * pitch + j * L, sum[i][j]);
  }
}

template <class T, int NC>
GEO_INLINE void outer_panel(const T* const* basis, int64_t B, const T* product, int rows, int64_t pitch, T* dweight) {
  int64_t b = 0;
  for (; b + kTile <= B; b += kTile) outer_tile<T, kTile, NC>(basis, b, product, rows, pitch, dweight + b * pitch);
  for (; b + 4 <= B; b += 4) outer_tile<T, 4, NC>(basis, b, product, rows, pitch, dweight + b * pitch);
  for (; b < B; ++b) outer_tile<T, 1, NC>(basis, b, product, rows, pitch, dweight + b * pitch);
}

// -- one chunk of edges -----------------------------------------------------------------------------------------------

template <class S>
struct Runner {
  using T = typename accumulate<S>::type;
  static constexpr bool kNative = same<S, T>::value;

  const GatherLinear<S>& job;
  const GatherLinearChunk<S>& chunk;
  const int64_t row, wide_B, rows_per_block;  // elements of a node's row; B rounded up; rows of basis in a block
  const bool direct;                          // the gradient of basis is written without a copy
  int64_t position, orientation = 0, segment;
  Outcome outcome{kNoFault, 0};
  T *spare, *product, *gradient, *widened[2];

  Runner(const GatherLinear<S>& j, const GatherLinearChunk<S>& c)
      : job(j),
        chunk(c),
        row(j.O * j.pitch),
        wide_B(round_up(j.B, vec<T>::lanes)),
        rows_per_block(block_rows(j)),
        direct(kNative && j.B == wide_B),
        position(c.begin) {
    T* p = chunk.scratch;
    spare = p, p += row;
    product = p, p += kBlock * job.pitch;
    gradient = p, p += kBlock * wide_B;
    widened[0] = p, p += kBlock * wide_B;
    widened[1] = p;
    int64_t low = 0, high = job.num_segments;  // the last segment that starts at or before `begin`
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      if (job.ptr[middle] <= chunk.begin)
        low = middle;
      else
        high = middle;
    }
    while (low > 0 && job.ptr[low] == chunk.begin && job.ptr[low - 1] == chunk.begin) --low;  // empty ones before it
    segment = low;
    clear();
  }

  static int64_t scratch(const GatherLinear<S>& job) {
    return job.O * job.pitch + kBlock * (job.pitch + 3 * round_up(job.B, vec<T>::lanes));
  }

  // A block's rows of basis and of products should fit the first-level cache.
  static int64_t block_rows(const GatherLinear<S>& job) {
    const int64_t wide = job.pitch > job.B ? job.pitch : job.B;
    const int64_t rows = 24576 / (wide * int64_t(sizeof(T))) / kTile * kTile;
    return rows < 2 * kTile ? 2 * kTile : rows > kBlock ? kBlock : rows;
  }

  T* out_row() const {
    if (!job.out) return nullptr;
    return job.ptr[segment] < chunk.begin ? chunk.head : job.out + segment * row;
  }
  void clear() const {
    if (job.out) memset(out_row(), 0, sizeof(T) * row);
  }

  // List the next rows of basis; false where an index is out of range.
  GEO_MEMBER bool fill(Block<T>& block, T* wide) {
    const bool shared = job.basis_O != job.O;
    int n = 0;
    while (n < rows_per_block && position < chunk.end) {
      while (job.ptr[segment + 1] <= position) {
        ++segment;
        clear();
      }
      const int64_t edge = job.perm ? job.perm[position] : position;
      if (uint64_t(edge) >= uint64_t(job.num_edges)) {
        outcome = {kEdgePerm, position};
        return false;
      }
      const int64_t other = job.in_index[edge];
      if (uint64_t(other) >= uint64_t(job.num_in)) {
        outcome = {kSrcIndex, edge};
        return false;
      }
      const T* in = job.in + other * row;
      const T* own = job.own ? job.own + segment * row : nullptr;
      T* out = out_row();
      for (; orientation < job.basis_O && n < rows_per_block; ++orientation, ++n) {
        const int64_t offset = shared ? 0 : orientation * job.pitch;
        const int64_t index = edge * job.basis_O + orientation;
        block.index[n] = index;
        block.in[n] = in + offset;
        block.own[n] = own ? own + offset : nullptr;
        block.out[n] = out ? out + offset : nullptr;
        block.basis[n] = widen_row(job.basis + index * job.B, wide + n * wide_B);
      }
      if (orientation == job.basis_O) orientation = 0, ++position;
    }
    block.rows = n;
    for (; n % kTile; ++n) {  // fill up the last tile with rows whose results go nowhere
      block.basis[n] = block.basis[n - 1];
      block.in[n] = block.in[n - 1];
      block.own[n] = block.own[n - 1];
      block.out[n] = spare;
      block.index[n] = -1;
    }
    return true;
  }

  GEO_MEMBER const T* widen_row(const T* from, T*) const { return from; }
  template <class H>
  const T* widen_row(const H* from, T* to) const {
    constexpr int64_t L = vec<T>::lanes;
    int64_t b = 0;
    for (; b + L <= job.B; b += L) store(to + b, load(from + b));
    for (; b < job.B; ++b) to[b] = widen(from[b]);
    return to;
  }
  GEO_MEMBER void narrow_row(const T* from, T* to) const { memcpy(to, from, sizeof(T) * job.B); }
  template <class H>
  void narrow_row(const T* from, H* to) const {
    constexpr int64_t L = vec<T>::lanes;
    int64_t b = 0;
    for (; b + L <= job.B; b += L) store(to + b, load(from + b));
    for (; b < job.B; ++b) narrow(from[b], to + b);
  }

  GEO_MEMBER void prefetch_rows(const Block<T>& next, int first) const {
    if (first >= next.rows) return;
    for (int i = first; i < first + kTile; ++i) {
      for (int64_t b = 0; b < job.B; b += 64 / sizeof(T)) __builtin_prefetch(next.basis[i] + b, 0, 2);
      for (int64_t c = 0; c < job.pitch; c += 64 / sizeof(T)) __builtin_prefetch(next.in[i] + c, 0, 2);
    }
  }

  GEO_MEMBER void compute(const Block<T>& block, const Block<T>& next) const {
    const int64_t reps = job.basis_O == job.O ? 1 : job.O, pitch = job.pitch;
    for_features<T>(pitch, [&](int64_t column, auto width) {
      constexpr int NC = decltype(width)::value;
      const T* panel = job.by_basis + column * job.B;
      for (int t = 0; t < block.rows; t += kTile) {
        if (column == 0) prefetch_rows(next, t);
        if (!job.out)
          product_tile<T, NC>(block, t, column, reps, pitch, product + t * pitch);
        else if (job.own)
          sum_tile<T, NC, true>(block, t, column, job.B, panel, reps, pitch, product + t * pitch);
        else
          sum_tile<T, NC, false>(block, t, column, job.B, panel, reps, pitch, nullptr);
      }
    });
    if (job.dbasis) differentiate_basis(block);
    if (chunk.dweight)
      for_features<T>(pitch, [&](int64_t column, auto width) {
        outer_panel<T, decltype(width)::value>(block.basis, job.B, product + column, block.rows, pitch,
                                               chunk.dweight + column);
      });
  }

  GEO_MEMBER void differentiate_basis(const Block<T>& block) const {
    for_features<T>(wide_B, [&](int64_t column, auto width) {
      constexpr int NC = decltype(width)::value;
      const T* panel = job.by_channel + column * job.C;
      for (int t = 0; t < block.rows; t += kTile) {
        const T* from[kTile];
        T* to[kTile];
        for (int i = 0; i < kTile; ++i) {
          from[i] = product + (t + i) * job.pitch;
          to[i] = gradient_row(block, t + i);
        }
        if (job.stream && direct)
          matrix_tile<T, NC, true>(from, to, column, job.C, panel);
        else
          matrix_tile<T, NC, false>(from, to, column, job.C, panel);
      }
    });
    if (!direct)
      for (int r = 0; r < block.rows; ++r) narrow_row(gradient + r * wide_B, job.dbasis + block.index[r] * job.B);
  }

  GEO_MEMBER T* gradient_row(const Block<T>& block, int r) const {
    T* to = gradient + r * wide_B;
    if constexpr (kNative) {
      if (direct && block.index[r] >= 0) to = job.dbasis + block.index[r] * job.B;
    }
    return to;
  }

  GEO_MEMBER void run() {
    Block<T> blocks[2];
    if (chunk.dweight) memset(chunk.dweight, 0, sizeof(T) * job.B * job.pitch);
    if (!fill(blocks[0], widened[0])) return;
    for (int now = 0; blocks[now].rows; now = 1 - now) {
      if (!fill(blocks[1 - now], widened[1 - now])) return;
      compute(blocks[now], blocks[1 - now]);
    }
    while (segment + 1 < job.num_segments && (chunk.last || job.ptr[segment + 1] < chunk.end)) {  // empty ones
      ++segment;
      clear();
    }
    if (job.stream) stream_fence();
  }
};

// -- the tables -------------------------------------------------------------------------------------------------------

template <class T>
int64_t packed_size(int64_t depth, int64_t columns) {
  return depth * round_up(columns, vec<T>::lanes);
}

template <class T>
void pack(T* to, const T* from, int64_t depth, int64_t columns, int64_t depth_stride, int64_t column_stride) {
  for_features<T>(round_up(columns, vec<T>::lanes), [&](int64_t column, auto width) {
    for (int64_t d = 0; d < depth; ++d)
      for (int64_t c = column; c < column + decltype(width)::value * vec<T>::lanes; ++c)
        *to++ = c < columns ? from[d * depth_stride + c * column_stride] : T(0);
  });
}

template <class S>
Outcome run(const GatherLinear<S>& job, const GatherLinearChunk<S>& chunk) {
  Runner<S> runner(job, chunk);
  runner.run();
  return runner.outcome;
}

template <class S>
constexpr GatherLinearTable<S> table() {
  using T = typename accumulate<S>::type;
  return {vec<T>::lanes, packed_size<T>, pack<T>, Runner<S>::scratch, run<S>};
}

}  // namespace

const GatherLinearTable<float> gather_linear_float = table<float>();
const GatherLinearTable<double> gather_linear_double = table<double>();
const GatherLinearTable<bfloat16> gather_linear_bfloat16 = table<bfloat16>();
const GatherLinearTable<float16> gather_linear_float16 = table<float16>();

}  // namespace GEO_SIMD_NAMESPACE
}  // namespace geo
