// Leaf of the selective scan: lanes are channels, and the states of a pass stay in registers along a chunk of rows. What is
// not done for every state (softplus, gate, conversion of 16-bit rows) is done before and after, a chunk at a time, so
// that the loops over states stand once for all of it.
#include "../selective_scan_table.h"

#include "../../selective_scan.h"
#include "exponentials.h"

namespace geo {

#if GEO_SIMD_LEVEL >= 1
template <>
struct MultiplyAdd<GEO_SIMD_NAMESPACE::vfloat> {
  using V = GEO_SIMD_NAMESPACE::vfloat;
#if GEO_SIMD_LEVEL == 2
  GEO_INLINE V of(V a, V b, V c) { return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
#else
  GEO_INLINE V of(V a, V b, V c) { return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#endif
};
template <>
struct MultiplyAdd<GEO_SIMD_NAMESPACE::vdouble> {
  using V = GEO_SIMD_NAMESPACE::vdouble;
#if GEO_SIMD_LEVEL == 2
  GEO_INLINE V of(V a, V b, V c) { return (V)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c); }
#else
  GEO_INLINE V of(V a, V b, V c) { return (V)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c); }
#endif
};
#endif

#if GEO_SIMD_LEVEL == 2
template <>
struct Exp2Parts<float, GEO_SIMD_NAMESPACE::vfloat> {
  using V = GEO_SIMD_NAMESPACE::vfloat;
  V r, n;
  GEO_INLINE Exp2Parts of(V t) {
    const V r = (V)_mm512_reduce_ps((__m512)t, 0x08);
    return {r, t - r};
  }
  GEO_INLINE V scaled(const Exp2Parts& p, V v) { return (V)_mm512_scalef_ps((__m512)v, (__m512)p.n); }
};
template <>
struct Exp2Parts<double, GEO_SIMD_NAMESPACE::vdouble> {
  using V = GEO_SIMD_NAMESPACE::vdouble;
  V r, n;
  GEO_INLINE Exp2Parts of(V t) {
    const V r = (V)_mm512_reduce_pd((__m512d)t, 0x08);
    return {r, t - r};
  }
  GEO_INLINE V scaled(const Exp2Parts& p, V v) { return (V)_mm512_scalef_pd((__m512d)v, (__m512d)p.n); }
};
#elif GEO_SIMD_LEVEL == 1
template <>
struct Exp2Parts<float, GEO_SIMD_NAMESPACE::vfloat> {
  using V = GEO_SIMD_NAMESPACE::vfloat;
  V r, power;
  GEO_INLINE Exp2Parts of(V t) {
    const __m256 above = _mm256_max_ps(_mm256_set1_ps(-127), (__m256)t);  // the second where it is NaN
    const V cut = (V)_mm256_min_ps(_mm256_set1_ps(128), above), shifted = cut + GeluNumbers<float>::shift;
    const __m256i n = _mm256_sub_epi32((__m256i)shifted, _mm256_set1_epi32(0x4b400000 - 127));
    return {cut - (shifted - GeluNumbers<float>::shift), (V)_mm256_slli_epi32(n, 23)};
  }
  GEO_INLINE V scaled(const Exp2Parts& p, V v) { return v * p.power; }
};
#endif

namespace GEO_SIMD_NAMESPACE {
namespace {

constexpr int kChunk = int(kScanChunk);
constexpr int kStates = int(kStateGroup);                              // of a group
constexpr int kScanGroups = kRegisters == 32 ? 4 : 2;                  // of a pass
constexpr int kBackGroups = kRegisters == 32 ? 2 : 1;

template <class T>
using Vec = typename vec<T>::type;

// x in all lanes. Less 0 it is x itself, also where that is -0, and the compiler knows: unlike 0 + x, this is one broadcast.
template <class T>
GEO_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

// n lanes from p on
template <class S>
GEO_INLINE auto get(const S* p, int n) {
  return n == vec<typename accumulate<S>::type>::lanes ? load(p) : load_n(p, n);
}
template <class S, class V>
GEO_INLINE void put(S* p, V v, int n) {
  if (n == vec<typename accumulate<S>::type>::lanes)
    store(p, v);
  else
    store_n(p, v, n);
}

// The rows of a chunk, in the order of the scan, and sums over the states.
template <class T>
struct Rows {
  typedef Vec<T> V;
  V step[kChunk], x[kChunk], fed[kChunk];           // Delta, u, and what B is multiplied by: Delta u or u
  V grad[kChunk], slope[kChunk], gate_grad[kChunk];  // dy before the gate; dDelta / ddelta; dz / y
  V y[kChunk], fed_grad[kChunk], rate_grad[kChunk];
};

// Rows that are read or written soon, asked for a row at a time: those of a vector of channels are too far apart to be
// foreseen by the processor.
struct Ahead {
  const char* row[4];
  int count;
  int64_t by;
  GEO_INLINE void fetch(const Ahead& ahead, int64_t k) {
    for (int i = 0; i < ahead.count; ++i) prefetch(ahead.row[i] + k * ahead.by);
  }
};

// What the passes over states share.
template <class T>
struct Pass {
  typedef Vec<T> V;
  const Rows<T>& rows;
  int count;
  bool zoh;
  const T *rate, *inverse;  // [states, stride]
  int64_t stride, states;
  const T *b, *c;        // [kChunk, states]
  Ahead inputs, results;  // of the next chunk, of this one
};

// States of a pass, and what is multiplied with them.
template <class T, int G>
struct Rates {
  Vec<T> rate[G * kStates], inverse[G * kStates];
  GEO_INLINE void load_from(Rates& to, const Pass<T>& pass, int64_t first, bool zoh) {
    for (int n = 0; n < G * kStates; ++n) to.rate[n] = load(pass.rate + (first + n) * pass.stride);
    for (int n = 0; zoh && n < G * kStates; ++n) to.inverse[n] = load(pass.inverse + (first + n) * pass.stride);
  }
};

template <class T, bool kZoh>
GEO_INLINE ScanStep<Vec<T>> step_of(Vec<T> d, Vec<T> rate, Vec<T> inverse) {
  if constexpr (kZoh)
    return zoh_step<T>(d, rate, inverse);
  else
    return {exp2_value<T>(d * rate), Vec<T>{}};
}
template <bool kZoh, class V>
GEO_INLINE V fed_state(const ScanStep<V>& step, V h, V fed, V b) {
  if constexpr (kZoh) fed = fed * step.gain;
  return multiply_add(step.decay, h, fed * b);
}

// Walk the chunk with the states of G groups from `first` on; `state` moves on, and y takes in the groups' sums.
template <class T, int G, bool kZoh>
GEO_NOINLINE void scan_rows(const Pass<T>& pass, int64_t first, Vec<T>* state, Vec<T>* y) {
  typedef Vec<T> V;
  constexpr int kCount = G * kStates;
  Rates<T, G> rates;
  Rates<T, G>::load_from(rates, pass, first, kZoh);
  V h[kCount];
  GEO_UNROLL(16) for (int n = 0; n < kCount; ++n) h[n] = state[first + n];
  const T *b = pass.b + first, *c = pass.c + first;
  GEO_UNROLL(1) for (int k = 0; k < pass.count; ++k) {
    Ahead::fetch(pass.inputs, k);
    const V d = pass.rows.step[k], fed = pass.rows.fed[k];
    V sum = y[k];
    GEO_UNROLL(4) for (int g = 0; g < G; ++g) {
      V part;
      GEO_UNROLL(4) for (int j = 0; j < kStates; ++j) {
        const int n = g * kStates + j;
        h[n] = fed_state<kZoh>(step_of<T, kZoh>(d, rates.rate[n], rates.inverse[n]), h[n], fed, broadcast(b[n]));
        part = j ? multiply_add(h[n], broadcast(c[n]), part) : h[n] * c[n];
      }
      sum = sum + part;
    }
    y[k] = sum;
    b += pass.states;
    c += pass.states;
  }
  GEO_UNROLL(16) for (int n = 0; n < kCount; ++n) state[first + n] = h[n];
}

// The states and steps of a chunk, for the way back.
template <class T, int G>
struct Trace {
  Vec<T> h[kChunk + 1][G * kStates], decay[kChunk][G * kStates], gain[kChunk][G * kStates];
};

// Move `state` through the chunk, keeping a trace if there is one.
template <class T, int G, bool kZoh, bool kTrace>
GEO_NOINLINE void replay_rows(const Pass<T>& pass, int64_t first, Vec<T>* state, Trace<T, G>* trace) {
  typedef Vec<T> V;
  constexpr int kCount = G * kStates;
  Rates<T, G> rates;
  Rates<T, G>::load_from(rates, pass, first, kZoh);
  V h[kCount];
  GEO_UNROLL(16) for (int n = 0; n < kCount; ++n) h[n] = state[first + n];
  if constexpr (kTrace) {
    GEO_UNROLL(16) for (int n = 0; n < kCount; ++n) trace->h[0][n] = h[n];
  }
  const T* b = pass.b + first;
  GEO_UNROLL(1) for (int k = 0; k < pass.count; ++k) {
    Ahead::fetch(pass.inputs, k);
    const V d = pass.rows.step[k], fed = pass.rows.fed[k];
    GEO_UNROLL(16) for (int n = 0; n < kCount; ++n) {
      const ScanStep<V> step = step_of<T, kZoh>(d, rates.rate[n], rates.inverse[n]);
      h[n] = fed_state<kZoh>(step, h[n], fed, broadcast(b[n]));
      if constexpr (kTrace) {
        trace->h[k + 1][n] = h[n];
        trace->decay[k][n] = step.decay;
        if constexpr (kZoh) trace->gain[k][n] = step.gain;
      }
    }
    b += pass.states;
  }
  GEO_UNROLL(16) for (int n = 0; n < kCount; ++n) state[first + n] = h[n];
}

// y takes in the sums of the groups.
template <class T, int G>
GEO_NOINLINE void read_trace(const Pass<T>& pass, int64_t first, const Trace<T, G>& trace, Vec<T>* y) {
  typedef Vec<T> V;
  const T* c = pass.c + first;
  for (int k = 0; k < pass.count; ++k, c += pass.states) {
    V sum = y[k];
    GEO_UNROLL(4) for (int g = 0; g < G; ++g) {
      V part;
      GEO_UNROLL(4) for (int j = 0; j < kStates; ++j) {
        const int n = g * kStates + j;
        part = j ? multiply_add(trace.h[k + 1][n], broadcast(c[n]), part) : trace.h[k + 1][n] * c[n];
      }
      sum = sum + part;
    }
    y[k] = sum;
  }
}

// Sums over lanes, of dB and dC: vectors are folded in pairs, and these again, until each lane holds a sum. So the vectors
// of K states, dB and dC of each in turn, leave their sums in the lanes of one vector, at the reversed bits of their place.
// a in the lanes whose bit kBit is 0, b in the others, each with the lane at the other side of that bit added to it.
template <class T, int kBit>
GEO_INLINE Vec<T> fold(Vec<T> a, Vec<T> b) {
  typename bits_of<Vec<T>>::type stay, move;
  constexpr int lanes = vec<T>::lanes;
  GEO_UNROLL(16) for (int i = 0; i < lanes; ++i) {
    stay[i] = i & kBit ? lanes + i : i;
    move[i] = i & kBit ? lanes + i - kBit : i + kBit;
  }
  return __builtin_shuffle(a, b, stay) + __builtin_shuffle(a, b, move);
}
template <class T, int kBit>
GEO_INLINE Vec<T> fold_rest(Vec<T> v) {
  if constexpr (kBit == 0)
    return v;
  else
    return fold_rest<T, kBit / 2>(fold<T, kBit>(v, v));
}
template <int K>
struct State {
  static constexpr int value = K;
};
// The fold of leaf(State<n>()), the folded dB and dC of state n, over kCount states from kFirst on.
template <class T, int kFirst, int kCount, class F>
GEO_INLINE Vec<T> fold_states(F&& leaf) {
  if constexpr (kCount == 1) {
    return leaf(State<kFirst>());
  } else {
    const Vec<T> a = fold_states<T, kFirst, kCount / 2>(leaf), b = fold_states<T, kFirst + kCount / 2, kCount / 2>(leaf);
    return fold<T, vec<T>::lanes / (2 * kCount)>(a, b);
  }
}
// How the states of a pass are folded: `vectors` of `states` each.
template <class T, int G>
struct Folding {
  static constexpr int lanes = vec<T>::lanes, all = G * kStates;
  static constexpr int states = 2 * all < lanes ? all : lanes / 2, vectors = all / states;
  // to_b and to_c, [all], from the vectors of a row
  GEO_INLINE void unfold(const Vec<T>* from, T* to_b, T* to_c) {
    typename bits_of<Vec<T>>::type order;
    GEO_UNROLL(16) for (int i = 0; i < lanes; ++i) {
      const int place = i < states ? 2 * i : (2 * (i - states) + 1) % lanes;
      int lane = 0;
      GEO_UNROLL(4) for (int bit = 1; bit < lanes; bit *= 2) lane = 2 * lane + (place & bit ? 1 : 0);
      order[i] = lane;
    }
    for (int i = 0; i < vectors; ++i) {
      T sums[lanes];
      store(sums, __builtin_shuffle(from[i], order));
      memcpy(to_b + i * states, sums, sizeof(T) * states);
      memcpy(to_c + i * states, sums + states, sizeof(T) * states);
    }
  }
};
template <class T>
constexpr int kFoldedVectors = Folding<T, 1>::vectors;  // of a group, or fewer

// Gradients of the states, carried back through a chunk, and what they leave.
template <class T>
struct Back {
  Vec<T>*state, *rate;          // dh and dA, [states]
  Vec<T>* folded;               // dB and dC, [kFoldedVectors * groups, kChunk], taken a pass at a time
  Vec<T>*fed_grad, *rate_grad;  // sums over states: of g v B, and of what Delta is multiplied with in the exponent
};

template <class T, int G, bool kZoh>
GEO_NOINLINE void walk_back(const Pass<T>& pass, int64_t first, const Trace<T, G>& trace, const Back<T>& back) {
  typedef Vec<T> V;
  typedef Folding<T, G> Folded;
  constexpr int kCount = G * kStates;
  Rates<T, G> rates;
  Rates<T, G>::load_from(rates, pass, first, kZoh);
  V carried[kCount], rate_sum[kCount];
  GEO_UNROLL(16) for (int n = 0; n < kCount; ++n) {
    carried[n] = back.state[first + n];
    rate_sum[n] = back.rate[first + n];
  }
  const int64_t last = pass.count - 1;
  const T *b = pass.b + last * pass.states + first, *c = pass.c + last * pass.states + first;
  V* folded = back.folded + kFoldedVectors<T> * kChunk * (first / kStates) + last * Folded::vectors;
  GEO_UNROLL(1) for (int64_t k = last; k >= 0; --k) {
    Ahead::fetch(pass.results, k);
    const V d = pass.rows.step[k], fed = pass.rows.fed[k], grad = pass.rows.grad[k];
    V fed_grad = back.fed_grad[k], rate_grad = back.rate_grad[k], fed_part, rate_part, gain_part;
    const auto leaf = [&](auto state) GEO_INLINED {
      constexpr int n = decltype(state)::value, j = n % kStates;
      const V decay = trace.decay[k][n], bn = broadcast(b[n]);
      const V g = multiply_add(grad, broadcast(c[n]), carried[n]), ge = g * decay, w = ge * trace.h[k][n];
      V gv = g;
      if constexpr (kZoh) {
        const ScanStep<V> step{decay, trace.gain[k][n]};
        gv = g * step.gain;
        gain_part = j ? multiply_add(ge, bn, gain_part) : ge * bn;
        rate_sum[n] = multiply_add(g * bn * fed, zoh_gain_grad<T>(d, rates.rate[n], rates.inverse[n], step), rate_sum[n]);
      }
      fed_part = j ? multiply_add(gv, bn, fed_part) : gv * bn;
      rate_part = j ? multiply_add(w, rates.rate[n], rate_part) : w * rates.rate[n];
      rate_sum[n] = multiply_add(w, d, rate_sum[n]);
      carried[n] = ge;
      if constexpr (j == kStates - 1) {
        if constexpr (kZoh) rate_part = multiply_add(gain_part, fed * T(1 / kScanLog2), rate_part);
        fed_grad = fed_grad + fed_part;
        rate_grad = rate_grad + rate_part;
      }
      return fold<T, Folded::lanes / 2>(gv * fed, grad * trace.h[k + 1][n]);
    };
    const auto put_vector = [&](auto vector) GEO_INLINED {
      constexpr int i = decltype(vector)::value;
      const V sums = fold_states<T, i * Folded::states, Folded::states>(leaf);
      folded[i] = folded[i] + fold_rest<T, Folded::lanes / (4 * Folded::states)>(sums);
    };
    put_vector(State<0>());
    if constexpr (Folded::vectors > 1) put_vector(State<1>());
    if constexpr (Folded::vectors > 2) {
      put_vector(State<2>());
      put_vector(State<3>());
    }
    static_assert(Folded::vectors == 1 || Folded::vectors == 2 || Folded::vectors == 4, "");
    back.fed_grad[k] = fed_grad;
    back.rate_grad[k] = rate_grad;
    b -= pass.states;
    c -= pass.states;
    folded -= Folded::vectors;
  }
  GEO_UNROLL(16) for (int n = 0; n < kCount; ++n) {
    back.state[first + n] = carried[n];
    back.rate[first + n] = rate_sum[n];
  }
}

// f(first state, Groups<number>) for the passes of groups [begin, end)
template <int G>
struct Groups {
  static constexpr int value = G;
};
template <int G, class F>
GEO_INLINE void for_passes(int64_t begin, int64_t end, F&& f) {
  int64_t g = begin;
  for (; g + G <= end; g += G) f(g * kStates, Groups<G>());
  for (; g < end; ++g) f(g * kStates, Groups<1>());
}

template <class T>
GEO_INLINE void scan_pass(const Pass<T>& pass, int64_t begin, int64_t end, Vec<T>* state, Vec<T>* y) {
  for_passes<kScanGroups>(begin, end, [&](int64_t first, auto groups) {
    constexpr int G = decltype(groups)::value;
    if (pass.zoh)
      scan_rows<T, G, true>(pass, first, state, y);
    else
      scan_rows<T, G, false>(pass, first, state, y);
  });
}
template <class T>
GEO_INLINE void move_pass(const Pass<T>& pass, int64_t begin, int64_t end, Vec<T>* state) {
  for_passes<kBackGroups>(begin, end, [&](int64_t first, auto groups) {
    constexpr int G = decltype(groups)::value;
    if (pass.zoh)
      replay_rows<T, G, true, false>(pass, first, state, nullptr);
    else
      replay_rows<T, G, false, false>(pass, first, state, nullptr);
  });
}
// `state` is that before the chunk, and is lost; y only if the gate's gradient wants it.
template <class T>
GEO_INLINE void back_pass(const Pass<T>& pass, int64_t begin, int64_t end, Vec<T>* state, const Back<T>& back, Vec<T>* y) {
  for_passes<kBackGroups>(begin, end, [&](int64_t first, auto groups) {
    constexpr int G = decltype(groups)::value;
    Trace<T, G> trace;
    if (pass.zoh)
      replay_rows<T, G, true, true>(pass, first, state, &trace);
    else
      replay_rows<T, G, false, true>(pass, first, state, &trace);
    if (y) read_trace<T, G>(pass, first, trace, y);
    if (pass.zoh)
      walk_back<T, G, true>(pass, first, trace, back);
    else
      walk_back<T, G, false>(pass, first, trace, back);
  });
}

// One task: its segments are cut into chunks of rows in the order of the scan.
template <class S>
struct Task {
  typedef typename accumulate<S>::type T;
  typedef Vec<T> V;
  static constexpr int kLanes = vec<T>::lanes;
  const Scan& job;
  const ScanTask& task;
  const int64_t states = job.groups * kStates;

