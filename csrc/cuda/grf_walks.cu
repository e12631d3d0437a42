// CUDA launchers of grf_walks and grf_paths: all walks are gone twice, to count and to fill, a thread a walk; of
// repelling walks, a warp a start. What they leave is then sorted by one key and summed in that order.
#include "../grf_walks.h"

#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_scan.cuh>

#include <optional>

#include "device.h"

namespace geo {
namespace {

constexpr int kThreads = 256, kWarp = 32;
constexpr unsigned kAll = 0xffffffffu;
constexpr int64_t kScratchBytes = int64_t(256) << 20;  // for the walks of the starts at hand

struct GrfLaws {
  uint64_t seed;
  const int64_t* halt_below;
  const int64_t* units;     // or null
  const int64_t* node_key;  // or null
  const int64_t* walk;      // or null
  int64_t num_halt, num_walks, per_start, first_walk, max_length, flags;
};

unsigned grid_of(int64_t items, int threads = kThreads) {
  return static_cast<unsigned>(std::clamp<int64_t>((items + threads - 1) / threads, 1, int64_t(1) << 20));
}

// What becomes of the walks ------------------------------------------------------------------------------------------
struct Arrival {
  int64_t edge, node, begin, degree;
  uint64_t halt_below;
};

struct Count {  // how many nodes they visit
  int64_t* counts;
  unsigned long long* longest;
  struct State {
    int64_t walk, count;
  };
  __device__ State begin(int64_t walk, int64_t, int64_t) const { return {walk, 1}; }
  __device__ void step(State& state, const Arrival&) const { ++state.count; }
  __device__ void end(const State& state) const {
    counts[state.walk] = state.count;
    atomicMax(longest, static_cast<unsigned long long>(state.count));
  }
};
struct Path {  // their nodes and edges
  const int64_t* ptr;
  int64_t* node;
  int64_t* edge;
  struct State {
    int64_t at;
  };
  __device__ State begin(int64_t walk, int64_t, int64_t start) const {
    const int64_t at = ptr[walk];
    node[at] = start;
    edge[at] = -1;
    return {at};
  }
  __device__ void step(State& state, const Arrival& to) const {
    ++state.at;
    node[state.at] = to.node;
    edge[state.at] = to.edge;
  }
  __device__ void end(const State&) const {}
};
template <class T>
struct Load {  // their loads, under a key that sorts by start, node and length
  const int64_t* ptr;
  const T* weight;
  const int64_t* units;
  int64_t num_nodes, num_lengths;
  uint64_t* keys;
  T* loads;
  struct State {
    int64_t at, row, length;
    T load;
  };
  __device__ void put(const State& state, int64_t node) const {
    const uint64_t pair = uint64_t(state.row) * uint64_t(num_nodes) + uint64_t(node);
    keys[state.at] = pair * uint64_t(num_lengths) + uint64_t(state.length);
    loads[state.at] = state.load;
  }
  __device__ State begin(int64_t walk, int64_t row, int64_t start) const {
    const State state{ptr[walk], row, 0, T(1)};
    put(state, start);
    return state;
  }
  __device__ void step(State& state, const Arrival& to) const {
    const T factor = weight[to.edge] * over_probability<T>(units, to.begin, to.degree, to.edge);
    ++state.at;
    ++state.length;
    state.load = state.load * factor * over_survival<T>(to.halt_below);
    put(state, to.node);
  }
  __device__ void end(const State&) const {}
};

// Steps --------------------------------------------------------------------------------------------------------------
struct Member {  // a walk
  uint64_t key, number, decider;
};
__device__ Member member_of(const GrfLaws& laws, int64_t s, int64_t k, int64_t node) {
  const uint64_t walk = uint64_t(laws.walk ? laws.walk[s] : k), number = uint64_t(laws.first_walk) + walk;
  return {uint64_t(laws.node_key ? laws.node_key[node] : node), number,
          halt_decider(number, walk, uint64_t(laws.num_walks), (laws.flags & kAntithetic) != 0)};
}
__device__ uint64_t halt_of(const GrfLaws& laws, int64_t step) {
  return uint64_t(laws.halt_below[min(step, laws.num_halt - 1)]);
}
// Whether the walk takes a step; then the bits to choose by and the row.
__device__ bool goes_on(const WalkGraph<int64_t>& graph, const GrfLaws& laws, const Member& member, int64_t node,
                        int64_t step, uint64_t halt_below, uint64_t& choice, Row& row, long long* flag) {
  const Draw drawn = draw(laws.seed, member.key, member.number, uint64_t(step), 0);
  uint64_t word = drawn.halt;
  if (laws.flags & kAntithetic) word = draw(laws.seed, member.key, member.decider & kLowWord, uint64_t(step), 0).halt;
  choice = drawn.choice;
  row = row_of(graph, node);
  if (row.bad >= 0) note_fault(flag, kPtr, row.bad);
  if (halt_word(word, member.decider) < halt_below || row.degree == 0) return false;
  return laws.units == nullptr || laws.units[row.begin + row.degree - 1] > 0;
}
__device__ int64_t rendezvous(const WalkGraph<int64_t>& graph, const GrfLaws& laws, const Row& row, uint64_t choice) {
  int64_t edge = row.begin, least = INT64_MAX, least_key = 0;
  for (int64_t e = row.begin; e < row.begin + row.degree; ++e) {
    const int64_t node = graph.col[e];
    if (uint64_t(node) >= uint64_t(graph.num_nodes)) return e;  // to follow it is a fault
    const int64_t key = laws.node_key ? laws.node_key[node] : node;
    const int64_t hash = neighbour_hash(choice, uint64_t(key));
    if (hash < least || (hash == least && (key < least_key || e == row.begin))) {
      edge = e;
      least = hash;
      least_key = key;
    }
  }
  return edge;
}
// Where an edge leads, or -1.
__device__ int64_t target_of(const WalkGraph<int64_t>& graph, int64_t edge, long long* flag) {
  const int64_t next = graph.col[edge];
  if (uint64_t(next) < uint64_t(graph.num_nodes)) return next;
  note_fault(flag, kDstIndex, edge);
  return -1;
}

template <class Sink>
__global__ void independent_kernel(WalkGraph<int64_t> graph, GrfLaws laws, const int64_t* __restrict__ start,
                                   int64_t num_starts, Sink sink, long long* flag) {
  const int64_t walks = num_starts * laws.per_start;
  for (int64_t w = blockIdx.x * int64_t(kThreads) + threadIdx.x; w < walks; w += int64_t(gridDim.x) * kThreads) {
    const int64_t s = w / laws.per_start;
    int64_t node = start[s];
    const bool inside = uint64_t(node) < uint64_t(graph.num_nodes);
    if (!inside) note_fault(flag, kSrcIndex, s);
    auto state = sink.begin(w, s, inside ? node : 0);
    if (inside) {
      const Member member = member_of(laws, s, w % laws.per_start, node);
      for (int64_t step = 0; step < laws.max_length; ++step) {
        const uint64_t halt_below = halt_of(laws, step);
        uint64_t choice;
        Row row;
        if (!goes_on(graph, laws, member, node, step, halt_below, choice, row, flag)) break;
        const int64_t edge = (laws.flags & kRendezvous) ? rendezvous(graph, laws, row, choice)
                             : laws.units ? edge_at(laws.units, row.begin, row.degree, choice >> 32)
                                          : row.begin + below(choice, row.degree);
        node = target_of(graph, edge, flag);
        if (node < 0) break;
        sink.step(state, {edge, node, row.begin, row.degree, halt_below});
      }
    }
    sink.end(state);
  }
}

// The walks of a start, one after the other; node: -1 after its end. See follow_swap.
template <class State>
struct Repelling {
  Member member;
  State state;
  uint64_t choice;
  int64_t node, begin, degree, target, place, before, point;
};

template <class Sink>
__global__ void repelling_kernel(WalkGraph<int64_t> graph, GrfLaws laws, const int64_t* __restrict__ start,
                                 int64_t num_starts, Sink sink, Repelling<typename Sink::State>* scratch,
                                 long long* flag) {
  const int64_t warp = (blockIdx.x * int64_t(kThreads) + threadIdx.x) / kWarp;
  const int64_t warps = int64_t(gridDim.x) * kThreads / kWarp, lane = threadIdx.x % kWarp, count = laws.num_walks;
  Repelling<typename Sink::State>* walks = scratch + warp * count;
  for (int64_t s = warp; s < num_starts; s += warps) {
    const int64_t from = start[s];
    const bool inside = uint64_t(from) < uint64_t(graph.num_nodes);
    if (!inside && lane == 0) note_fault(flag, kSrcIndex, s);
    for (int64_t i = lane; i < count; i += kWarp) {
      walks[i].state = sink.begin(s * count + i, s, inside ? from : 0);
      walks[i].node = inside ? from : -1;
      if (inside) walks[i].member = member_of(laws, s, i, from);
    }
    for (int64_t step = 0; step < laws.max_length; ++step) {
      const uint64_t halt_below = halt_of(laws, step);
      bool any = false;
      for (int64_t i = lane; i < count; i += kWarp) {
        auto& own = walks[i];
        Row row;
        if (own.node < 0) continue;
        if (!goes_on(graph, laws, own.member, own.node, step, halt_below, own.choice, row, flag)) {
          own.node = -1;
          continue;
        }
        own.begin = row.begin;
        own.degree = row.degree;
        any = true;
      }
      __syncwarp();
      if (!__any_sync(kAll, any)) break;
      for (int64_t i = lane; i < count; i += kWarp) {
        auto& own = walks[i];
        if (own.node < 0) continue;
        int64_t first = -1, size = 0, place = 0, before = -1;
        for (int64_t j = 0; j < count; ++j) {
          if (walks[j].node != own.node) continue;
          if (first < 0) first = j;
          if (j < i) ++place, before = j;
          ++size;
        }
        if (laws.units) {
          own.point = int64_t(systematic_point(walks[first].choice >> 32, place, size));
        } else {
          own.place = place % own.degree;
          own.before = before;
          own.target = own.place + below(own.choice, own.degree - own.place);
        }
      }
      __syncwarp();
      for (int64_t i = lane; i < count; i += kWarp) {
        auto& own = walks[i];
        if (own.node < 0) continue;
        int64_t edge;
        if (laws.units) {
          edge = edge_at(laws.units, own.begin, own.degree, uint64_t(own.point));
        } else {
          int64_t slot = own.target, at = i;
          for (int64_t other = own.place - 1; other >= 0; --other) {
            at = walks[at].before;
            slot = follow_swap(slot, walks[at].target, other);
          }
          edge = own.begin + slot;
        }
        own.node = target_of(graph, edge, flag);
        if (own.node >= 0) sink.step(own.state, {edge, own.node, own.begin, own.degree, halt_below});
      }
      __syncwarp();
    }
    for (int64_t i = lane; i < count; i += kWarp) sink.end(walks[i].state);
    __syncwarp();
  }
}

// Sums ---------------------------------------------------------------------------------------------------------------
__global__ void begins_kernel(const uint64_t* __restrict__ keys, int64_t count, int64_t* __restrict__ slots) {
  for (int64_t i = blockIdx.x * int64_t(kThreads) + threadIdx.x; i < count; i += int64_t(gridDim.x) * kThreads)
    slots[i] = i == 0 || keys[i] != keys[i - 1];
}
// slots: how many different keys there are up to each.
template <class T>
__global__ void sum_kernel(const uint64_t* __restrict__ keys, const T* __restrict__ loads,
                           const int64_t* __restrict__ slots, int64_t count, int64_t num_nodes, int64_t num_lengths,
                           T walks, int64_t* __restrict__ col, int32_t* __restrict__ length, T* __restrict__ value) {
  for (int64_t i = blockIdx.x * int64_t(kThreads) + threadIdx.x; i < count; i += int64_t(gridDim.x) * kThreads) {
    if (i > 0 && keys[i] == keys[i - 1]) continue;
    T sum = walks;  // all are at their start at first
    if (keys[i] % uint64_t(num_lengths) != 0) {
      sum = loads[i];
      for (int64_t j = i + 1; j < count && keys[j] == keys[i]; ++j) sum += loads[j];
    }
    const int64_t slot = slots[i] - 1;
    col[slot] = int64_t(keys[i] / uint64_t(num_lengths) % uint64_t(num_nodes));
    length[slot] = int32_t(keys[i] % uint64_t(num_lengths));
    value[slot] = sum / walks;
  }
}
__global__ void rows_kernel(const uint64_t* __restrict__ keys, const int64_t* __restrict__ slots, int64_t count,
                            int64_t num_starts, uint64_t keys_of_start, int64_t* __restrict__ ptr) {
  for (int64_t s = blockIdx.x * int64_t(kThreads) + threadIdx.x; s <= num_starts; s += int64_t(gridDim.x) * kThreads) {
    int64_t low = 0, high = count;  // the first key of this start or a later one
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (keys[middle] < uint64_t(s) * keys_of_start)
        low = middle + 1;
      else
        high = middle;
    }
    ptr[s] = low > 0 ? slots[low - 1] : 0;
  }
}

// Launchers ----------------------------------------------------------------------------------------------------------
struct GrfArgs {
  WalkGraph<int64_t> graph;
  GrfLaws laws;
  Tensor rowptr, col, start, halt_below;
  std::optional<Tensor> node_key, walk, units;
  int64_t num_starts, num_rows;  // rows: walks
  cudaStream_t stream;
};

std::optional<Tensor> checked_index(const std::optional<Tensor>& index, const char* op, const char* name,
                                    int64_t size) {
  if (!index) return std::nullopt;
  check_index_dtype(*index, op, name);
  STD_TORCH_CHECK(index->is_cuda() && index->numel() == size, op, ": ", name, " must have ", size,
                  " entries on the GPU");
  return torch::stable::contiguous(*index);
}

GrfArgs checked(const char* op, const Tensor& rowptr, const Tensor& col, const Tensor& start,
                const std::optional<Tensor>& node_key, const std::optional<Tensor>& walk,
                const std::optional<Tensor>& units, const Tensor& halt_below, int64_t num_walks, int64_t seed,
                int64_t first_walk, int64_t max_length, int64_t flags) {
  STD_TORCH_CHECK(rowptr.is_cuda() && col.is_cuda() && start.is_cuda() && halt_below.is_cuda(), op,
                  ": all tensors must be on the GPU");
  check_index_dtype(rowptr, op, "rowptr");
  check_index_dtype(col, op, "col");
  check_index_dtype(start, op, "start");
  check_index_dtype(halt_below, op, "halt_below");
  STD_TORCH_CHECK(rowptr.numel() > 0, op, ": rowptr must not be empty");
  STD_TORCH_CHECK(halt_below.numel() > 0, op, ": halt_below must not be empty");
  STD_TORCH_CHECK(num_walks > 0 && max_length >= 0, op, ": num_walks must be positive and max_length not negative");
  STD_TORCH_CHECK(!walk || !(flags & kRepelling), op, ": walk cannot be given for repelling walks");
  const int64_t num_nodes = rowptr.numel() - 1, num_starts = start.numel();
  GrfArgs args{{},
               {},
               torch::stable::contiguous(rowptr),
               torch::stable::contiguous(col),
               torch::stable::contiguous(start),
               torch::stable::contiguous(halt_below),
               checked_index(node_key, op, "node_key", num_nodes),
               checked_index(walk, op, "walk", num_starts),
               checked_index(units, op, "units", col.numel()),
               num_starts,
               num_starts * (walk ? 1 : num_walks),
               current_stream(start)};
  args.graph = {index_data(args.rowptr), index_data(args.col), num_nodes, col.numel()};
  const auto data = [](const std::optional<Tensor>& t) { return t ? index_data(*t) : nullptr; };
  args.laws = {uint64_t(seed),  index_data(args.halt_below), data(args.units),     data(args.node_key),
               data(args.walk), halt_below.numel(),          num_walks,            walk ? 1 : num_walks,
               first_walk,      max_length,                  flags};
  return args;
}

template <class Sink>
void walk_all(const GrfArgs& args, const Sink& sink) {
  if (args.num_rows == 0) return;
  long long* flag = fault_flag(args.start.get_device_index());
  if (!(args.laws.flags & kRepelling)) {
    independent_kernel<<<grid_of(args.num_rows), kThreads, 0, args.stream>>>(
        args.graph, args.laws, index_data(args.start), args.num_starts, sink, flag);
  } else {
    using Walk = Repelling<typename Sink::State>;
    const int64_t per_block = args.laws.num_walks * int64_t(sizeof(Walk)) * (kThreads / kWarp);
    const int64_t blocks = std::clamp<int64_t>(std::min<int64_t>(kScratchBytes / per_block, 1024), 1,
                                               (args.num_starts + kThreads / kWarp - 1) / (kThreads / kWarp));
    Tensor scratch = torch::stable::new_empty(args.start, {blocks * per_block}, ScalarType::Byte);
    repelling_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, args.stream>>>(
        args.graph, args.laws, index_data(args.start), args.num_starts, sink,
        static_cast<Walk*>(scratch.mutable_data_ptr()), flag);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void running_sums(const Tensor& like, int64_t* numbers, int64_t count, cudaStream_t stream) {
  size_t bytes = 0;
  STD_CUDA_CHECK(cub::DeviceScan::InclusiveSum(nullptr, bytes, numbers, numbers, count, stream));
  Tensor temporary = torch::stable::new_empty(like, {std::max<int64_t>(1, int64_t(bytes))}, ScalarType::Byte);
  STD_CUDA_CHECK(cub::DeviceScan::InclusiveSum(temporary.mutable_data_ptr(), bytes, numbers, numbers, count, stream));
}

int64_t read_back(const int64_t* number, cudaStream_t stream) {
  int64_t value = 0;
  STD_CUDA_CHECK(cudaMemcpyAsync(&value, number, sizeof(value), cudaMemcpyDeviceToHost, stream));
  STD_CUDA_CHECK(cudaStreamSynchronize(stream));
  return value;
}

// Where the nodes of each walk begin, [walks + 1], how many there are, and the most of one walk.
struct Sizes {
  Tensor ptr;
  int64_t total, longest;
};
Sizes count_all(const GrfArgs& args) {
  Tensor ptr = torch::stable::new_empty(args.start, {args.num_rows + 1});
  Tensor longest = torch::stable::new_empty(args.start, {1});
  int64_t* data = write<int64_t>(ptr);
  STD_CUDA_CHECK(cudaMemsetAsync(data, 0, sizeof(int64_t), args.stream));
  STD_CUDA_CHECK(cudaMemsetAsync(write<int64_t>(longest), 0, sizeof(int64_t), args.stream));
  walk_all(args, Count{data + 1, reinterpret_cast<unsigned long long*>(write<int64_t>(longest))});
  if (args.num_rows > 0) running_sums(args.start, data + 1, args.num_rows, args.stream);
  return {ptr, read_back(data + args.num_rows, args.stream), read_back(index_data(longest), args.stream)};
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> deposits(const GrfArgs& args, const Tensor& weight) {
  const Sizes sizes = count_all(args);
  const int64_t total = sizes.total, num_lengths = std::max<int64_t>(1, sizes.longest);
  const int64_t num_nodes = std::max<int64_t>(1, args.graph.num_nodes);  // starts outside are refused later
  const double keys_needed = double(args.num_starts) * double(num_nodes) * double(num_lengths);
  STD_TORCH_CHECK(keys_needed < 9e18,
                  "grf_walks: starts x nodes x lengths exceed 2^63: give fewer start nodes at a time");
  Tensor ptr = torch::stable::new_empty(args.start, {args.num_starts + 1});
  if (total == 0) {
    STD_CUDA_CHECK(cudaMemsetAsync(write<int64_t>(ptr), 0, sizeof(int64_t) * (args.num_starts + 1), args.stream));
    return {ptr, torch::stable::new_empty(args.start, {0}), torch::stable::new_empty(args.start, {0}, ScalarType::Int),
            torch::stable::new_empty(weight, {0})};
  }
  Tensor keys = torch::stable::new_empty(args.start, {2 * total});
  Tensor loads = torch::stable::new_empty(weight, {2 * total});
  uint64_t *key = reinterpret_cast<uint64_t*>(write<int64_t>(keys)), *sorted_key = key + total;
  T *load = write<T>(loads), *sorted_load = load + total;
  walk_all(args, Load<T>{index_data(sizes.ptr), read<T>(weight), args.laws.units, num_nodes, num_lengths, key, load});
  {
    int bits = 1;
    while (bits < 63 && uint64_t(keys_needed) >> bits) ++bits;
    size_t bytes = 0;
    const auto pass = [&](void* temporary) {
      STD_CUDA_CHECK(cub::DeviceRadixSort::SortPairs(temporary, bytes, key, sorted_key, load, sorted_load, total, 0,
                                                     bits, args.stream));
    };
    pass(nullptr);  // tells the size
    Tensor temporary = torch::stable::new_empty(args.start, {std::max<int64_t>(1, int64_t(bytes))}, ScalarType::Byte);
    pass(temporary.mutable_data_ptr());
  }
  int64_t* slots = reinterpret_cast<int64_t*>(key);  // which are done with
  begins_kernel<<<grid_of(total), kThreads, 0, args.stream>>>(sorted_key, total, slots);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  running_sums(args.start, slots, total, args.stream);
  const int64_t different = read_back(slots + total - 1, args.stream);
  Tensor col = torch::stable::new_empty(args.start, {different});
  Tensor length = torch::stable::new_empty(args.start, {different}, ScalarType::Int);
  Tensor value = torch::stable::new_empty(weight, {different});
  sum_kernel<T><<<grid_of(total), kThreads, 0, args.stream>>>(
      sorted_key, sorted_load, slots, total, num_nodes, num_lengths, T(args.laws.num_walks), write<int64_t>(col),
      write<int32_t>(length), write<T>(value));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  rows_kernel<<<grid_of(args.num_starts + 1), kThreads, 0, args.stream>>>(
      sorted_key, slots, total, args.num_starts, uint64_t(num_nodes) * uint64_t(num_lengths), write<int64_t>(ptr));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {ptr, col, length, value};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> grf_walks_cuda(
    const Tensor& rowptr, const Tensor& col, const Tensor& start, const Tensor& weight_,
    const std::optional<Tensor>& node_key, const std::optional<Tensor>& units, const Tensor& halt_below,
    int64_t num_walks, int64_t seed, int64_t first_walk, int64_t max_length, int64_t flags) {
  const DeviceGuard guard(start.get_device_index());
  const GrfArgs args = checked("grf_walks", rowptr, col, start, node_key, std::nullopt, units, halt_below, num_walks,
                               seed, first_walk, max_length, flags);
  STD_TORCH_CHECK(weight_.is_cuda() && weight_.dim() == 1 && weight_.numel() == col.numel(),
                  "grf_walks: weight must have one entry per edge, on the GPU");
  const Tensor weight = torch::stable::contiguous(weight_);
  if (weight.scalar_type() == ScalarType::Float) return deposits<float>(args, weight);
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Double, "grf_walks: weight must be float32 or float64");
  return deposits<double>(args, weight);
}

std::tuple<Tensor, Tensor, Tensor> grf_paths_cuda(const Tensor& rowptr, const Tensor& col, const Tensor& start,
                                                  const std::optional<Tensor>& node_key,
                                                  const std::optional<Tensor>& walk,
                                                  const std::optional<Tensor>& units, const Tensor& halt_below,
                                                  int64_t num_walks, int64_t seed, int64_t first_walk,
                                                  int64_t max_length, int64_t flags) {
  const DeviceGuard guard(start.get_device_index());
  const GrfArgs args = checked("grf_paths", rowptr, col, start, node_key, walk, units, halt_below, num_walks, seed,
                               first_walk, max_length, flags);
  const Sizes sizes = count_all(args);
  Tensor node = torch::stable::new_empty(args.start, {sizes.total});
  Tensor edge = torch::stable::new_empty(args.start, {sizes.total});
  walk_all(args, Path{index_data(sizes.ptr), write<int64_t>(node), write<int64_t>(edge)});
  return {sizes.ptr, node, edge};
}

}  // namespace
}  // namespace geo

STABLE_TORCH_LIBRARY_IMPL(geo, CUDA, m) {
  m.impl("grf_walks", TORCH_BOX(&geo::grf_walks_cuda));
  m.impl("grf_paths", TORCH_BOX(&geo::grf_paths_cuda));
}
