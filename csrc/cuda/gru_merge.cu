// CUDA launchers of gru_merge and gru_merge_backward: a block takes 32 pairs at a time. Their rows, and in the gradient
// those of the gates' sums, lie in shared memory, [feature, cell], or where they do not fit in a buffer of the block's own.
//
// Cell c < 32 has the left row of pair c as input and its right one as state, cell c + 32 the other way. Gradients of
// weights are summed by block, whose pairs and number follow from the sizes alone, and added up in order.
#include "../gru_merge.h"

#include <tuple>

#include "../gru_merge_args.h"
#include "device.h"

namespace geo {
namespace {

constexpr int kPairs = 32, kCells = 2 * kPairs, kPitch = kCells + 1;  // of a panel, and numbers from feature to feature
constexpr int kTile = 4, kStride = kCells / kTile;                    // a thread's cells are so far apart
constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 256, kMostPartNumbers = 1 << 24;
constexpr int64_t kSharedBytes = 96 << 10;

template <typename T>
struct Job {
  const T *x, *weight, *transposed, *bias, *grad;  // transposed: [F, 6 F]
  const int64_t *left, *right;
  T *out, *sides, *parts;  // sides and parts, [blocks, 6 F F + 4 F], may be null
  T* scratch;              // [blocks, state_size], or null
  int64_t rows, pairs, features, state_size;
  long long* flag;
};

template <typename T>
__device__ T* states_of(const Job<T>& job) {
  extern __shared__ __align__(16) unsigned char shared[];
  return job.scratch ? job.scratch + blockIdx.x * job.state_size : reinterpret_cast<T*>(shared);
}

// The rows of the panel's cells; 0 where there is none.
template <typename T>
__device__ void gather(const Job<T>& job, int64_t first, T* rows) {
  const int64_t F = job.features;
  for (int64_t i = threadIdx.x; i < F * kCells; i += kThreads) {
    const int64_t f = i % F, c = i / F, p = first + c % kPairs;
    T value = 0;
    if (p < job.pairs) {
      const int64_t row = (c < kPairs ? job.left : job.right)[p];
      if (row >= 0 && row < job.rows)
        value = job.x[row * F + f];
      else if (f == 0)
        note_fault(job.flag, c < kPairs ? kSrcIndex : kDstIndex, p);
    }
    rows[f * kPitch + c] = value;
  }
  __syncthreads();
}

template <typename T>
__device__ __forceinline__ void add_cell(T (&sum)[4], T input, T state, const T (&w)[6]) {
  sum[0] += input * w[0];
  sum[1] += input * w[1];
  sum[2] += input * w[2];
  sum[0] += state * w[3];
  sum[1] += state * w[4];
  sum[3] += state * w[5];
}

// finish(pair, f, gates of its cell, gates of its other cell)
template <typename T, typename F>
__device__ __forceinline__ void for_gates(const Job<T>& job, const T* rows, F&& finish) {
  const int64_t width = job.features;
  for (int64_t item = threadIdx.x; item < width * (kPairs / kTile); item += kThreads) {
    const int64_t f = item % width;
    const int pair = int(item / width) * kTile;
    const T* b = job.bias + f;
    const T start[4] = {b[0] + b[3 * width], b[width] + b[4 * width], b[2 * width], b[5 * width]};
    T there[kTile][4], back[kTile][4];
#pragma unroll
    for (int i = 0; i < kTile; ++i)
#pragma unroll
      for (int k = 0; k < 4; ++k) there[i][k] = back[i][k] = start[k];
    for (int64_t d = 0; d < width; ++d) {
      T w[6];
#pragma unroll
      for (int k = 0; k < 6; ++k) w[k] = job.transposed[(d * 6 + k) * width + f];
#pragma unroll
      for (int i = 0; i < kTile; ++i) {
        const T left = rows[d * kPitch + pair + i], right = rows[d * kPitch + kPairs + pair + i];
        add_cell(there[i], left, right, w);
        add_cell(back[i], right, left, w);
      }
    }
#pragma unroll
    for (int i = 0; i < kTile; ++i)
      finish(pair + i, f, gru_gates<T>(there[i][0], there[i][1], there[i][2], there[i][3]),
             gru_gates<T>(back[i][0], back[i][1], back[i][2], back[i][3]));
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) forward_kernel(Job<T> job) {
  T* rows = states_of(job);
  const int64_t F = job.features;
  for (int64_t first = blockIdx.x * int64_t(kPairs); first < job.pairs; first += gridDim.x * int64_t(kPairs)) {
    gather(job, first, rows);
    for_gates(job, rows, [&](int pair, int64_t f, const GRUGates<T>& there, const GRUGates<T>& back) {
      const T left = rows[f * kPitch + pair], right = rows[f * kPitch + kPairs + pair];
      if (first + pair < job.pairs)
        job.out[(first + pair) * F + f] = (gru_value(there, right) + gru_value(back, left)) * T(0.5);
    });
    __syncthreads();
  }
}

// sum[a, b] += the sum over cells of gates[a, cell] * rows[b, cell ^ other]
template <typename T>
__device__ __forceinline__ void outer(const T* gates, int64_t num, const T* rows, int other, int64_t width, T* sum) {
  const int64_t gate_tiles = (num + kTile - 1) / kTile, tiles = gate_tiles * ((width + kTile - 1) / kTile);
  for (int64_t item = threadIdx.x; item < tiles; item += kThreads) {
    const int64_t a = item % gate_tiles * kTile, b = item / gate_tiles * kTile;
    T total[kTile][kTile] = {};
    for (int c = 0; c < kCells; ++c) {
      T left[kTile], right[kTile];
#pragma unroll
      for (int i = 0; i < kTile; ++i) left[i] = gates[min(a + i, num - 1) * kPitch + c];
#pragma unroll
      for (int j = 0; j < kTile; ++j) right[j] = rows[min(b + j, width - 1) * kPitch + (c ^ other)];
#pragma unroll
      for (int i = 0; i < kTile; ++i)
#pragma unroll
        for (int j = 0; j < kTile; ++j) total[i][j] += left[i] * right[j];
    }
#pragma unroll
    for (int i = 0; i < kTile; ++i)
#pragma unroll
      for (int j = 0; j < kTile; ++j)
        if (a + i < num && b + j < width) sum[(a + i) * width + b + j] += total[i][j];
  }
}

// sum[i][j] += the sum over `num` gates of gates[gate, (cell + i kStride) ^ other] * weight[gate, column + j]
template <typename T>
__device__ __forceinline__ void multiply(const T* gates, int64_t num, int cell, int other, const T* weight, int64_t width,
                                         int64_t column, T (&sum)[kTile][kTile]) {
  for (int64_t d = 0; d < num; ++d) {
    T left[kTile], right[kTile];
#pragma unroll
    for (int i = 0; i < kTile; ++i) left[i] = gates[d * kPitch + ((cell + i * kStride) ^ other)];
#pragma unroll
    for (int j = 0; j < kTile; ++j) right[j] = weight[d * width + min(column + j, width - 1)];
#pragma unroll
    for (int i = 0; i < kTile; ++i)
#pragma unroll
      for (int j = 0; j < kTile; ++j) sum[i][j] += left[i] * right[j];
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) backward_kernel(Job<T> job) {
  const int64_t F = job.features, part_size = (6 * F + 4) * F;
  T *rows = states_of(job), *gates = rows + F * kPitch;  // gates: r, z, n and what r is multiplied with
  T *by_weight = job.parts + blockIdx.x * part_size, *by_bias = by_weight + 6 * F * F;
  for (int64_t i = threadIdx.x; job.parts && i < part_size; i += kThreads) by_weight[i] = T(0);
  for (int64_t first = blockIdx.x * int64_t(kPairs); first < job.pairs; first += gridDim.x * int64_t(kPairs)) {
    gather(job, first, rows);
    for_gates(job, rows, [&](int pair, int64_t f, const GRUGates<T>& there, const GRUGates<T>& back) {
      const bool inside = first + pair < job.pairs;
      const T grad = inside ? job.grad[(first + pair) * F + f] * T(0.5) : T(0);
      const T left = rows[f * kPitch + pair], right = rows[f * kPitch + kPairs + pair];
      const GRUGrads<T> of[2] = {gru_grads<T>(there, right, grad), gru_grads<T>(back, left, grad)};
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        T* to = gates + f * kPitch + side * kPairs + pair;
        to[0] = of[side].reset;
        to[F * kPitch] = of[side].update;
        to[2 * F * kPitch] = of[side].input;
        to[3 * F * kPitch] = of[side].scaled;
        if (inside && job.sides) job.sides[((1 - side) * job.pairs + first + pair) * F + f] = of[side].state;
      }
    });
    __syncthreads();
    if (job.parts) {
      outer(gates, 3 * F, rows, 0, F, by_weight);
      outer(gates, 2 * F, rows, kPairs, F, by_weight + 3 * F * F);
      outer(gates + 3 * F * kPitch, F, rows, kPairs, F, by_weight + 5 * F * F);
      for (int64_t f = threadIdx.x; f < 4 * F; f += kThreads) {
        T sum = 0;
        for (int c = 0; c < kCells; ++c) sum += gates[f * kPitch + c];
        by_bias[f] += sum;
      }
    }
    for (int64_t item = threadIdx.x; job.sides && item < (F + kTile - 1) / kTile * kStride; item += kThreads) {
      const int cell = int(item % kStride);
      const int64_t column = item / kStride * kTile;
      T sum[kTile][kTile] = {};
      multiply(gates, 3 * F, cell, 0, job.weight, F, column, sum);
      multiply(gates, 2 * F, cell, kPairs, job.weight + 3 * F * F, F, column, sum);
      multiply(gates + 3 * F * kPitch, F, cell, kPairs, job.weight + 5 * F * F, F, column, sum);
#pragma unroll
      for (int i = 0; i < kTile; ++i) {
        const int c = cell + i * kStride;
        const int64_t p = first + c % kPairs;
#pragma unroll
        for (int j = 0; j < kTile; ++j)
          if (p < job.pairs && column + j < F) job.sides[(c / kPairs * job.pairs + p) * F + column + j] += sum[i][j];
      }
    }
    __syncthreads();
  }
}

template <typename T>
__global__ void transpose_kernel(const T* weight, int64_t F, T* to) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < 6 * F * F; i += int64_t(gridDim.x) * blockDim.x)
    to[i] = weight[i % (6 * F) * F + i / (6 * F)];
}

// The sums over blocks. Both biases of r and of z have the same gradient.
template <typename T>
__global__ void sum_kernel(Job<T> job, int64_t blocks, T* weight, T* bias) {
  const int64_t F = job.features, size = 6 * F * F, part_size = (6 * F + 4) * F;
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < size + 6 * F; i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t gate = (i - size) / F, from = i < size ? i : size + (gate == 5 ? 3 : gate % 3) * F + (i - size) % F;
    T sum = 0;
    for (int64_t block = 0; block < blocks; ++block) sum += job.parts[block * part_size + from];
    (i < size ? weight + i : bias + (i - size))[0] = sum;
  }
}

