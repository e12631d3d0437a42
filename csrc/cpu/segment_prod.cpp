// CPU launcher of the gradient of a product.
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <memory>
#include <optional>
#include <type_traits>
#include <vector>

#include "parallel.h"
#include "segment_prod_table.h"
#include "segment_table.h"

namespace geo {
namespace {

const OthersTable& others_table(float) { return choose_table(GEO_TABLES(others_float)); }
const OthersTable& others_table(double) { return choose_table(GEO_TABLES(others_double)); }
const OthersTable& others_table(bfloat16) { return choose_table(GEO_TABLES(others_bfloat16)); }
const OthersTable& others_table(float16) { return choose_table(GEO_TABLES(others_float16)); }
const SegmentTable& segment_table(float) { return choose_table(GEO_TABLES(segment_float)); }
const SegmentTable& segment_table(double) { return choose_table(GEO_TABLES(segment_double)); }
const SegmentTable& segment_table(bfloat16) { return choose_table(GEO_TABLES(segment_bfloat16)); }
const SegmentTable& segment_table(float16) { return choose_table(GEO_TABLES(segment_float16)); }

template <class S>
Found run(const OthersJob& job) {
  using T = typename accumulate<S>::type;
  const int64_t num_segments = job.num_segments;
  const int64_t* p = job.ptr;
  const int64_t width = job.width, block = block_of(width * int64_t(sizeof(S)));
  const OthersTable& leaf = others_table(S{});
  int64_t longest = 0;  // run of rows that is read at a time
  for (int64_t i = 0; i < num_segments; ++i) longest = std::max(longest, std::min(p[i + 1] - p[i], 2 * kHubChunk));
  const int64_t room = longest * leaf.scratch_lanes, slots = num_slots(job.num_rows) * width;
  const std::unique_ptr<T[]> scratch(new T[room * max_threads(job.num_rows + num_segments, block)]);
  std::vector<T> pieces(slots);
  std::atomic<bool> hubs{false};
  Faults faults;
  auto note = [&](const Outcome& outcome) { faults.add(outcome.fault, outcome.position); };
  const SegmentArgs rows{job.x, nullptr, nullptr, p, job.perm, job.num_rows, width, false};
  parallel_segments(
      p, num_segments, block,
      [&](int64_t thread, int64_t first, int64_t last) { note(leaf.run(job, first, last, &scratch[thread * room])); },
      [&](int64_t, int64_t, int64_t begin, int64_t end, int64_t slot) {
        note(segment_table(S{}).piece[kProduct](rows, begin, end, &pieces[slot * width], nullptr));
        hubs.store(true, std::memory_order_relaxed);
      });
  if (!hubs || faults.first().fault != kNoFault) return faults.first();

  std::vector<T> before(slots, T(1)), after(slots, T(1));  // the products of the hub's other pieces, on either side
  for (int64_t i = 0; i < num_segments; ++i) {
    if (!is_hub(p[i], p[i + 1])) continue;
    const int64_t begin = first_slot(p[i]) * width, end = begin + num_pieces(p[i], p[i + 1]) * width;
    for (int64_t at = begin + width; at < end; ++at) before[at] = before[at - width] * pieces[at - width];
    for (int64_t at = end - width; at-- > begin;) after[at] = after[at + width] * pieces[at + width];
  }
  parallel_segments(
      p, num_segments, block, [](int64_t, int64_t, int64_t) {},
      [&](int64_t thread, int64_t i, int64_t begin, int64_t end, int64_t slot) {
        note(leaf.piece(job, i, begin, end, &before[slot * width], &after[slot * width], &scratch[thread * room]));
      });
  return faults.first();
}

// One column of unsorted rows is taken in the order it stands, which the caches like better than a permutation of single
// numbers. It is cut into parts, whose number depends on the sizes alone, each with products of its own.
template <class T>
Found run_in_place(const OthersJob& job) {
  const OthersTable& leaf = others_table(T{});
  const int64_t num = job.num_segments, parts = num_parts(job.num_rows, num);
  const std::unique_ptr<T[]> before(new T[parts * num]), after(new T[parts * num]);
  Faults faults;
  auto each_part = [&](auto&& f) {
    parallel_blocks(parts, 1, [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) f(k, job.num_rows * k / parts, job.num_rows * (k + 1) / parts);
    });
  };
  std::fill_n(after.get(), parts * num, T(1));
  if (parts == 1) {
    std::fill_n(before.get(), num, T(1));
  } else {
    OthersJob products = job;
    products.out = nullptr;
    each_part([&](int64_t k, int64_t begin, int64_t end) {
      const Outcome outcome = leaf.first(products, begin, end, &after[k * num]);
      faults.add(outcome.fault, outcome.position);
    });
    if (faults.first().fault != kNoFault) return faults.first();
    parallel_blocks(num, block_of(2 * parts * int64_t(sizeof(T))), [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        T own[kMaxParts], left = 1, right = 1;
        for (int64_t k = 0; k < parts; left *= own[k++]) {
          own[k] = after[k * num + i];
          before[k * num + i] = left;
        }
        for (int64_t k = parts; k-- > 0; right *= own[k]) after[k * num + i] = right;
      }
    });
  }
  each_part([&](int64_t k, int64_t begin, int64_t end) {
    const Outcome outcome = leaf.first(job, begin, end, &before[k * num]);
    faults.add(outcome.fault, outcome.position);
    if (outcome.fault == kNoFault) leaf.second(job, begin, end, &after[k * num]);
  });
  return faults.first();
}

