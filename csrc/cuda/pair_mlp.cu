// CUDA launchers of pair_mlp and pair_mlp_backward: a block takes a node with the nodes of its graph, 64 at a time, through
// all layers. The states lie in shared memory, [feature, pair], or where they do not fit in a buffer of the block's own.
//
// Both orders of a pair are visited, so each block writes the rows of its own nodes and no other; with the gradient
// g[i] + g[j] on the diagonal, too, the sums of weights' gradients come out twice. Blocks have equal runs of the nodes, by
// their number alone; sums of weights are kept for each block, of filters for each block and graph, and added up in order.
#include "../pair_mlp.h"

#include <tuple>

#include "../pair_mlp_args.h"
#include "device.h"

namespace geo {
namespace {

constexpr int kPairs = 64, kPitch = kPairs + 1;       // of a panel, and numbers from feature to feature
constexpr int kTile = 4, kStride = kPairs / kTile;    // a thread's pairs are so far apart
constexpr int kThreads = 128;
constexpr int64_t kMostBlocks = 1024, kMostSumNumbers = 1 << 24;  // of all blocks
constexpr int kMostLayers = 64;
constexpr int64_t kSharedBytes = 96 << 10;

template <typename T>
struct Job {
  const int64_t* ptr;
  const T *eigvecs, *filters, *params, *grad;
  T *out, *deigvecs;
  T *by_params, *by_filters;  // parts: [blocks, num_params], [blocks + graphs, K, M]
  T* scratch;                 // [blocks, state_size], or null
  int64_t nodes, graphs, num_params, state_size;
  int num_layers;
  int64_t width[kMostLayers + 1];  // of the input of each layer, and of the last one's output
  bool leading;
};

// The nodes [run_begin(b), run_begin(b + 1)) are those of block b.
GEO_HD int64_t run_begin(int64_t block, int64_t blocks, int64_t nodes) { return nodes * block / blocks; }
GEO_HD int64_t run_owner(int64_t node, int64_t blocks, int64_t nodes) { return ((node + 1) * blocks - 1) / nodes; }

// The graph of a node, and its nodes; none where ptr is bad.
struct Graph {
  int64_t index, begin, end;
};
__device__ Graph graph_of(const int64_t* ptr, int64_t graphs, int64_t nodes, int64_t node) {
  int64_t low = 0, high = graphs;  // the last one that begins at or before the node
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (ptr[middle] <= node)
      low = middle;
    else
      high = middle;
  }
  Graph graph{low, 0, 0};
  if (graphs == 0) return graph;
  segment_range(ptr, low, nodes, graph.begin, graph.end);
  if (node < graph.begin || node >= graph.end) graph.end = graph.begin;
  return graph;
}

// finish(pair, c, sum over d of x[d, pair] * weight[d * depth_step + c * step]) for all pairs and columns c
template <typename T, typename F>
__device__ __forceinline__ void multiply(const T* x, int64_t depth, const T* weight, int64_t depth_step, int64_t step,
                                         int64_t columns, F&& finish) {
  for (int64_t item = threadIdx.x; item < (columns + kTile - 1) / kTile * kStride; item += kThreads) {
    const int pair = int(item % kStride);
    const int64_t column = item / kStride * kTile;
    T sum[kTile][kTile] = {};
    int64_t at[kTile];
#pragma unroll
    for (int j = 0; j < kTile; ++j) at[j] = min(column + j, columns - 1) * step;
    for (int64_t d = 0; d < depth; ++d) {
      T left[kTile], right[kTile];
#pragma unroll
      for (int i = 0; i < kTile; ++i) left[i] = x[d * kPitch + pair + i * kStride];
#pragma unroll
      for (int j = 0; j < kTile; ++j) right[j] = weight[d * depth_step + at[j]];
#pragma unroll
      for (int i = 0; i < kTile; ++i)
#pragma unroll
        for (int j = 0; j < kTile; ++j) sum[i][j] = layer_step(sum[i][j], left[i], right[j]);
    }
#pragma unroll
    for (int i = 0; i < kTile; ++i)
#pragma unroll
      for (int j = 0; j < kTile; ++j)
        if (column + j < columns) finish(pair + i * kStride, column + j, sum[i][j]);
  }
}

// sum[a * row_step + b * step] += the sum over pairs of x[a] * grad[b]
template <typename T>
__device__ __forceinline__ void outer(const T* x, int64_t rows, const T* grad, int64_t columns, T* sum, int64_t row_step,
                                      int64_t step) {
  const int64_t row_tiles = (rows + kTile - 1) / kTile, tiles = row_tiles * ((columns + kTile - 1) / kTile);
  for (int64_t item = threadIdx.x; item < tiles; item += kThreads) {
    const int64_t a = item % row_tiles * kTile, b = item / row_tiles * kTile;
    T total[kTile][kTile] = {};
    for (int p = 0; p < kPairs; ++p) {
      T left[kTile], right[kTile];
#pragma unroll
      for (int i = 0; i < kTile; ++i) left[i] = x[min(a + i, rows - 1) * kPitch + p];
#pragma unroll
      for (int j = 0; j < kTile; ++j) right[j] = grad[min(b + j, columns - 1) * kPitch + p];
#pragma unroll
      for (int i = 0; i < kTile; ++i)
#pragma unroll
        for (int j = 0; j < kTile; ++j) total[i][j] = layer_step(total[i][j], left[i], right[j]);
    }
#pragma unroll
    for (int i = 0; i < kTile; ++i)
#pragma unroll
      for (int j = 0; j < kTile; ++j)
        if (a + i < rows && b + j < columns) sum[(a + i) * row_step + (b + j) * step] += total[i][j];
  }
}

// One node with `count` others from `first` on: all states, one behind the other. Returns the last one; `at` ends behind
// the parameters.
template <typename T>
__device__ T* run_layers(const Job<T>& job, int64_t graph, int64_t node, int64_t first, int count, T* states,
                         const T*& at) {
  const int64_t K = job.width[0];
  for (int64_t i = threadIdx.x; i < K * kPairs; i += kThreads) {
    const int64_t k = i % K, p = i / K;
    states[k * kPitch + p] =
        p < count ? pair_input(job.eigvecs[node * K + k], job.eigvecs[(first + p) * K + k]) : T(0);
  }
  __syncthreads();
  at = job.params;
  T* x = states;
  for (int l = 0; l < job.num_layers; ++l) {
    const int64_t in = job.width[l], out = job.width[l + 1];
    const T* weight = l ? at : job.filters + graph * in * out;
    if (l) at += in * out;
    const T* bias = l || job.leading ? at : nullptr;
    T* y = x + in * kPitch;
    multiply(x, in, weight, l ? 1 : out, l ? in : 1, out, [&](int p, int64_t f, T sum) {
      y[f * kPitch + p] = bias ? relu(sum + bias[f]) : sum;
    });
    if (bias) at += out;
    x = y;
    __syncthreads();
  }
  return x;
}

template <typename T>
__device__ T* states_of(const Job<T>& job) {
  extern __shared__ __align__(16) unsigned char shared[];
  return job.scratch ? job.scratch + blockIdx.x * job.state_size : reinterpret_cast<T*>(shared);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) forward_kernel(Job<T> job) {
  T* states = states_of(job);
  const int64_t F = job.width[job.num_layers];
  for (int64_t node = run_begin(blockIdx.x, gridDim.x, job.nodes); node < run_begin(blockIdx.x + 1, gridDim.x, job.nodes);
       ++node) {
    const Graph graph = graph_of(job.ptr, job.graphs, job.nodes, node);
    for (int64_t f = threadIdx.x; f < F; f += kThreads) job.out[node * F + f] = T(0);
    for (int64_t first = graph.begin; first < graph.end; first += kPairs) {
      const int count = int(min(int64_t(kPairs), graph.end - first));
      const T* at;
      const T* y = run_layers(job, graph.index, node, first, count, states, at);
      for (int64_t f = threadIdx.x; f < F; f += kThreads) {
        T sum = 0;
        for (int p = 0; p < count; ++p) sum += y[f * kPitch + p];
        job.out[node * F + f] += sum;
      }
      __syncthreads();
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) backward_kernel(Job<T> job) {
  T* states = states_of(job);
  const int64_t K = job.width[0], head_size = K * job.width[1], F = job.width[job.num_layers];
  T* by_params = job.by_params + blockIdx.x * job.num_params;
  for (int64_t i = threadIdx.x; i < job.num_params; i += kThreads) by_params[i] = T(0);
  int64_t current = -1;
  for (int64_t node = run_begin(blockIdx.x, gridDim.x, job.nodes); node < run_begin(blockIdx.x + 1, gridDim.x, job.nodes);
       ++node) {
    const Graph graph = graph_of(job.ptr, job.graphs, job.nodes, node);
    T* by_filters = job.by_filters + (blockIdx.x + graph.index) * head_size;  // both rise: no two blocks meet
    if (graph.index != current)
      for (int64_t i = threadIdx.x; i < head_size; i += kThreads) by_filters[i] = T(0);
    current = graph.index;
    for (int64_t k = threadIdx.x; job.deigvecs && k < K; k += kThreads) job.deigvecs[node * K + k] = T(0);
    for (int64_t first = graph.begin; first < graph.end; first += kPairs) {
      const int count = int(min(int64_t(kPairs), graph.end - first));
      const T* at;
      T* y = run_layers(job, graph.index, node, first, count, states, at);
      const bool masked = job.num_layers > 1 || job.leading;
      for (int64_t i = threadIdx.x; i < F * kPairs; i += kThreads) {
        const int64_t f = i % F, p = i / F;
        const T g = p < count ? pair_grad(job.grad[node * F + f], job.grad[(first + p) * F + f]) : T(0);
        y[f * kPitch + p] = masked ? relu_grad(y[f * kPitch + p], g) : g;
      }
      __syncthreads();
      for (int l = job.num_layers - 1; l >= 0; --l) {
        const int64_t in = job.width[l], out = job.width[l + 1];
        T* x = y - in * kPitch;
        if (l || job.leading) {
          at -= out;
          for (int64_t f = threadIdx.x; f < out; f += kThreads) {
            T sum = 0;
            for (int p = 0; p < kPairs; ++p) sum += y[f * kPitch + p];
            by_params[at - job.params + f] += sum;
          }
        }
        if (l) at -= in * out;
        outer(x, in, y, out, l ? by_params + (at - job.params) : by_filters, l ? 1 : out, l ? in : 1);
        __syncthreads();
        if (l == 0 && !job.deigvecs) break;
        const bool relu_before = l > 1 || (l == 1 && job.leading);
        const T* weight = l ? at : job.filters + graph.index * in * out;
        multiply(y, out, weight, l ? in : 1, l ? 1 : out, in, [&](int p, int64_t c, T sum) {
          x[c * kPitch + p] = relu_before ? relu_grad(x[c * kPitch + p], sum) : sum;
        });
        __syncthreads();
        y = x;
      }
      for (int64_t k = threadIdx.x; job.deigvecs && k < K; k += kThreads) {
        T sum = 0;
        for (int p = 0; p < count; ++p) sum = layer_step(sum, y[k * kPitch + p], job.eigvecs[(first + p) * K + k]);
        job.deigvecs[node * K + k] += sum;
      }
      __syncthreads();
    }
  }
}

// The sums over blocks; half of them, for each pair was visited twice.
template <typename T>
__global__ void sum_params_kernel(Job<T> job, int64_t blocks, T* out) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < job.num_params; i += int64_t(gridDim.x) * blockDim.x) {
    T sum = 0;
    for (int64_t block = 0; block < blocks; ++block) sum += job.by_params[block * job.num_params + i];
    out[i] = sum * T(0.5);
  }
}
template <typename T>
__global__ void sum_filters_kernel(Job<T> job, int64_t blocks, T* out) {
  const int64_t size = job.width[0] * job.width[1];
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < job.graphs * size; i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t graph = i / size;
    int64_t begin, end;
    segment_range(job.ptr, graph, job.nodes, begin, end);
    T sum = 0;
    if (begin < end) {
      const int64_t last = run_owner(end - 1, blocks, job.nodes);
      for (int64_t block = run_owner(begin, blocks, job.nodes); block <= last; ++block)
        sum += job.by_filters[(block + graph) * size + i % size];
    }
    out[i] = sum * T(0.5);
  }
}

