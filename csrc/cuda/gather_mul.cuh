#pragma once
// What the CUDA launchers of the segment and gather-multiply ops share: the sum over segments.
#include "../gather_mul.h"
#include "device.h"

namespace geo {

struct SumArgs {
  const int64_t* src;   // null: the edge itself
  const int64_t* ptr;
  const int64_t* perm;  // null: the place itself
  int64_t num_src, num_edges, num_segments;
  FeatureLayout layout;
  bool mean;
  long long* flag;
};

// The sum over the places [begin, end) of the CSR order, of feature f; w is null for weights of 1.
template <typename S>
__device__ typename accumulate<S>::type sum_range(const SumArgs& a, const S* x, const S* w, int64_t begin, int64_t end,
                                                  int64_t f) {
  const int64_t num_features = a.layout.num_features, num_weights = a.layout.num_weights;
  const int64_t wf = w ? weight_offset(a.layout, f) : 0;
  typename accumulate<S>::type sum = 0;
#pragma unroll 4
  for (int64_t k = begin; k < end; ++k) {
    const int64_t e = a.perm ? a.perm[k] : k;
    if (e < 0 || e >= a.num_edges) {
      note_fault(a.flag, kEdgePerm, k);
      continue;
    }
    const int64_t s = a.src ? a.src[e] : e;
    if (s < 0 || s >= a.num_src) {
      note_fault(a.flag, kSrcIndex, e);
      continue;
    }
    const auto xv = widen(x[s * num_features + f]);
    sum += w ? xv * widen(w[e * num_weights + wf]) : xv;
  }
  return sum;
}

template <typename S>
__device__ void finish_sum(const SumArgs& a, typename accumulate<S>::type sum, int64_t length, S* out) {
  narrow(a.mean && length > 1 ? sum / static_cast<typename accumulate<S>::type>(length) : sum, out);
}

// Ordinary segments, one thread a feature.
template <typename S>
__global__ void sum_segments_kernel(SumArgs a, const S* __restrict__ x, const S* __restrict__ w, S* __restrict__ out,
                                    int64_t tiles) {
  GEO_FOR_ITEMS(i, f, a.num_segments, a.layout.num_features, tiles) {
    int64_t begin, end;
    segment_range(a.ptr, i, a.num_edges, begin, end);
    if (is_hub(begin, end)) continue;
    finish_sum(a, sum_range(a, x, w, begin, end, f), end - begin, out + i * a.layout.num_features + f);
  }
}

// The pieces of hubs, each in its slot.
template <typename S>
__global__ void sum_pieces_kernel(SumArgs a, const S* __restrict__ x, const S* __restrict__ w,
                                  typename accumulate<S>::type* __restrict__ pieces, int64_t tiles) {
  GEO_FOR_ITEMS(slot, f, num_slots(a.num_edges), a.layout.num_features, tiles) {
    const int64_t i = slot_owner(a.ptr, a.num_segments, slot);
    int64_t begin, end;
    segment_range(a.ptr, i, a.num_edges, begin, end);
    const int64_t k = slot - first_slot(begin);
    if (!is_hub(begin, end) || k < 0 || k >= num_pieces(begin, end)) continue;
    pieces[slot * a.layout.num_features + f] =
        sum_range(a, x, w, piece_begin(begin, k), piece_end(begin, end, k), f);
  }
}

// Hubs: their pieces, added in order.
template <typename S>
__global__ void sum_hubs_kernel(SumArgs a, const typename accumulate<S>::type* __restrict__ pieces, S* __restrict__ out,
                                int64_t tiles) {
  GEO_FOR_ITEMS(i, f, a.num_segments, a.layout.num_features, tiles) {
    int64_t begin, end;
    segment_range(a.ptr, i, a.num_edges, begin, end);
    if (!is_hub(begin, end)) continue;
    typename accumulate<S>::type sum = 0;
    for (int64_t k = 0; k < num_pieces(begin, end); ++k)
      sum += pieces[(first_slot(begin) + k) * a.layout.num_features + f];
    finish_sum(a, sum, end - begin, out + i * a.layout.num_features + f);
  }
}

template <typename S>
void launch_sum(const SumArgs& a, const Tensor& like, const S* x, const S* w, S* out) {
  const int64_t num_features = a.layout.num_features;
  if (a.num_segments == 0 || num_features == 0) return;
  const cudaStream_t stream = current_stream(like);
  const Launch segments(a.num_segments, num_features);
  sum_segments_kernel<S><<<segments.grid, segments.block, 0, stream>>>(a, x, w, out, segments.tiles);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (a.num_edges < 2 * kHubChunk) return;
  const ScalarType wide = like.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor pieces = torch::stable::new_empty(like, {num_slots(a.num_edges) * num_features}, wide);
  auto* rows = write<typename accumulate<S>::type>(pieces);
  const Launch slots(num_slots(a.num_edges), num_features);
  sum_pieces_kernel<S><<<slots.grid, slots.block, 0, stream>>>(a, x, w, rows, slots.tiles);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  sum_hubs_kernel<S><<<segments.grid, segments.block, 0, stream>>>(a, rows, out, segments.tiles);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace geo
