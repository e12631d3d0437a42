// Leaf of softmax and log-sum-exp of unsorted rows in their order, a block of entries at a time: what belongs to segments is
// gathered for the block, or added to tables one entry after the other; the rest is done in vectors.
#include "../scatter_softmax_table.h"

#include "exponentials.h"

namespace geo {
namespace GEO_SIMD_NAMESPACE {
namespace {

constexpr int kBlock = 256;  // entries

// The first entry out of [0, size), or -1: unsigned, what is negative is too large.
GEO_INLINE int64_t first_bad(const int64_t* index, int64_t size, int64_t begin, int64_t end) {
  typedef vbits64 loose __attribute__((aligned(8), may_alias));
  constexpr int lanes = GEO_VECTOR_BYTES / 8;
  const uint64_t limit = uint64_t(size);
  auto bad = vbits64{} != vbits64{};
  int64_t e = begin;
  for (; e + lanes <= end; e += lanes) bad |= *reinterpret_cast<const loose*>(index + e) >= limit;
  uint64_t any = 0;
  for (; e < end; ++e) any |= uint64_t(index[e]) >= limit;
  GEO_UNROLL(8) for (int lane = 0; lane < lanes; ++lane) any |= uint64_t(bad[lane]);
  for (e = begin; any && e < end; ++e)
    if (uint64_t(index[e]) >= limit) return e;
  return -1;
}

// f(first entry, number, table entry of each) for blocks of the entries [begin, end).
template <class F>
GEO_INLINE int64_t for_blocks(const ScatterJob& job, int64_t begin, int64_t end, F&& f) {
  int64_t flat[kBlock];
  for (int64_t e = begin; e < end; e += kBlock) {
    const int n = int(end - e < kBlock ? end - e : kBlock);
    int64_t row = e / job.width, c = e % job.width;
    const int64_t bad = first_bad(job.index, job.size, row, (e + n - 1) / job.width + 1);
    if (bad >= 0) return bad;
    if (job.width == 1) {
      f(e, n, job.index + e);
      continue;
    }
    for (int k = 0; k < n; ++k) {
      flat[k] = job.index[row] * job.width + c;
      if (++c == job.width) {
        c = 0;
        ++row;
      }
    }
    f(e, n, static_cast<const int64_t*>(flat));
  }
  return -1;
}

template <class T>
GEO_INLINE void gather(const T* table, const int64_t* at, int n, T* to) {
  GEO_UNROLL(8) for (int k = 0; k < n; ++k) to[k] = table[at[k]];
}

template <class S>
struct Kernels {
  using T = typename accumulate<S>::type;
  using V = typename vec<T>::type;
  static constexpr bool kKeeps = sizeof(S) == sizeof(T);

  static int64_t maximum(const ScatterJob& job, int64_t begin, int64_t end, void* max_) {
    T* max = static_cast<T*>(max_);
    return for_blocks(job, begin, end, [&](int64_t e, int n, const int64_t* at) {
      const S* x = static_cast<const S*>(job.x) + e;
      GEO_UNROLL(4) for (int k = 0; k < n; ++k) max[at[k]] = greater(max[at[k]], T(widen(x[k])));
    });
  }

  static int64_t sum(const ScatterJob& job, int64_t begin, int64_t end, const void* max_, void* sum_, void* last_) {
    const T* max = static_cast<const T*>(max_);
    T *sum = static_cast<T*>(sum_), *last = static_cast<T*>(last_);
    return for_blocks(job, begin, end, [&](int64_t e, int n, const int64_t* at) {
      alignas(64) T below[kBlock], buffer[kBlock];
      const S* x = static_cast<const S*>(job.x) + e;
      T* exps = buffer;
      if constexpr (kKeeps)
        if (job.out) exps = static_cast<T*>(job.out) + e;
      if (max) {
        gather(max, at, n, below);
        for_vectors<T>(0, n, [&](auto get, auto put) { put(exps, exp_value<T>(get(x) - finite<T>(get(below)))); });
      } else {
        for_vectors<T>(0, n, [&](auto get, auto put) { put(exps, exp_value<T>(get(x))); });
      }
      GEO_UNROLL(4) for (int k = 0; k < n; ++k) sum[at[k]] += exps[k];
      if (last)
        GEO_UNROLL(4) for (int k = 0; k < n; ++k) last[at[k]] = widen(x[k]);
    });
  }

