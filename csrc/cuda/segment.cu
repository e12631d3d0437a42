// CUDA launchers of the segment ops.
#include "gather_mul.cuh"

#include <tuple>
#include <vector>

namespace geo {
namespace {

std::vector<int64_t> with_rows(const Tensor& t, int64_t rows) {
  std::vector<int64_t> sizes(t.sizes().begin(), t.sizes().end());
  sizes[0] = rows;
  return sizes;
}

int64_t row_width(const Tensor& t) {
  int64_t width = 1;
  for (int64_t d = 1; d < t.dim(); ++d) width *= t.size(d);
  return width;
}

Tensor segment_sum_cuda(const Tensor& src_, const Tensor& ptr_, bool mean) {
  constexpr const char* op = "segment_sum";
  const DeviceGuard guard(src_.get_device_index());
  STD_TORCH_CHECK(src_.is_cuda() && ptr_.is_cuda(), op, ": src and ptr must both be on the GPU");
  STD_TORCH_CHECK(src_.dim() >= 1, op, ": src must have one row per edge");
  const Tensor src = torch::stable::contiguous(src_), ptr = torch::stable::contiguous(ptr_);
  check_ptr_cuda(op, ptr, src.size(0));
  SumArgs a{};
  a.layout.push(row_width(src), false);
  a.layout.finish();
  a.ptr = index_data(ptr);
  a.num_src = a.num_edges = src.size(0);
  a.num_segments = ptr.numel() - 1;
  a.mean = mean;
  a.flag = fault_flag(src.get_device_index());
  Tensor out = torch::stable::new_empty(src, with_rows(src, a.num_segments));
  dispatch_floating(src.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    launch_sum<S>(a, src, read<S>(src), nullptr, write<S>(out));
  });
  return out;
}

template <typename S>
__global__ void gather_kernel(const S* __restrict__ src, const int64_t* __restrict__ ptr, S* __restrict__ out,
                              int64_t num_segments, int64_t num_edges, int64_t width, int64_t tiles) {
  GEO_FOR_ITEMS(e, f, num_edges, width, tiles) {
    int64_t low = 0, high = num_segments;  // the last segment that starts at or before e
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      if (ptr[middle] <= e)
        low = middle;
      else
        high = middle;
    }
    const bool inside = ptr[low] <= e && e < ptr[low + 1];  // false where ptr is bad, which is noted elsewhere
    out[e * width + f] = inside ? src[low * width + f] : S{};
  }
}