  // The rows of one chunk: first, first + by, ...
  struct Chunk {
    int64_t first, by;
    int count;
    GEO_INLINE int64_t row(const Chunk& chunk, int k) { return chunk.first + k * chunk.by; }
  };
  GEO_INLINE Chunk chunk_of(const Task& t, int64_t segment, int64_t index) {
    const int64_t begin = t.job.ptr[segment], end = t.job.ptr[segment + 1], done = index * kChunk;
    const int64_t left = end - begin - done;
    return {t.job.reverse ? end - 1 - done : begin + done, t.job.reverse ? -1 : 1, int(left < kChunk ? left : kChunk)};
  }
  // The rows of channels c that are read after this chunk.
  Chunk following(int64_t segment, int64_t index) const {
    if (index + 1 < num_chunks(job, segment)) return chunk_of(*this, segment, index + 1);
    int64_t next = segment + 1;
    while (next < task.last_segment && num_chunks(job, next) == 0) ++next;
    return next < task.last_segment ? chunk_of(*this, next, 0) : Chunk{};
  }
  Ahead ahead_of(const Chunk& chunk, int64_t c, const void* x0, const void* x1, const void* x2, const void* x3) const {
    Ahead ahead{};
    if (chunk.count == 0) return ahead;
    ahead.by = chunk.by * job.E * int64_t(sizeof(S));
    const void* const arrays[] = {x0, x1, x2, x3};
    for (const void* p : arrays)
      if (p) ahead.row[ahead.count++] = reinterpret_cast<const char*>(static_cast<const S*>(p) + chunk.first * job.E + c);
    return ahead;
  }
  static int64_t num_chunks(const Scan& job, int64_t segment) {
    return (job.ptr[segment + 1] - job.ptr[segment] + kChunk - 1) / kChunk;
  }
  int width_of(int64_t c) const { return int(task.last_channel - c < kLanes ? task.last_channel - c : kLanes); }

