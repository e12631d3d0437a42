// Leaf of the fused tensor product.
//
// An edge's matrices M, one for each path, are computed first; they are small and the same for all channels. Then channels
// run in vector lanes: a few vectors of each gathered component stay in registers while the rows of M pass by. The sum of a
// segment stays in the first-level cache. In the gradient of sh the products of two rows are summed over channels as
// vectors, and lanes are added only at the end, once for each component of sh.
#include "../gather_tensor_product_table.h"

#include "../../gather_tensor_product.h"
#include "../../segments.h"
#include "vec.h"

namespace geo {
namespace GEO_SIMD_NAMESPACE {
namespace {

#define GEO_MEMBER inline __attribute__((always_inline))
constexpr int kPanel = kRegisters == 32 ? 2 : 1;  // vectors of channels that stay in registers

// f(Size<D>) with the largest odd D <= depth
template <int N>
struct Size {
  static constexpr int value = N;
};
template <class F>
GEO_INLINE int with_depth(int64_t depth, F&& f) {
  if (depth >= 11) return f(Size<11>()), 11;
  if (depth >= 9) return f(Size<9>()), 9;
  if (depth >= 7) return f(Size<7>()), 7;
  if (depth >= 5) return f(Size<5>()), 5;
  if (depth >= 3) return f(Size<3>()), 3;
  return f(Size<1>()), 1;
}

// -- rows --------------------------------------------------------------------------------------------------------------

// A vector of a row of `left` elements: what is beyond them reads as zero and is not written.
template <class S>
GEO_INLINE typename vec<typename accumulate<S>::type>::type load_part(const S* p, int64_t left) {
  return left >= vec<typename accumulate<S>::type>::lanes ? load(p) : load_n(p, int(left));
}
template <class S, class V>
GEO_INLINE void store_part(S* p, V v, int64_t left) {
  if (left >= vec<typename accumulate<S>::type>::lanes)
    store(p, v);
  else
    store_n(p, v, int(left));
}

template <class S, class T, int D>
void pack_block(T* to, const S* from, int64_t mul, int64_t d, int64_t pitch) {
  const int64_t step = D ? D : d;
  for (int64_t i = 0; i < step; ++i)
    for (int64_t u = 0; u < mul; ++u) to[i * pitch + u] = widen(from[u * step + i]);
}
template <class S, class T, int D>
void unpack_block(S* to, const T* from, int64_t mul, int64_t d, int64_t pitch) {
  const int64_t step = D ? D : d;
  for (int64_t u = 0; u < mul; ++u)
    for (int64_t i = 0; i < step; ++i) narrow(from[i * pitch + u], to + u * step + i);
}

template <class S>
void pack(typename accumulate<S>::type* to, const S* from, const ProductBlock* blocks, int64_t num_blocks) {
  using T = typename accumulate<S>::type;
  for (const ProductBlock* b = blocks; b != blocks + num_blocks; ++b) {
    T* row = to + b->packed;
    const S* block = from + b->first;
    if (b->d == 1)
      for (int64_t u = 0; u < b->mul; u += vec<T>::lanes) store(row + u, load_part(block + u, b->mul - u));
    else if (b->d == 3) pack_block<S, T, 3>(row, block, b->mul, 3, b->pitch);
    else if (b->d == 5) pack_block<S, T, 5>(row, block, b->mul, 5, b->pitch);
    else if (b->d == 7) pack_block<S, T, 7>(row, block, b->mul, 7, b->pitch);
    else pack_block<S, T, 0>(row, block, b->mul, b->d, b->pitch);
  }
}
template <class S>
void unpack(S* to, const typename accumulate<S>::type* from, const ProductBlock* blocks, int64_t num_blocks) {
  using T = typename accumulate<S>::type;
  for (const ProductBlock* b = blocks; b != blocks + num_blocks; ++b) {
    const T* row = from + b->packed;
    S* block = to + b->first;
    if (b->d == 1)
      for (int64_t u = 0; u < b->mul; u += vec<T>::lanes) store_part(block + u, load(row + u), b->mul - u);
    else if (b->d == 3) unpack_block<S, T, 3>(block, row, b->mul, 3, b->pitch);
    else if (b->d == 5) unpack_block<S, T, 5>(block, row, b->mul, 5, b->pitch);
    else if (b->d == 7) unpack_block<S, T, 7>(block, row, b->mul, 7, b->pitch);
    else unpack_block<S, T, 0>(block, row, b->mul, b->d, b->pitch);
  }
}

// -- one path of one edge ------------------------------------------------------------------------------------------------

template <class S, int NC>
GEO_INLINE void load_weights(const S* weight, int64_t left, typename vec<typename accumulate<S>::type>::type (&w)[NC]) {
  using V = typename vec<typename accumulate<S>::type>::type;
  constexpr int64_t L = vec<typename accumulate<S>::type>::lanes;
  GEO_UNROLL(2) for (int j = 0; j < NC; ++j) w[j] = weight ? load_part(weight + j * L, left - j * L) : V{} + 1;
}

// out += M (w * in), components [0, D) of in and all of out; `row` is the length of a row of M
template <class S, int D, int NC>
void message(const typename accumulate<S>::type* in, typename accumulate<S>::type* out, int64_t pitch, const S* weight,
             int64_t left, const typename accumulate<S>::type* matrix, int64_t row, int64_t d_own) {
  using T = typename accumulate<S>::type;
  using V = typename vec<T>::type;
  constexpr int64_t L = vec<T>::lanes;
  V w[NC], x[D][NC];
  load_weights<S, NC>(weight, left, w);
  GEO_UNROLL(11) for (int i = 0; i < D; ++i) {
    GEO_UNROLL(2) for (int j = 0; j < NC; ++j) x[i][j] = load(in + i * pitch + j * L) * w[j];
  }
  GEO_UNROLL(1) for (int64_t o = 0; o < d_own; ++o) {
    V sum[NC];
    GEO_UNROLL(2) for (int j = 0; j < NC; ++j) sum[j] = load(out + j * L);
    GEO_UNROLL(11) for (int i = 0; i < D; ++i) {
      GEO_UNROLL(2) for (int j = 0; j < NC; ++j) sum[j] = row_step(sum[j], matrix[i], x[i][j]);
    }
    GEO_UNROLL(2) for (int j = 0; j < NC; ++j) store(out + j * L, sum[j]);
    out += pitch;
    matrix += row;
  }
}

template <class T>
struct Gradients {
  T* out;      // null unless wanted
  T* dweight;  // null unless wanted
  T* moment;   // a vector for each entry of M; null unless wanted
};

// All gradients from components [0, D) of in; moments are started where `first`, else added to.
template <class S, int D, int NC>
void differentiate(const typename accumulate<S>::type* in, const typename accumulate<S>::type* own, int64_t pitch,
                   const S* weight, int64_t left, const typename accumulate<S>::type* matrix, int64_t row, int64_t d_own,
                   bool first, const Gradients<typename accumulate<S>::type>& to) {
  using T = typename accumulate<S>::type;
  using V = typename vec<T>::type;
  constexpr int64_t L = vec<T>::lanes;
  V w[NC], g[D][NC], dw[NC];
  load_weights<S, NC>(weight, left, w);
  GEO_UNROLL(2) for (int j = 0; j < NC; ++j) dw[j] = V{};
  GEO_UNROLL(11) for (int i = 0; i < D; ++i) {
    GEO_UNROLL(2) for (int j = 0; j < NC; ++j) g[i][j] = load(in + i * pitch + j * L);
  }
  T *out = to.out, *moment = to.moment;
  GEO_UNROLL(1) for (int64_t o = 0; o < d_own; ++o) {
    V y[NC], x[NC];
    GEO_UNROLL(2) for (int j = 0; j < NC; ++j) y[j] = V{};
    GEO_UNROLL(11) for (int i = 0; i < D; ++i) {
      GEO_UNROLL(2) for (int j = 0; j < NC; ++j) y[j] = row_step(y[j], matrix[i], g[i][j]);
    }
    GEO_UNROLL(2) for (int j = 0; j < NC; ++j) {
      x[j] = load(own + j * L);
      dw[j] = scaled_step(dw[j], x[j], y[j]);
      if (out) store(out + j * L, scaled_step(load(out + j * L), w[j], y[j]));
      x[j] *= w[j];
    }
    if (moment) {
      GEO_UNROLL(11) for (int i = 0; i < D; ++i) {
        V sum = first ? V{} : load(moment + i * L);
        GEO_UNROLL(2) for (int j = 0; j < NC; ++j) sum = moment_step(sum, x[j], g[i][j]);
        store(moment + i * L, sum);
      }
      moment += row * L;
    }
    if (out) out += pitch;
    own += pitch;
    matrix += row;
  }
  if (to.dweight) {
    GEO_UNROLL(2) for (int j = 0; j < NC; ++j) store(to.dweight + j * L, load(to.dweight + j * L) + dw[j]);
  }
}

// N rows of vectors in one, each row in a part of L / N lanes that are still to be added: with N = L, lane i is the sum of
// row i.
template <class T, int N>
struct Fold {
  using V = typename vec<T>::type;
  static constexpr int L = vec<T>::lanes, W = L / N;

