// Leaf of softmax, log-sum-exp and standard deviation of segments: one visit of a segment's rows while they are in the
// cache. Wide rows are taken a tile of columns at a time. Of rows narrower than a vector, 1, 2, 4 or 8 columns, several
// fill a vector: the lanes that hold one column are then folded together.
#include "../segment_softmax_table.h"

#include "../../segments.h"
#include "exponentials.h"

#define GEO_METHOD inline __attribute__((always_inline))

namespace geo {
namespace GEO_SIMD_NAMESPACE {
namespace {

constexpr int kTile = kRegisters == 32 ? 4 : 2;  // vectors of a tile of columns
constexpr int kLookAhead = 16;                   // rows of the input that are fetched ahead of a permutation
constexpr int kKeptBytes = 1 << 14;              // exponentials of a tile that are kept for the second time they are used

// Lane i of v beside lane i ^ K.
template <int K, class V>
GEO_INLINE V exchanged(V v) {
  typename bits_of<V>::type from;
  constexpr int lanes = int(sizeof(from) / sizeof(from[0]));
  GEO_UNROLL(16) for (int i = 0; i < lanes; ++i) from[i] = i ^ K;
  return __builtin_shuffle(v, from);
}
// The lanes that are equal modulo width, combined: each of them then holds the result.
template <class V, class F>
GEO_INLINE V fold_lanes(V v, int64_t width, F&& f) {
  constexpr int lanes = int(sizeof(v) / sizeof(v[0]));
  if (lanes > 8 && width <= 8) v = f(v, exchanged<8 % lanes>(v));
  if (lanes > 4 && width <= 4) v = f(v, exchanged<4 % lanes>(v));
  if (lanes > 2 && width <= 2) v = f(v, exchanged<2 % lanes>(v));
  if (width == 1) v = f(v, exchanged<1>(v));
  return v;
}

// The lanes of v below n, of `fill` from there on.
template <class V>
GEO_INLINE V first_lanes(V v, int n, V fill) {
  typename bits_of<V>::type lane;
  constexpr int lanes = int(sizeof(lane) / sizeof(lane[0]));
  GEO_UNROLL(16) for (int i = 0; i < lanes; ++i) lane[i] = i;
  return lane < decltype(lane[0] + 0)(n) ? v : fill;
}

// n elements at p[at]: read as a whole vector where the array, of `size` elements, goes on that far.
template <class S>
GEO_INLINE auto load_within(const S* p, int64_t at, int n, int64_t size) {
  return at + vec<typename accumulate<S>::type>::lanes <= size ? load(p + at) : load_n(p + at, n);
}

// A tile of kCount vectors of columns, from c on; unless kWhole, n lanes of one vector.
template <class S, int kCount_, bool kWhole>
struct Columns {
  using T = typename accumulate<S>::type;
  using V = typename vec<T>::type;
  static constexpr int kCount = kCount_, kLanes = vec<T>::lanes;
  const SegmentJob& job;
  int64_t begin, end, c;
  int n;

  struct Place {
    const Columns& columns;
    int64_t at;
    GEO_METHOD V get(const S* p, int j, V) const {
      if constexpr (kWhole)
        return load(p + at + j * kLanes);
      else
        return load_within(p, at, columns.n, columns.job.num_edges * columns.job.width);
    }
    GEO_METHOD void put(S* p, int j, V v) const {
      if constexpr (kWhole)
        store(p + at + j * kLanes, v);
      else
        store_n(p + at, v, columns.n);
    }
  };
  template <class F>
  GEO_METHOD void each(F&& f) const {
    if (!job.perm) {
      for (int64_t e = begin; e < end; ++e) f(Place{*this, e * job.width + c});
      return;
    }
    for (int64_t e = begin; e < end; ++e) {
      const int64_t ahead = e + kLookAhead < job.num_edges ? job.perm[e + kLookAhead] * job.width + c : 0;
      GEO_UNROLL(4) for (int j = 0; j < kCount; ++j) prefetch(static_cast<const S*>(job.x) + ahead + j * kLanes);
      f(Place{*this, job.perm[e] * job.width + c});
    }
  }
  template <class F>
  GEO_METHOD V fold(V v, F&&) const {
    return v;
  }
  GEO_METHOD int64_t places() const { return end - begin; }

