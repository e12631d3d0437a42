// CPU launchers of softmax, log-sum-exp and standard deviation of segments.
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <optional>
#include <tuple>
#include <vector>

#include "parallel.h"
#include "scatter_softmax.h"
#include "segment_softmax_table.h"

namespace geo {
namespace {

const SegmentSoftmaxTable& table(float) { return choose_table(GEO_TABLES(segment_softmax_float)); }
const SegmentSoftmaxTable& table(double) { return choose_table(GEO_TABLES(segment_softmax_double)); }
const SegmentSoftmaxTable& table(bfloat16) { return choose_table(GEO_TABLES(segment_softmax_bfloat16)); }
const SegmentSoftmaxTable& table(float16) { return choose_table(GEO_TABLES(segment_softmax_float16)); }

ScalarType wide_type(ScalarType dtype) { return dtype == ScalarType::Double ? dtype : ScalarType::Float; }

int64_t row_width(const Tensor& t) {
  int64_t width = 1;
  for (int64_t d = 1; d < t.dim(); ++d) width *= t.size(d);
  return width;
}

const int64_t* checked_ptr(const char* op, const Tensor& src, const Tensor& ptr) {
  STD_TORCH_CHECK(src.dim() >= 1, op, ": src must have one row per edge");
  check_index_dtype(ptr, op, "ptr");
  STD_TORCH_CHECK(ptr.numel() > 0, op, ": ptr must not be empty");
  check_ptr(op, index_data(ptr), ptr.numel() - 1, src.size(0));
  return index_data(ptr);
}

// The order in which rows are read, checked: ptr rises from 0 to the number of rows, perm stays inside them.
struct Rows {
  Tensor ptr, perm;
  SegmentJob job{};
  int64_t num_segments;

  Rows(const char* op, const Tensor& src, const Tensor& ptr_, const std::optional<Tensor>& perm_)
      : ptr(made_contiguous(ptr_)), perm(perm_ ? made_contiguous(*perm_) : ptr) {
    job.ptr = checked_ptr(op, src, ptr);
    num_segments = ptr.numel() - 1;
    job.num_edges = src.size(0);
    job.width = row_width(src);
    if (!perm_) return;
    check_index_dtype(perm, op, "edge_perm");
    STD_TORCH_CHECK(perm.numel() == job.num_edges, op, ": edge_perm must have one entry per edge");
    job.perm = index_data(perm);
    const uint64_t limit = job.num_edges;
    parallel_blocks(job.num_edges, 1 << 15, [&](int64_t, int64_t begin, int64_t end) {
      uint64_t bad = 0;
      for (int64_t e = begin; e < end; ++e) bad |= uint64_t(job.perm[e]) >= limit;
      for (int64_t e = begin; bad && e < end; ++e)
        if (uint64_t(job.perm[e]) >= limit) return faults.add(kEdgePerm, e);
    });
    if (const Found found = faults.first(); found.fault != kNoFault)
      raise_out_of_range(op, "edge_perm", found.position, job.perm[found.position], 0, job.num_edges - 1);
  }

  // [N, *F] of `dtype`
  Tensor per_segment(const Tensor& src, ScalarType dtype) const {
    std::vector<int64_t> sizes(src.sizes().begin(), src.sizes().end());
    sizes[0] = num_segments;
    return torch::stable::new_empty(src, sizes, dtype);
  }

