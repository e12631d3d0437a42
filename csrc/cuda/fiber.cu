// CUDA launchers of fiber_mul_sum and fiber_outer: a thread an output, channels across the threads of a row.
#include "../fiber.h"

#include "device.h"

namespace geo {
namespace {

template <typename S>
__global__ void fiber_sum_kernel(const S* __restrict__ x, const S* __restrict__ kernel, S* __restrict__ out, int64_t nodes,
                                 int64_t O, int64_t P, int64_t C, int64_t stride_p, int64_t stride_o, int64_t tiles) {
  using T = typename accumulate<S>::type;
  GEO_FOR_ITEMS(row, c, nodes * P, C, tiles) {
    const S* from = x + row / P * O * C + c;
    const S* k = kernel + row % P * stride_p + c;
    T sum = 0;
    for (int64_t o = 0; o < O; ++o) sum = fiber_step(sum, T(widen(from[o * C])), T(widen(k[o * stride_o])));
    narrow(sum, out + row * C + c);
  }
}

// Item = (chunk of nodes, p, o).
template <typename S>
__global__ void fiber_outer_kernel(const S* __restrict__ a, const S* __restrict__ b,
                                   typename accumulate<S>::type* __restrict__ partial, int64_t nodes, int64_t chunks,
                                   int64_t P, int64_t O, int64_t C, int64_t tiles) {
  using T = typename accumulate<S>::type;
  GEO_FOR_ITEMS(item, c, chunks * P * O, C, tiles) {
    const int64_t o = item % O, p = item / O % P, chunk = item / O / P;
    T sum = 0;
    for (int64_t v = nodes * chunk / chunks; v < nodes * (chunk + 1) / chunks; ++v)
      sum = fiber_step(sum, T(widen(a[(v * P + p) * C + c])), T(widen(b[(v * O + o) * C + c])));
    partial[item * C + c] = sum;
  }
}

template <typename S>
__global__ void fiber_add_kernel(const typename accumulate<S>::type* __restrict__ partial, S* __restrict__ out,
                                 int64_t chunks, int64_t size) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < size; i += int64_t(gridDim.x) * blockDim.x) {
    typename accumulate<S>::type sum = 0;
    for (int64_t k = 0; k < chunks; ++k) sum += partial[k * size + i];
    narrow(sum, out + i);
  }
}

Tensor fiber_mul_sum_cuda(const Tensor& x_, const Tensor& kernel_, bool transposed) {
  constexpr const char* op = "fiber_mul_sum";
  const DeviceGuard guard(x_.get_device_index());
  STD_TORCH_CHECK(x_.is_cuda() && kernel_.is_cuda(), op, ": all tensors must be on the GPU");
  STD_TORCH_CHECK(x_.dim() == 3 && kernel_.dim() == 3, op, ": x and kernel must have three axes");
  STD_TORCH_CHECK(x_.scalar_type() == kernel_.scalar_type(), op, ": x and kernel must have one dtype");
  const Tensor x = torch::stable::contiguous(x_), kernel = torch::stable::contiguous(kernel_);
  const int64_t nodes = x.size(0), O = x.size(1), P = kernel.size(transposed ? 1 : 0), C = x.size(2);
  STD_TORCH_CHECK(kernel.size(transposed ? 0 : 1) == O && kernel.size(2) == C, op,
                  ": kernel must fit the orientations and channels of x");
  Tensor out = torch::stable::new_empty(x, {nodes, P, C});
  if (out.numel() == 0) return out;
  dispatch_floating(x.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    const Launch launch(nodes * P, C);
    fiber_sum_kernel<S><<<launch.grid, launch.block, 0, current_stream(x)>>>(
        read<S>(x), read<S>(kernel), write<S>(out), nodes, O, P, C, transposed ? C : O * C, transposed ? P * C : C,
        launch.tiles);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

Tensor fiber_outer_cuda(const Tensor& a_, const Tensor& b_) {
  constexpr const char* op = "fiber_outer";
  const DeviceGuard guard(a_.get_device_index());
  STD_TORCH_CHECK(a_.is_cuda() && b_.is_cuda(), op, ": all tensors must be on the GPU");
  STD_TORCH_CHECK(a_.dim() == 3 && b_.dim() == 3 && a_.size(0) == b_.size(0) && a_.size(2) == b_.size(2), op,
                  ": a must be [V, P, C] and b [V, O, C]");
  STD_TORCH_CHECK(a_.scalar_type() == b_.scalar_type(), op, ": a and b must have one dtype");
  const Tensor a = torch::stable::contiguous(a_), b = torch::stable::contiguous(b_);
  const int64_t nodes = a.size(0), P = a.size(1), O = b.size(1), C = a.size(2);
  const int64_t chunks = fiber_chunks(nodes), size = P * O * C;
  Tensor out = torch::stable::new_empty(a, {P, O, C});
  if (size == 0) return out;
  dispatch_floating(a.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    using T = typename accumulate<S>::type;
    const cudaStream_t stream = current_stream(a);
    Tensor partial = torch::stable::new_empty(a, {chunks * size}, sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float);
    const Launch launch(chunks * P * O, C);
    fiber_outer_kernel<S><<<launch.grid, launch.block, 0, stream>>>(read<S>(a), read<S>(b), write<T>(partial), nodes,
                                                                    chunks, P, O, C, launch.tiles);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    const unsigned blocks = static_cast<unsigned>(std::min<int64_t>((size + 255) / 256, 65535));
    fiber_add_kernel<S><<<blocks, 256, 0, stream>>>(read<T>(partial), write<S>(out), chunks, size);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out;
}

}  // namespace
}  // namespace geo

STABLE_TORCH_LIBRARY_IMPL(geo, CUDA, m) {
  m.impl("fiber_mul_sum", TORCH_BOX(&geo::fiber_mul_sum_cuda));
  m.impl("fiber_outer", TORCH_BOX(&geo::fiber_outer_cuda));
}