  // to[k, n] = from[row k, n]
  void read_states(const void* from_, const Chunk& chunk, T* to) const {
    const S* from = static_cast<const S*>(from_);
    for (int k = 0; k < chunk.count; ++k) {
      const S* row = from + Chunk::row(chunk, k) * job.N;
      int64_t n = 0;
      for (; n + kLanes <= job.N; n += kLanes) store(to + k * states + n, load(row + n));
      for (; n < job.N; ++n) to[k * states + n] = widen(row[n]);
    }
  }

  void read_rows(const Chunk& chunk, int64_t c, Rows<T>& rows, bool back) const {
    const int n = width_of(c);
    const S *u = static_cast<const S*>(job.u) + c, *delta = static_cast<const S*>(job.delta) + c;
    const V bias = load(static_cast<const T*>(job.bias) + c);
    for (int k = 0; k < chunk.count; ++k) {
      const int64_t at = Chunk::row(chunk, k) * job.E;
      V step = get(delta + at, n) + bias;
      if (job.softplus) {
        const Softplus<V> soft = softplus<T>(step);
        step = soft.value;
        if (back) rows.slope[k] = soft.slope;
      }
      rows.step[k] = step;
      rows.x[k] = get(u + at, n);
      rows.fed[k] = job.zoh ? rows.x[k] : step * rows.x[k];
    }
  }
  void read_grads(const Chunk& chunk, int64_t c, Rows<T>& rows) const {
    const int n = width_of(c);
    const S *grad = static_cast<const S*>(job.grad_y) + c, *z = static_cast<const S*>(job.z);
    for (int k = 0; k < chunk.count; ++k) {
      const int64_t at = Chunk::row(chunk, k) * job.E;
      V g = get(grad + at, n);
      if (z) {
        const Gate<V> gated = gate<T>(get(z + c + at, n));
        rows.gate_grad[k] = g * gated.slope;
        g = g * gated.value;
      }
      rows.grad[k] = g;
    }
  }
  // y starts as D u
  void start_y(const Chunk& chunk, int64_t c, Rows<T>& rows) const {
    const V skip = load(static_cast<const T*>(job.D) + c);
    for (int k = 0; k < chunk.count; ++k) rows.y[k] = skip * rows.x[k];
  }
  static void clear(V* sum, int count) {  // -0: the first term as it is
    for (int k = 0; k < count; ++k) sum[k] = -V{};
  }