  // Of a row per segment.
  template <class R>
  GEO_METHOD V get(const R* row, int j) const {
    if constexpr (kWhole)
      return load(row + c + j * kLanes);
    else
      return load_n(row + c, n);
  }
  template <class R>
  GEO_METHOD void put(R* row, int j, V v) const {
    if constexpr (kWhole)
      store(row + c + j * kLanes, v);
    else
      store_n(row + c, v, n);
  }
};

// All columns of narrow rows: as many rows as fill a vector at a time.
template <class S, bool kPerm>
struct Narrow {
  using T = typename accumulate<S>::type;
  using V = typename vec<T>::type;
  static constexpr int kCount = 1, kLanes = vec<T>::lanes;
  const SegmentJob& job;
  int64_t begin, end;

  template <bool kWhole>
  struct Place {
    const SegmentJob& job;
    int64_t e;  // place of the first row
    int n;      // lanes
    GEO_METHOD V get(const S* p, int, V fill) const {
      V v;
      if constexpr (kPerm) {
        S buffer[kLanes] = {};
        for_rows([&](int64_t row, int lane) { buffer[lane] = p[row]; });
        v = load(buffer);
      } else if constexpr (kWhole) {
        v = load(p + e * job.width);
      } else {
        v = load_within(p, e * job.width, n, job.num_edges * job.width);
      }
      return kWhole ? v : first_lanes(v, n, fill);
    }
    GEO_METHOD void put(S* p, int, V v) const {
      if constexpr (kPerm) {
        S buffer[kLanes];
        store(buffer, v);
        for_rows([&](int64_t row, int lane) { p[row] = buffer[lane]; });
      } else if constexpr (kWhole) {
        store(p + e * job.width, v);
      } else {
        store_n(p + e * job.width, v, n);
      }
    }
    // f(element, lane)
    template <class F>
    GEO_METHOD void for_rows(F&& f) const {
      const int count = kWhole ? kLanes : n;
      if (job.width == 1) {
        for (int lane = 0; lane < count; ++lane) f(job.perm[e + lane], lane);
      } else {
        const int64_t* row = job.perm + e;
        for (int lane = 0; lane < count; lane += int(job.width), ++row)
          for (int c = 0; c < job.width; ++c) f(*row * job.width + c, lane + c);
      }
    }
  };
  template <class F>
  GEO_METHOD void each(F&& f) const {
    const int64_t rows = kLanes >> __builtin_ctzll(job.width);
    int64_t e = begin;
    for (; e + rows <= end; e += rows) f(Place<true>{job, e, kLanes});
    if (e < end) f(Place<false>{job, e, int((end - e) * job.width)});
  }
  template <class F>
  GEO_METHOD V fold(V v, F&& f) const {
    return fold_lanes(v, job.width, f);
  }
  GEO_METHOD int64_t places() const { return ((end - begin) * job.width + kLanes - 1) / kLanes; }

  template <class R>
  GEO_METHOD V get(const R* row, int) const {
    if (job.width == 1) return V{} + widen(*row);
    R buffer[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) buffer[lane] = row[lane & (job.width - 1)];
    return load(buffer);
  }
  template <class R>
  GEO_METHOD void put(R* row, int, V v) const {
    if (job.width == 1)
      narrow(v[0], row);
    else
      store_n(row, v, int(job.width));
  }
};

template <class S>
GEO_INLINE bool is_narrow(const SegmentJob& job) {
  return job.width < vec<typename accumulate<S>::type>::lanes && (job.width & (job.width - 1)) == 0;
}

// f(rows) for each tile of columns of the rows at places [begin, end)
template <class S, class F>
GEO_INLINE void for_narrow_rows(const SegmentJob& job, int64_t begin, int64_t end, F&& f) {
  if (job.perm)
    f(Narrow<S, true>{job, begin, end});
  else
    f(Narrow<S, false>{job, begin, end});
}
template <class S, class F>
GEO_INLINE void for_tiles(const SegmentJob& job, int64_t begin, int64_t end, F&& f) {
  constexpr int lanes = vec<typename accumulate<S>::type>::lanes;
  if (is_narrow<S>(job)) return for_narrow_rows<S>(job, begin, end, f);
  int64_t c = 0;
  for (; c + kTile * lanes <= job.width; c += kTile * lanes) f(Columns<S, kTile, true>{job, begin, end, c, 0});
  for (; c + lanes <= job.width; c += lanes) f(Columns<S, 1, true>{job, begin, end, c, 0});
  if (c < job.width) f(Columns<S, 1, false>{job, begin, end, c, int(job.width - c)});
}

// What each op does with a tile of a segment. reduce() sums up some of its rows in `state`, merge() adds a later part's,
// close() turns the state of all rows into what write() needs of it, or writes the segment's own result.
#define GEO_FOR_VECTORS(j) GEO_UNROLL(4) for (int j = 0; j < R::kCount; ++j)

template <class S>
struct Exponentials {
  using T = typename accumulate<S>::type;
  using V = typename vec<T>::type;
  static constexpr int kParts = 2;