Tensor gather_csr_cuda(const Tensor& src_, const Tensor& ptr_, int64_t num_out) {
  constexpr const char* op = "gather_csr";
  const DeviceGuard guard(src_.get_device_index());
  STD_TORCH_CHECK(src_.is_cuda() && ptr_.is_cuda(), op, ": src and ptr must both be on the GPU");
  const Tensor src = torch::stable::contiguous(src_), ptr = torch::stable::contiguous(ptr_);
  check_ptr_cuda(op, ptr, num_out);
  const int64_t num_segments = ptr.numel() - 1;
  STD_TORCH_CHECK(src.dim() >= 1 && src.size(0) == num_segments, op, ": src must have ", num_segments, " rows");
  const int64_t width = row_width(src);
  if (num_segments == 0 || width == 0) return torch::stable::new_zeros(src, with_rows(src, num_out));
  Tensor out = torch::stable::new_empty(src, with_rows(src, num_out));
  if (num_out == 0) return out;
  dispatch_floating(src.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    const Launch launch(num_out, width);
    gather_kernel<S><<<launch.grid, launch.block, 0, current_stream(src)>>>(
        read<S>(src), index_data(ptr), write<S>(out), num_segments, num_out, width, launch.tiles);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

struct ExtremeArgs {
  const int64_t* ptr;
  int64_t num_edges, num_segments, width;
  bool largest;
};

// Whether v at a later place takes over from best: the first extreme stays, the first NaN stays for good.
template <typename T>
__device__ bool takes_over(T v, T best, bool largest) {
  return best == best && (v != v || (largest ? v > best : v < best));
}

// The place of the extreme in [begin, end); begin < end.
template <typename S>
__device__ int64_t extreme_of(const ExtremeArgs& a, const S* src, int64_t begin, int64_t end, int64_t f) {
  int64_t at = begin;
  auto best = widen(src[begin * a.width + f]);
  for (int64_t k = begin + 1; k < end; ++k) {
    const auto v = widen(src[k * a.width + f]);
    if (takes_over(v, best, a.largest)) {
      best = v;
      at = k;
    }
  }
  return at;
}

template <typename S>
__global__ void extreme_kernel(ExtremeArgs a, const S* __restrict__ src, S* __restrict__ out, int64_t* __restrict__ arg,
                               int64_t tiles) {
  GEO_FOR_ITEMS(i, f, a.num_segments, a.width, tiles) {
    int64_t begin, end;
    segment_range(a.ptr, i, a.num_edges, begin, end);
    if (is_hub(begin, end)) continue;
    const int64_t at = begin < end ? extreme_of(a, src, begin, end, f) : a.num_edges;
    arg[i * a.width + f] = at;
    out[i * a.width + f] = begin < end ? src[at * a.width + f] : S{};
  }
}

template <typename S>
__global__ void extreme_pieces_kernel(ExtremeArgs a, const S* __restrict__ src, int64_t* __restrict__ pieces,
                                      int64_t tiles) {
  GEO_FOR_ITEMS(slot, f, num_slots(a.num_edges), a.width, tiles) {
    int64_t begin, end;
    segment_range(a.ptr, slot_owner(a.ptr, a.num_segments, slot), a.num_edges, begin, end);
    const int64_t k = slot - first_slot(begin);
    if (!is_hub(begin, end) || k < 0 || k >= num_pieces(begin, end)) continue;
    pieces[slot * a.width + f] = extreme_of(a, src, piece_begin(begin, k), piece_end(begin, end, k), f);
  }
}

template <typename S>
__global__ void extreme_hubs_kernel(ExtremeArgs a, const S* __restrict__ src, const int64_t* __restrict__ pieces,
                                    S* __restrict__ out, int64_t* __restrict__ arg, int64_t tiles) {
  GEO_FOR_ITEMS(i, f, a.num_segments, a.width, tiles) {
    int64_t begin, end;
    segment_range(a.ptr, i, a.num_edges, begin, end);
    if (!is_hub(begin, end)) continue;
    int64_t at = pieces[first_slot(begin) * a.width + f];
    for (int64_t k = 1; k < num_pieces(begin, end); ++k) {
      const int64_t place = pieces[(first_slot(begin) + k) * a.width + f];
      if (takes_over(widen(src[place * a.width + f]), widen(src[at * a.width + f]), a.largest)) at = place;
    }
    arg[i * a.width + f] = at;
    out[i * a.width + f] = src[at * a.width + f];
  }
}

std::tuple<Tensor, Tensor> segment_extreme_cuda(const Tensor& src_, const Tensor& ptr_, bool largest) {
  constexpr const char* op = "segment_extreme";
  const DeviceGuard guard(src_.get_device_index());
  STD_TORCH_CHECK(src_.is_cuda() && ptr_.is_cuda(), op, ": src and ptr must both be on the GPU");
  STD_TORCH_CHECK(src_.dim() >= 1, op, ": src must have one row per edge");
  const Tensor src = torch::stable::contiguous(src_), ptr = torch::stable::contiguous(ptr_);
  check_ptr_cuda(op, ptr, src.size(0));
  const ExtremeArgs a{index_data(ptr), src.size(0), ptr.numel() - 1, row_width(src), largest};
  const std::vector<int64_t> sizes = with_rows(src, a.num_segments);
  Tensor out = torch::stable::new_empty(src, sizes), arg = torch::stable::new_empty(ptr, sizes);
  if (a.num_segments == 0 || a.width == 0) return {out, arg};
  const cudaStream_t stream = current_stream(src);
  const bool hubs = a.num_edges >= 2 * kHubChunk;
  Tensor pieces = torch::stable::new_empty(ptr, {hubs ? num_slots(a.num_edges) * a.width : 0});
  dispatch_floating(src.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    const Launch segments(a.num_segments, a.width);
    extreme_kernel<S><<<segments.grid, segments.block, 0, stream>>>(a, read<S>(src), write<S>(out), write<int64_t>(arg),
                                                                    segments.tiles);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    if (!hubs) return;
    const Launch slots(num_slots(a.num_edges), a.width);
    extreme_pieces_kernel<S><<<slots.grid, slots.block, 0, stream>>>(a, read<S>(src), write<int64_t>(pieces), slots.tiles);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    extreme_hubs_kernel<S><<<segments.grid, segments.block, 0, stream>>>(
        a, read<S>(src), index_data(pieces), write<S>(out), write<int64_t>(arg), segments.tiles);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {out, arg};
}

}  // namespace
}  // namespace geo

STABLE_TORCH_LIBRARY_IMPL(geo, CUDA, m) {
  m.impl("segment_sum", TORCH_BOX(&geo::segment_sum_cuda));
  m.impl("gather_csr", TORCH_BOX(&geo::gather_csr_cuda));
  m.impl("segment_extreme", TORCH_BOX(&geo::segment_extreme_cuda));
}
