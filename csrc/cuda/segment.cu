// CUDA launchers of the segment ops, of scatter_sum and of the gathers.
#include "segment_reduce.cuh"

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

unsigned grid_of(int64_t blocks) { return static_cast<unsigned>(std::clamp<int64_t>(blocks, 1, int64_t(1) << 20)); }

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

// -- reductions --------------------------------------------------------------------------------------------------------
// Reduce the rows of src in the order of ptr and perm; arg where the op gives rows, too.
template <template <typename> class Op>
void reduce_rows(const char* name, const Tensor& src, const Tensor& ptr, const int64_t* perm, bool mean, bool largest,
                 const Tensor& out, const Tensor* arg) {
  dispatch_floating(src.scalar_type(), name, [&](auto zero) {
    using S = decltype(zero);
    reduce::Job<S> job{};
    job.x = read<S>(src);
    job.ptr = index_data(ptr);
    job.perm = perm;
    job.out = write<S>(out);
    job.arg = arg ? write<int64_t>(*arg) : nullptr;
    job.num_rows = job.num_edges = src.size(0);
    job.num_segments = ptr.numel() - 1;
    job.width = row_width(src);
    job.mean = mean;
    job.largest = largest;
    job.flag = fault_flag(src.get_device_index());
    reduce::launch<Op<S>>(job, src);
  });
}

Tensor segment_sum_cuda(const Tensor& src, const Tensor& ptr, const std::optional<Tensor>& perm,
                        const std::optional<Tensor>&, bool mean) {
  constexpr const char* op = "segment_sum";
  const DeviceGuard guard(src.get_device_index());
  const Segments s(op, src, ptr, perm, std::nullopt, src.dim() ? src.size(0) : 0);
  Tensor out = torch::stable::new_empty(s.src, with_rows(s.src, s.num_segments));
  reduce_rows<reduce::Sum>(op, s.src, s.ptr, s.order(), mean, false, out, nullptr);
  return out;
}

Tensor segment_prod_cuda(const Tensor& src, const Tensor& ptr, const std::optional<Tensor>& perm,
                         const std::optional<Tensor>&) {
  constexpr const char* op = "segment_prod";
  const DeviceGuard guard(src.get_device_index());
  const Segments s(op, src, ptr, perm, std::nullopt, src.dim() ? src.size(0) : 0);
  Tensor out = torch::stable::new_empty(s.src, with_rows(s.src, s.num_segments));
  reduce_rows<reduce::Product>(op, s.src, s.ptr, s.order(), false, false, out, nullptr);
  return out;
}

std::tuple<Tensor, Tensor> segment_extreme_cuda(const Tensor& src, const Tensor& ptr, const std::optional<Tensor>& perm,
                                                bool largest) {
  constexpr const char* op = "segment_extreme";
  const DeviceGuard guard(src.get_device_index());
  const Segments s(op, src, ptr, perm, std::nullopt, src.dim() ? src.size(0) : 0);
  const std::vector<int64_t> sizes = with_rows(s.src, s.num_segments);
  Tensor out = torch::stable::new_empty(s.src, sizes), arg = torch::stable::new_empty(s.ptr, sizes);
  reduce_rows<reduce::Extreme>(op, s.src, s.ptr, s.order(), false, largest, out, &arg);
  return {out, arg};
}

Tensor segment_extreme_value_cuda(const Tensor& src, const Tensor& ptr, const std::optional<Tensor>& perm, bool largest) {
  constexpr const char* op = "segment_extreme_value";
  const DeviceGuard guard(src.get_device_index());
  const Segments s(op, src, ptr, perm, std::nullopt, src.dim() ? src.size(0) : 0);
  Tensor out = torch::stable::new_empty(s.src, with_rows(s.src, s.num_segments));
  reduce_rows<reduce::Extreme>(op, s.src, s.ptr, s.order(), false, largest, out, nullptr);
  return out;
}

