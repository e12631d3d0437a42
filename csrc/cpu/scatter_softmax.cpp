// Softmax and log-sum-exp by index, of rows in their order: tables with an entry per segment and column take the maxima and
// sums. The rows are cut into a number of parts that depends on the sizes alone; each part has tables of its own, which
// are merged in order.
//
// Exponentials are first added up without maximum, which saves a pass. Only where a segment's sum leaves the range in which
// that is as good is all done again, with maxima.
#include "scatter_softmax.h"

#include <atomic>
#include <limits>
#include <memory>
#include <vector>

#include "parallel.h"
#include "scatter_softmax_table.h"

namespace geo {
namespace {

const ScatterSoftmaxTable& table(float) { return choose_table(GEO_TABLES(scatter_softmax_float)); }
const ScatterSoftmaxTable& table(double) { return choose_table(GEO_TABLES(scatter_softmax_double)); }
const ScatterSoftmaxTable& table(bfloat16) { return choose_table(GEO_TABLES(scatter_softmax_bfloat16)); }
const ScatterSoftmaxTable& table(float16) { return choose_table(GEO_TABLES(scatter_softmax_float16)); }

template <class S>
struct Scatter {
  using T = typename accumulate<S>::type;
  const char *op, *name;
  Tensor index;
  const ScatterSoftmaxTable& leaf = table(S{});
  ScatterJob job{};
  int64_t entries, parts;  // of a table, made full vectors
  std::unique_ptr<T[]> max, sum, last;  // no maxima: the sums were fine without

  Scatter(const char* op_, const char* name_, const Tensor& src, const Tensor& index_, int64_t size)
      : op(op_), name(name_), index(made_contiguous(index_)) {
    check_index_dtype(index, op, name);
    STD_TORCH_CHECK(src.dim() >= 1 && src.size(0) == index.numel(), op, ": ", name, " must have one entry per row of src");
    job.index = index_data(index);
    job.num_rows = index.numel();
    job.size = size;
    job.width = 1;
    for (int64_t d = 1; d < src.dim(); ++d) job.width *= src.size(d);
    entries = (size * job.width + 15) / 16 * 16;
    parts = num_parts(job.num_rows, size);
  }

  // pass(begin, end, table, entries before it) for each part, each with a table filled with `fill`.
  template <class Pass>
  std::unique_ptr<T[]> tables(T fill, Pass&& pass) const {
    std::unique_ptr<T[]> all(new T[parts * entries]);
    advise_huge_pages(all.get(), parts * entries * int64_t(sizeof(T)));
    Faults faults;
    parallel_blocks(parts, 1, [&](int64_t, int64_t first, int64_t last) {
      for (int64_t k = first; k < last; ++k) {
        std::fill_n(&all[k * entries], entries, fill);
        note(faults, pass(begin_of(k), begin_of(k + 1), &all[k * entries], k * entries));
      }
    });
    raise(faults);
    return all;
  }
  int64_t begin_of(int64_t part) const { return job.num_rows * part / parts * job.width; }
  static void note(Faults& faults, int64_t bad) {
    if (bad >= 0) faults.add(kDstIndex, bad);
  }
  void raise(const Faults& faults) const {
    if (const Found found = faults.first(); found.fault != kNoFault)
      raise_out_of_range(op, name, found.position, job.index[found.position], 0, job.size - 1);
  }

  template <class Pass>
  void for_rows(Pass&& pass) const {
    const int64_t width = std::max<int64_t>(1, job.width);
    parallel_blocks(job.num_rows, block_of(width * int64_t(sizeof(S))), [&](int64_t, int64_t begin, int64_t end) {
      pass(begin * job.width, end * job.width);
    });
  }
  template <class Pass>
  void for_entries(Pass&& pass) const {
    parallel_blocks(entries, 1 << 14, [&](int64_t, int64_t begin, int64_t end) { pass(begin, end); });
  }