  template <bool kKeep, class R>
  GEO_INLINE void reduce(const SegmentJob& job, const R& rows, V (&state)[2][R::kCount], T* kept) {
    const S* x = static_cast<const S*>(job.x);
    const V least = V{} - ExpNumbers<T>::infinity;
    V max[R::kCount], below[R::kCount], sum[R::kCount];
    GEO_FOR_VECTORS(j) max[j] = least;
    rows.each([&](auto place) { GEO_FOR_VECTORS(j) max[j] = greater(max[j], place.get(x, j, least)); });
    GEO_FOR_VECTORS(j) {
      max[j] = rows.fold(max[j], [](V a, V b) { return greater(a, b); });
      below[j] = finite<T>(max[j]);
      sum[j] = V{};
    }
    rows.each([&](auto place) {
      GEO_FOR_VECTORS(j) {
        const V e = exp_value<T>(place.get(x, j, least) - below[j]);
        sum[j] += e;
        if constexpr (kKeep) {
          store(kept, e);
          kept += R::kLanes;
        }
      }
    });
    GEO_FOR_VECTORS(j) {
      state[0][j] = max[j];
      state[1][j] = rows.fold(sum[j], [](V a, V b) { return a + b; });
    }
  }
  template <int N>
  GEO_INLINE void merge(V (&state)[2][N], int64_t, const V (&other)[2][N], int64_t) {
    GEO_UNROLL(4) for (int j = 0; j < N; ++j) {
      const MaxSum<V> s = geo::merge<T>(MaxSum<V>{state[0][j], state[1][j]}, MaxSum<V>{other[0][j], other[1][j]});
      state[0][j] = s.max;
      state[1][j] = s.sum;
    }
  }
};

template <class S, bool kLog>
struct Softmax : Exponentials<S> {
  using typename Exponentials<S>::T;
  using typename Exponentials<S>::V;
  static constexpr bool kRows = true, kKeeps = !kLog;

  template <class R>
  GEO_INLINE void close(const SegmentJob&, int64_t, const R&, V (&state)[2][R::kCount]) {
    GEO_FOR_VECTORS(j) state[1][j] = softmax_scale<T>(MaxSum<V>{state[0][j], state[1][j]}, kLog);
  }
  template <bool kKept, class R>
  GEO_INLINE void write(const SegmentJob& job, int64_t, const R& rows, const V (&state)[2][R::kCount], const T* kept) {
    const S* x = static_cast<const S*>(job.x);
    S* out = static_cast<S*>(job.out);
    V max[R::kCount], scale[R::kCount];
    GEO_FOR_VECTORS(j) max[j] = state[0][j];
    GEO_FOR_VECTORS(j) scale[j] = state[1][j];
    rows.each([&](auto place) {
      GEO_FOR_VECTORS(j) {
        if constexpr (kKept) {
          place.put(out, j, load(kept) * scale[j]);
          kept += R::kLanes;
        } else {
          place.put(out, j, softmax_value<T>(place.get(x, j, V{}), max[j], scale[j], kLog));
        }
      }
    });
  }
};

template <class S>
struct LogSumExp : Exponentials<S> {
  using typename Exponentials<S>::T;
  using typename Exponentials<S>::V;
  static constexpr bool kRows = false, kKeeps = false;

