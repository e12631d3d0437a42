// Leaf of the derivatives of GELU.
#include "../gelu_table.h"

#include "vec.h"

namespace geo {
namespace GEO_SIMD_NAMESPACE {
namespace {

// f(i, get, put) for each vector of [begin, end); get and put take the last one's lanes alone.
template <class T, class F>
GEO_INLINE void for_vectors(int64_t begin, int64_t end, F&& f) {
  int64_t i = begin;
  for (; i + vec<T>::lanes <= end; i += vec<T>::lanes)
    f(i, [](const auto* p) { return load(p); }, [](auto* p, auto v) { store(p, v); });
  const int n = int(end - i);
  if (n) f(i, [n](const auto* p) { return load_n(p, n); }, [n](auto* p, auto v) { store_n(p, v, n); });
}

template <class S>
void mul(const Gelu& job, int64_t begin, int64_t end) {
  using T = typename accumulate<S>::type;
  const S *x = static_cast<const S*>(job.x), *g = static_cast<const S*>(job.g);
  S* out = static_cast<S*>(job.out);
  dispatch_gelu_order(job.order, [&](auto order) {
    constexpr int n = decltype(order)::value;
    if (g)
      for_vectors<T>(begin, end, [&](int64_t i, auto get, auto put) {
        put(out + i, get(g + i) * gelu_value<n>(gelu_parts<T>(get(x + i)), job.poly));
      });
    else
      for_vectors<T>(begin, end, [&](int64_t i, auto get, auto put) {
        put(out + i, gelu_value<n>(gelu_parts<T>(get(x + i)), job.poly));
      });
  });
}

template <class S>
void grad(const Gelu& job, int64_t begin, int64_t end) {
  using T = typename accumulate<S>::type;
  const S *x = static_cast<const S*>(job.x), *g = static_cast<const S*>(job.g), *h = static_cast<const S*>(job.h);
  S *out = static_cast<S*>(job.out), *dx = static_cast<S*>(job.dx);
  dispatch_gelu_order(job.order, [&](auto order) {
    constexpr int n = decltype(order)::value, next = n < 3 ? n + 1 : 3;
    for_vectors<T>(begin, end, [&](int64_t i, auto get, auto put) {
      const auto parts = gelu_parts<T>(get(x + i));
      const auto v = get(h + i);
      put(out + i, v * gelu_value<n>(parts, job.poly));
      put(dx + i, v * get(g + i) * gelu_value<next>(parts, job.next));
    });
  });
}

template <class S>
constexpr GeluTable table() {
  return {mul<S>, grad<S>};
}

}  // namespace

const GeluTable gelu_float = table<float>();
const GeluTable gelu_double = table<double>();
const GeluTable gelu_bfloat16 = table<bfloat16>();
const GeluTable gelu_float16 = table<float16>();

}  // namespace GEO_SIMD_NAMESPACE
}  // namespace geo