  // Sums over the states of one group.
  T* part(int which, int64_t group, const Chunk& chunk, int k, int64_t c) const {
    const int64_t row = Chunk::row(chunk, k) - job.first_row;
    return static_cast<T*>(job.parts) + ((which * job.groups + group) * job.rows + row) * job.width + c;
  }
  void put_parts(int which, int64_t group, const Chunk& chunk, int64_t c, const V* sum) const {
    for (int k = 0; k < chunk.count; ++k) store(part(which, group, chunk, k, c), sum[k]);
  }
  void add_parts(int which, const Chunk& chunk, int64_t c, V* sum) const {
    for (int64_t g = 0; g < job.groups; ++g)
      for (int k = 0; k < chunk.count; ++k) sum[k] = sum[k] + load(part(which, g, chunk, k, c));
  }

  // States [S, E, N] of the task's channels from c on, to and from lanes; `from` may be null.
  void read_state(const void* from_, int64_t segment, int64_t c, V* to) const {
    const T* from = static_cast<const T*>(from_);
    for (int64_t i = 0; i < states; ++i) to[i] = V{};
    if (!from) return;
    for (int lane = 0; lane < width_of(c); ++lane)
      for (int64_t i = 0; i < job.N; ++i) to[i][lane] = from[(segment * job.E + c + lane) * job.N + i];
  }
  void write_state(void* to_, int64_t segment, int64_t c, const V* from) const {
    T* to = static_cast<T*>(to_);
    const int64_t first = task.first_group * kStates, end = task.last_group * kStates;
    for (int lane = 0; lane < width_of(c); ++lane)
      for (int64_t i = first; i < end && i < job.N; ++i) to[(segment * job.E + c + lane) * job.N + i] = from[i][lane];
  }