Tensor segment_prod_grad_cpu(const Tensor& grad_, const Tensor& src_, const Tensor& ptr_,
                             const std::optional<Tensor>& perm_, const std::optional<Tensor>& index_) {
  constexpr const char* op = "segment_prod_grad";
  STD_TORCH_CHECK(src_.dim() >= 1, op, ": src must have one row per edge");
  check_index_dtype(ptr_, op, "ptr");
  const Tensor grad = made_contiguous(grad_), src = made_contiguous(src_);
  const Tensor ptr = made_contiguous(ptr_), perm = perm_ ? made_contiguous(*perm_) : ptr;
  const Tensor index = index_ ? made_contiguous(*index_) : ptr;
  const int64_t num_segments = ptr.numel() - 1, num_rows = src.size(0);
  OthersJob job{};
  job.ptr = index_data(ptr);
  job.num_rows = num_rows;
  job.num_segments = num_segments;
  job.width = 1;
  STD_TORCH_CHECK(num_segments >= 0, op, ": ptr must not be empty");
  bool same = grad.dim() == src.dim() && grad.size(0) == num_segments;
  for (int64_t d = 1; d < src.dim(); ++d) {
    same = same && grad.size(d) == src.size(d);
    job.width *= src.size(d);
  }
  STD_TORCH_CHECK(same && grad.scalar_type() == src.scalar_type(), op,
                  ": grad must have the dtype of src and one of its rows per segment");
  check_ptr(op, job.ptr, num_segments, num_rows);
  if (perm_) {
    check_index_dtype(perm, op, "edge_perm");
    STD_TORCH_CHECK(perm.numel() == num_rows, op, ": edge_perm must have one entry per edge");
    job.perm = index_data(perm);
  }
  if (index_) {
    check_index_dtype(index, op, "dst_index");
    STD_TORCH_CHECK(index.numel() == num_rows, op, ": dst_index must have one entry per edge");
    job.index = index_data(index);
  }
  Tensor out = torch::stable::new_empty(src, src.sizes());
  if (job.width == 0) return out;
  dispatch_floating(src.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    job.x = read<S>(src);
    job.g = read<S>(grad);
    job.out = write<S>(out);
    advise_huge_pages(job.out, out.numel() * int64_t(sizeof(S)));
    const bool in_place = job.perm && job.index && job.width == 1;
    Found found;
    if constexpr (std::is_same<S, typename accumulate<S>::type>::value)
      found = in_place ? run_in_place<S>(job) : run<S>(job);
    else
      found = run<S>(job);
    if (found.fault == kDstIndex)
      raise_out_of_range(op, "dst_index", found.position, job.index[found.position], 0, num_segments - 1);
    if (found.fault == kEdgePerm)
      raise_out_of_range(op, "edge_perm", found.position, job.perm[found.position], 0, num_rows - 1);
  });
  return out;
}

}  // namespace
}  // namespace geo

STABLE_TORCH_LIBRARY_IMPL(geo, CPU, m) { m.impl("segment_prod_grad", TORCH_BOX(&geo::segment_prod_grad_cpu)); }