 private:
  Faults faults;
};

void check_rows(const char* op, const char* name, const Tensor& t, ScalarType dtype, const Tensor& like, int64_t rows) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, op, ": ", name, " must be ", torch::headeronly::toString(dtype), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
  bool same = t.dim() == like.dim() && t.size(0) == rows;
  for (int64_t d = 1; same && d < like.dim(); ++d) same = t.size(d) == like.size(d);
  STD_TORCH_CHECK(same, op, ": ", name, " must have ", rows, " rows of the shape of src's");
}

// Whether the rows are taken in their order, by the segment of each, and not segment by segment.
bool in_order(const char* op, const Tensor& src, const Tensor& ptr, const std::optional<Tensor>& perm,
              const std::optional<Tensor>& index) {
  if (!perm || !index || !takes_rows_in_order(row_width(src))) return false;
  checked_ptr(op, src, made_contiguous(ptr));
  return true;
}

template <class S>
void run(const SegmentKernel& kernel, const SegmentJob& job, int64_t num_segments) {
  using T = typename accumulate<S>::type;
  if (job.width == 0) return;
  const int64_t block = block_of(job.width * int64_t(sizeof(S))), row = job.width * kernel.parts;
  std::vector<T> states(num_slots(job.num_edges) * row);
  std::atomic<bool> hubs{false};
  parallel_segments(
      job.ptr, num_segments, block, [&](int64_t, int64_t first, int64_t last) { kernel.run(job, first, last); },
      [&](int64_t, int64_t i, int64_t begin, int64_t end, int64_t slot) {
        if (kernel.parts == 0) return kernel.write(job, i, begin, end, nullptr);
        kernel.piece(job, begin, end, &states[slot * row]);
        hubs.store(true, std::memory_order_relaxed);
      });
  if (!hubs) return;
  for (int64_t i = 0; i < num_segments; ++i)
    if (is_hub(job.ptr[i], job.ptr[i + 1])) kernel.finish(job, i, &states[first_slot(job.ptr[i]) * row]);
  if (!kernel.write) return;
  parallel_segments(
      job.ptr, num_segments, block, [](int64_t, int64_t, int64_t) {},
      [&](int64_t, int64_t i, int64_t begin, int64_t end, int64_t) {
        kernel.write(job, i, begin, end, &states[first_slot(job.ptr[i]) * row]);
      });
}

Tensor segment_softmax_cpu(const Tensor& src_, const Tensor& ptr, const std::optional<Tensor>& perm,
                           const std::optional<Tensor>& index, bool log) {
  constexpr const char* op = "segment_softmax";
  const Tensor src = made_contiguous(src_);
  if (in_order(op, src, ptr, perm, index))
    return softmax_by_index(op, "dst_index", src, *index, ptr.numel() - 1, log);
  Rows rows(op, src, ptr, perm);
  Tensor out = torch::stable::new_empty(src, src.sizes());
  dispatch_floating(src.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    SegmentJob& job = rows.job;
    job.x = read<S>(src);
    job.out = write<S>(out);
    job.log = log;
    advise_huge_pages(job.out, out.numel() * int64_t(sizeof(S)));
    run<S>(table(S{}).softmax, job, rows.num_segments);
  });
  return out;
}

Tensor segment_softmax_grad_cpu(const Tensor& grad_, const Tensor& out_, const Tensor& ptr,
                                const std::optional<Tensor>& perm, const std::optional<Tensor>& index, bool log) {
  constexpr const char* op = "segment_softmax_grad";
  const Tensor grad = made_contiguous(grad_), out = made_contiguous(out_);
  check_rows(op, "grad", grad, out.scalar_type(), out, out.size(0));
  if (in_order(op, out, ptr, perm, index))
    return softmax_grad_by_index(op, "dst_index", grad, out, *index, ptr.numel() - 1, log);
  Rows rows(op, out, ptr, perm);
  Tensor to = torch::stable::new_empty(out, out.sizes());
  dispatch_floating(out.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    SegmentJob& job = rows.job;
    job.x = read<S>(out);
    job.g = read<S>(grad);
    job.out = write<S>(to);
    job.log = log;
    advise_huge_pages(job.out, to.numel() * int64_t(sizeof(S)));
    run<S>(table(S{}).softmax_grad, job, rows.num_segments);
  });
  return to;
}

