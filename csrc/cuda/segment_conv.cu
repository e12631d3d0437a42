// CUDA launchers of segment_causal_conv1d and its weight's gradient: a thread goes down some rows of one channel with the
// taps and the rows that they still need in registers, channels across the threads of a row.
#include "../segment_conv.h"

#include "device.h"

namespace geo {
namespace {

constexpr int64_t kTileRows = 32;    // of a thread
constexpr int64_t kChunkRows = 256;  // of a thread that sums
constexpr int64_t kMaxChunks = 4096;

// Rows [begin, end) of a channel, cut at the ends of segments: f(run's first row in the order of the scan, rows, reach).
template <class F>
__device__ __forceinline__ void for_runs(const int64_t* ptr, int64_t num_segments, int64_t num_rows, int64_t begin,
                                         int64_t end, bool reverse, F&& f) {
  int64_t s = conv_segment(ptr, num_segments, begin);
  for (int64_t low = begin; low < end && s < num_segments; ++s) {
    int64_t first, stop;
    segment_range(ptr, s, num_rows, first, stop);
    low = max(low, first);
    const int64_t high = min(stop, end);
    if (low < high) {
      const int64_t t = reverse ? high - 1 : low;
      f(t, high - low, conv_reach(t, first, stop, reverse));
      low = high;
    }
  }
}

template <int K, typename S, typename T>
__global__ void segment_conv_kernel(const S* __restrict__ x, const T* __restrict__ weight, const T* __restrict__ bias,
                                    const int64_t* __restrict__ ptr, S* __restrict__ out, int64_t num_segments,
                                    int64_t num_rows, int64_t E, int64_t taps, bool reverse, int64_t tiles) {
  const int64_t step = reverse ? -E : E;
  GEO_FOR_ITEMS(tile, c, (num_rows + kTileRows - 1) / kTileRows, E, tiles) {
    const int64_t begin = tile * kTileRows, end = min(begin + kTileRows, num_rows);
    const T start = bias ? bias[c] : T(0);
    if constexpr (K > 0) {
      T w[K], h[K];
      GEO_UNROLL(8) for (int j = 0; j < K; ++j) w[j] = weight[c * K + j];
      for_runs(ptr, num_segments, num_rows, begin, end, reverse, [&](int64_t t, int64_t count, int64_t reach) {
        int64_t at = t * E + c;
        GEO_UNROLL(8) for (int j = 1; j < K; ++j) h[j] = j <= reach ? T(widen(x[at - j * step])) : T(0);
        for (int64_t i = 0; i < count; ++i, at += step) {
          h[0] = widen(x[at]);
          T sum = start;
          GEO_UNROLL(8) for (int j = 0; j < K; ++j) sum = conv_step(sum, w[j], h[j]);
          narrow(sum, out + at);
          GEO_UNROLL(8) for (int j = K - 1; j > 0; --j) h[j] = h[j - 1];
        }
      });
    } else {
      for_runs(ptr, num_segments, num_rows, begin, end, reverse, [&](int64_t t, int64_t count, int64_t reach) {
        int64_t at = t * E + c;
        for (int64_t i = 0; i < count; ++i, at += step) {
          T sum = start;
          for (int64_t j = 0; j < min(reach + i + 1, taps); ++j)
            sum = conv_step(sum, weight[c * taps + j], T(widen(x[at - j * step])));
          narrow(sum, out + at);
        }
      });
    }
  }
}

// Item = (chunk of rows, tap), or a chunk for all taps where they are unrolled; partial is [chunks, K, E].
template <int K, typename S, typename T>
__global__ void segment_conv_weight_kernel(const S* __restrict__ grad, const S* __restrict__ x,
                                           const int64_t* __restrict__ ptr, T* __restrict__ partial,
                                           int64_t num_segments, int64_t num_rows, int64_t chunks, int64_t E,
                                           int64_t taps, bool reverse, int64_t tiles) {
  const int64_t step = reverse ? -E : E;
  GEO_FOR_ITEMS(item, c, chunks * (K > 0 ? 1 : taps), E, tiles) {
    const int64_t chunk = K > 0 ? item : item / taps;
    const int64_t begin = num_rows * chunk / chunks, end = num_rows * (chunk + 1) / chunks;
    if constexpr (K > 0) {
      T sum[K], h[K];
      GEO_UNROLL(8) for (int j = 0; j < K; ++j) sum[j] = T(0);
      for_runs(ptr, num_segments, num_rows, begin, end, reverse, [&](int64_t t, int64_t count, int64_t reach) {
        int64_t at = t * E + c;
        GEO_UNROLL(8) for (int j = 1; j < K; ++j) h[j] = j <= reach ? T(widen(x[at - j * step])) : T(0);
        for (int64_t i = 0; i < count; ++i, at += step) {
          h[0] = widen(x[at]);
          const T g = widen(grad[at]);
          GEO_UNROLL(8) for (int j = 0; j < K; ++j) sum[j] = conv_step(sum[j], g, h[j]);
          GEO_UNROLL(8) for (int j = K - 1; j > 0; --j) h[j] = h[j - 1];
        }
      });
      GEO_UNROLL(8) for (int j = 0; j < K; ++j) partial[(chunk * K + j) * E + c] = sum[j];
    } else {
      const int64_t j = item % taps;
      T sum = 0;
      for_runs(ptr, num_segments, num_rows, begin, end, reverse, [&](int64_t t, int64_t count, int64_t reach) {
        for (int64_t i = max(int64_t(0), j - reach); i < count; ++i) {
          const int64_t at = t * E + c + i * step;
          sum = conv_step(sum, T(widen(grad[at])), T(widen(x[at - j * step])));
        }
      });
      partial[item * E + c] = sum;
    }
  }
}

// out [E, K]: a warp for each output adds every 32nd chunk, and then its lanes, in a fixed order.
template <typename T>
__global__ void segment_conv_add_kernel(const T* __restrict__ partial, T* __restrict__ out, int64_t chunks, int64_t E,
                                        int64_t taps) {
  const int64_t size = E * taps;
  for (int64_t i = blockIdx.x * int64_t(blockDim.y) + threadIdx.y; i < size; i += int64_t(gridDim.x) * blockDim.y) {
    T sum = 0;
    for (int64_t k = threadIdx.x; k < chunks; k += 32) sum += partial[k * size + i];
    for (int width = 16; width; width /= 2) sum += __shfl_down_sync(0xffffffffu, sum, width);
    if (threadIdx.x == 0) out[i % E * taps + i / E] = sum;
  }
}

// f(Size<K>), or f(Size<0>) where K is not one of those unrolled
template <int N>
struct Size {
  static constexpr int value = N;
};
template <class F>
void for_taps(int64_t K, F&& f) {
  switch (K) {
    case 1: return f(Size<1>());
    case 2: return f(Size<2>());
    case 3: return f(Size<3>());
    case 4: return f(Size<4>());
    case 5: return f(Size<5>());
    case 6: return f(Size<6>());
    case 7: return f(Size<7>());
    case 8: return f(Size<8>());
    default: return f(Size<0>());
  }
}

template <class S>
constexpr ScalarType wide_dtype = sizeof(S) == 8 ? ScalarType::Double : ScalarType::Float;

Tensor segment_conv_cuda(const Tensor& x_, const Tensor& weight_, const std::optional<Tensor>& bias_,
                         const Tensor& ptr_, bool reverse) {
  constexpr const char* op = "segment_causal_conv1d";
  const DeviceGuard guard(x_.get_device_index());
  STD_TORCH_CHECK(x_.is_cuda() && weight_.is_cuda() && ptr_.is_cuda() && (!bias_ || bias_->is_cuda()), op,
                  ": all tensors must be on the GPU");
  STD_TORCH_CHECK(x_.dim() == 2, op, ": x must have two axes");
  const Tensor x = torch::stable::contiguous(x_), weight = torch::stable::contiguous(weight_);
  const Tensor ptr = torch::stable::contiguous(ptr_);
  const int64_t rows = x.size(0), E = x.size(1);
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) == E && weight.size(1) >= 1, op, ": weight must be [E, K]");
  check_ptr_cuda(op, ptr, rows);
  Tensor out = torch::stable::new_empty(x, {rows, E});
  if (out.numel() == 0) return out;
  if (ptr.numel() == 1) return torch::stable::zero_(out);  // rows, and no segment to have them: noted
  dispatch_floating(x.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    using T = typename accumulate<S>::type;
    STD_TORCH_CHECK(weight.scalar_type() == wide_dtype<S>, op, ": weight must be of the type x is accumulated in");
    Tensor bias;
    if (bias_) {
      bias = torch::stable::contiguous(*bias_);
      STD_TORCH_CHECK(bias.scalar_type() == wide_dtype<S> && bias.dim() == 1 && bias.size(0) == E, op,
                      ": bias must be [E], of the type x is accumulated in");
    }
    const Launch launch((rows + kTileRows - 1) / kTileRows, E);
    for_taps(weight.size(1), [&](auto taps) {
      constexpr int K = decltype(taps)::value;
      segment_conv_kernel<K, S, T><<<launch.grid, launch.block, 0, current_stream(x)>>>(
          read<S>(x), read<T>(weight), bias_ ? read<T>(bias) : nullptr, index_data(ptr), write<S>(out), ptr.numel() - 1,
          rows, E, weight.size(1), reverse, launch.tiles);
    });
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

Tensor segment_conv_weight_cuda(const Tensor& grad_, const Tensor& x_, const Tensor& ptr_, int64_t kernel_size,
                                bool reverse) {
  constexpr const char* op = "segment_causal_conv1d_weight";
  const DeviceGuard guard(x_.get_device_index());
  STD_TORCH_CHECK(x_.is_cuda() && grad_.is_cuda() && ptr_.is_cuda(), op, ": all tensors must be on the GPU");
  STD_TORCH_CHECK(x_.dim() == 2 && grad_.dim() == 2 && grad_.size(0) == x_.size(0) && grad_.size(1) == x_.size(1), op,
                  ": grad and x must be [T, E]");
  STD_TORCH_CHECK(grad_.scalar_type() == x_.scalar_type(), op, ": grad and x must have one dtype");
  STD_TORCH_CHECK(kernel_size >= 1, op, ": kernel_size must be at least 1");
  const Tensor x = torch::stable::contiguous(x_), grad = torch::stable::contiguous(grad_);
  const Tensor ptr = torch::stable::contiguous(ptr_);
  const int64_t rows = x.size(0), E = x.size(1), size = E * kernel_size;
  check_ptr_cuda(op, ptr, rows);
  Tensor out = x;
  dispatch_floating(x.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    using T = typename accumulate<S>::type;
    const cudaStream_t stream = current_stream(x);
    out = torch::stable::new_empty(x, {E, kernel_size}, wide_dtype<S>);
    if (size == 0) return;
    if (rows == 0 || ptr.numel() == 1) {
      out = torch::stable::zero_(out);
      return;
    }
    const int64_t chunks = std::clamp<int64_t>(rows / kChunkRows, 1, kMaxChunks);
    Tensor partial = torch::stable::new_empty(x, {chunks * size}, wide_dtype<S>);
    for_taps(kernel_size, [&](auto taps) {
      constexpr int K = decltype(taps)::value;
      const Launch launch(chunks * (K > 0 ? 1 : kernel_size), E);
      segment_conv_weight_kernel<K, S, T><<<launch.grid, launch.block, 0, stream>>>(
          read<S>(grad), read<S>(x), index_data(ptr), write<T>(partial), ptr.numel() - 1, rows, chunks, E, kernel_size,
          reverse, launch.tiles);
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    const unsigned blocks = static_cast<unsigned>(std::min<int64_t>((size + 7) / 8, 65535));
    segment_conv_add_kernel<T><<<blocks, dim3(32, 8), 0, stream>>>(read<T>(partial), write<T>(out), chunks, E, kernel_size);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out;
}

}  // namespace
}  // namespace geo

STABLE_TORCH_LIBRARY_IMPL(geo, CUDA, m) {
  m.impl("segment_causal_conv1d", TORCH_BOX(&geo::segment_conv_cuda));
  m.impl("segment_causal_conv1d_weight", TORCH_BOX(&geo::segment_conv_weight_cuda));
}
