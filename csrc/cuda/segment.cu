// CUDA launchers of the segment ops.
#include "gather_mul.cuh"

#include <optional>
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

// Contiguous tensors of an op; perm, where there is one, holds the row at each place of the CSR order.
struct Segments {
  Tensor src, ptr;
  std::optional<Tensor> perm, index;
  int64_t num_rows, num_segments, width;
  long long* flag;

  Segments(const char* op, const Tensor& src_, const Tensor& ptr_, const std::optional<Tensor>& perm_,
           const std::optional<Tensor>& index_, int64_t num_rows_)
      : src(torch::stable::contiguous(src_)), ptr(torch::stable::contiguous(ptr_)), num_rows(num_rows_) {
    STD_TORCH_CHECK(src.is_cuda() && ptr.is_cuda(), op, ": src and ptr must both be on the GPU");
    STD_TORCH_CHECK(src.dim() >= 1, op, ": src must have one row per edge");
    check_ptr_cuda(op, ptr, num_rows);
    num_segments = ptr.numel() - 1;
    width = row_width(src);
    flag = fault_flag(src.get_device_index());
    perm = per_row(op, "edge_perm", perm_);
    index = per_row(op, "dst_index", index_);
  }
  const int64_t* order() const { return perm ? index_data(*perm) : nullptr; }

 private:
  std::optional<Tensor> per_row(const char* op, const char* name, const std::optional<Tensor>& t) const {
    if (!t) return std::nullopt;
    check_index_dtype(*t, op, name);
    STD_TORCH_CHECK(t->is_cuda() && t->numel() == num_rows, op, ": ", name, " must have one entry per edge, on the GPU");
    return torch::stable::contiguous(*t);
  }
};

Tensor segment_sum_cuda(const Tensor& src, const Tensor& ptr, const std::optional<Tensor>& perm,
                        const std::optional<Tensor>&, bool mean) {
  constexpr const char* op = "segment_sum";
  const DeviceGuard guard(src.get_device_index());
  const Segments s(op, src, ptr, perm, std::nullopt, src.dim() ? src.size(0) : 0);
  SumArgs a{};
  a.layout.push(s.width, false);
  a.layout.finish();
  a.ptr = index_data(s.ptr);
  a.perm = s.order();
  a.num_src = a.num_edges = s.num_rows;
  a.num_segments = s.num_segments;
  a.mean = mean;
  a.flag = s.flag;
  Tensor out = torch::stable::new_empty(s.src, with_rows(s.src, s.num_segments));
  dispatch_floating(s.src.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    launch_sum<S>(a, s.src, read<S>(s.src), nullptr, write<S>(out));
  });
  return out;
}

// -- products ----------------------------------------------------------------------------------------------------------
struct RowsArgs {
  const int64_t* ptr;
  const int64_t* perm;
  int64_t num_rows, num_segments, width;
  bool largest;
  long long* flag;
};

// The row at a place of the CSR order; -1, and a note, where perm holds none.
__device__ int64_t row_at(const RowsArgs& a, int64_t place) {
  const int64_t row = a.perm ? a.perm[place] : place;
  if (row >= 0 && row < a.num_rows) return row;
  note_fault(a.flag, kEdgePerm, place);
  return -1;
}

template <typename S>
__device__ typename accumulate<S>::type product_of(const RowsArgs& a, const S* src, int64_t begin, int64_t end,
                                                   int64_t f) {
  typename accumulate<S>::type product = 1;
  for (int64_t k = begin; k < end; ++k) {
    const int64_t row = row_at(a, k);
    if (row >= 0) product *= widen(src[row * a.width + f]);
  }
  return product;
}

template <typename S>
__global__ void product_kernel(RowsArgs a, const S* __restrict__ src, S* __restrict__ out, int64_t tiles) {
  GEO_FOR_ITEMS(i, f, a.num_segments, a.width, tiles) {
    int64_t begin, end;
    segment_range(a.ptr, i, a.num_rows, begin, end);
    if (!is_hub(begin, end)) narrow(product_of(a, src, begin, end, f), out + i * a.width + f);
  }
}

template <typename S>
__global__ void product_pieces_kernel(RowsArgs a, const S* __restrict__ src,
                                      typename accumulate<S>::type* __restrict__ pieces, int64_t tiles) {
  GEO_FOR_ITEMS(slot, f, num_slots(a.num_rows), a.width, tiles) {
    int64_t begin, end;
    segment_range(a.ptr, slot_owner(a.ptr, a.num_segments, slot), a.num_rows, begin, end);
    const int64_t k = slot - first_slot(begin);
    if (!is_hub(begin, end) || k < 0 || k >= num_pieces(begin, end)) continue;
    pieces[slot * a.width + f] = product_of(a, src, piece_begin(begin, k), piece_end(begin, end, k), f);
  }
}