  // Without maximum, which saves a visit of the rows, where the sums are such that it is as good.
  template <bool kKeep, class R>
  GEO_INLINE void reduce(const SegmentJob& job, const R& rows, V (&state)[2][R::kCount], T* kept) {
    const S* x = static_cast<const S*>(job.x);
    V sum[R::kCount];
    GEO_FOR_VECTORS(j) sum[j] = V{};
    rows.each([&](auto place) { GEO_FOR_VECTORS(j) sum[j] += exp_value<T>(place.get(x, j, V{} - ExpNumbers<T>::infinity)); });
    auto fits = V{} == V{};
    GEO_FOR_VECTORS(j) {
      state[0][j] = V{};
      state[1][j] = rows.fold(sum[j], [](V a, V b) { return a + b; });
      fits &= (state[1][j] >= T(kLeastSum)) & (state[1][j] <= T(kMostSum));
    }
    if (!all_of(fits)) Exponentials<S>::template reduce<kKeep>(job, rows, state, kept);
  }
  template <class R>
  GEO_INLINE void close(const SegmentJob& job, int64_t i, const R& rows, V (&state)[2][R::kCount]) {
    const S* x = static_cast<const S*>(job.x);
    T* out = static_cast<T*>(job.out) + i * job.width;
    if (rows.end - rows.begin == 1)
      return rows.each([&](auto place) { GEO_FOR_VECTORS(j) rows.put(out, j, place.get(x, j, V{})); });
    GEO_FOR_VECTORS(j) {
      const V value = logsumexp_value<T>(MaxSum<V>{state[0][j], state[1][j]});
      rows.put(out, j, job.ptr[i] < job.ptr[i + 1] ? value : V{});
    }
  }
};

template <class S, bool kLog>
struct SoftmaxGrad {
  using T = typename accumulate<S>::type;
  using V = typename vec<T>::type;
  static constexpr int kParts = 1;
  static constexpr bool kRows = true, kKeeps = false;

  template <bool, class R>
  GEO_INLINE void reduce(const SegmentJob& job, const R& rows, V (&state)[1][R::kCount], T*) {
    const S *g = static_cast<const S*>(job.g), *y = static_cast<const S*>(job.x);
    V sum[R::kCount];
    GEO_FOR_VECTORS(j) sum[j] = V{};
    rows.each([&](auto place) {
      GEO_FOR_VECTORS(j) sum[j] += softmax_grad_term(place.get(g, j, V{}), kLog ? V{} : place.get(y, j, V{}), kLog);
    });
    GEO_FOR_VECTORS(j) state[0][j] = rows.fold(sum[j], [](V a, V b) { return a + b; });
  }
  template <int N>
  GEO_INLINE void merge(V (&state)[1][N], int64_t, const V (&other)[1][N], int64_t) {
    GEO_UNROLL(4) for (int j = 0; j < N; ++j) state[0][j] += other[0][j];
  }
  template <class R>
  GEO_INLINE void close(const SegmentJob&, int64_t, const R&, V (&)[1][R::kCount]) {}
  template <bool, class R>
  GEO_INLINE void write(const SegmentJob& job, int64_t, const R& rows, const V (&state)[1][R::kCount], const T*) {
    const S *g = static_cast<const S*>(job.g), *y = static_cast<const S*>(job.x);
    S* out = static_cast<S*>(job.out);
    V sum[R::kCount];
    GEO_FOR_VECTORS(j) sum[j] = state[0][j];
    rows.each([&](auto place) {
      GEO_FOR_VECTORS(j)
      place.put(out, j, softmax_grad_value<T>(place.get(g, j, V{}), place.get(y, j, V{}), sum[j], kLog));
    });
  }
};

template <class S>
struct LogSumExpGrad {
  using T = typename accumulate<S>::type;
  using V = typename vec<T>::type;
  static constexpr int kParts = 0;
  static constexpr bool kRows = true, kKeeps = false;