// The rows are sorted by index, stably, and summed in that order.
Tensor scatter_sum_cuda(const Tensor& src_, const Tensor& index, int64_t size, bool mean) {
  constexpr const char* op = "scatter_sum";
  const DeviceGuard guard(src_.get_device_index());
  STD_TORCH_CHECK(src_.dim() >= 1 && src_.size(0) == index.numel(), op, ": index must have one entry per row of src");
  STD_TORCH_CHECK(src_.is_cuda() && index.is_cuda(), op, ": src and index must both be on the GPU");
  const Tensor src = torch::stable::contiguous(src_);
  const auto [ptr, perm] = csr_from_index_cuda(index, size);
  Tensor out = torch::stable::new_empty(src, with_rows(src, size));
  reduce_rows<reduce::Sum>(op, src, ptr, index_data(perm), mean, false, out, nullptr);
  return out;
}

// -- copies ------------------------------------------------------------------------------------------------------------
constexpr int kThreads = 256, kRows = 4;  // of a block; rows that a thread copies at once

// Rows of `units` units each, 2^lane_bits threads a row.
struct Copies {
  const int64_t *ptr, *perm, *index;
  int64_t num_rows, num_src, units;
  int lane_bits;
  long long* flag;
};

// The last of the segments [low, high) that starts at or before e.
__device__ int64_t segment_of(const int64_t* ptr, int64_t low, int64_t high, int64_t e) {
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (ptr[middle] <= e)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// Row index[e] of src to row e, or, by ptr, each row of src to the places of its segment: to these rows themselves or, with
// perm, to those that stand there. A block first finds where its rows come from and go to.
template <bool kByIndex, typename Unit>
__global__ void __launch_bounds__(kThreads) copy_kernel(Copies a, const Unit* __restrict__ src, Unit* __restrict__ out) {
  __shared__ int64_t from[kThreads * kRows], to[kByIndex ? 1 : kThreads * kRows];
  const int step = kThreads >> a.lane_bits, lanes = 1 << a.lane_bits;
  for (int64_t first = blockIdx.x * int64_t(step * kRows); first < a.num_rows; first += gridDim.x * int64_t(step * kRows)) {
    const int num = int(min(int64_t(step * kRows), a.num_rows - first));
    int64_t low = 0, high = 0;
    if (!kByIndex) {
      low = segment_of(a.ptr, 0, a.num_src, first);
      high = segment_of(a.ptr, low, a.num_src, first + num - 1) + 1;
    }
    for (int r = threadIdx.x; r < num; r += kThreads) {
      const int64_t e = first + r;
      if constexpr (kByIndex) {
        const int64_t i = a.index[e];
        const bool inside = i >= 0 && i < a.num_src;
        if (!inside) note_fault(a.flag, kDstIndex, e);
        from[r] = inside ? i : -1;
      } else {
        const int64_t i = segment_of(a.ptr, low, high, e), row = a.perm ? a.perm[e] : e;
        const bool inside = row >= 0 && row < a.num_rows;
        if (!inside) note_fault(a.flag, kEdgePerm, e);
        from[r] = a.ptr[i] <= e && e < a.ptr[i + 1] ? i : -1;  // a bad ptr is noted elsewhere
        to[r] = inside ? row : -1;
      }
    }
    __syncthreads();
    const int r = threadIdx.x >> a.lane_bits;
    for (int64_t c = threadIdx.x & (lanes - 1); c < a.units; c += lanes) {
      Unit unit[kRows];
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        const int64_t i = r + u * step < num ? from[r + u * step] : -1;
        unit[u] = i < 0 ? Unit{} : src[i * a.units + c];
      }
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        if (r + u * step >= num) continue;
        const int64_t row = kByIndex ? first + r + u * step : to[r + u * step];
        if (row >= 0) out[row * a.units + c] = unit[u];
      }
    }
    __syncthreads();
  }
}