template <typename S>
__global__ void product_hubs_kernel(RowsArgs a, const typename accumulate<S>::type* __restrict__ pieces,
                                    S* __restrict__ out, int64_t tiles) {
  GEO_FOR_ITEMS(i, f, a.num_segments, a.width, tiles) {
    int64_t begin, end;
    segment_range(a.ptr, i, a.num_rows, begin, end);
    if (!is_hub(begin, end)) continue;
    typename accumulate<S>::type product = 1;
    for (int64_t k = 0; k < num_pieces(begin, end); ++k) product *= pieces[(first_slot(begin) + k) * a.width + f];
    narrow(product, out + i * a.width + f);
  }
}

Tensor segment_prod_cuda(const Tensor& src, const Tensor& ptr, const std::optional<Tensor>& perm,
                         const std::optional<Tensor>&) {
  constexpr const char* op = "segment_prod";
  const DeviceGuard guard(src.get_device_index());
  const Segments s(op, src, ptr, perm, std::nullopt, src.dim() ? src.size(0) : 0);
  Tensor out = torch::stable::new_empty(s.src, with_rows(s.src, s.num_segments));
  if (s.num_segments == 0 || s.width == 0) return out;
  const RowsArgs a{index_data(s.ptr), s.order(), s.num_rows, s.num_segments, s.width, false, s.flag};
  const cudaStream_t stream = current_stream(s.src);
  dispatch_floating(s.src.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    const Launch segments(a.num_segments, a.width);
    product_kernel<S><<<segments.grid, segments.block, 0, stream>>>(a, read<S>(s.src), write<S>(out), segments.tiles);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    if (a.num_rows < 2 * kHubChunk) return;
    const ScalarType wide = s.src.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    Tensor pieces = torch::stable::new_empty(s.src, {num_slots(a.num_rows) * a.width}, wide);
    auto* rows = write<typename accumulate<S>::type>(pieces);
    const Launch slots(num_slots(a.num_rows), a.width);
    product_pieces_kernel<S><<<slots.grid, slots.block, 0, stream>>>(a, read<S>(s.src), rows, slots.tiles);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    product_hubs_kernel<S><<<segments.grid, segments.block, 0, stream>>>(a, rows, write<S>(out), segments.tiles);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out;
}

// -- copies ------------------------------------------------------------------------------------------------------------

// To each place of the CSR order, or, with perm, to the row that stands there.
template <typename S>
__global__ void gather_kernel(RowsArgs a, const S* __restrict__ src, S* __restrict__ out, int64_t tiles) {
  GEO_FOR_ITEMS(e, f, a.num_rows, a.width, tiles) {
    int64_t low = 0, high = a.num_segments;  // the last segment that starts at or before e
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      if (a.ptr[middle] <= e)
        low = middle;
      else
        high = middle;
    }
    const bool inside = a.ptr[low] <= e && e < a.ptr[low + 1];  // false where ptr is bad, which is noted elsewhere
    const int64_t row = row_at(a, e);
    if (row >= 0) out[row * a.width + f] = inside ? src[low * a.width + f] : S{};
  }
}

template <typename S>
__global__ void take_kernel(RowsArgs a, const int64_t* __restrict__ index, const S* __restrict__ src,
                            S* __restrict__ out, int64_t tiles) {
  GEO_FOR_ITEMS(e, f, a.num_rows, a.width, tiles) {
    const int64_t i = index[e];
    const bool inside = i >= 0 && i < a.num_segments;
    if (!inside) note_fault(a.flag, kDstIndex, e);
    out[e * a.width + f] = inside ? src[i * a.width + f] : S{};
  }
}