// -- launchers --------------------------------------------------------------------------------------------------------------

PairMLPArgs checked(const char* op, const Tensor& eigvecs, const Tensor& filters, const Tensor& ptr, const Tensor& params,
                    const std::vector<int64_t>& widths, bool leading) {
  PairMLPArgs in(op, eigvecs, filters, ptr, params, widths, leading);
  STD_TORCH_CHECK(in.num_layers() <= kMostLayers, op, ": at most ", kMostLayers - 1, " layers");
  check_ptr_cuda(op, in.ptr, in.nodes);
  return in;
}

// As many as have room for `numbers` each.
int64_t blocks_of(const PairMLPArgs& in, int64_t numbers) {
  return std::min({in.nodes, kMostBlocks, std::max<int64_t>(1, kMostSumNumbers / std::max<int64_t>(1, numbers))});
}

// How much shared memory a block may have.
int64_t shared_bytes(int device) {
  int most = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return std::min<int64_t>(most, kSharedBytes);
}

template <typename T>
Job<T> make_job(const PairMLPArgs& in) {
  Job<T> job{};
  job.ptr = index_data(in.ptr);
  job.eigvecs = read<T>(in.eigvecs);
  job.filters = read<T>(in.filters);
  job.params = read<T>(in.params);
  job.nodes = in.nodes;
  job.graphs = in.graphs;
  job.num_params = in.params.numel();
  job.num_layers = int(in.num_layers());
  job.leading = in.leading;
  for (size_t i = 0; i < in.widths.size(); ++i) {
    job.width[i] = in.widths[i];
    job.state_size += in.widths[i] * kPitch;
  }
  return job;
}

