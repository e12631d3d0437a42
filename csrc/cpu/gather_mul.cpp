// CPU launchers of gather_mul_segment_sum and gather_mul.
#include "gather_mul.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

namespace geo {
namespace {

Tensor gather_mul_segment_sum_cpu(const Tensor& x_, const Tensor& weight_, const Tensor& src_index_,
                                  const std::optional<Tensor>&, const Tensor& ptr_, const std::optional<Tensor>& perm_,
                                  const std::optional<Tensor>&, const std::optional<Tensor>&) {
  constexpr const char* op = "gather_mul_segment_sum";
  check_index_dtype(src_index_, op, "src_index");
  check_index_dtype(ptr_, op, "ptr");
  if (perm_) check_index_dtype(*perm_, op, "edge_perm");
  const Tensor x = made_contiguous(x_), weight = made_contiguous(weight_);
  const Tensor src_index = made_contiguous(src_index_), ptr = made_contiguous(ptr_);
  const Tensor perm = perm_ ? made_contiguous(*perm_) : ptr;
  const int64_t num_edges = src_index.numel(), num_segments = ptr.numel() - 1;
  STD_TORCH_CHECK(num_segments >= 0, op, ": ptr must not be empty");
  STD_TORCH_CHECK(x.dim() >= 1 && weight.dim() == x.dim(), op, ": weight must have as many axes as x");
  STD_TORCH_CHECK(x.scalar_type() == weight.scalar_type(), op, ": x and weight must have one dtype");
  STD_TORCH_CHECK(weight.size(0) == num_edges, op, ": weight must have one row per edge");
  STD_TORCH_CHECK(!perm_ || perm.numel() == num_edges, op, ": edge_perm must have one entry per edge");
  check_ptr(op, index_data(ptr), num_segments, num_edges);
  FeatureLayout layout;
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes[0] = num_segments;
  for (int64_t d = 1; d < x.dim(); ++d) {
    const int64_t s = x.size(d), w = weight.size(d);
    STD_TORCH_CHECK(w == s || w == 1, op, ": axis ", d, " of weight has size ", w, ", x has ", s);
    STD_TORCH_CHECK(layout.push(s, w != s), op, ": too many alternations of shared and full axes");
  }
  layout.finish();
  Tensor out = torch::stable::new_empty(x, sizes);
  dispatch_floating(x.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    const PlaneList planes(layout);
    GatherMulSum a{};
    a.x = read<S>(x);
    a.w = read<S>(weight);
    a.out = write<S>(out);
    a.src = index_data(src_index);
    a.ptr = index_data(ptr);
    a.perm = perm_ ? index_data(perm) : nullptr;
    a.num_src = x.size(0);
    a.num_edges = num_edges;
    a.num_features = layout.num_features;
    a.num_weights = layout.num_weights;
    a.planes = planes.get();
    run_gather_mul_sum<S>(op, a, num_segments);
  });
  return out;
}

Tensor gather_mul_cpu(const Tensor& x_, const Tensor& g_, const Tensor& src_index_, const Tensor& dst_index_,
                      const std::optional<Tensor>&, const std::optional<Tensor>&, const std::optional<Tensor>&,
                      const std::optional<Tensor>&, int64_t shared) {
  constexpr const char* op = "gather_mul";
  check_index_dtype(src_index_, op, "src_index");
  check_index_dtype(dst_index_, op, "dst_index");
  const Tensor x = made_contiguous(x_), g = made_contiguous(g_);
  const Tensor src_index = made_contiguous(src_index_), dst_index = made_contiguous(dst_index_);
  const int64_t num_edges = src_index.numel();
  STD_TORCH_CHECK(dst_index.numel() == num_edges, op, ": src_index and dst_index must have equal length");
  STD_TORCH_CHECK(x.dim() >= 1 && g.dim() == x.dim(), op, ": x and g must have as many axes");
  STD_TORCH_CHECK(x.scalar_type() == g.scalar_type(), op, ": x and g must have one dtype");
  FeatureLayout layout;
  std::vector<int64_t> sizes = {num_edges};
  for (int64_t d = 1; d < x.dim(); ++d) {
    STD_TORCH_CHECK(x.size(d) == g.size(d), op, ": axis ", d, " of g has size ", g.size(d), ", x has ", x.size(d));
    const bool is_shared = shared >> (d - 1) & 1;
    STD_TORCH_CHECK(layout.push(x.size(d), is_shared), op, ": too many alternations of shared and full axes");
    sizes.push_back(is_shared ? 1 : x.size(d));
  }
  layout.finish();
  if (layout.num_features == 0) return torch::stable::new_zeros(x, sizes);
  Tensor out = torch::stable::new_empty(x, sizes);
  dispatch_floating(x.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    using T = typename accumulate<S>::type;
    const GatherMulTable& leaf = gather_mul_table(S{});
    const PlaneList planes(layout);
    GatherMul a{};
    a.x = read<S>(x);
    a.g = read<S>(g);
    a.out = write<S>(out);
    a.src = index_data(src_index);
    a.dst = index_data(dst_index);
    a.num_src = x.size(0);
    a.num_dst = g.size(0);
    a.num_features = layout.num_features;
    a.num_weights = layout.num_weights;
    a.planes = planes.get();
    const int64_t bytes = num_edges * layout.num_weights * int64_t(sizeof(S));
    a.stream = bytes >= (int64_t(1) << 25) && layout.num_weights * sizeof(S) % 64 == 0 &&
               reinterpret_cast<uintptr_t>(a.out) % 64 == 0;
    advise_huge_pages(a.out, bytes);
    const int64_t block = block_of(layout.num_features * sizeof(S));
    const int64_t pad = (layout.num_weights + 15) / 16 * 16;
    std::vector<T> scratch(max_threads(num_edges, block) * pad);
    Faults faults;
    parallel_blocks(num_edges, block, [&](int64_t thread, int64_t begin, int64_t end) {
      const Outcome outcome = leaf.product(a, begin, end, &scratch[thread * pad]);
      faults.add(outcome.fault, outcome.position);
    });
    const Found found = faults.first();
    if (found.fault == kSrcIndex)
      raise_out_of_range(op, "src_index", found.position, a.src[found.position], 0, a.num_src - 1);
    if (found.fault == kDstIndex)
      raise_out_of_range(op, "dst_index", found.position, a.dst[found.position], 0, a.num_dst - 1);
  });
  return out;
}

}  // namespace
}  // namespace geo

STABLE_TORCH_LIBRARY_IMPL(geo, CPU, m) {
  m.impl("gather_mul_segment_sum", TORCH_BOX(&geo::gather_mul_segment_sum_cpu));
  m.impl("gather_mul", TORCH_BOX(&geo::gather_mul_cpu));
}