  bool add_exponentials() {
    sum = tables(kNoSum<T>, [&](int64_t begin, int64_t end, T* to, int64_t at) {
      return leaf.sum(job, begin, end, max.get(), to, last ? last.get() + at : nullptr);
    });
    std::atomic<bool> fits{true};
    for_entries([&](int64_t begin, int64_t end) {
      if (last) leaf.merge_last(sum.get(), last.get(), parts, entries, begin, end);
      if (!leaf.merge(sum.get(), parts, entries, begin, end)) fits.store(false, std::memory_order_relaxed);
    });
    return fits;
  }
  void exponentials(bool with_maximum) {
    if (!with_maximum && add_exponentials()) return;
    last.reset();
    max = tables(-std::numeric_limits<T>::infinity(),
                 [&](int64_t begin, int64_t end, T* to, int64_t) { return leaf.maximum(job, begin, end, to); });
    for_entries([&](int64_t begin, int64_t end) { leaf.merge_maximum(max.get(), parts, entries, begin, end); });
    add_exponentials();
  }
};

}  // namespace

bool takes_rows_in_order(int64_t width) { return width == 1; }

Tensor softmax_by_index(const char* op, const char* name, const Tensor& src, const Tensor& index, int64_t size, bool log) {
  Tensor out = torch::stable::new_empty(src, src.sizes());
  dispatch_floating(src.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    Scatter<S> s(op, name, src, index, size);
    s.job.x = read<S>(src);
    s.job.out = write<S>(out);
    s.job.log = log;
    advise_huge_pages(s.job.out, out.numel() * int64_t(sizeof(S)));
    s.exponentials(log);  // the logarithm of a sum without maximum would lose digits: x - log(exp(x)) is not 0
    if (s.max)
      s.for_entries([&](int64_t begin, int64_t end) { s.leaf.divisor(s.max.get(), s.sum.get(), begin, end, log); });
    s.for_rows([&](int64_t begin, int64_t end) { s.leaf.softmax(s.job, begin, end, s.max.get(), s.sum.get()); });
  });
  return out;
}

Tensor softmax_grad_by_index(const char* op, const char* name, const Tensor& grad, const Tensor& out, const Tensor& index,
                             int64_t size, bool log) {
  Tensor to = torch::stable::new_empty(out, out.sizes());
  dispatch_floating(out.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    using T = typename accumulate<S>::type;
    Scatter<S> s(op, name, out, index, size);
    s.job.x = read<S>(out);
    s.job.g = read<S>(grad);
    s.job.out = write<S>(to);
    s.job.log = log;
    advise_huge_pages(s.job.out, to.numel() * int64_t(sizeof(S)));
    s.sum = s.tables(T(0), [&](int64_t begin, int64_t end, T* sum, int64_t) {
      return s.leaf.grad_sum(s.job, begin, end, sum);
    });
    s.for_entries([&](int64_t begin, int64_t end) { s.leaf.merge(s.sum.get(), s.parts, s.entries, begin, end); });
    s.for_rows([&](int64_t begin, int64_t end) { s.leaf.softmax_grad(s.job, begin, end, s.sum.get()); });
  });
  return to;
}

Tensor logsumexp_by_index(const char* op, const char* name, const Tensor& src, const Tensor& index, int64_t size,
                          bool single_rows) {
  std::vector<int64_t> sizes(src.sizes().begin(), src.sizes().end());
  sizes[0] = size;
  const ScalarType dtype = src.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor out = torch::stable::new_empty(src, sizes, dtype);
  dispatch_floating(src.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    using T = typename accumulate<S>::type;
    Scatter<S> s(op, name, src, index, size);
    s.job.x = read<S>(src);
    T* to = write<T>(out);
    advise_huge_pages(to, out.numel() * int64_t(sizeof(T)));
    if (single_rows) s.last = s.tables(T(0), [](int64_t, int64_t, T*, int64_t) { return int64_t(-1); });
    s.exponentials(false);
    s.for_entries([&](int64_t begin, int64_t end) {
      s.leaf.logsumexp(s.max.get(), s.sum.get(), s.last.get(), begin, std::min(end, out.numel()), to);
    });
  });
  return out;
}

Tensor logsumexp_grad_by_index(const char* op, const char* name, const Tensor& grad, const Tensor& src, const Tensor& out,
                               const Tensor& index, int64_t size) {
  Tensor to = torch::stable::new_empty(src, src.sizes());
  dispatch_floating(src.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    using T = typename accumulate<S>::type;
    Scatter<S> s(op, name, src, index, size);
    s.job.x = read<S>(src);
    s.job.g = read<T>(grad);
    s.job.level = read<T>(out);
    s.job.out = write<S>(to);
    advise_huge_pages(s.job.out, to.numel() * int64_t(sizeof(S)));
    Faults faults;
    s.for_rows([&](int64_t begin, int64_t end) { s.note(faults, s.leaf.logsumexp_grad(s.job, begin, end)); });
    s.raise(faults);
  });
  return to;
}

}  // namespace geo
