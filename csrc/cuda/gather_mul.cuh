#pragma once
// The weighted sum over segments for the launchers of gather_mul.
#include "segment_reduce.cuh"

namespace geo {

struct SumArgs {
  const int64_t* src;   // the row of x of each edge
  const int64_t* ptr;
  const int64_t* perm;  // null: the place itself
  int64_t num_src, num_edges, num_segments;
  FeatureLayout layout;
  long long* flag;
};

template <typename S>
void launch_sum(const SumArgs& a, const Tensor& like, const S* x, const S* w, S* out) {
  reduce::Job<S> job{};
  job.x = x;
  job.w = w;
  job.ptr = a.ptr;
  job.perm = a.perm;
  job.source = a.src;
  job.out = out;
  job.num_rows = a.num_src;
  job.num_edges = a.num_edges;
  job.num_segments = a.num_segments;
  job.width = a.layout.num_features;
  job.layout = a.layout;
  job.flag = a.flag;
  reduce::launch<reduce::WeightedSum<S>>(job, like);
}

}  // namespace geo