  // The task's states of channels c, to and from [kStateGroup * groups, width].
  void load_states(const void* from, int64_t c, V* to) const {
    for (int64_t n = task.first_group * kStates; n < task.last_group * kStates; ++n)
      to[n] = load(static_cast<const T*>(from) + n * job.width + c);
  }
  void store_states(void* to, int64_t c, const V* from) const {
    for (int64_t n = task.first_group * kStates; n < task.last_group * kStates; ++n)
      store(static_cast<T*>(to) + n * job.width + c, from[n]);
  }
  int64_t last_chunk(int64_t chunks) const { return task.last_chunk < chunks ? task.last_chunk : chunks; }
  void* kept(int64_t piece) const { return static_cast<T*>(job.kept) + piece * states * job.width; }

  void write_y(const Chunk& chunk, int64_t c, const Rows<T>& rows) const {
    const int n = width_of(c);
    const S* z = static_cast<const S*>(job.z);
    S* y = static_cast<S*>(job.y) + c;
    for (int k = 0; k < chunk.count; ++k) {
      const int64_t at = Chunk::row(chunk, k) * job.E;
      put(y + at, z ? rows.y[k] * gate<T>(get(z + c + at, n)).value : rows.y[k], n);
    }
  }

  Pass<T> pass_of(const Rows<T>& rows, const Chunk& chunk, int64_t c, const T* b, const T* c_, const Ahead& inputs,
                  const Ahead& results) const {
    const T *rate = static_cast<const T*>(job.rate) + c, *inverse = static_cast<const T*>(job.inverse) + c;
    return {rows, chunk.count, job.zoh, rate, inverse, job.width, states, b, c_, inputs, results};
  }

