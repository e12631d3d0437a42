// CUDA launchers of gelu_mul and gelu_mul_grad.
#include "../gelu.h"

#include <optional>
#include <tuple>

#include "../gelu_args.h"
#include "device.h"

namespace geo {
namespace {

constexpr int kThreads = 256;

dim3 grid_of(int64_t size) {
  return dim3(static_cast<unsigned>(std::clamp<int64_t>((size + kThreads - 1) / kThreads, 1, int64_t(1) << 16)));
}

#define GEO_FOR_ELEMENTS(i, size) \
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < (size); i += int64_t(gridDim.x) * blockDim.x)

template <int kOrder, class S>
__global__ void mul_kernel(const S* __restrict__ x, const S* __restrict__ g, S* __restrict__ out, int64_t size,
                           GeluPolynomial poly) {
  using T = typename accumulate<S>::type;
  GEO_FOR_ELEMENTS(i, size) {
    const T f = gelu_value<kOrder>(gelu_parts<T>(widen(x[i])), poly);
    narrow(g ? widen(g[i]) * f : f, out + i);
  }
}

template <int kOrder, class S>
__global__ void grad_kernel(const S* __restrict__ x, const S* __restrict__ g, const S* __restrict__ h,
                            S* __restrict__ dx, S* __restrict__ dg, int64_t size, GeluPolynomial poly,
                            GeluPolynomial next) {
  using T = typename accumulate<S>::type;
  GEO_FOR_ELEMENTS(i, size) {
    const auto parts = gelu_parts<T>(widen(x[i]));
    const T v = widen(h[i]);
    narrow(v * gelu_value<kOrder>(parts, poly), dg + i);
    narrow(v * widen(g[i]) * gelu_value<(kOrder < 3 ? kOrder + 1 : 3)>(parts, next), dx + i);
  }
}

Tensor gelu_mul_cuda(const Tensor& x_, const std::optional<Tensor>& g_, int64_t order) {
  constexpr const char* op = "gelu_mul";
  const DeviceGuard guard(x_.get_device_index());
  check_gelu(op, order, kGeluOrders, x_, g_);
  STD_TORCH_CHECK(x_.is_cuda() && (!g_ || g_->is_cuda()), op, ": all tensors must be on the GPU");
  const Tensor x = torch::stable::contiguous(x_), g = g_ ? torch::stable::contiguous(*g_) : x;
  Tensor out = torch::stable::new_empty(x, x.sizes());
  const int64_t size = x.numel();
  if (size == 0) return out;
  const GeluPolynomial poly = gelu_polynomial(int(order));
  dispatch_floating(x.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    dispatch_gelu_order(order, [&](auto n) {
      mul_kernel<decltype(n)::value, S><<<grid_of(size), kThreads, 0, current_stream(x)>>>(
          read<S>(x), g_ ? read<S>(g) : nullptr, write<S>(out), size, poly);
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out;
}

std::tuple<Tensor, Tensor> gelu_mul_grad_cuda(const Tensor& x_, const Tensor& g_, const Tensor& h_, int64_t order) {
  constexpr const char* op = "gelu_mul_grad";
  const DeviceGuard guard(x_.get_device_index());
  check_gelu(op, order, kGeluOrders - 1, x_, g_);
  check_gelu(op, order, kGeluOrders - 1, x_, h_);
  STD_TORCH_CHECK(x_.is_cuda() && g_.is_cuda() && h_.is_cuda(), op, ": all tensors must be on the GPU");
  const Tensor x = torch::stable::contiguous(x_), g = torch::stable::contiguous(g_), h = torch::stable::contiguous(h_);
  Tensor dx = torch::stable::new_empty(x, x.sizes()), dg = torch::stable::new_empty(x, x.sizes());
  const int64_t size = x.numel();
  if (size == 0) return {dx, dg};
  const GeluPolynomial poly = gelu_polynomial(int(order)), next = gelu_polynomial(int(order) + 1);
  dispatch_floating(x.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    dispatch_gelu_order(order, [&](auto n) {
      grad_kernel<decltype(n)::value, S><<<grid_of(size), kThreads, 0, current_stream(x)>>>(
          read<S>(x), read<S>(g), read<S>(h), write<S>(dx), write<S>(dg), size, poly, next);
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {dx, dg};
}

}  // namespace
}  // namespace geo

STABLE_TORCH_LIBRARY_IMPL(geo, CUDA, m) {
  m.impl("gelu_mul", TORCH_BOX(&geo::gelu_mul_cuda));
  m.impl("gelu_mul_grad", TORCH_BOX(&geo::gelu_mul_grad_cuda));
}
