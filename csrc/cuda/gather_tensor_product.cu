// CUDA launchers of gather_tensor_product_segment_sum and gather_tensor_product_grad.
//
//   sum      a block for each segment and output block of columns: its threads own elements (channel, component) and go
//            through the edges in their order
//   dweight  a block for each edge (each chunk of edges where weights are shared) and path: its threads own channels
//   dsh      a block for each edge: its threads own entries of a path's moment, then components of sh
// The edge's matrix of a path, which all channels share, is computed by the block into shared memory; matrices that do not
// fit are computed entry by entry. There are no atomics on floats and no order that depends on the schedule.
#include "../gather_tensor_product.h"

#include <optional>
#include <tuple>

#include "../gather_linear.h"
#include "device.h"

namespace geo {
namespace {

constexpr int kThreads = 128;
constexpr int kEntries = 2048;  // of a matrix in shared memory

template <typename S>
struct ProductArgs {
  const S* x;  // [num_x, dim_x], what the paths call x
  const S* g;  // [num_g, dim_out], what they call out
  const S *sh, *weight;
  const double* coefficients;
  const TensorPath* paths;
  const int64_t *x_index, *g_index;  // rows of each edge
  int64_t num_x, num_g, dim_x, dim_out, num_edges, dim_sh, dim_weight, num_coefficients, num_paths, weight_stride;
  int x_fault, g_fault;
  long long* flag;
};

// A path with its places in weights and coefficients; false where the table is bad.
template <typename S>
__device__ bool find_path(const ProductArgs<S>& a, int64_t number, TensorPath& path, int64_t& weight,
                          int64_t& coefficients) {
  weight = coefficients = 0;
  for (int64_t p = 0; p <= number; ++p) {
    path = a.paths[p];
    if (!path_fits(path, a.dim_x, a.dim_sh, a.dim_out, a.dim_weight - weight, a.num_coefficients - coefficients))
      return false;
    if (p == number) return true;
    weight += path.mul * path.has_weight;
    coefficients += path.d1 * path.d2 * path.d3;
  }
  return false;
}

template <typename S>
__device__ typename accumulate<S>::type matrix_entry(const double* coefficients, const TensorPath& path, const S* sh,
                                                     int64_t i, int64_t k) {
  using T = typename accumulate<S>::type;
  T entry = 0;
  for (int64_t j = 0; j < path.d2; ++j)
    entry = matrix_step(entry, T(coefficients[(i * path.d2 + j) * path.d3 + k]), T(widen(sh[path.sh + j])));
  return entry;
}

// The matrix [d1, d3] of an edge; all threads of the block call its constructor.
template <typename S>
struct Matrix {
  using T = typename accumulate<S>::type;
  const double* coefficients;
  const TensorPath& path;
  const S* sh;
  const T* entries;