// f(Unit{}) with the widest unit that rows of so many bytes at these addresses consist of.
template <typename F>
void dispatch_unit(int64_t bytes, const void* src, const void* out, F&& f) {
  const uintptr_t all = uintptr_t(bytes) | reinterpret_cast<uintptr_t>(src) | reinterpret_cast<uintptr_t>(out);
  if (all % 16 == 0) return f(uint4{});
  if (all % 8 == 0) return f(uint64_t{});
  if (all % 4 == 0) return f(uint32_t{});
  if (all % 2 == 0) return f(uint16_t{});
  return f(uint8_t{});
}

void copy_rows(Copies a, const Tensor& src, const Tensor& out) {
  const int64_t bytes = row_width(src) * int64_t(src.element_size());
  if (a.num_rows == 0 || bytes == 0) return;
  const void* source = src.const_data_ptr();
  void* target = out.mutable_data_ptr();
  dispatch_unit(bytes, source, target, [&](auto zero) {
    using Unit = decltype(zero);
    a.units = bytes / int64_t(sizeof(Unit));
    a.lane_bits = reduce::bits_for(a.units, reduce::kWarpBits);
    const int rows = (kThreads >> a.lane_bits) * kRows;
    const unsigned grid = grid_of((a.num_rows + rows - 1) / rows);
    const cudaStream_t stream = current_stream(src);
    const Unit* x = static_cast<const Unit*>(source);
    Unit* y = static_cast<Unit*>(target);
    if (a.index)
      copy_kernel<true><<<grid, kThreads, 0, stream>>>(a, x, y);
    else
      copy_kernel<false><<<grid, kThreads, 0, stream>>>(a, x, y);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor gather_csr_cuda(const Tensor& src, const Tensor& ptr, const std::optional<Tensor>& perm,
                       const std::optional<Tensor>& index, int64_t num_out) {
  constexpr const char* op = "gather_csr";
  const DeviceGuard guard(src.get_device_index());
  const Segments s(op, src, ptr, perm, index, num_out);
  STD_TORCH_CHECK(s.src.size(0) == s.num_segments, op, ": src must have ", s.num_segments, " rows");
  const std::vector<int64_t> sizes = with_rows(s.src, num_out);
  if (s.num_segments == 0) return torch::stable::new_zeros(s.src, sizes);
  Tensor out = torch::stable::new_empty(s.src, sizes);
  Copies a{index_data(s.ptr), s.order(), nullptr, num_out, s.num_segments, 0, 0, s.flag};
  if (s.perm && s.index) a.index = index_data(*s.index);
  copy_rows(a, s.src, out);
  return out;
}

Tensor gather_index_cuda(const Tensor& src_, const Tensor& index_) {
  constexpr const char* op = "gather_index";
  const DeviceGuard guard(src_.get_device_index());
  check_index_dtype(index_, op, "index");
  STD_TORCH_CHECK(src_.is_cuda() && index_.is_cuda(), op, ": src and index must both be on the GPU");
  STD_TORCH_CHECK(src_.dim() >= 1, op, ": src must have rows");
  const Tensor src = torch::stable::contiguous(src_), index = torch::stable::contiguous(index_);
  Tensor out = torch::stable::new_empty(src, with_rows(src, index.numel()));
  long long* flag = fault_flag(src.get_device_index());
  copy_rows({nullptr, nullptr, index_data(index), index.numel(), src.size(0), 0, 0, flag}, src, out);
  return out;
}

}  // namespace
}  // namespace geo

STABLE_TORCH_LIBRARY_IMPL(geo, CUDA, m) {
  m.impl("segment_sum", TORCH_BOX(&geo::segment_sum_cuda));
  m.impl("segment_prod", TORCH_BOX(&geo::segment_prod_cuda));
  m.impl("segment_extreme", TORCH_BOX(&geo::segment_extreme_cuda));
  m.impl("segment_extreme_value", TORCH_BOX(&geo::segment_extreme_value_cuda));
  m.impl("scatter_sum", TORCH_BOX(&geo::scatter_sum_cuda));
  m.impl("gather_csr", TORCH_BOX(&geo::gather_csr_cuda));
  m.impl("gather_index", TORCH_BOX(&geo::gather_index_cuda));
}