// What is alone in its segment of one column, as it stands.
void put_single_rows(const char* op, const Tensor& src, const Tensor& ptr_, const Tensor& perm_, const Tensor& out) {
  check_index_dtype(perm_, op, "edge_perm");
  STD_TORCH_CHECK(perm_.numel() == src.size(0), op, ": edge_perm must have one entry per edge");
  const int64_t *ptr = index_data(ptr_), *perm = index_data(perm_), rows = src.size(0);
  Faults faults;
  dispatch_floating(src.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    const S* x = read<S>(src);
    auto* to = write<typename accumulate<S>::type>(out);
    parallel_blocks(ptr_.numel() - 1, 1 << 14, [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (ptr[i + 1] - ptr[i] != 1) continue;
        const int64_t row = perm[ptr[i]];
        if (uint64_t(row) >= uint64_t(rows)) return faults.add(kEdgePerm, ptr[i]);
        to[i] = widen(x[row]);
      }
    });
  });
  if (const Found found = faults.first(); found.fault != kNoFault)
    raise_out_of_range(op, "edge_perm", found.position, perm[found.position], 0, rows - 1);
}

Tensor segment_logsumexp_cpu(const Tensor& src_, const Tensor& ptr, const std::optional<Tensor>& perm,
                             const std::optional<Tensor>& index) {
  constexpr const char* op = "segment_logsumexp";
  const Tensor src = made_contiguous(src_);
  if (in_order(op, src, ptr, perm, index)) {
    const Tensor out = logsumexp_by_index(op, "dst_index", src, *index, ptr.numel() - 1, false);
    put_single_rows(op, src, made_contiguous(ptr), made_contiguous(*perm), out);
    return out;
  }
  Rows rows(op, src, ptr, perm);
  Tensor out = rows.per_segment(src, wide_type(src.scalar_type()));
  dispatch_floating(src.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    using T = typename accumulate<S>::type;
    SegmentJob& job = rows.job;
    job.x = read<S>(src);
    job.out = write<T>(out);
    advise_huge_pages(job.out, out.numel() * int64_t(sizeof(T)));
    run<S>(table(S{}).logsumexp, job, rows.num_segments);
  });
  return out;
}

Tensor segment_logsumexp_grad_cpu(const Tensor& grad_, const Tensor& src_, const Tensor& out_, const Tensor& ptr,
                                  const std::optional<Tensor>& perm, const std::optional<Tensor>& index) {
  constexpr const char* op = "segment_logsumexp_grad";
  const Tensor grad = made_contiguous(grad_), src = made_contiguous(src_);
  const Tensor out = made_contiguous(out_);
  check_rows(op, "grad", grad, wide_type(src.scalar_type()), src, ptr.numel() - 1);
  check_rows(op, "out", out, wide_type(src.scalar_type()), src, ptr.numel() - 1);
  if (perm && index) {  // nothing to sum: any rows in their order
    checked_ptr(op, src, made_contiguous(ptr));
    return logsumexp_grad_by_index(op, "dst_index", grad, src, out, *index, ptr.numel() - 1);
  }
  Rows rows(op, src, ptr, perm);
  Tensor to = torch::stable::new_empty(src, src.sizes());
  dispatch_floating(src.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    using T = typename accumulate<S>::type;
    SegmentJob& job = rows.job;
    job.x = read<S>(src);
    job.g = read<T>(grad);
    job.level = read<T>(out);
    job.out = write<S>(to);
    advise_huge_pages(job.out, to.numel() * int64_t(sizeof(S)));
    run<S>(table(S{}).logsumexp_grad, job, rows.num_segments);
  });
  return to;
}

std::tuple<Tensor, Tensor> segment_std_cpu(const Tensor& src_, const Tensor& ptr, const std::optional<Tensor>& perm,
                                           const std::optional<Tensor>&, bool unbiased) {
  constexpr const char* op = "segment_std";
  const Tensor src = made_contiguous(src_);
  Rows rows(op, src, ptr, perm);
  Tensor std = rows.per_segment(src, src.scalar_type()), mean = rows.per_segment(src, wide_type(src.scalar_type()));
  dispatch_floating(src.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    using T = typename accumulate<S>::type;
    SegmentJob& job = rows.job;
    job.x = read<S>(src);
    job.out = write<S>(std);
    job.mean = write<T>(mean);
    job.unbiased = unbiased;
    advise_huge_pages(job.out, std.numel() * int64_t(sizeof(S)));
    advise_huge_pages(job.mean, mean.numel() * int64_t(sizeof(T)));
    run<S>(table(S{}).std, job, rows.num_segments);
  });
  return {std, mean};
}

