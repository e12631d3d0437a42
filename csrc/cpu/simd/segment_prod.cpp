// Leaf kernels of the gradient of a product, compiled once per SIMD level (see vec.h).
//
// The product of the other rows is that of the rows before times that of the rows after. Dividing the whole product by
// the row would read as much, fail where the product overflows or underflows and that of the others does not, and need
// cases for zeros; this way there are none. The two running products start from both ends at once: the first to come to
// a row leaves its product in `scratch`, the second multiplies.
#include "../segment_prod_table.h"

#include "../../segments.h"
#include "vec.h"

namespace geo {
namespace GEO_SIMD_NAMESPACE {
namespace {

constexpr int kTile = 4;  // vectors

template <class S>
using Acc = typename accumulate<S>::type;
template <class S>
using Vec = typename vec<Acc<S>>::type;

// n columns of a row from f on: N vectors, or a part of one.
template <class S, int N>
struct Columns {
  static constexpr int kStep = N * vec<Acc<S>>::lanes;
  int64_t f;
  int n;
  struct Value {
    Vec<S> v[N];
  };
  template <class P>
  GEO_INLINE Value read(const Columns& c, const P* row) {
    Value value;
    constexpr int L = vec<Acc<S>>::lanes;
    GEO_UNROLL(4) for (int j = 0; j < N; ++j)
      value.v[j] = N > 1 || c.n == L ? load(row + c.f + j * L) : load_n(row + c.f, c.n);
    return value;
  }
  template <class P>
  GEO_INLINE void write(const Columns& c, P* row, const Value& value) {
    constexpr int L = vec<Acc<S>>::lanes;
    GEO_UNROLL(4) for (int j = 0; j < N; ++j) {
      if (N > 1 || c.n == L)
        store(row + c.f + j * L, value.v[j]);
      else
        store_n(row + c.f, value.v[j], c.n);
    }
  }
  GEO_INLINE Value ones() {
    Value value;
    GEO_UNROLL(4) for (int j = 0; j < N; ++j) value.v[j] = Vec<S>{} + Acc<S>(1);
    return value;
  }
  GEO_INLINE Value times(const Value& a, const Value& b) {
    Value value;
    GEO_UNROLL(4) for (int j = 0; j < N; ++j) value.v[j] = a.v[j] * b.v[j];
    return value;
  }
  GEO_INLINE void keep(Acc<S>* to, const Value& value) {
    GEO_UNROLL(4) for (int j = 0; j < N; ++j) store(to + j * vec<Acc<S>>::lanes, value.v[j]);
  }
  GEO_INLINE Value kept(const Acc<S>* from) {
    Value value;
    GEO_UNROLL(4) for (int j = 0; j < N; ++j) value.v[j] = load(from + j * vec<Acc<S>>::lanes);
    return value;
  }
};

// A row of one column.
template <class S>
struct Single {
  static constexpr int kStep = 1;
  using Value = Acc<S>;
  template <class P>
  GEO_INLINE Value read(const Single&, const P* row) {
    return widen(*row);
  }
  template <class P>
  GEO_INLINE void write(const Single&, P* row, Value value) {
    narrow(value, row);
  }
  GEO_INLINE Value ones() { return 1; }
  GEO_INLINE Value times(Value a, Value b) { return a * b; }
  GEO_INLINE void keep(Acc<S>* to, Value value) { *to = value; }
  GEO_INLINE Value kept(const Acc<S>* from) { return *from; }
};

template <class S, class C>
GEO_INLINE void others(const OthersJob& job, const C& c, int64_t begin, int64_t end, const S* g, const Acc<S>* before,
                       const Acc<S>* after, Acc<S>* scratch) {
  using Value = typename C::Value;
  const S* x = static_cast<const S*>(job.x);
  S* out = static_cast<S*>(job.out);
  auto row = [&](int64_t place) { return (job.perm ? job.perm[place] : place) * job.width; };
  const Value grad = C::read(c, g);
  Value left = before ? C::read(c, before) : C::ones(), right = after ? C::read(c, after) : C::ones();
  const int64_t num = end - begin, half = num / 2;
  for (int64_t k = 0, l = num - 1; k < half; ++k, --l) {
    C::keep(scratch + k * C::kStep, left);
    C::keep(scratch + l * C::kStep, right);
    left = C::times(left, C::read(c, x + row(begin + k)));
    right = C::times(right, C::read(c, x + row(begin + l)));
  }
  if (num % 2) {
    const int64_t at = row(begin + half);
    const Value middle = C::read(c, x + at);
    C::write(c, out + at, C::times(grad, C::times(left, right)));
    left = C::times(left, middle);
    right = C::times(right, middle);
  }
  for (int64_t k = half - 1, l = num - half; k >= 0; --k, ++l) {
    const int64_t first = row(begin + k), last = row(begin + l);
    const Value x_first = C::read(c, x + first), x_last = C::read(c, x + last);
    C::write(c, out + first, C::times(grad, C::times(C::kept(scratch + k * C::kStep), right)));
    C::write(c, out + last, C::times(grad, C::times(left, C::kept(scratch + l * C::kStep))));
    right = C::times(right, x_first);
    left = C::times(left, x_last);
  }
}

template <class S>
Outcome piece(const OthersJob& job, int64_t segment, int64_t begin, int64_t end, const void* before_,
              const void* after_, void* scratch_) {
  if (job.perm) {
    bool bad = false;
    for (int64_t k = begin; k < end; ++k) bad |= uint64_t(job.perm[k]) >= uint64_t(job.num_rows);
    for (int64_t k = begin; bad && k < end; ++k)
      if (uint64_t(job.perm[k]) >= uint64_t(job.num_rows)) return {kEdgePerm, k};
  }
  constexpr int L = vec<Acc<S>>::lanes;
  const S* g = static_cast<const S*>(job.g) + segment * job.width;
  const Acc<S>*before = static_cast<const Acc<S>*>(before_), *after = static_cast<const Acc<S>*>(after_);
  Acc<S>* scratch = static_cast<Acc<S>*>(scratch_);
  if (job.width == 1) {
    others(job, Single<S>{}, begin, end, g, before, after, scratch);
    return {kNoFault, 0};
  }
  int64_t f = 0;
  for (; f + kTile * L <= job.width; f += kTile * L)
    others(job, Columns<S, kTile>{f, L}, begin, end, g, before, after, scratch);
  for (; f + L <= job.width; f += L) others(job, Columns<S, 1>{f, L}, begin, end, g, before, after, scratch);
  if (f < job.width) others(job, Columns<S, 1>{f, int(job.width - f)}, begin, end, g, before, after, scratch);
  return {kNoFault, 0};
}

template <class S>
Outcome run(const OthersJob& job, int64_t first, int64_t last, void* scratch) {
  for (int64_t i = first; i < last; ++i) {
    const Outcome outcome = piece<S>(job, i, job.ptr[i], job.ptr[i + 1], nullptr, nullptr, scratch);
    if (outcome.fault != kNoFault) return outcome;
  }
  return {kNoFault, 0};
}

// -- one column, in the order it stands --------------------------------------------------------------------------------
template <class S>
Outcome first(const OthersJob& job, int64_t begin, int64_t end, void* products_) {
  const S* x = static_cast<const S*>(job.x);
  Acc<S>*out = static_cast<Acc<S>*>(job.out), *products = static_cast<Acc<S>*>(products_);
  for (int64_t e = begin; e < end; ++e) {
    const int64_t i = job.index[e];
    if (uint64_t(i) >= uint64_t(job.num_segments)) return {kDstIndex, e};
    if (out) out[e] = products[i];
    products[i] *= widen(x[e]);
  }
  return {kNoFault, 0};
}
template <class S>
void second(const OthersJob& job, int64_t begin, int64_t end, void* products_) {
  const S *x = static_cast<const S*>(job.x), *g = static_cast<const S*>(job.g);
  Acc<S>*out = static_cast<Acc<S>*>(job.out), *products = static_cast<Acc<S>*>(products_);
  for (int64_t e = end - 1; e >= begin; --e) {
    const int64_t i = job.index[e];
    out[e] = widen(g[i]) * (out[e] * products[i]);
    products[i] *= widen(x[e]);
  }
}

template <class S>
constexpr OthersTable table_of() {
  if constexpr (sizeof(S) < sizeof(Acc<S>))  // products are kept in the rows of the result
    return {kTile * vec<Acc<S>>::lanes, run<S>, piece<S>, nullptr, nullptr};
  else
    return {kTile * vec<Acc<S>>::lanes, run<S>, piece<S>, first<S>, second<S>};
}

}  // namespace

const OthersTable others_float = table_of<float>();
const OthersTable others_double = table_of<double>();
const OthersTable others_bfloat16 = table_of<bfloat16>();
const OthersTable others_float16 = table_of<float16>();

}  // namespace GEO_SIMD_NAMESPACE
}  // namespace geo