  void forward(V* scratch) const {
    V* state = scratch;
    T *b = reinterpret_cast<T*>(state + states), *c_ = b + kChunk * states;
    memset(b, 0, sizeof(T) * 2 * kChunk * states);
    Rows<T> rows;
    for (int64_t segment = task.first_segment; segment < task.last_segment; ++segment)
      for (int64_t c = task.first_channel; c < task.last_channel; c += kLanes) {
        const int64_t chunks = num_chunks(job, segment), end = last_chunk(chunks);
        if (task.first_chunk == 0)
          read_state(job.initial, segment, c, state);
        else
          load_states(job.carried, c, state);
        for (int64_t i = task.first_chunk; i < end; ++i) {
          const Chunk chunk = chunk_of(*this, segment, i);
          read_rows(chunk, c, rows, false);
          if (task.mode != ScanMode::kPart) start_y(chunk, c, rows);
          if (task.mode == ScanMode::kFinish) {
            add_parts(0, chunk, c, rows.y);
          } else {
            read_states(job.B, chunk, b);
            read_states(job.C, chunk, c_);
            const bool more = i + 1 < chunks, beside = !more && c + kLanes < task.last_channel;
            const Chunk next = beside ? chunk_of(*this, segment, 0) : following(segment, i);
            const int64_t next_c = more ? c : beside ? c + kLanes : task.first_channel;
            const Ahead inputs = ahead_of(next, next_c, job.u, job.delta, job.z, job.y);
            const Pass<T> pass = pass_of(rows, chunk, c, b, c_, inputs, {});
            if (task.mode == ScanMode::kWhole) scan_pass(pass, 0, job.groups, state, rows.y);
            for (int64_t g = task.first_group; task.mode == ScanMode::kPart && g < task.last_group; ++g) {
              clear(rows.y, chunk.count);
              scan_pass(pass, g, g + 1, state, rows.y);
              put_parts(0, g, chunk, c, rows.y);
            }
          }
          if (task.mode != ScanMode::kPart) write_y(chunk, c, rows);
        }
        if (task.mode == ScanMode::kFinish) continue;
        if (end < chunks) store_states(job.carried, c, state);
        if (end == chunks && job.last) write_state(job.last, segment, c, state);
      }
  }

  // -- gradient --------------------------------------------------------------------------------------------------------
  struct Sums {  // of a vector of channels, over the rows of the task
    V *state, *rate, *skip, *bias;
  };

  void write_grads(const Chunk& chunk, int64_t c, const Rows<T>& rows, const Sums& sums) const {
    const int n = width_of(c);
    const V skip = load(static_cast<const T*>(job.D) + c);
    S *du = static_cast<S*>(job.du) + c, *ddelta = static_cast<S*>(job.ddelta) + c, *dz = static_cast<S*>(job.dz);
    for (int k = chunk.count - 1; k >= 0; --k) {
      const int64_t at = Chunk::row(chunk, k) * job.E;
      const V fed_grad = rows.fed_grad[k];
      put(du + at, multiply_add(skip, rows.grad[k], job.zoh ? fed_grad : rows.step[k] * fed_grad), n);
      V step_grad = rows.rate_grad[k] * T(kScanLog2);
      if (!job.zoh) step_grad = multiply_add(rows.x[k], fed_grad, step_grad);
      if (job.softplus) step_grad = step_grad * rows.slope[k];
      put(ddelta + at, step_grad, n);
      *sums.bias = *sums.bias + step_grad;
      *sums.skip = multiply_add(rows.grad[k], rows.x[k], *sums.skip);
      if (dz) put(dz + c + at, rows.gate_grad[k] * rows.y[k], n);
    }
  }

  int64_t blocks() const { return (task.last_channel - task.first_channel + kLanes - 1) / kLanes; }