template <typename T>
void launch(void (*kernel)(Job<T>), Job<T> job, const PairMLPArgs& in, int64_t blocks) {
  const int64_t bytes = job.state_size * int64_t(sizeof(T));
  const bool shared = bytes <= shared_bytes(in.eigvecs.get_device_index());
  const Tensor scratch = in.buffer({shared ? 0 : blocks * job.state_size});
  if (!shared)
    job.scratch = write<T>(scratch);
  else if (bytes > 48 << 10)
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
  kernel<<<unsigned(blocks), kThreads, shared ? size_t(bytes) : 0, current_stream(in.eigvecs)>>>(job);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

unsigned blocks_for(int64_t work) { return static_cast<unsigned>(std::clamp<int64_t>((work + 255) / 256, 1, 1 << 16)); }

Tensor pair_mlp_cuda(const Tensor& eigvecs, const Tensor& filters, const Tensor& ptr, const Tensor& params,
                     std::vector<int64_t> widths, bool leading) {
  constexpr const char* op = "pair_mlp";
  const DeviceGuard guard(eigvecs.get_device_index());
  const PairMLPArgs in = checked(op, eigvecs, filters, ptr, params, widths, leading);
  Tensor out = in.buffer({in.nodes, in.widths.back()});
  if (out.numel() == 0) return out;
  in.dispatch(op, [&](auto zero) {
    using T = decltype(zero);
    Job<T> job = make_job<T>(in);
    job.out = write<T>(out);
    launch<T>(forward_kernel<T>, job, in, blocks_of(in, job.state_size));
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> pair_mlp_backward_cuda(const Tensor& grad_, const Tensor& eigvecs,
                                                          const Tensor& filters, const Tensor& ptr, const Tensor& params,
                                                          std::vector<int64_t> widths, bool leading, bool need_eigvecs) {
  constexpr const char* op = "pair_mlp_backward";
  const DeviceGuard guard(eigvecs.get_device_index());
  const PairMLPArgs in = checked(op, eigvecs, filters, ptr, params, widths, leading);
  const Tensor grad = in.grad(op, grad_);
  const int64_t head_size = in.widths[0] * in.widths[1];
  Tensor deigvecs = need_eigvecs ? in.buffer({in.nodes, in.widths[0]}) : in.buffer({0});
  Tensor dfilters = in.buffer({in.graphs, in.widths[0], in.widths[1]}), dparams = in.buffer({in.params.numel()});
  in.dispatch(op, [&](auto zero) {
    using T = decltype(zero);
    Job<T> job = make_job<T>(in);
    const int64_t blocks = blocks_of(in, std::max(job.state_size, job.num_params + head_size));
    const Tensor by_params = in.buffer({blocks * job.num_params});
    const Tensor by_filters = in.buffer({(blocks + job.graphs) * head_size});
    job.grad = read<T>(grad);
    job.deigvecs = need_eigvecs ? write<T>(deigvecs) : nullptr;
    job.by_params = write<T>(by_params);
    job.by_filters = write<T>(by_filters);
    const cudaStream_t stream = current_stream(in.eigvecs);
    if (blocks > 0) launch<T>(backward_kernel<T>, job, in, blocks);
    sum_params_kernel<T><<<blocks_for(job.num_params), 256, 0, stream>>>(job, blocks, write<T>(dparams));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    sum_filters_kernel<T><<<blocks_for(dfilters.numel()), 256, 0, stream>>>(job, blocks, write<T>(dfilters));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {deigvecs, dfilters, dparams};
}

}  // namespace
}  // namespace geo

STABLE_TORCH_LIBRARY_IMPL(geo, CUDA, m) {
  m.impl("pair_mlp", TORCH_BOX(&geo::pair_mlp_cuda));
  m.impl("pair_mlp_backward", TORCH_BOX(&geo::pair_mlp_backward_cuda));
}