  static GEO_MEMBER V rows(const T* from) {
    const V a = Fold<T, N / 2>::rows(from), b = Fold<T, N / 2>::rows(from + N / 2 * L);
    typename bits_of<V>::type low{}, high{};
    GEO_UNROLL(16) for (int l = 0; l < L; ++l) {
      const int part = l / W, lane = part % (N / 2) * 2 * W + l % W + (part < N / 2 ? 0 : L);
      low[l] = lane;
      high[l] = lane + W;
    }
    return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
  }
};
template <class T>
struct Fold<T, 1> {
  static GEO_MEMBER typename vec<T>::type rows(const T* from) { return load(from); }
};

// f(first channel, Size<NC>) for panels of NC vectors
template <class T, class F>
GEO_INLINE void for_panels(int64_t pitch, F&& f) {
  constexpr int64_t L = vec<T>::lanes;
  int64_t c = 0;
  for (; c + kPanel * L <= pitch; c += kPanel * L) f(c, Size<kPanel>());
  if (c < pitch) f(c, Size<1>());
}

// -- one chunk of edges --------------------------------------------------------------------------------------------------

template <class S>
struct Runner {
  using T = typename accumulate<S>::type;
  using V = typename vec<T>::type;
  static constexpr int64_t L = vec<T>::lanes;

