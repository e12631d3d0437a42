// CPU launchers of the segment ops and of the sort behind SegmentPlan.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "gather_mul.h"
#include "parallel.h"

namespace geo {
namespace {

std::vector<int64_t> with_rows(const Tensor& t, int64_t rows) {
  std::vector<int64_t> sizes(t.sizes().begin(), t.sizes().end());
  sizes[0] = rows;
  return sizes;
}

// `perm` made contiguous, or anything where there is none.
Tensor contiguous_perm(const char* op, const std::optional<Tensor>& perm, const Tensor& other, int64_t num_edges) {
  if (!perm) return other;
  check_index_dtype(*perm, op, "edge_perm");
  STD_TORCH_CHECK(perm->numel() == num_edges, op, ": edge_perm must have one entry per edge");
  return torch::stable::contiguous(*perm);
}

Tensor segment_sum_cpu(const Tensor& src_, const Tensor& ptr_, const std::optional<Tensor>& perm_,
                       const std::optional<Tensor>&, bool mean) {
  constexpr const char* op = "segment_sum";
  STD_TORCH_CHECK(src_.dim() >= 1, op, ": src must have one row per edge");
  check_index_dtype(ptr_, op, "ptr");
  const Tensor src = torch::stable::contiguous(src_), ptr = torch::stable::contiguous(ptr_);
  const int64_t num_edges = src.size(0), num_segments = ptr.numel() - 1;
  check_ptr(op, index_data(ptr), num_segments, num_edges);
  const Tensor perm = contiguous_perm(op, perm_, ptr, num_edges);
  FeatureLayout layout;
  for (int64_t d = 1; d < src.dim(); ++d) layout.push(src.size(d), false);
  layout.finish();
  const std::vector<int64_t> sizes = with_rows(src, num_segments);
  Tensor out = torch::stable::new_empty(src, sizes);
  dispatch_floating(src.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    const PlaneList planes(layout);
    GatherMulSum a{};
    a.x = read<S>(src);
    a.out = write<S>(out);
    a.ptr = index_data(ptr);
    a.perm = perm_ ? index_data(perm) : nullptr;
    a.num_src = a.num_edges = num_edges;
    a.num_features = layout.num_features;
    a.planes = planes.get();
    a.mean = mean;
    run_gather_mul_sum<S>(op, a, num_segments);
  });
  return out;
}

Tensor gather_csr_cpu(const Tensor& src_, const Tensor& ptr_, const std::optional<Tensor>& perm_,
                      const std::optional<Tensor>&, int64_t num_out) {
  constexpr const char* op = "gather_csr";
  check_index_dtype(ptr_, op, "ptr");
  const Tensor src = torch::stable::contiguous(src_), ptr = torch::stable::contiguous(ptr_);
  const int64_t num_segments = ptr.numel() - 1;
  STD_TORCH_CHECK(src.dim() >= 1 && src.size(0) == num_segments, op, ": src must have ", num_segments, " rows");
  const int64_t* p = index_data(ptr);
  check_ptr(op, p, num_segments, num_out);
  const Tensor perm_tensor = contiguous_perm(op, perm_, ptr, num_out);
  const int64_t* perm = perm_ ? index_data(perm_tensor) : nullptr;
  for (int64_t e = 0; perm && e < num_out; ++e)
    if (uint64_t(perm[e]) >= uint64_t(num_out)) raise_out_of_range(op, "edge_perm", e, perm[e], 0, num_out - 1);
  const std::vector<int64_t> sizes = with_rows(src, num_out);
  Tensor out = torch::stable::new_empty(src, sizes);
  dispatch_floating(src.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    const int64_t width = num_segments ? src.numel() / num_segments : 0;
    const S* from = read<S>(src);
    S* to = write<S>(out);
    if (width == 0) return;
    advise_huge_pages(to, num_out * width * int64_t(sizeof(S)));
    parallel_blocks(num_out, block_of(width * sizeof(S)), [&](int64_t, int64_t begin, int64_t end) {
      int64_t i = std::upper_bound(p, p + num_segments + 1, begin) - p - 1;
      for (int64_t e = begin; e < end; ++i) {
        const int64_t stop = std::min(end, p[i + 1]);
        const S* row = from + i * width;
        if (perm) {
          for (; e < stop; ++e) std::copy(row, row + width, to + perm[e] * width);
        } else if (width == 1) {
          std::fill(to + e, to + stop, *row);
        } else if (e < stop) {  // the first row, then twice as many each time
          std::memcpy(to + e * width, row, width * sizeof(S));
          for (int64_t done = 1, count = stop - e; done < count; done *= 2)
            std::memcpy(to + (e + done) * width, to + e * width, std::min(done, count - done) * width * sizeof(S));
        }
        e = std::max(e, stop);
      }
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> segment_extreme_cpu(const Tensor& src_, const Tensor& ptr_,
                                               const std::optional<Tensor>& perm_, bool largest) {
  constexpr const char* op = "segment_extreme";
  STD_TORCH_CHECK(src_.dim() >= 1, op, ": src must have one row per edge");
  check_index_dtype(ptr_, op, "ptr");
  const Tensor src = torch::stable::contiguous(src_), ptr = torch::stable::contiguous(ptr_);
  const int64_t num_edges = src.size(0), num_segments = ptr.numel() - 1;
  const int64_t* p = index_data(ptr);
  check_ptr(op, p, num_segments, num_edges);
  const Tensor perm_tensor = contiguous_perm(op, perm_, ptr, num_edges);
  const int64_t* perm = perm_ ? index_data(perm_tensor) : nullptr;
  for (int64_t e = 0; perm && e < num_edges; ++e)
    if (uint64_t(perm[e]) >= uint64_t(num_edges)) raise_out_of_range(op, "edge_perm", e, perm[e], 0, num_edges - 1);
  const std::vector<int64_t> sizes = with_rows(src, num_segments);
  Tensor out = torch::stable::new_empty(src, sizes), arg = torch::stable::new_empty(ptr, sizes);
  int64_t width = 1;
  for (int64_t d = 1; d < src.dim(); ++d) width *= src.size(d);
  if (width == 0) return {out, arg};
  dispatch_floating(src.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    const GatherMulTable& leaf = gather_mul_table(S{});
    const SegmentExtreme a{read<S>(src), write<S>(out), write<int64_t>(arg), p, perm, num_edges, width, largest};
    S* values = write<S>(out);
    int64_t* args = write<int64_t>(arg);
    std::vector<S> piece_values(num_slots(num_edges) * width);
    std::vector<int64_t> piece_args(num_slots(num_edges) * width);
    parallel_segments(
        p, num_segments, block_of(width * sizeof(S)),
        [&](int64_t, int64_t first, int64_t last) {
          for (int64_t i = first; i < last; ++i) {
            if (p[i] < p[i + 1]) {
              leaf.extreme(a, p[i], p[i + 1], values + i * width, args + i * width);
            } else {
              std::fill(values + i * width, values + (i + 1) * width, S{});
              std::fill(args + i * width, args + (i + 1) * width, num_edges);
            }
          }
        },
        [&](int64_t, int64_t, int64_t begin, int64_t end, int64_t slot) {
          leaf.extreme(a, begin, end, &piece_values[slot * width], &piece_args[slot * width]);
        });
    for (int64_t i = 0; i < num_segments; ++i) {  // the extreme of the pieces, the first on a tie, NaN over all
      if (!is_hub(p[i], p[i + 1])) continue;
      const int64_t slot = first_slot(p[i]), pieces = num_pieces(p[i], p[i + 1]);
      for (int64_t f = 0; f < width; ++f) {
        int64_t best = slot;
        for (int64_t k = slot + 1; k < slot + pieces; ++k) {
          const auto v = widen(piece_values[k * width + f]), b = widen(piece_values[best * width + f]);
          if (b == b && (v != v || (largest ? v > b : v < b))) best = k;
        }
        values[i * width + f] = piece_values[best * width + f];
        args[i * width + f] = piece_args[best * width + f];
      }
    }
  });
  return {out, arg};
}

// Counting sort: ptr [size + 1] and the edges grouped by segment, in their own order inside each.
std::tuple<Tensor, Tensor> csr_from_index_cpu(const Tensor& index_, int64_t size) {
  constexpr const char* op = "csr_from_index";
  check_index_dtype(index_, op, "index");
  STD_TORCH_CHECK(size >= 0, op, ": size must not be negative, got ", size);
  const Tensor index = torch::stable::contiguous(index_);
  const int64_t num_edges = index.numel();
  Tensor ptr = torch::stable::new_empty(index, {size + 1}), perm = torch::stable::new_empty(index, {num_edges});
  const int64_t* segment = index_data(index);
  int64_t *p = write<int64_t>(ptr), *order = write<int64_t>(perm);
  std::fill(p, p + size + 1, int64_t{0});
  for (int64_t e = 0; e < num_edges; ++e) {
    if (uint64_t(segment[e]) >= uint64_t(size)) raise_out_of_range(op, "index", e, segment[e], 0, size - 1);
    ++p[segment[e] + 1];
  }
  for (int64_t i = 0; i < size; ++i) p[i + 1] += p[i];
  std::vector<int64_t> next(p, p + size);
  for (int64_t e = 0; e < num_edges; ++e) order[next[segment[e]]++] = e;
  return {ptr, perm};
}

}  // namespace
}  // namespace geo

STABLE_TORCH_LIBRARY_IMPL(geo, CPU, m) {
  m.impl("segment_sum", TORCH_BOX(&geo::segment_sum_cpu));
  m.impl("gather_csr", TORCH_BOX(&geo::gather_csr_cpu));
  m.impl("segment_extreme", TORCH_BOX(&geo::segment_extreme_cpu));
  m.impl("csr_from_index", TORCH_BOX(&geo::csr_from_index_cpu));
}
