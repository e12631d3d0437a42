// CUDA launchers of softmax, log-sum-exp and standard deviation of segments: a warp takes a tile of columns of a segment,
// its lanes spread over columns first, then over rows. Hubs are cut into pieces, a block each.
#include "../segment_softmax.h"

#include <optional>
#include <tuple>
#include <vector>

#include "device.h"

namespace geo {
namespace {

constexpr int kWarp = 32, kWarps = 8;  // threads of a warp, warps of a block

// Rows [E, width] and segments [N, width]; T is the accumulation type of the rows' type S.
template <typename S>
struct Job {
  using T = typename accumulate<S>::type;
  const int64_t *ptr, *perm;
  int64_t num_edges, num_segments, width;
  const S* x;      // the input; the output for the gradient of softmax
  const S* g_row;  // gradient of rows
  const T *g_segment, *level;
  S* out_row;
  T* out_segment;
  S* std;
  T* mean;
  bool unbiased;
  long long* flag;
};

// The state of the rows that one thread, or several together, have read of a column.
template <typename T>
struct Part {
  T a, b;
  int64_t count;
};

// f(offset of the entry) for column f of every `step`th row from place `begin` on.
template <typename S, typename F>
__device__ void for_rows(const Job<S>& job, int64_t begin, int64_t end, int step, int64_t column, F&& f) {
  for (int64_t e = begin; e < end; e += step) {
    const int64_t row = job.perm ? job.perm[e] : e;
    if (uint64_t(row) < uint64_t(job.num_edges))
      f(row * job.width + column);
    else
      note_fault(job.flag, kEdgePerm, e);
  }
}

// reduce() reads some rows of a column, merge() adds later rows' part, close() turns the part of all rows into what write()
// needs of it, or writes the segment's own result where `first`.
template <typename S>
struct Exponentials {
  using T = typename accumulate<S>::type;
  static constexpr bool kReduces = true;
  __device__ static Part<T> reduce(const Job<S>& job, int64_t begin, int64_t end, int step, int64_t f) {
    T max = -ExpNumbers<T>::infinity, sum = 0;
    for_rows(job, begin, end, step, f, [&](int64_t at) { max = greater(max, T(widen(job.x[at]))); });
    const T below = finite<T>(max);
    for_rows(job, begin, end, step, f, [&](int64_t at) { sum += exp_value<T>(T(widen(job.x[at])) - below); });
    return {max, sum, begin < end ? (end - begin + step - 1) / step : 0};
  }
  __device__ static Part<T> merge(const Part<T>& a, const Part<T>& b) {
    const MaxSum<T> s = geo::merge<T>(MaxSum<T>{a.a, a.b}, MaxSum<T>{b.a, b.b});
    return {s.max, s.sum, a.count + b.count};
  }
};

template <typename S, bool kLog>
struct Softmax : Exponentials<S> {
  using T = typename accumulate<S>::type;
  static constexpr bool kRows = true;
  __device__ static void close(const Job<S>&, int64_t, int64_t, Part<T>& p, bool) {
    p.b = softmax_scale<T>(MaxSum<T>{p.a, p.b}, kLog);
  }
  __device__ static void write(const Job<S>& job, int64_t, int64_t f, int64_t at, const Part<T>& p) {
    narrow(softmax_value<T>(T(widen(job.x[at])), p.a, p.b, kLog), job.out_row + at);
  }
};

template <typename S>
struct LogSumExp : Exponentials<S> {
  using T = typename accumulate<S>::type;
  static constexpr bool kRows = false;
  __device__ static void close(const Job<S>& job, int64_t i, int64_t f, Part<T>& p, bool first) {
    if (first) job.out_segment[i * job.width + f] = p.count ? logsumexp_value<T>(MaxSum<T>{p.a, p.b}) : T(0);
  }
};

template <typename S, bool kLog>
struct SoftmaxGrad {
  using T = typename accumulate<S>::type;
  static constexpr bool kReduces = true, kRows = true;
  __device__ static Part<T> reduce(const Job<S>& job, int64_t begin, int64_t end, int step, int64_t f) {
    T sum = 0;
    for_rows(job, begin, end, step, f, [&](int64_t at) {
      sum += softmax_grad_term(T(widen(job.g_row[at])), T(widen(job.x[at])), kLog);
    });
    return {sum, 0, begin < end ? (end - begin + step - 1) / step : 0};
  }
  __device__ static Part<T> merge(const Part<T>& a, const Part<T>& b) { return {a.a + b.a, 0, a.count + b.count}; }
  __device__ static void close(const Job<S>&, int64_t, int64_t, Part<T>&, bool) {}
  __device__ static void write(const Job<S>& job, int64_t, int64_t f, int64_t at, const Part<T>& p) {
    narrow(softmax_grad_value<T>(T(widen(job.g_row[at])), T(widen(job.x[at])), p.a, kLog), job.out_row + at);
  }
};

template <typename S>
struct LogSumExpGrad {
  using T = typename accumulate<S>::type;
  static constexpr bool kReduces = false, kRows = true;
  __device__ static void write(const Job<S>& job, int64_t i, int64_t f, int64_t at, const Part<T>&) {
    const int64_t of = i * job.width + f;
    narrow(logsumexp_grad_value<T>(job.g_segment[of], T(widen(job.x[at])), job.level[of]), job.out_row + at);
  }
};

template <typename S>
struct Std {
  using T = typename accumulate<S>::type;
  static constexpr bool kReduces = true, kRows = false;
  __device__ static Part<T> reduce(const Job<S>& job, int64_t begin, int64_t end, int step, int64_t f) {
    const int64_t count = begin < end ? (end - begin + step - 1) / step : 0;
    T mean = 0, squares = 0;
    for_rows(job, begin, end, step, f, [&](int64_t at) { mean += T(widen(job.x[at])); });
    mean /= T(count ? count : 1);
    for_rows(job, begin, end, step, f, [&](int64_t at) {
      const T away = T(widen(job.x[at])) - mean;
      squares += away * away;
    });
    return {mean, squares, count};
  }
  __device__ static Part<T> merge(const Part<T>& a, const Part<T>& b) {
    const Moments<T> m = geo::merge<T>(Moments<T>{a.a, a.b}, T(a.count), Moments<T>{b.a, b.b}, T(b.count));
    return {m.mean, m.squares, a.count + b.count};
  }
  __device__ static void close(const Job<S>& job, int64_t i, int64_t f, Part<T>& p, bool first) {
    if (!first) return;
    narrow(T(sqrt(p.b / T(degrees_of_freedom(p.count, job.unbiased)))), job.std + i * job.width + f);
    job.mean[i * job.width + f] = p.a;
  }
};

// a's rows come before b's; a part of no rows changes nothing.
template <typename Op, typename T>
__device__ Part<T> merged(const Part<T>& a, const Part<T>& b) {
  if (a.count == 0) return b;
  if (b.count == 0) return a;
  return Op::merge(a, b);
}
// The parts of the lanes of a warp that share a column; each lane gets the same bits.
template <typename Op, typename T>
__device__ Part<T> merge_lanes(Part<T> p, int columns, int lane) {
  for (int step = columns; step < kWarp; step *= 2) {
    const Part<T> q{__shfl_xor_sync(~0u, p.a, step), __shfl_xor_sync(~0u, p.b, step),
                    __shfl_xor_sync(~0u, static_cast<long long>(p.count), step)};
    p = lane & step ? merged<Op>(q, p) : merged<Op>(p, q);
  }
  return p;
}

// `columns` of a tile, a power of two up to the lanes of a warp; the other lanes take further rows.
template <typename Op, typename S>
__global__ void segments_kernel(Job<S> job, int columns, int64_t tiles) {
  using T = typename accumulate<S>::type;
  const int lane = threadIdx.x % kWarp, row = lane / columns, rows = kWarp / columns;
  for (int64_t item = blockIdx.x * int64_t(kWarps) + threadIdx.x / kWarp; item < job.num_segments * tiles;
       item += gridDim.x * int64_t(kWarps)) {
    const int64_t i = item / tiles, f = item % tiles * columns + lane % columns;
    int64_t begin, end;
    segment_range(job.ptr, i, job.num_edges, begin, end);
    if (is_hub(begin, end)) continue;
    const bool inside = f < job.width;
    Part<T> p{};
    if constexpr (Op::kReduces) {
      if (inside) p = Op::reduce(job, begin + row, end, rows, f);
      p = merge_lanes<Op>(p, columns, lane);
      if (inside) Op::close(job, i, f, p, row == 0);
    }
    if constexpr (Op::kRows)
      if (inside) for_rows(job, begin + row, end, rows, f, [&](int64_t at) { Op::write(job, i, f, at, p); });
  }
}

template <typename Op, typename S>
__global__ void pieces_kernel(Job<S> job, Part<typename accumulate<S>::type>* parts, int columns, int64_t tiles) {
  using T = typename accumulate<S>::type;
  __shared__ Part<T> of_warp[kWarps][kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, rows = kWarp / columns;
  for (int64_t item = blockIdx.x; item < num_slots(job.num_edges) * tiles; item += gridDim.x) {
    const int64_t slot = item / tiles, f = item % tiles * columns + lane % columns;
    int64_t i, k, begin, end;
    if (!piece_of(job.ptr, job.num_segments, job.num_edges, slot, i, k, begin, end)) continue;
    Part<T> p{};
    if (f < job.width)
      p = Op::reduce(job, piece_begin(begin, k) + warp * rows + lane / columns, piece_end(begin, end, k), kWarps * rows, f);
    of_warp[warp][lane] = merge_lanes<Op>(p, columns, lane);
    __syncthreads();
    if (warp == 0 && lane < columns && f < job.width) {
      for (int w = 1; w < kWarps; ++w) of_warp[0][lane] = merged<Op>(of_warp[0][lane], of_warp[w][lane]);
      parts[slot * job.width + f] = of_warp[0][lane];
    }
    __syncthreads();
  }
}

template <typename Op, typename S>
__global__ void hubs_kernel(Job<S> job, const Part<typename accumulate<S>::type>* parts, int columns, int64_t tiles) {
  using T = typename accumulate<S>::type;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, rows = kWarp / columns;
  for (int64_t item = blockIdx.x; item < num_slots(job.num_edges) * tiles; item += gridDim.x) {
    const int64_t f = item % tiles * columns + lane % columns;
    int64_t i, k, begin, end;
    if (!piece_of(job.ptr, job.num_segments, job.num_edges, item / tiles, i, k, begin, end) || f >= job.width) continue;
    Part<T> p{};
    if constexpr (Op::kReduces) {
      if (!Op::kRows && k > 0) continue;
      for (int64_t piece = 0; piece < num_pieces(begin, end); ++piece)
        p = merged<Op>(p, parts[(first_slot(begin) + piece) * job.width + f]);
      Op::close(job, i, f, p, k == 0 && warp == 0 && lane < columns);
    }
    if constexpr (Op::kRows)
      for_rows(job, piece_begin(begin, k) + warp * rows + lane / columns, piece_end(begin, end, k), kWarps * rows, f,
               [&](int64_t at) { Op::write(job, i, f, at, p); });
  }
}

template <typename Op, typename S>
void launch(const Job<S>& job, const Tensor& like) {
  using T = typename accumulate<S>::type;
  if (job.num_segments == 0 || job.width == 0) return;
  const cudaStream_t stream = current_stream(like);
  int columns = 1;
  while (columns < job.width && columns < kWarp) columns *= 2;
  const int64_t tiles = (job.width + columns - 1) / columns, items = job.num_segments * tiles;
  const auto grid = [](int64_t blocks) { return unsigned(std::clamp<int64_t>(blocks, 1, int64_t(1) << 20)); };
  segments_kernel<Op><<<grid((items + kWarps - 1) / kWarps), kWarp * kWarps, 0, stream>>>(job, columns, tiles);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (job.num_edges < 2 * kHubChunk) return;
  const int64_t slots = num_slots(job.num_edges);
  Tensor buffer = torch::stable::new_empty(like, {Op::kReduces ? slots * job.width * int64_t(sizeof(Part<T>)) : 0},
                                           ScalarType::Byte);
  Part<T>* parts = static_cast<Part<T>*>(buffer.mutable_data_ptr());
  if constexpr (Op::kReduces) {
    pieces_kernel<Op><<<grid(slots * tiles), kWarp * kWarps, 0, stream>>>(job, parts, columns, tiles);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  hubs_kernel<Op><<<grid(slots * tiles), kWarp * kWarps, 0, stream>>>(job, parts, columns, tiles);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

ScalarType wide_type(ScalarType dtype) { return dtype == ScalarType::Double ? dtype : ScalarType::Float; }

// The order in which rows are read. ptr and perm are checked by kernels.
struct Rows {
  Tensor ptr, perm;
  bool permuted;
  int64_t width = 1;
  Rows(const char* op, const Tensor& src, const Tensor& ptr_, const std::optional<Tensor>& perm_)
      : ptr(torch::stable::contiguous(ptr_)), perm(perm_ ? torch::stable::contiguous(*perm_) : ptr), permuted(perm_) {
    STD_TORCH_CHECK(src.is_cuda() && ptr.is_cuda() && perm.is_cuda(), op, ": all tensors must be on the GPU");
    STD_TORCH_CHECK(src.dim() >= 1, op, ": src must have one row per edge");
    check_ptr_cuda(op, ptr, src.size(0));
    if (permuted) {
      check_index_dtype(perm, op, "edge_perm");
      STD_TORCH_CHECK(perm.numel() == src.size(0), op, ": edge_perm must have one entry per edge");
    }
    for (int64_t d = 1; d < src.dim(); ++d) width *= src.size(d);
  }
  template <typename S>
  Job<S> job(const Tensor& src) const {
    Job<S> job{};
    job.ptr = index_data(ptr);
    job.perm = permuted ? index_data(perm) : nullptr;
    job.num_edges = src.size(0);
    job.num_segments = ptr.numel() - 1;
    job.width = width;
    job.x = read<S>(src);
    job.flag = fault_flag(src.get_device_index());
    return job;
  }
  Tensor per_segment(const Tensor& src, ScalarType dtype) const {
    std::vector<int64_t> sizes(src.sizes().begin(), src.sizes().end());
    sizes[0] = ptr.numel() - 1;
    return torch::stable::new_empty(src, sizes, dtype);
  }
};

void check_rows(const char* op, const char* name, const Tensor& t, ScalarType dtype, const Tensor& like, int64_t rows) {
  STD_TORCH_CHECK(t.is_cuda() && t.scalar_type() == dtype, op, ": ", name, " must be ",
                  torch::headeronly::toString(dtype), " on the GPU");
  bool same = t.dim() == like.dim() && t.size(0) == rows;
  for (int64_t d = 1; same && d < like.dim(); ++d) same = t.size(d) == like.size(d);
  STD_TORCH_CHECK(same, op, ": ", name, " must have ", rows, " rows of the shape of src's");
}

Tensor segment_softmax_cuda(const Tensor& src_, const Tensor& ptr, const std::optional<Tensor>& perm,
                            const std::optional<Tensor>&, bool log) {
  constexpr const char* op = "segment_softmax";
  const DeviceGuard guard(src_.get_device_index());
  const Tensor src = torch::stable::contiguous(src_);
  const Rows rows(op, src, ptr, perm);
  Tensor out = torch::stable::new_empty(src, src.sizes());
  dispatch_floating(src.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    Job<S> job = rows.job<S>(src);
    job.out_row = write<S>(out);
    log ? launch<Softmax<S, true>>(job, src) : launch<Softmax<S, false>>(job, src);
  });
  return out;
}

Tensor segment_softmax_grad_cuda(const Tensor& grad_, const Tensor& out_, const Tensor& ptr,
                                 const std::optional<Tensor>& perm, const std::optional<Tensor>&, bool log) {
  constexpr const char* op = "segment_softmax_grad";
  const DeviceGuard guard(out_.get_device_index());
  const Tensor grad = torch::stable::contiguous(grad_), out = torch::stable::contiguous(out_);
  const Rows rows(op, out, ptr, perm);
  check_rows(op, "grad", grad, out.scalar_type(), out, out.size(0));
  Tensor to = torch::stable::new_empty(out, out.sizes());
  dispatch_floating(out.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    Job<S> job = rows.job<S>(out);
    job.g_row = read<S>(grad);
    job.out_row = write<S>(to);
    log ? launch<SoftmaxGrad<S, true>>(job, out) : launch<SoftmaxGrad<S, false>>(job, out);
  });
  return to;
}

Tensor segment_logsumexp_cuda(const Tensor& src_, const Tensor& ptr, const std::optional<Tensor>& perm,
                              const std::optional<Tensor>&) {
  constexpr const char* op = "segment_logsumexp";
  const DeviceGuard guard(src_.get_device_index());
  const Tensor src = torch::stable::contiguous(src_);
  const Rows rows(op, src, ptr, perm);
  Tensor out = rows.per_segment(src, wide_type(src.scalar_type()));
  dispatch_floating(src.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    Job<S> job = rows.job<S>(src);
    job.out_segment = write<typename accumulate<S>::type>(out);
    launch<LogSumExp<S>>(job, src);
  });
  return out;
}

Tensor segment_logsumexp_grad_cuda(const Tensor& grad_, const Tensor& src_, const Tensor& out_, const Tensor& ptr,
                                   const std::optional<Tensor>& perm, const std::optional<Tensor>&) {
  constexpr const char* op = "segment_logsumexp_grad";
  const DeviceGuard guard(src_.get_device_index());
  const Tensor grad = torch::stable::contiguous(grad_), src = torch::stable::contiguous(src_);
  const Tensor out = torch::stable::contiguous(out_);
  const Rows rows(op, src, ptr, perm);
  check_rows(op, "grad", grad, wide_type(src.scalar_type()), src, ptr.numel() - 1);
  check_rows(op, "out", out, wide_type(src.scalar_type()), src, ptr.numel() - 1);
  Tensor to = torch::stable::new_empty(src, src.sizes());
  dispatch_floating(src.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    using T = typename accumulate<S>::type;
    Job<S> job = rows.job<S>(src);
    job.g_segment = read<T>(grad);
    job.level = read<T>(out);
    job.out_row = write<S>(to);
    launch<LogSumExpGrad<S>>(job, src);
  });
  return to;
}

std::tuple<Tensor, Tensor> segment_std_cuda(const Tensor& src_, const Tensor& ptr, const std::optional<Tensor>& perm,
                                            const std::optional<Tensor>&, bool unbiased) {
  constexpr const char* op = "segment_std";
  const DeviceGuard guard(src_.get_device_index());
  const Tensor src = torch::stable::contiguous(src_);
  const Rows rows(op, src, ptr, perm);
  Tensor std = rows.per_segment(src, src.scalar_type()), mean = rows.per_segment(src, wide_type(src.scalar_type()));
  dispatch_floating(src.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    Job<S> job = rows.job<S>(src);
    job.std = write<S>(std);
    job.mean = write<typename accumulate<S>::type>(mean);
    job.unbiased = unbiased;
    launch<Std<S>>(job, src);
  });
  return {std, mean};
}

}  // namespace
}  // namespace geo

STABLE_TORCH_LIBRARY_IMPL(geo, CUDA, m) {
  m.impl("segment_softmax", TORCH_BOX(&geo::segment_softmax_cuda));
  m.impl("segment_softmax_grad", TORCH_BOX(&geo::segment_softmax_grad_cuda));
  m.impl("segment_logsumexp", TORCH_BOX(&geo::segment_logsumexp_cuda));
  m.impl("segment_logsumexp_grad", TORCH_BOX(&geo::segment_logsumexp_grad_cuda));
  m.impl("segment_std", TORCH_BOX(&geo::segment_std_cuda));
}