// -- launchers --------------------------------------------------------------------------------------------------------------

unsigned blocks_for(int64_t work) { return static_cast<unsigned>(std::clamp<int64_t>((work + 255) / 256, 1, 1 << 16)); }

// How much shared memory a block may have.
int64_t shared_bytes(int device) {
  int most = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return std::min<int64_t>(most, kSharedBytes);
}

// kernel(job) with `states` numbers of each cell, where there are pairs and features.
template <typename T>
void launch(void (*kernel)(Job<T>), Job<T> job, const GRUMergeArgs& in, int64_t states, int64_t blocks) {
  job.state_size = states * kPitch;
  const int64_t bytes = job.state_size * int64_t(sizeof(T));
  const bool shared = bytes <= shared_bytes(in.x.get_device_index());
  if (!shared) blocks = std::min(blocks, kMostBlocks);
  const int64_t F = in.features;
  const Tensor transposed = in.buffer({F, 6 * F});
  transpose_kernel<T><<<blocks_for(6 * F * F), 256, 0, current_stream(in.x)>>>(read<T>(in.weight), F, write<T>(transposed));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  job.x = read<T>(in.x);
  job.weight = read<T>(in.weight);
  job.transposed = read<T>(transposed);
  job.bias = read<T>(in.bias);
  job.left = index_data(in.left);
  job.right = index_data(in.right);
  job.rows = in.rows;
  job.pairs = in.pairs;
  job.features = F;
  job.flag = fault_flag(in.x.get_device_index());
  const Tensor scratch = in.buffer({shared ? 0 : blocks * job.state_size});
  if (!shared)
    job.scratch = write<T>(scratch);
  else if (bytes > 48 << 10)
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
  kernel<<<unsigned(blocks), kThreads, shared ? size_t(bytes) : 0, current_stream(in.x)>>>(job);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

int64_t panels(const GRUMergeArgs& in) { return (in.pairs + kPairs - 1) / kPairs; }

Tensor gru_merge_cuda(const Tensor& x, const Tensor& left, const Tensor& right, const Tensor& weight, const Tensor& bias) {
  constexpr const char* op = "gru_merge";
  const DeviceGuard guard(x.get_device_index());
  const GRUMergeArgs in(op, x, left, right, weight, bias);
  Tensor out = in.buffer({in.pairs, in.features});
  if (out.numel() == 0) return out;
  in.dispatch(op, [&](auto zero) {
    using T = decltype(zero);
    Job<T> job{};
    job.out = write<T>(out);
    launch<T>(forward_kernel<T>, job, in, in.features, std::min<int64_t>(panels(in), 1 << 14));
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> gru_merge_backward_cuda(const Tensor& grad_, const Tensor& x, const Tensor& left,
                                                           const Tensor& right, const Tensor& weight, const Tensor& bias,
                                                           bool need_x, bool need_weights) {
  constexpr const char* op = "gru_merge_backward";
  const DeviceGuard guard(x.get_device_index());
  const GRUMergeArgs in(op, x, left, right, weight, bias);
  const Tensor grad = in.grad(op, grad_);
  const int64_t F = in.features, part_size = (6 * F + 4) * F, gates = need_weights ? 6 * F : 0;
  Tensor sides = in.buffer({need_x ? 2 * in.pairs : 0, F}), dweight = in.buffer({gates, F}), dbias = in.buffer({gates});
  if (F == 0) return {sides, dweight, dbias};
  const int64_t blocks = std::min({panels(in), kMostBlocks, std::max<int64_t>(1, kMostPartNumbers / part_size)});
  const Tensor parts = in.buffer({need_weights ? blocks : 0, part_size});
  in.dispatch(op, [&](auto zero) {
    using T = decltype(zero);
    Job<T> job{};
    job.features = F;
    job.grad = read<T>(grad);
    job.sides = need_x ? write<T>(sides) : nullptr;
    job.parts = need_weights ? write<T>(parts) : nullptr;
    if (blocks > 0) launch<T>(backward_kernel<T>, job, in, 5 * F, blocks);
    if (!need_weights) return;
    sum_kernel<T><<<blocks_for(dweight.numel()), 256, 0, current_stream(x)>>>(job, blocks, write<T>(dweight), write<T>(dbias));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {sides, dweight, dbias};
}

}  // namespace
}  // namespace geo

STABLE_TORCH_LIBRARY_IMPL(geo, CUDA, m) {
  m.impl("gru_merge", TORCH_BOX(&geo::gru_merge_cuda));
  m.impl("gru_merge_backward", TORCH_BOX(&geo::gru_merge_backward_cuda));
}