  template <bool, class R>
  GEO_INLINE void write(const SegmentJob& job, int64_t i, const R& rows, const V (&)[1][R::kCount], const T*) {
    const S* x = static_cast<const S*>(job.x);
    S* to = static_cast<S*>(job.out);
    V g[R::kCount], out[R::kCount];
    GEO_FOR_VECTORS(j) g[j] = rows.get(static_cast<const T*>(job.g) + i * job.width, j);
    GEO_FOR_VECTORS(j) out[j] = rows.get(static_cast<const T*>(job.level) + i * job.width, j);
    rows.each([&](auto place) {
      GEO_FOR_VECTORS(j) place.put(to, j, logsumexp_grad_value<T>(g[j], place.get(x, j, V{}), out[j]));
    });
  }
};

template <class S>
struct Std {
  using T = typename accumulate<S>::type;
  using V = typename vec<T>::type;
  static constexpr int kParts = 2;
  static constexpr bool kRows = false, kKeeps = false;

  template <bool, class R>
  GEO_INLINE void reduce(const SegmentJob& job, const R& rows, V (&state)[2][R::kCount], T*) {
    const S* x = static_cast<const S*>(job.x);
    const T count = T(rows.begin < rows.end ? rows.end - rows.begin : 1);
    const auto add = [](V a, V b) { return a + b; };
    V mean[R::kCount], squares[R::kCount];
    GEO_FOR_VECTORS(j) mean[j] = V{};
    rows.each([&](auto place) { GEO_FOR_VECTORS(j) mean[j] += place.get(x, j, V{}); });
    GEO_FOR_VECTORS(j) {
      mean[j] = rows.fold(mean[j], add) / count;
      squares[j] = V{};
    }
    rows.each([&](auto place) {
      GEO_FOR_VECTORS(j) {
        const V step = place.get(x, j, mean[j]) - mean[j];
        squares[j] += step * step;
      }
    });
    GEO_FOR_VECTORS(j) {
      state[0][j] = mean[j];
      state[1][j] = rows.fold(squares[j], add);
    }
  }
  template <int N>
  GEO_INLINE void merge(V (&state)[2][N], int64_t count, const V (&other)[2][N], int64_t other_count) {
    GEO_UNROLL(4) for (int j = 0; j < N; ++j) {
      const Moments<V> a{state[0][j], state[1][j]}, b{other[0][j], other[1][j]};
      const Moments<V> m = geo::merge<T>(a, T(count), b, T(other_count));
      state[0][j] = m.mean;
      state[1][j] = m.squares;
    }
  }
  template <class R>
  GEO_INLINE void close(const SegmentJob& job, int64_t i, const R& rows, V (&state)[2][R::kCount]) {
    const T freedom = T(degrees_of_freedom(job.ptr[i + 1] - job.ptr[i], job.unbiased));
    GEO_FOR_VECTORS(j) {
      T variance[R::kLanes];
      store(variance, state[1][j] / freedom);
      for (int lane = 0; lane < R::kLanes; ++lane) variance[lane] = T(__builtin_sqrt(variance[lane]));
      rows.put(static_cast<S*>(job.out) + i * job.width, j, load(variance));
      rows.put(static_cast<T*>(job.mean) + i * job.width, j, state[0][j]);
    }
  }
};

// The functions of a SegmentKernel.
template <class S, class Op>
struct Kernel {
  using T = typename Op::T;
  using V = typename Op::V;
  static constexpr int kParts = Op::kParts ? Op::kParts : 1;

  static void run(const SegmentJob& job, int64_t first, int64_t last) {
    alignas(64) T kept[Op::kKeeps ? kKeptBytes / sizeof(T) : 1];
    for (int64_t i = first; i < last; ++i) {
      for_tiles<S>(job, job.ptr[i], job.ptr[i + 1], [&](const auto& rows) {
        using R = typename remove<decltype(rows)>::type;
        V state[kParts][R::kCount];
        if constexpr (Op::kKeeps) {
          if (rows.places() * R::kCount <= int64_t(kKeptBytes / sizeof(V))) {
            Op::template reduce<true>(job, rows, state, kept);
            Op::close(job, i, rows, state);
            Op::template write<true>(job, i, rows, state, kept);
            return;
          }
        }
        if constexpr (Op::kParts > 0) {
          Op::template reduce<false>(job, rows, state, kept);
          Op::close(job, i, rows, state);
        }
        if constexpr (Op::kRows) Op::template write<false>(job, i, rows, state, kept);
      });
    }
  }