Tensor gather_csr_cuda(const Tensor& src, const Tensor& ptr, const std::optional<Tensor>& perm,
                       const std::optional<Tensor>& index, int64_t num_out) {
  constexpr const char* op = "gather_csr";
  const DeviceGuard guard(src.get_device_index());
  const Segments s(op, src, ptr, perm, index, num_out);
  STD_TORCH_CHECK(s.src.size(0) == s.num_segments, op, ": src must have ", s.num_segments, " rows");
  const std::vector<int64_t> sizes = with_rows(s.src, num_out);
  if (s.num_segments == 0 || s.width == 0) return torch::stable::new_zeros(s.src, sizes);
  Tensor out = torch::stable::new_empty(s.src, sizes);
  if (num_out == 0) return out;
  const RowsArgs a{index_data(s.ptr), s.order(), num_out, s.num_segments, s.width, false, s.flag};
  dispatch_floating(s.src.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    const Launch launch(num_out, s.width);
    if (s.perm && s.index)
      take_kernel<S><<<launch.grid, launch.block, 0, current_stream(s.src)>>>(a, index_data(*s.index), read<S>(s.src),
                                                                              write<S>(out), launch.tiles);
    else
      gather_kernel<S><<<launch.grid, launch.block, 0, current_stream(s.src)>>>(a, read<S>(s.src), write<S>(out),
                                                                                launch.tiles);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

// -- minima and maxima -------------------------------------------------------------------------------------------------
// Whether v at a later place takes over from best: the first extreme stays, the first NaN stays for good.
template <typename T>
__device__ bool takes_over(T v, T best, bool largest) {
  return best == best && (v != v || (largest ? v > best : v < best));
}

// The row of the extreme among the places [begin, end); num_rows where there is none.
template <typename S>
__device__ int64_t extreme_of(const RowsArgs& a, const S* src, int64_t begin, int64_t end, int64_t f) {
  int64_t at = a.num_rows;
  typename accumulate<S>::type best = 0;
  for (int64_t k = begin; k < end; ++k) {
    const int64_t row = row_at(a, k);
    if (row < 0) continue;
    const auto v = widen(src[row * a.width + f]);
    if (at == a.num_rows || takes_over(v, best, a.largest)) {
      best = v;
      at = row;
    }
  }
  return at;
}
template <typename S>
__device__ void write_extreme(const RowsArgs& a, const S* src, int64_t at, int64_t i, int64_t f, S* out, int64_t* arg) {
  arg[i * a.width + f] = at;
  out[i * a.width + f] = at < a.num_rows ? src[at * a.width + f] : S{};
}

template <typename S>
__global__ void extreme_kernel(RowsArgs a, const S* __restrict__ src, S* __restrict__ out, int64_t* __restrict__ arg,
                               int64_t tiles) {
  GEO_FOR_ITEMS(i, f, a.num_segments, a.width, tiles) {
    int64_t begin, end;
    segment_range(a.ptr, i, a.num_rows, begin, end);
    if (!is_hub(begin, end)) write_extreme(a, src, extreme_of(a, src, begin, end, f), i, f, out, arg);
  }
}

template <typename S>
__global__ void extreme_pieces_kernel(RowsArgs a, const S* __restrict__ src, int64_t* __restrict__ pieces,
                                      int64_t tiles) {
  GEO_FOR_ITEMS(slot, f, num_slots(a.num_rows), a.width, tiles) {
    int64_t begin, end;
    segment_range(a.ptr, slot_owner(a.ptr, a.num_segments, slot), a.num_rows, begin, end);
    const int64_t k = slot - first_slot(begin);
    if (!is_hub(begin, end) || k < 0 || k >= num_pieces(begin, end)) continue;
    pieces[slot * a.width + f] = extreme_of(a, src, piece_begin(begin, k), piece_end(begin, end, k), f);
  }
}

template <typename S>
__global__ void extreme_hubs_kernel(RowsArgs a, const S* __restrict__ src, const int64_t* __restrict__ pieces,
                                    S* __restrict__ out, int64_t* __restrict__ arg, int64_t tiles) {
  GEO_FOR_ITEMS(i, f, a.num_segments, a.width, tiles) {
    int64_t begin, end;
    segment_range(a.ptr, i, a.num_rows, begin, end);
    if (!is_hub(begin, end)) continue;
    int64_t at = pieces[first_slot(begin) * a.width + f];
    for (int64_t k = 1; k < num_pieces(begin, end); ++k) {
      const int64_t place = pieces[(first_slot(begin) + k) * a.width + f];
      if (place == a.num_rows) continue;
      if (at == a.num_rows || takes_over(widen(src[place * a.width + f]), widen(src[at * a.width + f]), a.largest))
        at = place;
    }
    write_extreme(a, src, at, i, f, out, arg);
  }
}

std::tuple<Tensor, Tensor> segment_extreme_cuda(const Tensor& src_, const Tensor& ptr_,
                                                const std::optional<Tensor>& perm, bool largest) {
  constexpr const char* op = "segment_extreme";
  const DeviceGuard guard(src_.get_device_index());
  const Segments s(op, src_, ptr_, perm, std::nullopt, src_.dim() ? src_.size(0) : 0);
  const Tensor &src = s.src, &ptr = s.ptr;
  const RowsArgs a{index_data(ptr), s.order(), s.num_rows, s.num_segments, s.width, largest, s.flag};
  const std::vector<int64_t> sizes = with_rows(src, a.num_segments);
  Tensor out = torch::stable::new_empty(src, sizes), arg = torch::stable::new_empty(ptr, sizes);
  if (a.num_segments == 0 || a.width == 0) return {out, arg};
  const cudaStream_t stream = current_stream(src);
  const bool hubs = a.num_rows >= 2 * kHubChunk;
  Tensor pieces = torch::stable::new_empty(ptr, {hubs ? num_slots(a.num_rows) * a.width : 0});
  dispatch_floating(src.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    const Launch segments(a.num_segments, a.width);
    extreme_kernel<S><<<segments.grid, segments.block, 0, stream>>>(a, read<S>(src), write<S>(out), write<int64_t>(arg),
                                                                    segments.tiles);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    if (!hubs) return;
    const Launch slots(num_slots(a.num_rows), a.width);
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
  m.impl("segment_prod", TORCH_BOX(&geo::segment_prod_cuda));
  m.impl("gather_csr", TORCH_BOX(&geo::gather_csr_cuda));
  m.impl("segment_extreme", TORCH_BOX(&geo::segment_extreme_cuda));
}