  // Leave the states before every piece of the segment in `kept`.
  void keep(V* scratch) const {
    V* state = scratch;
    T* b = reinterpret_cast<T*>(state + states);
    memset(b, 0, sizeof(T) * kChunk * states);
    Rows<T> rows;
    const int64_t segment = task.first_segment, chunks = num_chunks(job, segment);
    for (int64_t c = task.first_channel; c < task.last_channel; c += kLanes) {
      read_state(job.initial, segment, c, state);
      for (int64_t i = 0; i < chunks; ++i) {
        if (i % job.piece == 0) store_states(kept(i / job.piece), c, state);
        if (i / job.piece * job.piece + job.piece >= chunks) break;
        const Chunk chunk = chunk_of(*this, segment, i);
        read_rows(chunk, c, rows, false);
        read_states(job.B, chunk, b);
        const Ahead inputs = ahead_of(chunk_of(*this, segment, i + 1), c, job.u, job.delta, nullptr, nullptr);
        move_pass(pass_of(rows, chunk, c, b, b, inputs, {}), task.first_group, task.last_group, state);
      }
    }
  }

  void backward(V* scratch) const {
    if (task.mode == ScanMode::kKeep) return keep(scratch);
    const int64_t blocks = this->blocks();
    V* at = scratch;
    const auto take = [&](int64_t count) {
      V* taken = at;
      at += count;
      return taken;
    };
    const int64_t num_folded = kFoldedVectors<T> * kChunk * job.groups;
    V *state = take(states), *folded = take(num_folded);
    V *state_grad = take(blocks * states), *rate_grad = take(blocks * states), *skip = take(blocks), *bias = take(blocks);
    T *b = reinterpret_cast<T*>(at), *c_ = b + kChunk * states;
    V* checkpoint = reinterpret_cast<V*>(c_ + kChunk * states);  // [chunks, blocks, states]
    memset(scratch, 0, reinterpret_cast<char*>(checkpoint) - reinterpret_cast<char*>(scratch));
    const bool finish = task.mode == ScanMode::kFinish, part = task.mode == ScanMode::kPart;
    const int64_t first_state = task.first_group * kStates;
    const auto sums_of = [&](int64_t k) { return task.tile * job.width + task.first_channel + k * kLanes; };
    for (int64_t k = 0; k < blocks; ++k) {
      const int64_t c = task.first_channel + k * kLanes;
      if (!finish) load_states(static_cast<T*>(job.dA) + task.tile * states * job.width, c, rate_grad + k * states);
      skip[k] = load(static_cast<T*>(job.dD) + sums_of(k));
      bias[k] = load(static_cast<T*>(job.dbias) + sums_of(k));
    }
    Rows<T> rows;
    for (int64_t segment = task.first_segment; segment < task.last_segment; ++segment) {
      const int64_t chunks = num_chunks(job, segment), last = last_chunk(chunks);
      for (int64_t k = 0; !finish && k < blocks; ++k) {
        const int64_t c = task.first_channel + k * kLanes;
        if (last == chunks)
          read_state(job.grad_last, segment, c, state_grad + k * states);
        else
          load_states(job.carried, c, state_grad + k * states);
      }
      for (int64_t end = last, begin; end > task.first_chunk; end = begin) {
        begin = job.kept ? (end - 1) / job.piece * job.piece : 0;
        for (int64_t k = 0; !finish && k < blocks; ++k) {
          const int64_t c = task.first_channel + k * kLanes;
          if (job.kept)
            load_states(kept(begin / job.piece), c, checkpoint + k * states);
          else
            read_state(job.initial, segment, c, checkpoint + k * states);
          for (int64_t i = begin; i + 1 < end; ++i) {
            const Chunk chunk = chunk_of(*this, segment, i);
            read_rows(chunk, c, rows, false);
            read_states(job.B, chunk, b);
            V *from = checkpoint + ((i - begin) * blocks + k) * states, *to = from + blocks * states;
            for (int64_t n = first_state; n < task.last_group * kStates; ++n) to[n] = from[n];
            const Ahead inputs = ahead_of(chunk_of(*this, segment, i + 1), c, job.u, job.delta, nullptr, nullptr);
            move_pass(pass_of(rows, chunk, c, b, c_, inputs, {}), task.first_group, task.last_group, to);
          }
        }
        for (int64_t i = end - 1; i >= begin; --i) {
          const Chunk chunk = chunk_of(*this, segment, i);
          if (!finish) {
            read_states(job.B, chunk, b);
            read_states(job.C, chunk, c_);
            memset(folded, 0, sizeof(V) * num_folded);
          }
          for (int64_t k = 0; k < blocks; ++k) {
            const int64_t c = task.first_channel + k * kLanes;
            read_rows(chunk, c, rows, true);
            read_grads(chunk, c, rows);
            clear(rows.fed_grad, chunk.count);
            clear(rows.rate_grad, chunk.count);
            if (job.z && !part) start_y(chunk, c, rows);
            const Sums sums{state_grad + k * states, rate_grad + k * states, skip + k, bias + k};
            if (finish) {
              add_parts(0, chunk, c, rows.fed_grad);
              add_parts(1, chunk, c, rows.rate_grad);
              if (job.z) add_parts(2, chunk, c, rows.y);
            } else {
              const bool same = k + 1 < blocks;
              const Chunk next = same ? chunk : i > 0 ? chunk_of(*this, segment, i - 1) : following(segment, chunks - 1);
              const int64_t next_c = same ? c + kLanes : task.first_channel;
              const Ahead inputs = ahead_of(next, next_c, job.u, job.delta, job.z, job.grad_y);
              const Ahead results = ahead_of(chunk, c, job.du, job.ddelta, job.dz, nullptr);
              const Pass<T> pass = pass_of(rows, chunk, c, b, c_, inputs, results);
              const Back<T> back{sums.state, sums.rate, folded, rows.fed_grad, rows.rate_grad};
              V *from = checkpoint + ((i - begin) * blocks + k) * states, *y = job.z ? rows.y : nullptr;
              for (int64_t n = first_state; n < task.last_group * kStates; ++n) state[n] = from[n];
              if (!part) back_pass(pass, 0, job.groups, state, back, y);
              for (int64_t g = task.first_group; part && g < task.last_group; ++g) {
                clear(rows.fed_grad, chunk.count);
                clear(rows.rate_grad, chunk.count);
                clear(rows.y, chunk.count);
                back_pass(pass, g, g + 1, state, back, y);
                put_parts(0, g, chunk, c, rows.fed_grad);
                put_parts(1, g, chunk, c, rows.rate_grad);
                if (y) put_parts(2, g, chunk, c, rows.y);
              }
            }
            if (!part) write_grads(chunk, c, rows, sums);
          }
          if (finish) continue;
          const auto unfold = [&](int64_t first, auto groups) {
            typedef Folding<T, decltype(groups)::value> Folded;
            for (int k = 0; k < chunk.count; ++k) {
              const int64_t to = (task.block * job.rows + Chunk::row(chunk, k) - job.first_row) * states + first;
              Folded::unfold(folded + kFoldedVectors<T> * kChunk * (first / kStates) + k * Folded::vectors,
                             static_cast<T*>(job.dB) + to, static_cast<T*>(job.dC) + to);
            }
          };
          if (!part) for_passes<kBackGroups>(0, job.groups, unfold);
          if (part) for_passes<1>(task.first_group, task.last_group, unfold);
        }
      }
      for (int64_t k = 0; !finish && k < blocks; ++k) {
        const int64_t c = task.first_channel + k * kLanes;
        if (task.first_chunk > 0)
          store_states(job.carried, c, state_grad + k * states);
        else if (job.dinitial)
          write_state(job.dinitial, segment, c, state_grad + k * states);
      }
    }
    for (int64_t k = 0; k < blocks; ++k) {
      const int64_t c = task.first_channel + k * kLanes;
      if (!finish) store_states(static_cast<T*>(job.dA) + task.tile * states * job.width, c, rate_grad + k * states);
      if (part) continue;
      store(static_cast<T*>(job.dD) + sums_of(k), skip[k]);
      store(static_cast<T*>(job.dbias) + sums_of(k), bias[k]);
    }
  }