  static void softmax(const ScatterJob& job, int64_t begin, int64_t end, const void* max_, const void* divisor) {
    const T* max = static_cast<const T*>(max_);
    for_blocks(job, begin, end, [&](int64_t e, int n, const int64_t* at) {
      alignas(64) T top[kBlock], by[kBlock];
      const S* x = static_cast<const S*>(job.x) + e;
      S* out = static_cast<S*>(job.out) + e;
      gather(static_cast<const T*>(divisor), at, n, by);
      if (job.log) {
        gather(max, at, n, top);
        for_vectors<T>(0, n, [&](auto get, auto put) { put(out, (get(x) - get(top)) - get(by)); });
      } else if constexpr (kKeeps) {
        for_vectors<T>(0, n, [&](auto get, auto put) { put(out, get(out) / get(by)); });
      } else {
        if (max)
          gather(max, at, n, top);
        else
          memset(top, 0, sizeof(top));
        for_vectors<T>(0, n, [&](auto get, auto put) { put(out, exp_value<T>(get(x) - finite<T>(get(top))) / get(by)); });
      }
    });
  }

  static int64_t grad_sum(const ScatterJob& job, int64_t begin, int64_t end, void* sum_) {
    T* sum = static_cast<T*>(sum_);
    return for_blocks(job, begin, end, [&](int64_t e, int n, const int64_t* at) {
      alignas(64) T term[kBlock];
      const S *g = static_cast<const S*>(job.g) + e, *y = static_cast<const S*>(job.x) + e;
      for_vectors<T>(0, n, [&](auto get, auto put) { put(term, softmax_grad_term(get(g), get(y), job.log)); });
      GEO_UNROLL(4) for (int k = 0; k < n; ++k) sum[at[k]] += term[k];
    });
  }

  static void softmax_grad(const ScatterJob& job, int64_t begin, int64_t end, const void* sum) {
    for_blocks(job, begin, end, [&](int64_t e, int n, const int64_t* at) {
      alignas(64) T total[kBlock];
      const S *g = static_cast<const S*>(job.g) + e, *y = static_cast<const S*>(job.x) + e;
      S* out = static_cast<S*>(job.out) + e;
      gather(static_cast<const T*>(sum), at, n, total);
      for_vectors<T>(0, n, [&](auto get, auto put) {
        put(out, softmax_grad_value<T>(get(g), get(y), get(total), job.log));
      });
    });
  }

  static int64_t logsumexp_grad(const ScatterJob& job, int64_t begin, int64_t end) {
    if (job.width >= vec<T>::lanes) return logsumexp_grad_wide(job, begin / job.width, end / job.width);
    return for_blocks(job, begin, end, [&](int64_t e, int n, const int64_t* at) {
      alignas(64) T g[kBlock], level[kBlock];
      const S* x = static_cast<const S*>(job.x) + e;
      S* out = static_cast<S*>(job.out) + e;
      gather(static_cast<const T*>(job.g), at, n, g);
      gather(static_cast<const T*>(job.level), at, n, level);
      for_vectors<T>(0, n, [&](auto get, auto put) { put(out, logsumexp_grad_value<T>(get(g), get(x), get(level))); });
    });
  }