  static void piece(const SegmentJob& job, int64_t begin, int64_t end, void* to) {
    for_tiles<S>(job, begin, end, [&](const auto& rows) {
      using R = typename remove<decltype(rows)>::type;
      V state[kParts][R::kCount];
      Op::template reduce<false>(job, rows, state, static_cast<T*>(nullptr));
      save(job, rows, static_cast<T*>(to), state);
    });
  }

  static void finish(const SegmentJob& job, int64_t i, void* states) {
    const int64_t begin = job.ptr[i], end = job.ptr[i + 1];
    T* first = static_cast<T*>(states);
    for_tiles<S>(job, begin, end, [&](const auto& rows) {
      using R = typename remove<decltype(rows)>::type;
      V state[kParts][R::kCount], other[kParts][R::kCount];
      read(job, rows, first, state);
      for (int64_t k = 1; k < num_pieces(begin, end); ++k) {
        const int64_t from = piece_begin(begin, k);
        read(job, rows, first + k * kParts * job.width, other);
        Op::merge(state, from - begin, other, piece_end(begin, end, k) - from);
      }
      Op::close(job, i, rows, state);
      save(job, rows, first, state);
    });
  }

  static void write(const SegmentJob& job, int64_t i, int64_t begin, int64_t end, const void* from) {
    for_tiles<S>(job, begin, end, [&](const auto& rows) {
      using R = typename remove<decltype(rows)>::type;
      V state[kParts][R::kCount];
      if constexpr (Op::kParts > 0) read(job, rows, static_cast<const T*>(from), state);
      Op::template write<false>(job, i, rows, state, static_cast<const T*>(nullptr));
    });
  }

  static constexpr SegmentKernel table() {
    SegmentKernel kernel{Op::kParts, run, nullptr, nullptr, nullptr};
    if constexpr (Op::kParts > 0) {
      kernel.piece = piece;
      kernel.finish = finish;
    }
    if constexpr (Op::kRows) kernel.write = write;
    return kernel;
  }

 private:
  template <class X>
  struct remove {
    typedef X type;
  };
  template <class X>
  struct remove<const X&> {
    typedef X type;
  };
  template <class R>
  GEO_INLINE void read(const SegmentJob& job, const R& rows, const T* from, V (&state)[kParts][R::kCount]) {
    for (int part = 0; part < kParts; ++part) GEO_FOR_VECTORS(j) state[part][j] = rows.get(from + part * job.width, j);
  }
  template <class R>
  GEO_INLINE void save(const SegmentJob& job, const R& rows, T* to, const V (&state)[kParts][R::kCount]) {
    for (int part = 0; part < kParts; ++part) GEO_FOR_VECTORS(j) rows.put(to + part * job.width, j, state[part][j]);
  }
};

// Narrow sorted rows, many segments at a time: what is the same for all entries is done without regard to segments, so that
// no lanes are idle. Entries of the segments [from, to) are kept in buffers. Segments of few entries take no branch that is
// hard to predict: the first kAhead are always gone over, and buffers have room for as many behind their end.
template <class S>
struct Packed {
  using T = typename accumulate<S>::type;
  using V = typename vec<T>::type;
  static constexpr int kLanes = vec<T>::lanes, kAhead = kLanes < 8 ? 2 * kLanes : 32;
  static constexpr int kEntries = 1 << 11, kSegments = 1 << 9;  // kSegments: entries of a table of segments
  struct Buffer {
    alignas(64) T at[kEntries + kAhead] = {};
  };
  const SegmentJob& job;
  int64_t from, to;  // segments

  // pack(segments) for runs of short segments, other(i) for long ones
  template <class Pack, class Other>
  GEO_INLINE void each(const SegmentJob& job, int64_t first, int64_t last, Pack&& pack, Other&& other) {
    for (int64_t from = first; from < last;) {
      int64_t to = from;
      const int64_t most = from + kSegments / job.width < last ? from + kSegments / job.width : last;
      while (to < most && (job.ptr[to + 1] - job.ptr[from]) * job.width <= kEntries) ++to;
      if (to > from)
        pack(Packed{job, from, to});
      else
        other(to++);
      from = to;
    }
  }

  GEO_METHOD int64_t begin() const { return job.ptr[from] * job.width; }
  GEO_METHOD int64_t size() const { return job.ptr[to] * job.width - begin(); }
  GEO_METHOD int64_t entry(int64_t i) const { return (job.ptr[i] - job.ptr[from]) * job.width; }

