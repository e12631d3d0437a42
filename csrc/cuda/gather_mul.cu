// CUDA launchers of gather_mul_segment_sum and gather_mul.
#include "gather_mul.cuh"

#include <optional>
#include <vector>

namespace geo {
namespace {

Tensor gather_mul_segment_sum_cuda(const Tensor& x_, const Tensor& weight_, const Tensor& src_index_,
                                   const std::optional<Tensor>&, const Tensor& ptr_, const std::optional<Tensor>& perm_,
                                   const std::optional<Tensor>&, const std::optional<Tensor>&) {
  constexpr const char* op = "gather_mul_segment_sum";
  const DeviceGuard guard(x_.get_device_index());
  check_index_dtype(src_index_, op, "src_index");
  if (perm_) check_index_dtype(*perm_, op, "edge_perm");
  const Tensor x = torch::stable::contiguous(x_), weight = torch::stable::contiguous(weight_);
  const Tensor src_index = torch::stable::contiguous(src_index_), ptr = torch::stable::contiguous(ptr_);
  const Tensor perm = perm_ ? torch::stable::contiguous(*perm_) : ptr;
  const int64_t num_edges = src_index.numel(), num_segments = ptr.numel() - 1;
  STD_TORCH_CHECK(x.is_cuda() && weight.is_cuda() && src_index.is_cuda() && ptr.is_cuda() && perm.is_cuda(), op,
                  ": all tensors must be on the GPU");
  STD_TORCH_CHECK(x.dim() >= 1 && weight.dim() == x.dim(), op, ": weight must have as many axes as x");
  STD_TORCH_CHECK(x.scalar_type() == weight.scalar_type(), op, ": x and weight must have one dtype");
  STD_TORCH_CHECK(weight.size(0) == num_edges, op, ": weight must have one row per edge");
  STD_TORCH_CHECK(!perm_ || perm.numel() == num_edges, op, ": edge_perm must have one entry per edge");
  check_ptr_cuda(op, ptr, num_edges);
  SumArgs a{};
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes[0] = num_segments;
  for (int64_t d = 1; d < x.dim(); ++d) {
    const int64_t s = x.size(d), w = weight.size(d);
    STD_TORCH_CHECK(w == s || w == 1, op, ": axis ", d, " of weight has size ", w, ", x has ", s);
    STD_TORCH_CHECK(a.layout.push(s, w != s), op, ": too many alternations of shared and full axes");
  }
  a.layout.finish();
  a.src = index_data(src_index);
  a.ptr = index_data(ptr);
  a.perm = perm_ ? index_data(perm) : nullptr;
  a.num_src = x.size(0);
  a.num_edges = num_edges;
  a.num_segments = num_segments;
  a.flag = fault_flag(x.get_device_index());
  Tensor out = torch::stable::new_empty(x, sizes);
  dispatch_floating(x.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    launch_sum<S>(a, x, read<S>(x), read<S>(weight), write<S>(out));
  });
  return out;
}

struct ProductArgs {
  const int64_t* src;
  const int64_t* dst;
  int64_t num_src, num_dst, num_edges;
  FeatureLayout layout;
  long long* flag;
};

// Rows of x and g of edge e; false, and noted, where an index is bad.
template <typename S>
__device__ bool edge_rows(const ProductArgs& a, int64_t e, const S*& x, const S*& g) {
  const int64_t s = a.src[e], d = a.dst[e];
  const bool bad_src = s < 0 || s >= a.num_src, bad_dst = d < 0 || d >= a.num_dst;
  if (bad_src) note_fault(a.flag, kSrcIndex, e);
  if (bad_dst) note_fault(a.flag, kDstIndex, e);
  if (bad_src || bad_dst) return false;
  x += s * a.layout.num_features;
  g += d * a.layout.num_features;
  return true;
}

// One thread an element of the output.
template <typename S>
__global__ void product_kernel(ProductArgs a, const S* __restrict__ x, const S* __restrict__ g, S* __restrict__ out,
                               int64_t tiles) {
  const int64_t num_weights = a.layout.num_weights, num_terms = a.layout.num_features / num_weights;
  GEO_FOR_ITEMS(e, j, a.num_edges, num_weights, tiles) {
    const S *xe = x, *ge = g;
    typename accumulate<S>::type sum = 0;
    if (edge_rows(a, e, xe, ge))
      for (int64_t k = 0; k < num_terms; ++k) {
        const int64_t f = feature_of(a.layout, j, k);
        sum += widen(xe[f]) * widen(ge[f]);
      }
    narrow(sum, out + e * num_weights + j);
  }
}

// One warp an element of the output: for weights shared along the innermost axis, whose terms lie side by side.
template <typename S>
__global__ void product_warp_kernel(ProductArgs a, const S* __restrict__ x, const S* __restrict__ g,
                                    S* __restrict__ out) {
  const int64_t num_weights = a.layout.num_weights, num_terms = a.layout.num_features / num_weights;
  const int lane = threadIdx.x;
  for (int64_t item = blockIdx.x * int64_t(blockDim.y) + threadIdx.y; item < a.num_edges * num_weights;
       item += int64_t(gridDim.x) * blockDim.y) {
    const S *xe = x, *ge = g;
    typename accumulate<S>::type sum = 0;
    if (edge_rows(a, item / num_weights, xe, ge))
      for (int64_t k = lane; k < num_terms; k += 32) {
        const int64_t f = feature_of(a.layout, item % num_weights, k);
        sum += widen(xe[f]) * widen(ge[f]);
      }
    for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (lane == 0) narrow(sum, out + item);
  }
}

Tensor gather_mul_cuda(const Tensor& x_, const Tensor& g_, const Tensor& src_index_, const Tensor& dst_index_,
                       const std::optional<Tensor>&, const std::optional<Tensor>&, const std::optional<Tensor>&,
                       const std::optional<Tensor>&, int64_t shared) {
  constexpr const char* op = "gather_mul";
  const DeviceGuard guard(x_.get_device_index());
  check_index_dtype(src_index_, op, "src_index");
  check_index_dtype(dst_index_, op, "dst_index");
  const Tensor x = torch::stable::contiguous(x_), g = torch::stable::contiguous(g_);
  const Tensor src_index = torch::stable::contiguous(src_index_), dst_index = torch::stable::contiguous(dst_index_);
  STD_TORCH_CHECK(x.is_cuda() && g.is_cuda() && src_index.is_cuda() && dst_index.is_cuda(), op,
                  ": all tensors must be on the GPU");
  STD_TORCH_CHECK(x.dim() >= 1 && g.dim() == x.dim(), op, ": x and g must have as many axes");
  STD_TORCH_CHECK(x.scalar_type() == g.scalar_type(), op, ": x and g must have one dtype");
  ProductArgs a{};
  a.num_edges = src_index.numel();
  STD_TORCH_CHECK(dst_index.numel() == a.num_edges, op, ": src_index and dst_index must have equal length");
  std::vector<int64_t> sizes = {a.num_edges};
  for (int64_t d = 1; d < x.dim(); ++d) {
    STD_TORCH_CHECK(x.size(d) == g.size(d), op, ": axis ", d, " of g has size ", g.size(d), ", x has ", x.size(d));
    const bool is_shared = shared >> (d - 1) & 1;
    STD_TORCH_CHECK(a.layout.push(x.size(d), is_shared), op, ": too many alternations of shared and full axes");
    sizes.push_back(is_shared ? 1 : x.size(d));
  }
  a.layout.finish();
  if (a.layout.num_features == 0) return torch::stable::new_zeros(x, sizes);
  Tensor out = torch::stable::new_empty(x, sizes);
  if (a.num_edges == 0) return out;
  a.src = index_data(src_index);
  a.dst = index_data(dst_index);
  a.num_src = x.size(0);
  a.num_dst = g.size(0);
  a.flag = fault_flag(x.get_device_index());
  dispatch_floating(x.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    const int inner = a.layout.num_groups - 1;
    const int64_t num_weights = a.layout.num_weights;
    if (inner >= 0 && a.layout.stride[inner] == 0) {
      const int64_t blocks = (a.num_edges * num_weights + 7) / 8;
      const unsigned grid = static_cast<unsigned>(std::clamp<int64_t>(blocks, 1, int64_t(1) << 20));
      product_warp_kernel<S><<<grid, dim3(32, 8), 0, current_stream(x)>>>(a, read<S>(x), read<S>(g), write<S>(out));
    } else {
      const Launch launch(a.num_edges, num_weights);
      product_kernel<S><<<launch.grid, launch.block, 0, current_stream(x)>>>(a, read<S>(x), read<S>(g), write<S>(out),
                                                                             launch.tiles);
    }
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace
}  // namespace geo

STABLE_TORCH_LIBRARY_IMPL(geo, CUDA, m) {
  m.impl("gather_mul_segment_sum", TORCH_BOX(&geo::gather_mul_segment_sum_cuda));
  m.impl("gather_mul", TORCH_BOX(&geo::gather_mul_cuda));
}