  __device__ Matrix(const double* c, const TensorPath& p, const S* s, T* shared)
      : coefficients(c), path(p), sh(s), entries(p.d1 <= kEntries / p.d3 ? shared : nullptr) {
    __syncthreads();
    if (entries)
      for (int64_t m = threadIdx.x; m < p.d1 * p.d3; m += kThreads)
        shared[m] = matrix_entry(c, p, s, m / p.d3, m % p.d3);
    __syncthreads();
  }
  __device__ T operator()(int64_t i, int64_t k) const {
    return entries ? entries[i * path.d3 + k] : matrix_entry(coefficients, path, sh, i, k);
  }
};

// The rows of an edge; false, and noted, where an index is bad.
template <typename S>
__device__ bool find_rows(const ProductArgs<S>& a, int64_t e, int64_t& x_row, int64_t& g_row) {
  x_row = a.x_index[e];
  g_row = a.g_index[e];
  const bool bad_x = x_row < 0 || x_row >= a.num_x, bad_g = g_row < 0 || g_row >= a.num_g;
  if (bad_x && threadIdx.x == 0) note_fault(a.flag, a.x_fault, e);
  if (bad_g && threadIdx.x == 0) note_fault(a.flag, a.g_fault, e);
  return !bad_x && !bad_g;
}

// -- sum over segments --------------------------------------------------------------------------------------------------

// out of x (kReversed: x of out). Block (segment, path): the first path of an output block computes all paths that lead
// there.
template <typename S, bool kReversed>
__global__ void __launch_bounds__(kThreads) sum_kernel(ProductArgs<S> a, const int64_t* ptr, const int64_t* perm,
                                                       int64_t num_segments, S* out) {
  using T = typename accumulate<S>::type;
  __shared__ T shared[kEntries];
  const S* in = kReversed ? a.g : a.x;
  const int64_t* in_index = kReversed ? a.g_index : a.x_index;
  const int64_t num_in = kReversed ? a.num_g : a.num_x, dim_in = kReversed ? a.dim_out : a.dim_x;
  const int64_t dim_own = kReversed ? a.dim_x : a.dim_out;
  for (int64_t w = blockIdx.x; w < num_segments * a.num_paths; w += gridDim.x) {
    const int64_t first = w % a.num_paths, segment = w / a.num_paths;
    TensorPath block;
    int64_t weight, coefficients;
    if (!find_path(a, first, block, weight, coefficients) || block.mul == 0) continue;
    const int64_t column = kReversed ? block.x : block.out, d_own = kReversed ? block.d1 : block.d3;
    bool leads = true;
    for (int64_t p = 0; p < first; ++p)
      leads = leads && !((kReversed ? a.paths[p].x : a.paths[p].out) == column && a.paths[p].mul > 0);
    if (!leads) continue;
    int64_t begin, end;
    segment_range(ptr, segment, a.num_edges, begin, end);
    for (int64_t q0 = 0; q0 < block.mul * d_own; q0 += kThreads) {
      const int64_t q = q0 + threadIdx.x, u = q / d_own, o = q % d_own;
      T sum = 0;
      for (int64_t place = begin; place < end; ++place) {
        const int64_t e = perm ? perm[place] : place;
        if (e < 0 || e >= a.num_edges) {
          if (threadIdx.x == 0) note_fault(a.flag, kEdgePerm, place);
          continue;
        }
        const int64_t row = in_index[e];
        if (row < 0 || row >= num_in) {
          if (threadIdx.x == 0) note_fault(a.flag, kReversed ? a.g_fault : a.x_fault, e);
          continue;
        }
        int64_t path_weight = weight, path_coefficients = coefficients;
        for (int64_t p = first; p < a.num_paths; ++p) {
          const TensorPath path = a.paths[p];
          if (!path_fits(path, a.dim_x, a.dim_sh, a.dim_out, a.dim_weight - path_weight,
                         a.num_coefficients - path_coefficients))
            break;
          const int64_t w_column = path_weight;
          const double* c = a.coefficients + path_coefficients;
          path_weight += path.mul * path.has_weight;
          path_coefficients += path.d1 * path.d2 * path.d3;
          const int64_t d_in = kReversed ? path.d3 : path.d1;
          if ((kReversed ? path.x : path.out) != column || path.mul != block.mul || (kReversed ? path.d1 : path.d3) != d_own)
            continue;
          const Matrix<S> matrix(c, path, a.sh + e * a.dim_sh, shared);
          if (u >= block.mul) continue;
          const S* from = in + row * dim_in + (kReversed ? path.out : path.x) + u * d_in;
          T y = 0;
          for (int64_t i = 0; i < d_in; ++i)
            y = row_step(y, kReversed ? matrix(o, i) : matrix(i, o), T(widen(from[i])));
          const T scale = path.has_weight ? T(widen(a.weight[e * a.weight_stride + w_column + u])) : T(1);
          sum = scaled_step(sum, scale, y);
        }
      }
      if (u < block.mul) narrow(sum, out + segment * dim_own + column + q);
    }
  }
}

unsigned grid_of(int64_t work) { return static_cast<unsigned>(std::clamp<int64_t>(work, 1, int64_t(1) << 20)); }

template <typename S, bool kReversed>
void launch_sum(const ProductArgs<S>& a, const Tensor& ptr, const std::optional<Tensor>& perm, const Tensor& like, S* out) {
  const int64_t num_segments = ptr.numel() - 1;
  if (num_segments * a.num_paths == 0) return;
  sum_kernel<S, kReversed><<<grid_of(num_segments * a.num_paths), kThreads, 0, current_stream(like)>>>(
      a, index_data(ptr), perm ? index_data(*perm) : nullptr, num_segments, out);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// -- gradients of weight and sh -------------------------------------------------------------------------------------------

// Row c of out [chunks, W]: the sum over the edges of chunk c. Chunks are edges themselves where weights are not shared.
template <typename S, typename Out>
__global__ void __launch_bounds__(kThreads) dweight_kernel(ProductArgs<S> a, Out* out, int64_t chunks) {
  using T = typename accumulate<S>::type;
  __shared__ T shared[kEntries];
  for (int64_t w = blockIdx.x; w < chunks * a.num_paths; w += gridDim.x) {
    const int64_t chunk = w / a.num_paths;
    TensorPath path;
    int64_t weight, coefficients;
    if (!find_path(a, w % a.num_paths, path, weight, coefficients) || !path.has_weight) continue;
    const int64_t begin = linear_chunk_begin(chunk, chunks, a.num_edges);
    const int64_t end = linear_chunk_begin(chunk + 1, chunks, a.num_edges);
    for (int64_t u0 = 0; u0 < path.mul; u0 += kThreads) {
      const int64_t u = u0 + threadIdx.x;
      T sum = 0;
      for (int64_t e = begin; e < end; ++e) {
        int64_t x_row, g_row;
        if (!find_rows(a, e, x_row, g_row)) continue;
        const Matrix<S> matrix(a.coefficients + coefficients, path, a.sh + e * a.dim_sh, shared);
        if (u >= path.mul) continue;
        const S* x = a.x + x_row * a.dim_x + path.x + u * path.d1;
        const S* g = a.g + g_row * a.dim_out + path.out + u * path.d3;
        for (int64_t i = 0; i < path.d1; ++i) {
          T y = 0;
          for (int64_t k = 0; k < path.d3; ++k) y = row_step(y, matrix(i, k), T(widen(g[k])));
          sum = scaled_step(sum, T(widen(x[i])), y);
        }
      }
      if (u < path.mul) narrow(sum, out + chunk * a.dim_weight + weight + u);
    }
  }
}

template <typename S>
__global__ void __launch_bounds__(kThreads) dsh_kernel(ProductArgs<S> a, typename accumulate<S>::type* out) {
  using T = typename accumulate<S>::type;
  __shared__ T moment[kEntries];
  for (int64_t e = blockIdx.x; e < a.num_edges; e += gridDim.x) {
    T* dsh = out + e * a.dim_sh;
    for (int64_t j = threadIdx.x; j < a.dim_sh; j += kThreads) dsh[j] = 0;
    int64_t x_row, g_row, weight = 0, coefficients = 0;
    if (!find_rows(a, e, x_row, g_row)) continue;
    for (int64_t p = 0; p < a.num_paths; ++p) {
      const TensorPath path = a.paths[p];
      if (!path_fits(path, a.dim_x, a.dim_sh, a.dim_out, a.dim_weight - weight, a.num_coefficients - coefficients)) break;
      const S* scale = path.has_weight ? a.weight + e * a.weight_stride + weight : nullptr;
      const double* c = a.coefficients + coefficients;
      weight += path.mul * path.has_weight;
      coefficients += path.d1 * path.d2 * path.d3;
      const int64_t size = path.d1 * path.d3;
      for (int64_t m0 = 0; m0 < size; m0 += kEntries) {
        const int64_t m1 = min(m0 + kEntries, size);
        __syncthreads();
        for (int64_t m = m0 + threadIdx.x; m < m1; m += kThreads) {
          const S* x = a.x + x_row * a.dim_x + path.x + m / path.d3;
          const S* g = a.g + g_row * a.dim_out + path.out + m % path.d3;
          T sum = 0;
          for (int64_t u = 0; u < path.mul; ++u) {
            const T w = scale ? T(widen(scale[u])) : T(1);
            sum = moment_step(sum, w * T(widen(x[u * path.d1])), T(widen(g[u * path.d3])));
          }
          moment[m - m0] = sum;
        }
        __syncthreads();
        for (int64_t j = threadIdx.x; j < path.d2; j += kThreads) {
          T sum = dsh[path.sh + j];
          for (int64_t m = m0; m < m1; ++m)
            sum = sh_step(sum, T(c[(m / path.d3 * path.d2 + j) * path.d3 + m % path.d3]), moment[m - m0]);
          dsh[path.sh + j] = sum;
        }
      }
    }
    __syncthreads();
  }
}

template <typename S>
__global__ void add_rows_kernel(const typename accumulate<S>::type* __restrict__ from, S* __restrict__ to, int64_t rows,
                                int64_t size) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < size; i += int64_t(gridDim.x) * blockDim.x) {
    typename accumulate<S>::type sum = 0;
    for (int64_t r = 0; r < rows; ++r) sum += from[r * size + i];
    narrow(sum, to + i);
  }
}

// -- launchers --------------------------------------------------------------------------------------------------------------

// A buffer in the accumulation type of the tensor.
template <typename S>
Tensor wide_buffer(const Tensor& like, int64_t size) {
  constexpr bool kDouble = sizeof(typename accumulate<S>::type) == 8;
  return torch::stable::new_empty(like, {size}, kDouble ? ScalarType::Double : ScalarType::Float);
}

void check_operands(const char* op, const Tensor& x, const Tensor& sh, const Tensor& weight, const Tensor& coefficients,
                    const Tensor& paths, const Tensor& index) {
  STD_TORCH_CHECK(x.is_cuda() && sh.is_cuda() && weight.is_cuda() && coefficients.is_cuda() && paths.is_cuda() &&
                      index.is_cuda(),
                  op, ": all tensors must be on the GPU");
  STD_TORCH_CHECK(x.dim() == 2 && sh.dim() == 2 && weight.dim() == 2, op, ": x, sh and weight must have two axes");
  STD_TORCH_CHECK(x.scalar_type() == sh.scalar_type() && x.scalar_type() == weight.scalar_type(), op,
                  ": x, sh and weight must have one dtype");
  STD_TORCH_CHECK(weight.size(0) == sh.size(0) || weight.size(0) == 1, op, ": weight must have a row per edge, or one");
  STD_TORCH_CHECK(coefficients.dim() == 1 && coefficients.scalar_type() == ScalarType::Double, op,
                  ": coefficients must be float64 with one axis");
  STD_TORCH_CHECK(paths.dim() == 2 && paths.size(1) == kPathColumns && paths.scalar_type() == ScalarType::Long, op,
                  ": paths must be int64 [P, 8]");
  STD_TORCH_CHECK(index.numel() == sh.size(0), op, ": the index must have one entry per row of sh");
}

template <typename S>
ProductArgs<S> make_args(const Tensor& sh, const Tensor& weight, const Tensor& coefficients, const Tensor& paths) {
  ProductArgs<S> a{};
  a.sh = read<S>(sh);
  a.weight = read<S>(weight);
  a.coefficients = read<double>(coefficients);
  a.paths = reinterpret_cast<const TensorPath*>(index_data(paths));
  a.num_edges = sh.size(0);
  a.dim_sh = sh.size(1);
  a.dim_weight = weight.size(1);
  a.weight_stride = weight.size(0) == sh.size(0) ? weight.size(1) : 0;
  a.num_coefficients = coefficients.numel();
  a.num_paths = paths.size(0);
  a.flag = fault_flag(sh.get_device_index());
  return a;
}

Tensor gather_tensor_product_segment_sum_cuda(const Tensor& x_, const Tensor& sh_, const Tensor& weight_,
                                              const Tensor& coefficients_, const Tensor& paths_, const Tensor& src_index_,
                                              const std::optional<Tensor>&, const Tensor& ptr_,
                                              const std::optional<Tensor>& perm_, const std::optional<Tensor>&,
                                              const std::optional<Tensor>&, int64_t dim_out, bool transposed) {
  constexpr const char* op = "gather_tensor_product_segment_sum";
  const DeviceGuard guard(x_.get_device_index());
  check_operands(op, x_, sh_, weight_, coefficients_, paths_, src_index_);
  check_index_dtype(src_index_, op, "src_index");
  check_index_dtype(ptr_, op, "ptr");
  if (perm_) check_index_dtype(*perm_, op, "edge_perm");
  const Tensor x = made_contiguous(x_), sh = made_contiguous(sh_), weight = made_contiguous(weight_);
  const Tensor coefficients = made_contiguous(coefficients_), paths = made_contiguous(paths_);
  const Tensor src_index = made_contiguous(src_index_), ptr = made_contiguous(ptr_);
  std::optional<Tensor> perm;
  if (perm_) perm = made_contiguous(*perm_);
  STD_TORCH_CHECK(ptr.is_cuda() && (!perm || perm->is_cuda()), op, ": all tensors must be on the GPU");
  STD_TORCH_CHECK(!perm || perm->numel() == sh.size(0), op, ": edge_perm must have one entry per row of sh");
  STD_TORCH_CHECK(ptr.numel() >= 1 && dim_out >= 0, op, ": ptr must not be empty, dim_out not negative");
  check_ptr_cuda(op, ptr, sh.size(0));
  Tensor out = torch::stable::new_zeros(x, {ptr.numel() - 1, dim_out});
  if (sh.size(0) == 0) return out;
  dispatch_floating(x.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    ProductArgs<S> a = make_args<S>(sh, weight, coefficients, paths);
    a.dim_x = transposed ? dim_out : x.size(1);
    a.dim_out = transposed ? x.size(1) : dim_out;
    (transposed ? a.g : a.x) = read<S>(x);
    (transposed ? a.num_g : a.num_x) = x.size(0);
    (transposed ? a.g_index : a.x_index) = index_data(src_index);
    a.x_fault = a.g_fault = kSrcIndex;
    if (transposed)
      launch_sum<S, true>(a, ptr, perm, x, write<S>(out));
    else
      launch_sum<S, false>(a, ptr, perm, x, write<S>(out));
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> gather_tensor_product_grad_cuda(
    const Tensor& x_, const Tensor& g_, const Tensor& sh_, const Tensor& weight_, const Tensor& coefficients_,
    const Tensor& paths_, const Tensor& src_index_, const Tensor& dst_index_, const Tensor&, const std::optional<Tensor>&,
    const Tensor& t_ptr_, const std::optional<Tensor>& t_perm_, bool transposed, bool need_x, bool need_sh,
    bool need_weight) {
  constexpr const char* op = "gather_tensor_product_grad";
  const DeviceGuard guard(x_.get_device_index());
  check_operands(op, x_, sh_, weight_, coefficients_, paths_, src_index_);
  check_operands(op, g_, sh_, weight_, coefficients_, paths_, dst_index_);
  check_index_dtype(src_index_, op, "src_index");
  check_index_dtype(dst_index_, op, "dst_index");
  check_index_dtype(t_ptr_, op, "t_ptr");
  if (t_perm_) check_index_dtype(*t_perm_, op, "t_perm");
  const Tensor x = made_contiguous(x_), g = made_contiguous(g_), sh = made_contiguous(sh_);
  const Tensor weight = made_contiguous(weight_), coefficients = made_contiguous(coefficients_);
  const Tensor paths = made_contiguous(paths_), src_index = made_contiguous(src_index_);
  const Tensor dst_index = made_contiguous(dst_index_), ptr = made_contiguous(t_ptr_);
  std::optional<Tensor> perm;
  if (t_perm_) perm = made_contiguous(*t_perm_);
  STD_TORCH_CHECK(ptr.is_cuda() && (!perm || perm->is_cuda()), op, ": all tensors must be on the GPU");
  STD_TORCH_CHECK(ptr.numel() - 1 == x.size(0), op, ": t_ptr must have one entry more than x has rows");
  STD_TORCH_CHECK(!perm || perm->numel() == sh.size(0), op, ": t_perm must have one entry per row of sh");
  check_ptr_cuda(op, ptr, sh.size(0));
  const auto make = [&](const Tensor& like, bool needed) {
    return needed ? torch::stable::new_zeros(like, like.sizes()) : torch::stable::new_empty(like, {0});
  };
  Tensor dx = make(x, need_x), dsh = make(sh, need_sh), dweight = make(weight, need_weight);
  if (sh.size(0) == 0 || paths.size(0) == 0) return {dx, dsh, dweight};
  dispatch_floating(x.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    using T = typename accumulate<S>::type;
    const cudaStream_t stream = current_stream(x);
    ProductArgs<S> a = make_args<S>(sh, weight, coefficients, paths);
    const Tensor &of_x = transposed ? g : x, &of_out = transposed ? x : g;
    a.x = read<S>(of_x);
    a.g = read<S>(of_out);
    a.num_x = of_x.size(0);
    a.num_g = of_out.size(0);
    a.dim_x = of_x.size(1);
    a.dim_out = of_out.size(1);
    a.x_index = index_data(transposed ? dst_index : src_index);
    a.g_index = index_data(transposed ? src_index : dst_index);
    a.x_fault = transposed ? kDstIndex : kSrcIndex;
    a.g_fault = transposed ? kSrcIndex : kDstIndex;
    if (need_x) {
      if (transposed)
        launch_sum<S, false>(a, ptr, perm, x, write<S>(dx));
      else
        launch_sum<S, true>(a, ptr, perm, x, write<S>(dx));
    }
    if (need_sh && a.dim_sh > 0) {
      Tensor wide = wide_buffer<S>(sh, sh.numel());
      dsh_kernel<S><<<grid_of(a.num_edges), kThreads, 0, stream>>>(a, write<T>(wide));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      add_rows_kernel<S><<<grid_of((sh.numel() + 255) / 256), 256, 0, stream>>>(read<T>(wide), write<S>(dsh), 1, sh.numel());
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
    if (need_weight && a.dim_weight > 0) {
      if (a.weight_stride != 0) {
        dweight_kernel<S, S><<<grid_of(a.num_edges * a.num_paths), kThreads, 0, stream>>>(a, write<S>(dweight),
                                                                                         a.num_edges);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      } else {
        const int64_t chunks = linear_chunks(a.num_edges, 8);
        Tensor partial = wide_buffer<S>(weight, chunks * a.dim_weight);
        dweight_kernel<S, T><<<grid_of(chunks * a.num_paths), kThreads, 0, stream>>>(a, write<T>(partial), chunks);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
        add_rows_kernel<S><<<grid_of((a.dim_weight + 255) / 256), 256, 0, stream>>>(read<T>(partial), write<S>(dweight),
                                                                                   chunks, a.dim_weight);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      }
    }
  });
  return {dx, dsh, dweight};
}

}  // namespace
}  // namespace geo

STABLE_TORCH_LIBRARY_IMPL(geo, CUDA, m) {
  m.impl("gather_tensor_product_segment_sum", TORCH_BOX(&geo::gather_tensor_product_segment_sum_cuda));
  m.impl("gather_tensor_product_grad", TORCH_BOX(&geo::gather_tensor_product_grad_cuda));
}