// -- by index: sorted rows as segments, others in their order ----------------------------------------------------------
std::optional<Tensor> ptr_of_sorted(const char* op, const Tensor& index_, int64_t size) {
  check_index_dtype(index_, op, "index");
  STD_TORCH_CHECK(size >= 0, op, ": size must not be negative, got ", size);
  const Tensor index = made_contiguous(index_), ptr = torch::stable::new_empty(index, {size + 1});
  if (sorted_ptr(index_data(index), index.numel(), size, write<int64_t>(ptr))) return ptr;
  return std::nullopt;
}

Tensor scatter_softmax_cpu(const Tensor& src, const Tensor& index, int64_t size, bool log) {
  constexpr const char* op = "scatter_softmax";
  if (const auto ptr = ptr_of_sorted(op, index, size)) return segment_softmax_cpu(src, *ptr, {}, {}, log);
  return softmax_by_index(op, "index", made_contiguous(src), index, size, log);
}

Tensor scatter_softmax_grad_cpu(const Tensor& grad, const Tensor& out, const Tensor& index, int64_t size, bool log) {
  constexpr const char* op = "scatter_softmax_grad";
  if (const auto ptr = ptr_of_sorted(op, index, size)) return segment_softmax_grad_cpu(grad, out, *ptr, {}, {}, log);
  check_rows(op, "grad", grad, out.scalar_type(), out, out.size(0));
  return softmax_grad_by_index(op, "index", made_contiguous(grad), made_contiguous(out), index, size,
                               log);
}

Tensor scatter_logsumexp_cpu(const Tensor& src, const Tensor& index, int64_t size) {
  constexpr const char* op = "scatter_logsumexp";
  if (const auto ptr = ptr_of_sorted(op, index, size)) return segment_logsumexp_cpu(src, *ptr, {}, {});
  return logsumexp_by_index(op, "index", made_contiguous(src), index, size, true);
}

Tensor scatter_logsumexp_grad_cpu(const Tensor& grad, const Tensor& src, const Tensor& out, const Tensor& index) {
  constexpr const char* op = "scatter_logsumexp_grad";
  const int64_t size = out.size(0);
  check_rows(op, "grad", grad, wide_type(src.scalar_type()), src, size);
  check_rows(op, "out", out, wide_type(src.scalar_type()), src, size);
  return logsumexp_grad_by_index(op, "index", made_contiguous(grad), made_contiguous(src),
                                 made_contiguous(out), index, size);
}

}  // namespace
}  // namespace geo

STABLE_TORCH_LIBRARY_IMPL(geo, CPU, m) {
  m.impl("segment_softmax", TORCH_BOX(&geo::segment_softmax_cpu));
  m.impl("segment_softmax_grad", TORCH_BOX(&geo::segment_softmax_grad_cpu));
  m.impl("segment_logsumexp", TORCH_BOX(&geo::segment_logsumexp_cpu));
  m.impl("segment_logsumexp_grad", TORCH_BOX(&geo::segment_logsumexp_grad_cpu));
  m.impl("scatter_softmax", TORCH_BOX(&geo::scatter_softmax_cpu));
  m.impl("scatter_softmax_grad", TORCH_BOX(&geo::scatter_softmax_grad_cpu));
  m.impl("scatter_logsumexp", TORCH_BOX(&geo::scatter_logsumexp_cpu));
  m.impl("scatter_logsumexp_grad", TORCH_BOX(&geo::scatter_logsumexp_grad_cpu));
  m.impl("segment_std", TORCH_BOX(&geo::segment_std_cpu));
}