  // The sums of buffered entries over each segment; 0 of none.
  GEO_METHOD void sum(const T* entries, T* sums) const {
    for (int64_t i = from; i < to; ++i) {
      const T* p = entries + entry(i);
      const int64_t n = entry(i + 1) - entry(i);
      V s = lanes_below(p, n, 0);
      GEO_UNROLL(8) for (int k = kLanes; k < kAhead; k += kLanes) s += lanes_below(p, n, k);
      for (int64_t k = kAhead; k < n; k += kLanes) s += lanes_below(p, n, k);
      store(sums + (i - from) * job.width, fold_lanes(s, job.width, [](V a, V b) { return a + b; }));
    }
  }
  // f(i) for segments with a sum of exponentials that is not to be used without maximum.
  template <class F>
  GEO_METHOD void each_unused(const T* sums, F&& f) const {
    const auto is_used = [](auto sum) { return (sum >= T(kLeastSum)) & (sum <= T(kMostSum)); };
    const int64_t count = (to - from) * job.width;
    for (int64_t k = 0; k < count; k += kLanes) {
      if (k + kLanes <= count && all_of(is_used(load(sums + k)))) continue;
      int64_t last = -1;
      for (int64_t c = k; c < count && c < k + kLanes; ++c)
        if (!is_used(sums[c]) && c / job.width != last) f(from + (last = c / job.width));
    }
  }
  template <class F>
  GEO_METHOD void each_of_one_row(F&& f) const {
    for (int64_t i = from; i < to; ++i)
      if (job.ptr[i + 1] - job.ptr[i] == 1) f(i);
  }
  // Each segment's value at all its entries.
  template <class R>
  GEO_METHOD void spread(const R* values, T* entries) const {
    const Narrow<S, false> rows{job, 0, 0};
    for (int64_t i = from; i < to; ++i) {
      const V v = rows.get(values + (i - from) * job.width, 0);
      T* p = entries + entry(i);
      GEO_UNROLL(8) for (int k = 0; k < kAhead; k += kLanes) store(p + k, v);
      for (int64_t k = kAhead; k < entry(i + 1) - entry(i); k += kLanes) store(p + k, v);
    }
  }

 private:
  // The vector at p + k, 0 from lane n - k on.
  GEO_INLINE V lanes_below(const T* p, int64_t n, int64_t k) {
    const int64_t left = n - k;
    return first_lanes(load(p + k), int(left < 0 ? 0 : left > kLanes ? kLanes : left), V{});
  }
};

template <class S>
struct SoftmaxKernel : Kernel<S, Softmax<S, false>> {
  using Base = Kernel<S, Softmax<S, false>>;
  using T = typename accumulate<S>::type;
  using P = Packed<S>;

  static void run(const SegmentJob& job, int64_t first, int64_t last) {
    if (job.perm || !is_narrow<S>(job)) return Base::run(job, first, last);
    typename P::Buffer exps, divisors;
    alignas(64) T sums[P::kSegments + P::kLanes];
    auto pack = [&](const P& segments) {
      const S* x = static_cast<const S*>(job.x) + segments.begin();
      S* out = static_cast<S*>(job.out) + segments.begin();
      for_vectors<T>(0, segments.size(), [&](auto get, auto put) { put(exps.at, exp_value<T>(get(x))); });
      segments.sum(exps.at, sums);
      segments.spread(sums, divisors.at);
      for_vectors<T>(0, segments.size(), [&](auto get, auto put) { put(out, get(exps.at) / get(divisors.at)); });
      segments.each_unused(sums, [&](int64_t i) { Base::run(job, i, i + 1); });
    };
    P::each(job, first, last, pack, [&](int64_t i) { Base::run(job, i, i + 1); });
  }
};

template <class S>
struct LogSumExpKernel : Kernel<S, LogSumExp<S>> {
  using Base = Kernel<S, LogSumExp<S>>;
  using T = typename accumulate<S>::type;
  using V = typename vec<T>::type;
  using P = Packed<S>;

