// CPU launchers of softmax, log-sum-exp and standard deviation of segments.
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <optional>
#include <tuple>
#include <vector>

#include "parallel.h"
#include "segment_softmax_table.h"

namespace geo {
namespace {

const SegmentSoftmaxTable& table(float) { return choose_table(GEO_TABLES(segment_softmax_float)); }
const SegmentSoftmaxTable& table(double) { return choose_table(GEO_TABLES(segment_softmax_double)); }
const SegmentSoftmaxTable& table(bfloat16) { return choose_table(GEO_TABLES(segment_softmax_bfloat16)); }
const SegmentSoftmaxTable& table(float16) { return choose_table(GEO_TABLES(segment_softmax_float16)); }

ScalarType wide_type(ScalarType dtype) { return dtype == ScalarType::Double ? dtype : ScalarType::Float; }

// The order in which rows are read, checked: ptr rises from 0 to the number of rows, perm stays inside them.
struct Rows {
  Tensor ptr, perm;
  SegmentJob job{};
  int64_t num_segments;

  Rows(const char* op, const Tensor& src, const Tensor& ptr_, const std::optional<Tensor>& perm_)
      : ptr(torch::stable::contiguous(ptr_)), perm(perm_ ? torch::stable::contiguous(*perm_) : ptr) {
    STD_TORCH_CHECK(src.dim() >= 1, op, ": src must have one row per edge");
    check_index_dtype(ptr, op, "ptr");
    STD_TORCH_CHECK(ptr.numel() > 0, op, ": ptr must not be empty");
    num_segments = ptr.numel() - 1;
    job.ptr = index_data(ptr);
    job.num_edges = src.size(0);
    job.width = 1;
    for (int64_t d = 1; d < src.dim(); ++d) job.width *= src.size(d);
    check_ptr(op, job.ptr, num_segments, job.num_edges);
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
                           const std::optional<Tensor>&, bool log) {
  constexpr const char* op = "segment_softmax";
  const Tensor src = torch::stable::contiguous(src_);
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
                                const std::optional<Tensor>& perm, const std::optional<Tensor>&, bool log) {
  constexpr const char* op = "segment_softmax_grad";
  const Tensor grad = torch::stable::contiguous(grad_), out = torch::stable::contiguous(out_);
  Rows rows(op, out, ptr, perm);
  check_rows(op, "grad", grad, out.scalar_type(), out, out.size(0));
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

Tensor segment_logsumexp_cpu(const Tensor& src_, const Tensor& ptr, const std::optional<Tensor>& perm,
                             const std::optional<Tensor>&) {
  constexpr const char* op = "segment_logsumexp";
  const Tensor src = torch::stable::contiguous(src_);
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
                                  const std::optional<Tensor>& perm, const std::optional<Tensor>&) {
  constexpr const char* op = "segment_logsumexp_grad";
  const Tensor grad = torch::stable::contiguous(grad_), src = torch::stable::contiguous(src_);
  const Tensor out = torch::stable::contiguous(out_);
  Rows rows(op, src, ptr, perm);
  check_rows(op, "grad", grad, wide_type(src.scalar_type()), src, rows.num_segments);
  check_rows(op, "out", out, wide_type(src.scalar_type()), src, rows.num_segments);
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
  const Tensor src = torch::stable::contiguous(src_);
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

}  // namespace
}  // namespace geo

STABLE_TORCH_LIBRARY_IMPL(geo, CPU, m) {
  m.impl("segment_softmax", TORCH_BOX(&geo::segment_softmax_cpu));
  m.impl("segment_softmax_grad", TORCH_BOX(&geo::segment_softmax_grad_cpu));
  m.impl("segment_logsumexp", TORCH_BOX(&geo::segment_logsumexp_cpu));
  m.impl("segment_logsumexp_grad", TORCH_BOX(&geo::segment_logsumexp_grad_cpu));
  m.impl("segment_std", TORCH_BOX(&geo::segment_std_cpu));
}
