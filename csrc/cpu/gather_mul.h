#pragma once
// What the CPU launchers of the segment and gather-multiply ops share.
#include <vector>

#include "../gather_mul.h"
#include "gather_mul_table.h"
#include "parallel.h"

namespace geo {

inline const GatherMulTable& gather_mul_table(float) { return choose_table(GEO_TABLES(gather_mul_float)); }
inline const GatherMulTable& gather_mul_table(double) { return choose_table(GEO_TABLES(gather_mul_double)); }
inline const GatherMulTable& gather_mul_table(bfloat16) { return choose_table(GEO_TABLES(gather_mul_bfloat16)); }
inline const GatherMulTable& gather_mul_table(float16) { return choose_table(GEO_TABLES(gather_mul_float16)); }

// The layout's two innermost groups as a plane, the outer ones as a list of planes.
class PlaneList {
 public:
  explicit PlaneList(const FeatureLayout& layout) {
    const int inner = layout.num_groups - 1, outer = layout.num_groups - 2;
    planes_.rows = outer >= 0 ? layout.size[outer] : 1;
    planes_.cols = inner >= 0 ? layout.size[inner] : 1;
    planes_.w_row = outer >= 0 ? layout.stride[outer] : 0;
    planes_.w_col = inner >= 0 ? layout.stride[inner] : 1;
    const int64_t plane = planes_.rows * planes_.cols;
    for (int64_t f = 0; f < layout.num_features; f += plane) {
      x_offset_.push_back(f);
      w_offset_.push_back(weight_offset(layout, f));
    }
  }
  Planes get() const {
    Planes planes = planes_;
    planes.num_planes = static_cast<int64_t>(x_offset_.size());
    planes.x_offset = x_offset_.data();
    planes.w_offset = w_offset_.data();
    return planes;
  }

 private:
  Planes planes_{};
  std::vector<int64_t> x_offset_, w_offset_;
};

// Fill a.out; raises where an index is out of range.
template <class S>
void run_gather_mul_sum(const char* op, GatherMulSum& a, int64_t num_segments) {
  using T = typename accumulate<S>::type;
  const GatherMulTable& leaf = gather_mul_table(S{});
  const int64_t width = a.num_features;
  if (width == 0 || num_segments == 0) return;
  const int64_t row_bytes = (width + (a.w ? a.num_weights : 0)) * int64_t(sizeof(S));
  a.huge_rows = row_bytes >= 512;
  advise_huge_pages(a.out, num_segments * width * int64_t(sizeof(S)));
  const int64_t block = block_of(row_bytes);
  const int64_t threads = max_threads(a.num_edges + num_segments, block);
  const int64_t pad = (width + 15) / 16 * 16;
  std::vector<T> scratch(threads * pad), pieces(num_slots(a.num_edges) * width);
  Faults faults;
  parallel_segments(
      a.ptr, num_segments, block,
      [&](int64_t thread, int64_t first, int64_t last) {
        const Outcome outcome = leaf.sum_segments(a, first, last, &scratch[thread * pad]);
        faults.add(outcome.fault, outcome.position);
      },
      [&](int64_t, int64_t, int64_t begin, int64_t end, int64_t slot) {
        const Outcome outcome = leaf.sum_edges(a, begin, end, &pieces[slot * width]);
        faults.add(outcome.fault, outcome.position);
      });
  const Found found = faults.first();
  if (found.fault == kSrcIndex)
    raise_out_of_range(op, "src_index", found.position, a.src[found.position], 0, a.num_src - 1);
  if (found.fault == kEdgePerm)
    raise_out_of_range(op, "edge_perm", found.position, a.perm[found.position], 0, a.num_edges - 1);
  if (pieces.empty()) return;
  for (int64_t i = 0; i < num_segments; ++i)
    if (is_hub(a.ptr[i], a.ptr[i + 1]))
      leaf.sum_rows(a, i, &pieces[first_slot(a.ptr[i]) * width], num_pieces(a.ptr[i], a.ptr[i + 1]),
                    a.ptr[i + 1] - a.ptr[i]);
}

}  // namespace geo