  // What a later edge reads, fetched a piece with each path of this one: all at once would hold up this edge's own loads.
  struct Ahead {
    const char *weight = nullptr, *in = nullptr;
    int64_t weight_bytes = 0, in_bytes = 0, weight_step = 0, in_step = 0;

    GEO_MEMBER void fetch() {
      for (int64_t end = weight_bytes < weight_step ? 0 : weight_bytes - weight_step; weight_bytes > end;) {
        __builtin_prefetch(weight);
        weight += 64;
        weight_bytes -= 64;
      }
      for (int64_t end = in_bytes < in_step ? 0 : in_bytes - in_step; in_bytes > end;) {
        __builtin_prefetch(in);
        in += 64;
        in_bytes -= 64;
      }
    }
  };

  const GatherProduct<S>& job;
  const GatherProductChunk<S>& chunk;
  int64_t segment, distance;  // how many edges ahead
  Ahead ahead;
  T *sum, *spare, *own, *sh, *matrices, *moment, *dsh, *dweight;

  static int64_t round_up(int64_t n) { return (n + L - 1) / L * L; }
  static int64_t scratch(const GatherProduct<S>& job) {
    return 2 * job.own_row + round_up(job.dim_sh) * (1 + L) + job.matrix_row + job.matrix_max * L + job.pitch_max;
  }

  Runner(const GatherProduct<S>& j, const GatherProductChunk<S>& c) : job(j), chunk(c), sum(nullptr) {
    T* p = chunk.scratch;
    spare = p, p += job.own_row;
    own = p, p += job.own_row;
    sh = p, p += round_up(job.dim_sh);
    dsh = p, p += round_up(job.dim_sh) * L;
    matrices = p, p += job.matrix_row;
    moment = p, p += job.matrix_max * L;
    dweight = p;
    memset(own, 0, sizeof(T) * job.own_row);
    distance = 12288 / (job.weight_stride * int64_t(sizeof(S)) + job.in_row * int64_t(sizeof(T)) + 1);
    distance = distance < 2 ? 2 : distance > 8 ? 8 : distance;
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
  }