  static int64_t logsumexp_grad_wide(const ScatterJob& job, int64_t first, int64_t last) {
    const int64_t bad = first_bad(job.index, job.size, first, last);
    for (int64_t e = first; bad < 0 && e < last; ++e) {
      const T* g = static_cast<const T*>(job.g) + job.index[e] * job.width;
      const T* level = static_cast<const T*>(job.level) + job.index[e] * job.width;
      const S* x = static_cast<const S*>(job.x) + e * job.width;
      S* out = static_cast<S*>(job.out) + e * job.width;
      for_vectors<T>(0, job.width, [&](auto get, auto put) {
        put(out, logsumexp_grad_value<T>(get(g), get(x), get(level)));
      });
    }
    return bad;
  }

  static bool merge(void* sums, int64_t parts, int64_t entries, int64_t begin, int64_t end) {
    T* sum = static_cast<T*>(sums);
    for (int64_t k = 1; k < parts; ++k)
      for (int64_t i = begin; i < end; i += vec<T>::lanes) store(sum + i, load(sum + i) + load(sum + k * entries + i));
    const auto none = to_bits(kNoSum<T>);
    bool fits = true;
    for (int64_t i = begin; i < end; i += vec<T>::lanes) {
      const V s = load(sum + i);
      fits &= all_of(((s >= T(kLeastSum)) & (s <= T(kMostSum))) | (to_bits(s) == none));
    }
    return fits;
  }

  static void merge_last(const void* sums, void* lasts, int64_t parts, int64_t entries, int64_t begin, int64_t end) {
    const T* sum = static_cast<const T*>(sums);
    T* last = static_cast<T*>(lasts);
    const auto none = to_bits(kNoSum<T>);
    for (int64_t k = 1; k < parts; ++k)
      for (int64_t i = begin; i < end; i += vec<T>::lanes)
        store(last + i, to_bits(load(sum + k * entries + i)) == none ? load(last + i) : load(last + k * entries + i));
  }

  static void merge_maximum(void* maxima, int64_t parts, int64_t entries, int64_t begin, int64_t end) {
    T* max = static_cast<T*>(maxima);
    for (int64_t k = 1; k < parts; ++k)
      for (int64_t i = begin; i < end; i += vec<T>::lanes)
        store(max + i, greater(load(max + i), load(max + k * entries + i)));
  }

  static void divisor(const void* max_, void* sum_, int64_t begin, int64_t end, bool log) {
    const T* max = static_cast<const T*>(max_);
    T* sum = static_cast<T*>(sum_);
    for (int64_t i = begin; i < end; i += vec<T>::lanes) {
      const V top = load(max + i), total = load(sum + i) + (top - top);
      store(sum + i, log ? log_value<T>(total) : total);
    }
  }

  static void logsumexp(const void* max_, const void* sum_, const void* last_, int64_t begin, int64_t end, void* out) {
    const T *max = static_cast<const T*>(max_), *sum = static_cast<const T*>(sum_), *last = static_cast<const T*>(last_);
    const auto none = to_bits(kNoSum<T>);
    for_vectors<T>(begin, end, [&](auto get, auto put) {
      const V total = get(sum);
      V value;
      if (max) {
        value = logsumexp_value<T>(MaxSum<V>{get(max), total});
      } else {
        value = log_value<T>(total);
        if (last) value = exp_value<T>(get(last)) == total ? get(last) : value;
      }
      put(static_cast<T*>(out), to_bits(total) == none ? V{} : value);
    });
  }
};

template <class S>
constexpr ScatterSoftmaxTable table() {
  using K = Kernels<S>;
  return {K::maximum, K::sum,        K::softmax,       K::grad_sum, K::softmax_grad, K::logsumexp_grad,
          K::merge,   K::merge_last, K::merge_maximum, K::divisor,  K::logsumexp};
}

}  // namespace

const ScatterSoftmaxTable scatter_softmax_float = table<float>();
const ScatterSoftmaxTable scatter_softmax_double = table<double>();
const ScatterSoftmaxTable scatter_softmax_bfloat16 = table<bfloat16>();
const ScatterSoftmaxTable scatter_softmax_float16 = table<float16>();

}  // namespace GEO_SIMD_NAMESPACE
}  // namespace geo