  // Vectors of scratch, as taken above.
  int64_t scratch(bool back) const {
    const int64_t scalars = (kChunk * states + kLanes - 1) / kLanes;
    if (!back) return states + 2 * scalars;
    int64_t longest = 1;  // piece
    for (int64_t s = task.first_segment; task.mode != ScanMode::kFinish && s < task.last_segment; ++s)
      longest = num_chunks(job, s) > longest ? num_chunks(job, s) : longest;
    if (job.kept && job.piece < longest) longest = job.piece;
    const int64_t folded = kFoldedVectors<T> * kChunk * job.groups;
    return states + folded + blocks() * (2 * states + 2) + 2 * scalars + longest * blocks() * states;
  }
};

// While it lives, numbers below the normal range count as 0. A state that is not fed any more, and a gradient on its way
// back from the few rows that have one, would stay there for good, at a hundred cycles for each operation.
struct NoSubnormals {
#ifdef __SSE__
  const unsigned before = __builtin_ia32_stmxcsr();
  NoSubnormals() { __builtin_ia32_ldmxcsr(before | 0x8040u); }
  ~NoSubnormals() { __builtin_ia32_ldmxcsr(before); }
#endif
};

template <class S>
int64_t scratch(const Scan& job, const ScanTask& task, bool back) {
  return Task<S>{job, task}.scratch(back) * Task<S>::kLanes;
}
template <class S>
void forward(const Scan& job, const ScanTask& task, void* scratch) {
  [[maybe_unused]] const NoSubnormals guard;
  Task<S>{job, task}.forward(static_cast<typename Task<S>::V*>(scratch));
}
template <class S>
void backward(const Scan& job, const ScanTask& task, void* scratch) {
  [[maybe_unused]] const NoSubnormals guard;
  Task<S>{job, task}.backward(static_cast<typename Task<S>::V*>(scratch));
}

template <class S>
constexpr SelectiveScanTable table() {
  return {vec<typename accumulate<S>::type>::lanes, scratch<S>, forward<S>, backward<S>};
}

}  // namespace

const SelectiveScanTable selective_scan_float = table<float>();
const SelectiveScanTable selective_scan_double = table<double>();
const SelectiveScanTable selective_scan_bfloat16 = table<bfloat16>();
const SelectiveScanTable selective_scan_float16 = table<float16>();

}  // namespace GEO_SIMD_NAMESPACE
}  // namespace geo