  void start_segment() {
    if (job.own) pack<S>(own, job.own + segment * job.own_dim, job.own_blocks, job.num_own_blocks);
    if (!job.out) return;
    const bool begun = job.ptr[segment] < chunk.begin, goes_on = job.ptr[segment + 1] > chunk.end;
    sum = begun ? chunk.head : goes_on ? chunk.tail : spare;
    memset(sum, 0, sizeof(T) * job.own_row);
  }
  void finish_segment() {
    if (!job.out || sum != spare) return;
    S* out = job.out + segment * job.own_dim;
    if (!job.own_covered) memset(out, 0, sizeof(S) * job.own_dim);
    unpack<S>(out, sum, job.own_blocks, job.num_own_blocks);
  }

  void prepare(const S* from) {
    for (int64_t j = 0; j < job.dim_sh; ++j) sh[j] = widen(from[j]);
    for (const ProductMatrices* p = job.matrices; p != job.matrices + job.num_matrices; ++p) {
      int64_t m = 0;
      for (; m + 4 * L <= p->size; m += 4 * L) entries<4>(*p, m);
      for (; m < p->size; m += L) entries<1>(*p, m);
    }
  }
  template <int N>
  GEO_MEMBER void entries(const ProductMatrices& p, int64_t m) {
    const T* coefficients = job.coefficients + p.coefficients + m;
    V entry[N];
    GEO_UNROLL(4) for (int n = 0; n < N; ++n) entry[n] = V{};
    GEO_UNROLL(1) for (int64_t j = 0; j < p.d_sh; ++j) {
      const T value = sh[p.sh + j];
      GEO_UNROLL(4) for (int n = 0; n < N; ++n) entry[n] = matrix_step(entry[n], load(coefficients + n * L), value);
      coefficients += p.size;
    }
    GEO_UNROLL(4) for (int n = 0; n < N; ++n) store(matrices + p.matrix + m + n * L, entry[n]);
  }

  void sum_messages(const T* in, const S* weight) {
    for (const ProductPath* p = job.paths; p != job.paths + job.num_paths; ++p) {
      ahead.fetch();
      for_panels<T>(p->pitch, [&](int64_t c, auto width) {
        constexpr int NC = decltype(width)::value;
        const S* w = p->weight < 0 ? nullptr : weight + p->weight + c;
        for (int64_t i = 0; i < p->d_in;)
          i += with_depth(p->d_in - i, [&](auto depth) {
            message<S, decltype(depth)::value, NC>(in + p->in + i * p->pitch + c, sum + p->own + c, p->pitch, w, p->mul - c,
                                                   matrices + p->matrix + i, p->d_in, p->d_own);
          });
      });
    }
  }

  void differentiate_edge(const T* in, const S* weight, int64_t edge) {
    if (job.dsh) memset(dsh, 0, sizeof(T) * L * round_up(job.dim_sh));
    for (const ProductPath* p = job.paths; p != job.paths + job.num_paths; ++p) {
      ahead.fetch();
      const bool need_weight = p->weight >= 0 && (job.dweight || chunk.dweight);
      T* dw = chunk.dweight ? chunk.dweight + p->shared_weight : dweight;
      if (need_weight && !chunk.dweight) memset(dw, 0, sizeof(T) * p->pitch);
      for_panels<T>(p->pitch, [&](int64_t c, auto width) {
        constexpr int NC = decltype(width)::value;
        const S* w = p->weight < 0 ? nullptr : weight + p->weight + c;
        for (int64_t i = 0; i < p->d_in;) {
          const Gradients<T> to{job.out ? sum + p->own + c : nullptr, need_weight ? dw + c : nullptr,
                                job.dsh ? moment + i * L : nullptr};
          i += with_depth(p->d_in - i, [&](auto depth) {
            differentiate<S, decltype(depth)::value, NC>(in + p->in + i * p->pitch + c, own + p->own + c, p->pitch, w,
                                                         p->mul - c, matrices + p->matrix + i, p->d_in, p->d_own, c == 0,
                                                         to);
          });
        }
      });
      if (need_weight && job.dweight) {
        S* to = job.dweight + edge * job.dim_weight + p->weight;
        if (job.stream && p->weight % L == 0 && p->mul % L == 0)
          for (int64_t c = 0; c < p->mul; c += L) stream(to + c, load(dw + c));
        else
          for (int64_t c = 0; c < p->mul; c += L) store_part(to + c, load(dw + c), p->mul - c);
      }
      if (job.dsh) add_terms(*p);
    }
    if (job.dsh)
      for (int64_t j = 0; j < job.dim_sh; j += L)
        store_part(job.dsh + edge * job.dim_sh + j, Fold<T, int(L)>::rows(dsh + j * L), job.dim_sh - j);
  }

