// CUDA launchers of gather_linear_mul_segment_sum and gather_linear_mul_grad.
//
// All three kernels are a tiled matrix product, 64 x 64 outputs of a block in registers (4 x 4 a thread), whose operands pass
// through shared memory 16 deep; they differ in how an operand is read and where a product goes:
//   sum      K = basis W^T for 64 rows (edge, orientation) of one segment; K * in is summed over the edges in their order
//   dbasis   (x * g) W for 64 rows
//   dweight  (x * g)^T basis for one chunk of edges; the chunks' sums are then added in order
// There are no atomics on floats and no order that depends on the schedule.
#include "../gather_linear.h"

#include <optional>
#include <tuple>

#include "device.h"

namespace geo {
namespace {

constexpr int kTile = 64;    // rows and columns of a block's output
constexpr int kDepth = 16;   // of an operand in shared memory
constexpr int kThread = 4;   // rows and columns of a thread's output
constexpr int kThreads = (kTile / kThread) * (kTile / kThread);
constexpr int kOri = 16;     // orientations a block of the sum holds at most

template <typename S>
struct LinearArgs {
  const S* x;  // [num_src, O, C]
  const S* g;  // [num_dst, O, C]
  const S* basis;
  const S* weight;
  const int64_t* src;
  const int64_t* dst;
  int64_t num_src, num_dst, num_edges, O, basis_O, C, B;
  long long* flag;
};

template <typename T>
using Operand = T[kDepth][kTile + 1];

// sum[i][j] += a[:, row i of this thread] . b[:, column j of this thread]
template <typename T>
__device__ __forceinline__ void multiply(const Operand<T>& a, const Operand<T>& b, T (&sum)[kThread][kThread]) {
  const int row = threadIdx.x / (kTile / kThread) * kThread, column = threadIdx.x % (kTile / kThread) * kThread;
#pragma unroll
  for (int d = 0; d < kDepth; ++d) {
    T left[kThread], right[kThread];
#pragma unroll
    for (int i = 0; i < kThread; ++i) left[i] = a[d][row + i];
#pragma unroll
    for (int j = 0; j < kThread; ++j) right[j] = b[d][column + j];
#pragma unroll
    for (int i = 0; i < kThread; ++i)
#pragma unroll
      for (int j = 0; j < kThread; ++j) sum[i][j] = linear_step(sum[i][j], left[i], right[j]);
  }
}

// Fill an operand: value(d, i) for 0 <= d < kDepth, 0 <= i < kTile; neighbouring threads take neighbouring d or i.
template <bool kDepthFirst, typename T, typename F>
__device__ __forceinline__ void fill(Operand<T>& operand, F&& value) {
  for (int k = threadIdx.x; k < kDepth * kTile; k += kThreads) {
    const int d = kDepthFirst ? k % kDepth : k / kTile, i = kDepthFirst ? k / kDepth : k % kTile;
    operand[d][i] = value(d, i);
  }
}

// -- sum over segments --------------------------------------------------------------------------------------------------

struct SumIndex {
  const int64_t* ptr;
  const int64_t* perm;   // null: the place itself
  const int64_t* in;     // row of `in` of each edge
  int64_t num_in, num_segments;
  int in_fault;
};

template <typename T>
union SumShared {
  struct {
    Operand<T> basis, weight;
  } operands;
  T message[kTile][kTile + 1];
};

// Places [begin, end) of the CSR order, orientations [o0, o0 + num_o), channels [c0, c0 + 64): to out[o * C + c].
template <typename S, typename Out>
__device__ void sum_range(const LinearArgs<S>& a, const SumIndex& index, const S* in, int64_t begin, int64_t end,
                          int64_t o0, int num_o, int64_t c0, SumShared<typename accumulate<S>::type>& shared,
                          int64_t (&basis_row)[kTile], int64_t (&in_row)[kTile], Out* out) {
  using T = typename accumulate<S>::type;
  constexpr int kOwned = kOri * kTile / kThreads;
  const int edges_per_tile = kTile / num_o, rows = edges_per_tile * num_o;
  const int row = threadIdx.x / (kTile / kThread) * kThread, column = threadIdx.x % (kTile / kThread) * kThread;
  T owned[kOwned];
  for (int k = 0; k < kOwned; ++k) owned[k] = 0;
  for (int64_t first = begin; first < end; first += edges_per_tile) {
    if (threadIdx.x < kTile) {
      const int r = threadIdx.x;
      const int64_t place = first + r / num_o, o = o0 + r % num_o;
      int64_t from_basis = -1, from_in = -1;
      if (r < rows && place < end) {
        const int64_t e = index.perm ? index.perm[place] : place;
        if (e < 0 || e >= a.num_edges) {
          note_fault(a.flag, kEdgePerm, place);
        } else if (const int64_t s = index.in[e]; s < 0 || s >= index.num_in) {
          note_fault(a.flag, index.in_fault, e);
        } else {
          from_basis = (e * a.basis_O + (a.basis_O == a.O ? o : 0)) * a.B;
          from_in = (s * a.O + o) * a.C;
        }
      }
      basis_row[r] = from_basis;
      in_row[r] = from_in;
    }
    __syncthreads();
    T kernel[kThread][kThread] = {};
    for (int64_t b0 = 0; b0 < a.B; b0 += kDepth) {
      fill<true>(shared.operands.basis, [&](int d, int i) {
        return basis_row[i] >= 0 && b0 + d < a.B ? widen(a.basis[basis_row[i] + b0 + d]) : T(0);
      });
      fill<true>(shared.operands.weight, [&](int d, int i) {
        return c0 + i < a.C && b0 + d < a.B ? widen(a.weight[(c0 + i) * a.B + b0 + d]) : T(0);
      });
      __syncthreads();
      multiply(shared.operands.basis, shared.operands.weight, kernel);
      __syncthreads();
    }
    for (int i = 0; i < kThread; ++i)
      for (int j = 0; j < kThread; ++j) {
        const int64_t c = c0 + column + j, from = in_row[row + i];
        const T value = from >= 0 && c < a.C ? T(widen(in[from + c])) : T(0);
        shared.message[row + i][column + j] = message_step(T(0), kernel[i][j], value);
      }
    __syncthreads();
    for (int k = 0; k < kOwned; ++k) {
      const int item = threadIdx.x + k * kThreads, o = item / kTile, c = item % kTile;
      if (o < num_o)
        for (int r = o; r < rows; r += num_o) owned[k] += shared.message[r][c];
    }
    __syncthreads();
  }
  for (int k = 0; k < kOwned; ++k) {
    const int item = threadIdx.x + k * kThreads, o = item / kTile;
    const int64_t c = c0 + item % kTile;
    if (o < num_o && c < a.C) narrow(owned[k], out + (o0 + o) * a.C + c);
  }
}

// One block an item, its orientations and its channels: item = segment (kPieces false) or slot of a piece of a hub.
template <typename S, bool kPieces, typename Out>
__global__ void __launch_bounds__(kThreads) sum_kernel(LinearArgs<S> a, SumIndex index, const S* in, Out* out,
                                                       int64_t num_items, int64_t ori_tiles, int64_t channel_tiles) {
  __shared__ SumShared<typename accumulate<S>::type> shared;
  __shared__ int64_t basis_row[kTile], in_row[kTile];
  const int64_t work = num_items * ori_tiles * channel_tiles;
  for (int64_t w = blockIdx.x; w < work; w += gridDim.x) {
    const int64_t c0 = w % channel_tiles * kTile, o0 = w / channel_tiles % ori_tiles * kOri;
    const int64_t item = w / channel_tiles / ori_tiles;
    const int num_o = static_cast<int>(a.O - o0 < kOri ? a.O - o0 : kOri);
    const int64_t i = kPieces ? slot_owner(index.ptr, index.num_segments, item) : item;
    int64_t begin, end;
    segment_range(index.ptr, i, a.num_edges, begin, end);
    if (is_hub(begin, end) != kPieces) continue;
    if (kPieces) {
      const int64_t k = item - first_slot(begin);
      if (k < 0 || k >= num_pieces(begin, end)) continue;
      const int64_t piece = piece_begin(begin, k);
      end = piece_end(begin, end, k);
      begin = piece;
    }
    sum_range(a, index, in, begin, end, o0, num_o, c0, shared, basis_row, in_row, out + item * a.O * a.C);
  }
}

// Hubs: their pieces, added in order.
template <typename S>
__global__ void sum_hubs_kernel(const int64_t* ptr, int64_t num_segments, int64_t num_edges, int64_t num_features,
                                const typename accumulate<S>::type* __restrict__ pieces, S* __restrict__ out,
                                int64_t tiles) {
  GEO_FOR_ITEMS(i, f, num_segments, num_features, tiles) {
    int64_t begin, end;
    segment_range(ptr, i, num_edges, begin, end);
    if (!is_hub(begin, end)) continue;
    typename accumulate<S>::type sum = 0;
    for (int64_t k = 0; k < num_pieces(begin, end); ++k) sum += pieces[(first_slot(begin) + k) * num_features + f];
    narrow(sum, out + i * num_features + f);
  }
}

unsigned grid_of(int64_t work) { return static_cast<unsigned>(std::clamp<int64_t>(work, 1, int64_t(1) << 20)); }
int64_t tiles_of(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

// A buffer in the accumulation type of the tensor.
template <typename S>
Tensor wide_buffer(const Tensor& like, int64_t size) {
  constexpr bool kDouble = sizeof(typename accumulate<S>::type) == 8;
  return torch::stable::new_empty(like, {size}, kDouble ? ScalarType::Double : ScalarType::Float);
}

template <typename S>
void launch_sum(const LinearArgs<S>& a, const SumIndex& index, const S* in, const Tensor& like, S* out) {
  using T = typename accumulate<S>::type;
  const cudaStream_t stream = current_stream(like);
  const int64_t ori_tiles = tiles_of(a.O, kOri), channel_tiles = tiles_of(a.C, kTile), row = a.O * a.C;
  if (index.num_segments == 0 || row == 0) return;
  sum_kernel<S, false, S><<<grid_of(index.num_segments * ori_tiles * channel_tiles), kThreads, 0, stream>>>(
      a, index, in, out, index.num_segments, ori_tiles, channel_tiles);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  const int64_t slots = num_slots(a.num_edges);
  if (a.num_edges < 2 * kHubChunk) return;
  Tensor pieces = wide_buffer<S>(like, slots * row);
  sum_kernel<S, true, T><<<grid_of(slots * ori_tiles * channel_tiles), kThreads, 0, stream>>>(
      a, index, in, write<T>(pieces), slots, ori_tiles, channel_tiles);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  const Launch hubs(index.num_segments, row);
  sum_hubs_kernel<S><<<hubs.grid, hubs.block, 0, stream>>>(index.ptr, index.num_segments, a.num_edges, row,
                                                           read<T>(pieces), out, hubs.tiles);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// -- gradients of basis and weight ----------------------------------------------------------------------------------------

// The product x[src] * g[dst] of row (edge, orientation) of basis at channel c; rows are offsets, negative where noted bad.
template <typename S>
__device__ __forceinline__ typename accumulate<S>::type product(const LinearArgs<S>& a, int64_t x_row, int64_t g_row,
                                                                int64_t c) {
  using T = typename accumulate<S>::type;
  T sum = 0;
  if (x_row < 0 || c >= a.C) return sum;
  const int64_t reps = a.basis_O == a.O ? 1 : a.O;
  for (int64_t q = 0; q < reps; ++q)
    sum = product_step(sum, T(widen(a.x[x_row + q * a.C + c])), T(widen(a.g[g_row + q * a.C + c])));
  return sum;
}

// Offsets of row `row` of basis in x and g.
template <typename S>
__device__ __forceinline__ void product_rows(const LinearArgs<S>& a, int64_t row, bool inside, int64_t& x_row,
                                             int64_t& g_row) {
  x_row = g_row = -1;
  if (!inside) return;
  const int64_t e = row / a.basis_O, o = row % a.basis_O, s = a.src[e], d = a.dst[e];
  const bool bad_src = s < 0 || s >= a.num_src, bad_dst = d < 0 || d >= a.num_dst;
  if (bad_src) note_fault(a.flag, kSrcIndex, e);
  if (bad_dst) note_fault(a.flag, kDstIndex, e);
  if (bad_src || bad_dst) return;
  x_row = (s * a.O + o) * a.C;
  g_row = (d * a.O + o) * a.C;
}

template <typename S>
__global__ void __launch_bounds__(kThreads) dbasis_kernel(LinearArgs<S> a, S* dbasis, int64_t row_tiles,
                                                          int64_t basis_tiles) {
  using T = typename accumulate<S>::type;
  __shared__ Operand<T> left, right;
  __shared__ int64_t x_row[kTile], g_row[kTile];
  const int row = threadIdx.x / (kTile / kThread) * kThread, column = threadIdx.x % (kTile / kThread) * kThread;
  const int64_t num_rows = a.num_edges * a.basis_O;
  for (int64_t w = blockIdx.x; w < row_tiles * basis_tiles; w += gridDim.x) {
    const int64_t b0 = w % basis_tiles * kTile, r0 = w / basis_tiles * kTile;
    if (threadIdx.x < kTile) {
      const int64_t r = r0 + threadIdx.x;
      product_rows(a, r, r < num_rows, x_row[threadIdx.x], g_row[threadIdx.x]);
    }
    __syncthreads();
    T sum[kThread][kThread] = {};
    for (int64_t c0 = 0; c0 < a.C; c0 += kDepth) {
      fill<true>(left, [&](int d, int i) { return product(a, x_row[i], g_row[i], c0 + d); });
      fill<false>(right, [&](int d, int i) {
        return c0 + d < a.C && b0 + i < a.B ? widen(a.weight[(c0 + d) * a.B + b0 + i]) : T(0);
      });
      __syncthreads();
      multiply(left, right, sum);
      __syncthreads();
    }
    for (int i = 0; i < kThread; ++i)
      for (int j = 0; j < kThread; ++j) {
        const int64_t r = r0 + row + i, b = b0 + column + j;
        if (r < num_rows && b < a.B) narrow(sum[i][j], dbasis + r * a.B + b);
      }
  }
}

template <typename S>
__global__ void __launch_bounds__(kThreads) dweight_kernel(LinearArgs<S> a, typename accumulate<S>::type* partial,
                                                           int64_t chunks, int64_t channel_tiles, int64_t basis_tiles) {
  using T = typename accumulate<S>::type;
  __shared__ Operand<T> left, right;
  __shared__ int64_t x_row[kDepth], g_row[kDepth];
  const int row = threadIdx.x / (kTile / kThread) * kThread, column = threadIdx.x % (kTile / kThread) * kThread;
  for (int64_t w = blockIdx.x; w < chunks * channel_tiles * basis_tiles; w += gridDim.x) {
    const int64_t b0 = w % basis_tiles * kTile, c0 = w / basis_tiles % channel_tiles * kTile;
    const int64_t chunk = w / basis_tiles / channel_tiles;
    const int64_t end = linear_chunk_begin(chunk + 1, chunks, a.num_edges) * a.basis_O;
    T sum[kThread][kThread] = {};
    for (int64_t r0 = linear_chunk_begin(chunk, chunks, a.num_edges) * a.basis_O; r0 < end; r0 += kDepth) {
      if (threadIdx.x < kDepth) {
        const int64_t r = r0 + threadIdx.x;
        product_rows(a, r, r < end, x_row[threadIdx.x], g_row[threadIdx.x]);
      }
      __syncthreads();
      fill<false>(left, [&](int d, int i) { return product(a, x_row[d], g_row[d], c0 + i); });
      fill<false>(right, [&](int d, int i) {
        return r0 + d < end && b0 + i < a.B ? widen(a.basis[(r0 + d) * a.B + b0 + i]) : T(0);
      });
      __syncthreads();
      multiply(left, right, sum);
      __syncthreads();
    }
    for (int i = 0; i < kThread; ++i)
      for (int j = 0; j < kThread; ++j) {
        const int64_t c = c0 + row + i, b = b0 + column + j;
        if (c < a.C && b < a.B) partial[(chunk * a.C + c) * a.B + b] = sum[i][j];
      }
  }
}

template <typename S>
__global__ void add_chunks_kernel(const typename accumulate<S>::type* __restrict__ partial, S* __restrict__ out,
                                  int64_t chunks, int64_t size) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < size; i += int64_t(gridDim.x) * blockDim.x) {
    typename accumulate<S>::type sum = 0;
    for (int64_t k = 0; k < chunks; ++k) sum += partial[k * size + i];
    narrow(sum, out + i);
  }
}

// -- launchers --------------------------------------------------------------------------------------------------------------

void check_operands(const char* op, const Tensor& x, const Tensor& basis, const Tensor& weight, const Tensor& index) {
  STD_TORCH_CHECK(x.is_cuda() && basis.is_cuda() && weight.is_cuda() && index.is_cuda(), op,
                  ": all tensors must be on the GPU");
  STD_TORCH_CHECK(x.dim() == 3 && basis.dim() == 3 && weight.dim() == 2, op,
                  ": x and basis must have three axes, weight two");
  STD_TORCH_CHECK(x.scalar_type() == basis.scalar_type() && x.scalar_type() == weight.scalar_type(), op,
                  ": x, basis and weight must have one dtype");
  STD_TORCH_CHECK(basis.size(1) == x.size(1) || basis.size(1) == 1, op, ": axis 1 of basis must be that of x, or 1");
  STD_TORCH_CHECK(weight.size(0) == x.size(2) && weight.size(1) == basis.size(2), op, ": weight must be [C, B]");
  STD_TORCH_CHECK(index.numel() == basis.size(0), op, ": the index must have one entry per row of basis");
}

template <typename S>
LinearArgs<S> make_args(const Tensor& x, const Tensor& basis, const Tensor& weight) {
  LinearArgs<S> a{};
  a.x = read<S>(x);
  a.basis = read<S>(basis);
  a.weight = read<S>(weight);
  a.num_src = x.size(0);
  a.num_edges = basis.size(0);
  a.O = x.size(1);
  a.basis_O = basis.size(1);
  a.C = x.size(2);
  a.B = basis.size(2);
  a.flag = fault_flag(x.get_device_index());
  return a;
}

Tensor gather_linear_mul_segment_sum_cuda(const Tensor& x_, const Tensor& basis_, const Tensor& weight_,
                                          const Tensor& src_index_, const std::optional<Tensor>&, const Tensor& ptr_,
                                          const std::optional<Tensor>& perm_, const std::optional<Tensor>&,
                                          const std::optional<Tensor>&) {
  constexpr const char* op = "gather_linear_mul_segment_sum";
  const DeviceGuard guard(x_.get_device_index());
  check_operands(op, x_, basis_, weight_, src_index_);
  check_index_dtype(src_index_, op, "src_index");
  if (perm_) check_index_dtype(*perm_, op, "edge_perm");
  const Tensor x = torch::stable::contiguous(x_), basis = torch::stable::contiguous(basis_);
  const Tensor weight = torch::stable::contiguous(weight_), ptr = torch::stable::contiguous(ptr_);
  const Tensor src_index = torch::stable::contiguous(src_index_);
  const Tensor perm = perm_ ? torch::stable::contiguous(*perm_) : ptr;
  STD_TORCH_CHECK(ptr.is_cuda() && perm.is_cuda(), op, ": all tensors must be on the GPU");
  STD_TORCH_CHECK(!perm_ || perm.numel() == basis.size(0), op, ": edge_perm must have one entry per row of basis");
  check_ptr_cuda(op, ptr, basis.size(0));
  Tensor out = torch::stable::new_empty(x, {ptr.numel() - 1, x.size(1), x.size(2)});
  dispatch_floating(x.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    const LinearArgs<S> a = make_args<S>(x, basis, weight);
    const SumIndex index{index_data(ptr), perm_ ? index_data(perm) : nullptr, index_data(src_index), x.size(0),
                         ptr.numel() - 1, kSrcIndex};
    launch_sum<S>(a, index, a.x, x, write<S>(out));
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> gather_linear_mul_grad_cuda(
    const Tensor& x_, const Tensor& g_, const Tensor& basis_, const Tensor& weight_, const Tensor& src_index_,
    const Tensor& dst_index_, const Tensor&, const std::optional<Tensor>&, const Tensor& t_ptr_,
    const std::optional<Tensor>& t_perm_, bool need_x, bool need_basis, bool need_weight) {
  constexpr const char* op = "gather_linear_mul_grad";
  const DeviceGuard guard(x_.get_device_index());
  check_operands(op, x_, basis_, weight_, src_index_);
  check_operands(op, g_, basis_, weight_, dst_index_);
  check_index_dtype(src_index_, op, "src_index");
  check_index_dtype(dst_index_, op, "dst_index");
  if (t_perm_) check_index_dtype(*t_perm_, op, "t_perm");
  const Tensor x = torch::stable::contiguous(x_), g = torch::stable::contiguous(g_);
  const Tensor basis = torch::stable::contiguous(basis_), weight = torch::stable::contiguous(weight_);
  const Tensor src_index = torch::stable::contiguous(src_index_), dst_index = torch::stable::contiguous(dst_index_);
  const Tensor ptr = torch::stable::contiguous(t_ptr_);
  const Tensor perm = t_perm_ ? torch::stable::contiguous(*t_perm_) : ptr;
  STD_TORCH_CHECK(ptr.is_cuda() && perm.is_cuda(), op, ": all tensors must be on the GPU");
  STD_TORCH_CHECK(ptr.numel() - 1 == x.size(0), op, ": t_ptr must have one entry more than x has rows");
  STD_TORCH_CHECK(!t_perm_ || perm.numel() == basis.size(0), op, ": t_perm must have one entry per row of basis");
  check_ptr_cuda(op, ptr, basis.size(0));
  const bool empty = basis.size(0) == 0 || basis.size(2) == 0 || x.size(1) * x.size(2) == 0;
  const auto make = [&](const Tensor& like, bool needed) {
    if (!needed) return torch::stable::new_empty(like, {0});
    return empty ? torch::stable::new_zeros(like, like.sizes()) : torch::stable::new_empty(like, like.sizes());
  };
  Tensor dx = make(x, need_x), dbasis = make(basis, need_basis), dweight = make(weight, need_weight);
  if (empty) return {dx, dbasis, dweight};
  dispatch_floating(x.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    using T = typename accumulate<S>::type;
    const cudaStream_t stream = current_stream(x);
    LinearArgs<S> a = make_args<S>(x, basis, weight);
    a.g = read<S>(g);
    a.num_dst = g.size(0);
    a.src = index_data(src_index);
    a.dst = index_data(dst_index);
    const int64_t channel_tiles = tiles_of(a.C, kTile), basis_tiles = tiles_of(a.B, kTile);
    if (need_x) {
      const SumIndex index{index_data(ptr), t_perm_ ? index_data(perm) : nullptr, a.dst, a.num_dst, x.size(0), kDstIndex};
      launch_sum<S>(a, index, a.g, x, write<S>(dx));
    }
    if (need_basis) {
      const int64_t row_tiles = tiles_of(a.num_edges * a.basis_O, kTile);
      dbasis_kernel<S><<<grid_of(row_tiles * basis_tiles), kThreads, 0, stream>>>(a, write<S>(dbasis), row_tiles,
                                                                                  basis_tiles);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
    if (need_weight) {
      const int64_t chunks = linear_chunks(a.num_edges, a.basis_O), size = a.C * a.B;
      Tensor partial = wide_buffer<S>(x, chunks * size);
      dweight_kernel<S><<<grid_of(chunks * channel_tiles * basis_tiles), kThreads, 0, stream>>>(
          a, write<T>(partial), chunks, channel_tiles, basis_tiles);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      add_chunks_kernel<S><<<grid_of(tiles_of(size, 256)), 256, 0, stream>>>(read<T>(partial), write<S>(dweight), chunks,
                                                                             size);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
  });
  return {dx, dbasis, dweight};
}

}  // namespace
}  // namespace geo

STABLE_TORCH_LIBRARY_IMPL(geo, CUDA, m) {
  m.impl("gather_linear_mul_segment_sum", TORCH_BOX(&geo::gather_linear_mul_segment_sum_cuda));
  m.impl("gather_linear_mul_grad", TORCH_BOX(&geo::gather_linear_mul_grad_cuda));
}
