// Leaf of the causal convolution: for each vector of channels, down the rows of all segments in a block, with the taps and
// the rows that they still need in registers. So each row is loaded once.
#include "../segment_conv_table.h"

#include "../../segment_conv.h"
#include "vec.h"

namespace geo {
namespace GEO_SIMD_NAMESPACE {
namespace {

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

// f(run of rows): those of one segment in [begin, end). `t` is the first in the order of the scan, `reach` the number of
// rows of the segment that come before it, in that order.
template <class F>
GEO_INLINE void for_runs(const SegmentConv& job, int64_t segment, int64_t begin, int64_t end, F&& f) {
  for (int64_t s = segment, low = begin; low < end; ++s) {
    const int64_t stop = job.ptr[s + 1];
    const int64_t high = stop < end ? stop : end;
    if (low < high) {
      const int64_t t = job.reverse ? high - 1 : low;
      f(t, high - low, conv_reach(t, job.ptr[s], stop, job.reverse));
      low = high;
    }
  }
}

// K taps; h[j] is the row j + 1 steps back.
template <class S, int K, class L>
GEO_NOINLINE void conv_taps(const SegmentConv& job, int64_t segment, int64_t begin, int64_t end, int64_t c, L lanes) {
  using T = typename accumulate<S>::type;
  using V = typename vec<T>::type;
  const int64_t E = job.E, step = job.reverse ? -E : E;
  const S* x = static_cast<const S*>(job.x) + c;
  S* out = static_cast<S*>(const_cast<void*>(job.other)) + c;
  V w[K], h[K];
  GEO_UNROLL(8) for (int j = 0; j < K; ++j) w[j] = lanes.get(static_cast<const T*>(job.weight) + j * E + c);
  const V bias = job.bias ? lanes.get(static_cast<const T*>(job.bias) + c) : V{};
  for_runs(job, segment, begin, end, [&](int64_t t, int64_t count, int64_t reach) GEO_INLINED {
    const S* from = x + t * E;
    S* to = out + t * E;
    GEO_UNROLL(8) for (int j = 1; j < K; ++j) h[j] = j <= reach ? lanes.get(from - j * step) : V{};
    GEO_UNROLL(1) for (int64_t i = 0; i < count; ++i) {
      h[0] = lanes.get(from);
      V sum = bias;
      GEO_UNROLL(8) for (int j = 0; j < K; ++j) sum = conv_step(sum, w[j], h[j]);
      lanes.put(to, sum);
      GEO_UNROLL(8) for (int j = K - 1; j > 0; --j) h[j] = h[j - 1];
      from += step;
      to += step;
    }
  });
}

template <class S, int K, class L>
GEO_NOINLINE void weight_taps(const SegmentConv& job, int64_t segment, int64_t begin, int64_t end, int64_t c, L lanes,
                              typename accumulate<S>::type* to) {
  using T = typename accumulate<S>::type;
  using V = typename vec<T>::type;
  const int64_t E = job.E, step = job.reverse ? -E : E;
  const S *x = static_cast<const S*>(job.x) + c, *grad = static_cast<const S*>(job.other) + c;
  V sum[K], h[K];
  GEO_UNROLL(8) for (int j = 0; j < K; ++j) sum[j] = V{};
  for_runs(job, segment, begin, end, [&](int64_t t, int64_t count, int64_t reach) GEO_INLINED {
    const S *from = x + t * E, *g = grad + t * E;
    GEO_UNROLL(8) for (int j = 1; j < K; ++j) h[j] = j <= reach ? lanes.get(from - j * step) : V{};
    GEO_UNROLL(1) for (int64_t i = 0; i < count; ++i) {
      h[0] = lanes.get(from);
      const V v = lanes.get(g);
      GEO_UNROLL(8) for (int j = 0; j < K; ++j) sum[j] = conv_step(sum[j], v, h[j]);
      GEO_UNROLL(8) for (int j = K - 1; j > 0; --j) h[j] = h[j - 1];
      from += step;
      g += step;
    }
  });
  GEO_UNROLL(8) for (int j = 0; j < K; ++j) lanes.put(to + j * E + c, lanes.get(to + j * E + c) + sum[j]);
}

// Any number of taps: the rows they need are read again.
template <class S, class L>
GEO_NOINLINE void conv_any(const SegmentConv& job, int64_t segment, int64_t begin, int64_t end, int64_t c, L lanes) {
  using T = typename accumulate<S>::type;
  using V = typename vec<T>::type;
  const int64_t E = job.E, step = job.reverse ? -E : E;
  const S* x = static_cast<const S*>(job.x) + c;
  const T* weight = static_cast<const T*>(job.weight) + c;
  S* out = static_cast<S*>(const_cast<void*>(job.other)) + c;
  const V bias = job.bias ? lanes.get(static_cast<const T*>(job.bias) + c) : V{};
  for_runs(job, segment, begin, end, [&](int64_t t, int64_t count, int64_t reach) GEO_INLINED {
    const S* from = x + t * E;
    S* to = out + t * E;
    for (int64_t i = 0; i < count; ++i, from += step, to += step) {
      const int64_t taps = reach + i + 1 < job.K ? reach + i + 1 : job.K;
      V sum = bias;
      for (int64_t j = 0; j < taps; ++j) sum = conv_step(sum, lanes.get(weight + j * E), lanes.get(from - j * step));
      lanes.put(to, sum);
    }
  });
}

template <class S, class L>
GEO_NOINLINE void weight_any(const SegmentConv& job, int64_t segment, int64_t begin, int64_t end, int64_t c, L lanes,
                             typename accumulate<S>::type* to) {
  using T = typename accumulate<S>::type;
  using V = typename vec<T>::type;
  const int64_t E = job.E, step = job.reverse ? -E : E;
  const S *x = static_cast<const S*>(job.x) + c, *grad = static_cast<const S*>(job.other) + c;
  for (int64_t j = 0; j < job.K; ++j) {
    V sum{};
    for_runs(job, segment, begin, end, [&](int64_t t, int64_t count, int64_t reach) GEO_INLINED {
      const int64_t first = j > reach ? j - reach : 0;  // no row stands j steps before the earlier ones
      const S *from = x + t * E - j * step, *g = grad + t * E;
      for (int64_t i = first; i < count; ++i) sum = conv_step(sum, lanes.get(g + i * step), lanes.get(from + i * step));
    });
    lanes.put(to + j * E + c, lanes.get(to + j * E + c) + sum);
  }
}

template <int N>
struct Size {
  static constexpr int value = N;
};
// f(Size<K>), or f(Size<0>) where K is not one of those unrolled
template <class F>
GEO_INLINE void for_taps(int64_t K, F&& f) {
  switch (K) {
    case 1: return f(Size<1>());
    case 2: return f(Size<2>());
    case 3: return f(Size<3>());
    case 4: return f(Size<4>());
    case 5: return f(Size<5>());
    case 6: return f(Size<6>());
    case 7: return f(Size<7>());
    case 8: return f(Size<8>());
    default: return f(Size<0>());
  }
}

// f(c, Lanes) for each vector of channels
template <class T, class F>
GEO_INLINE void for_channels(int64_t E, F&& f) {
  int64_t c = 0;
  for (; c + vec<T>::lanes <= E; c += vec<T>::lanes) f(c, Lanes<true>{});
  if (c < E) f(c, Lanes<false>{int(E - c)});
}

template <class S>
void conv(const SegmentConv& job, int64_t segment, int64_t begin, int64_t end) {
  for_taps(job.K, [&](auto taps) {
    for_channels<typename accumulate<S>::type>(job.E, [&](int64_t c, auto lanes) {
      if constexpr (decltype(taps)::value)
        conv_taps<S, decltype(taps)::value>(job, segment, begin, end, c, lanes);
      else
        conv_any<S>(job, segment, begin, end, c, lanes);
    });
  });
}

template <class S>
void weight(const SegmentConv& job, int64_t segment, int64_t begin, int64_t end, void* sum) {
  using T = typename accumulate<S>::type;
  for_taps(job.K, [&](auto taps) {
    for_channels<T>(job.E, [&](int64_t c, auto lanes) {
      if constexpr (decltype(taps)::value)
        weight_taps<S, decltype(taps)::value>(job, segment, begin, end, c, lanes, static_cast<T*>(sum));
      else
        weight_any<S>(job, segment, begin, end, c, lanes, static_cast<T*>(sum));
    });
  });
}

template <class S>
constexpr SegmentConvTable table() {
  return {conv<S>, weight<S>};
}

}  // namespace

const SegmentConvTable segment_conv_float = table<float>();
const SegmentConvTable segment_conv_double = table<double>();
const SegmentConvTable segment_conv_bfloat16 = table<bfloat16>();
const SegmentConvTable segment_conv_float16 = table<float16>();

}  // namespace GEO_SIMD_NAMESPACE
}  // namespace geo