  static void run(const SegmentJob& job, int64_t first, int64_t last) {
    if (job.perm || !is_narrow<S>(job)) return Base::run(job, first, last);
    typename P::Buffer exps;
    alignas(64) T sums[P::kSegments + P::kLanes];
    auto pack = [&](const P& segments) {
      const S* x = static_cast<const S*>(job.x) + segments.begin();
      for_vectors<T>(0, segments.size(), [&](auto get, auto put) { put(exps.at, exp_value<T>(get(x))); });
      segments.sum(exps.at, sums);
      const int64_t count = (segments.to - segments.from) * job.width;
      T* out = static_cast<T*>(job.out) + segments.from * job.width;
      for_vectors<T>(0, count, [&](auto get, auto put) { put(out, log_value<T>(get(sums))); });
      segments.each_of_one_row([&](int64_t i) {
        for (int c = 0; c < job.width; ++c) out[(i - segments.from) * job.width + c] = widen(x[segments.entry(i) + c]);
      });
      segments.each_unused(sums, [&](int64_t i) { Base::run(job, i, i + 1); });
    };
    P::each(job, first, last, pack, [&](int64_t i) { Base::run(job, i, i + 1); });
  }

  static constexpr SegmentKernel table() {
    SegmentKernel kernel = Base::table();
    kernel.run = run;
    return kernel;
  }
};

template <class S>
struct LogSumExpGradKernel : Kernel<S, LogSumExpGrad<S>> {
  using Base = Kernel<S, LogSumExpGrad<S>>;
  using T = typename accumulate<S>::type;
  using P = Packed<S>;

  static void run(const SegmentJob& job, int64_t first, int64_t last) {
    if (job.perm || !is_narrow<S>(job)) return Base::run(job, first, last);
    typename P::Buffer g, level;
    auto pack = [&](const P& segments) {
      const S* x = static_cast<const S*>(job.x) + segments.begin();
      S* out = static_cast<S*>(job.out) + segments.begin();
      segments.spread(static_cast<const T*>(job.g) + segments.from * job.width, g.at);
      segments.spread(static_cast<const T*>(job.level) + segments.from * job.width, level.at);
      for_vectors<T>(0, segments.size(), [&](auto get, auto put) {
        put(out, logsumexp_grad_value<T>(get(g.at), get(x), get(level.at)));
      });
    };
    P::each(job, first, last, pack, [&](int64_t i) { Base::run(job, i, i + 1); });
  }

  static constexpr SegmentKernel table() {
    SegmentKernel kernel = Base::table();
    kernel.run = run;
    return kernel;
  }
};

// One kernel out of two, chosen by the job's `log`.
template <class No, class Yes>
struct ByLog {
  static void run(const SegmentJob& job, int64_t first, int64_t last) {
    (job.log ? Yes::run : No::run)(job, first, last);
  }
  static void piece(const SegmentJob& job, int64_t begin, int64_t end, void* state) {
    (job.log ? Yes::piece : No::piece)(job, begin, end, state);
  }
  static void finish(const SegmentJob& job, int64_t i, void* states) {
    (job.log ? Yes::finish : No::finish)(job, i, states);
  }
  static void write(const SegmentJob& job, int64_t i, int64_t begin, int64_t end, const void* state) {
    (job.log ? Yes::write : No::write)(job, i, begin, end, state);
  }
};

template <class S>
constexpr SegmentSoftmaxTable table() {
  using Forward = ByLog<SoftmaxKernel<S>, Kernel<S, Softmax<S, true>>>;
  using Backward = ByLog<Kernel<S, SoftmaxGrad<S, false>>, Kernel<S, SoftmaxGrad<S, true>>>;
  return {{2, Forward::run, Forward::piece, Forward::finish, Forward::write},
          {1, Backward::run, Backward::piece, Backward::finish, Backward::write},
          LogSumExpKernel<S>::table(),
          LogSumExpGradKernel<S>::table(),
          Kernel<S, Std<S>>::table()};
}

}  // namespace

const SegmentSoftmaxTable segment_softmax_float = table<float>();
const SegmentSoftmaxTable segment_softmax_double = table<double>();
const SegmentSoftmaxTable segment_softmax_bfloat16 = table<bfloat16>();
const SegmentSoftmaxTable segment_softmax_float16 = table<float16>();

}  // namespace GEO_SIMD_NAMESPACE
}  // namespace geo