  void add_terms(const ProductPath& p) {
    for (int64_t j = 0; j < p.d_sh; ++j) {
      const int64_t begin = job.term_ptr[p.terms + j], end = job.term_ptr[p.terms + j + 1];
      V even = load(dsh + (p.sh + j) * L), odd{};
      int64_t t = begin;
      for (; t + 2 <= end; t += 2) {
        even = sh_step(even, job.terms[t].coefficient, load(moment + job.terms[t].entry * L));
        odd = sh_step(odd, job.terms[t + 1].coefficient, load(moment + job.terms[t + 1].entry * L));
      }
      if (t < end) even = sh_step(even, job.terms[t].coefficient, load(moment + job.terms[t].entry * L));
      store(dsh + (p.sh + j) * L, even + odd);
    }
  }

  Ahead look_ahead(int64_t position) const {
    Ahead ahead;
    if (position >= chunk.end) return ahead;
    const int64_t edge = job.perm ? job.perm[position] : position;
    if (uint64_t(edge) >= uint64_t(job.num_edges)) return ahead;
    const int64_t row = job.in_index[edge];
    if (uint64_t(row) >= uint64_t(job.num_in)) return ahead;
    ahead.weight = reinterpret_cast<const char*>(job.weight + edge * job.weight_stride);
    ahead.in = reinterpret_cast<const char*>(job.in + row * job.in_row);
    ahead.weight_bytes = job.weight_stride * int64_t(sizeof(S));
    ahead.in_bytes = job.in_row * int64_t(sizeof(T));
    ahead.weight_step = (ahead.weight_bytes / job.num_paths + 63) / 64 * 64;
    ahead.in_step = (ahead.in_bytes / job.num_paths + 63) / 64 * 64;
    __builtin_prefetch(job.sh + edge * job.dim_sh);
    return ahead;
  }

  Outcome run() {
    if (chunk.dweight) memset(chunk.dweight, 0, sizeof(T) * job.num_shared);
    start_segment();
    for (int64_t position = chunk.begin; position < chunk.end; ++position) {
      while (job.ptr[segment + 1] <= position) {
        finish_segment();
        ++segment;
        start_segment();
      }
      const int64_t edge = job.perm ? job.perm[position] : position;
      if (uint64_t(edge) >= uint64_t(job.num_edges)) return {kEdgePerm, position};
      const int64_t row = job.in_index[edge];
      if (uint64_t(row) >= uint64_t(job.num_in)) return {kSrcIndex, edge};
      ahead = look_ahead(position + distance);
      prepare(job.sh + edge * job.dim_sh);
      const T* in = job.in + row * job.in_row;
      const S* weight = job.weight + edge * job.weight_stride;
      if (job.own)
        differentiate_edge(in, weight, edge);
      else
        sum_messages(in, weight);
    }
    if (job.stream) stream_fence();
    finish_segment();
    while (segment + 1 < job.num_segments && (chunk.last || job.ptr[segment + 1] < chunk.end)) {  // empty ones
      ++segment;
      start_segment();
      finish_segment();
    }
    return {kNoFault, 0};
  }
};

template <class S>
Outcome run(const GatherProduct<S>& job, const GatherProductChunk<S>& chunk) {
  return Runner<S>(job, chunk).run();
}

template <class S>
constexpr GatherProductTable<S> table() {
  return {vec<typename accumulate<S>::type>::lanes, pack<S>, unpack<S>, Runner<S>::scratch, run<S>};
}

}  // namespace

const GatherProductTable<float> gather_product_float = table<float>();
const GatherProductTable<double> gather_product_double = table<double>();
const GatherProductTable<bfloat16> gather_product_bfloat16 = table<bfloat16>();
const GatherProductTable<float16> gather_product_float16 = table<float16>();

}  // namespace GEO_SIMD_NAMESPACE
}  // namespace geo
