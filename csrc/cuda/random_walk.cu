// CUDA launcher of random_walk: a thread a walk.
#include "../random_walk.h"

#include <optional>

#include "device.h"

namespace geo {
namespace {

template <class Choice, class Halting>
__global__ void walk_kernel(WalkGraph<int64_t> graph, WalkLaws laws, const int64_t* __restrict__ start,
                            const int64_t* __restrict__ node_key, int64_t walks, int64_t num_walks, int64_t length,
                            int64_t first_walk, int64_t* __restrict__ nodes, int64_t* __restrict__ edges,
                            long long* flag) {
  for (int64_t w = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; w < walks; w += int64_t(gridDim.x) * blockDim.x) {
    const int64_t s = w / num_walks;
    int64_t* to = nodes + w * (length + 1);
    Walker at{uint64_t(node_key[s]), uint64_t(first_walk + w % num_walks), 0, start[s], -1};
    if (uint64_t(at.node) >= uint64_t(graph.num_nodes)) {
      note_fault(flag, kSrcIndex, s);
      at.node = -1;
    }
    to[0] = at.node;
    for (int64_t step = 0; step < length; ++step) {
      at.step = uint64_t(step);
      int64_t edge = -1;
      if (at.node >= 0) {
        const Draw drawn = draw(laws.seed, at.node_key, at.walk, at.step, 0);
        const Row row = row_of(graph, at.node);
        if (row.bad >= 0) note_fault(flag, kPtr, row.bad);
        if (Halting::ends(laws, drawn.halt)) {
          at.node = -1;
        } else if (row.degree > 0) {
          edge = Choice::edge(graph, laws, at, row.begin, row.degree, drawn.choice);
          int64_t next = graph.col[edge];
          if (uint64_t(next) >= uint64_t(graph.num_nodes)) {
            note_fault(flag, kDstIndex, edge);
            next = -1;
          }
          at.previous = at.node;
          at.node = next;
        }
      }
      to[step + 1] = at.node;
      if (edges) edges[w * length + step] = edge;
    }
  }
}

std::tuple<Tensor, Tensor> random_walk_cuda(const Tensor& rowptr_, const Tensor& col_, const Tensor& start_,
                                            const std::optional<Tensor>& node_key_, int64_t walk_length,
                                            int64_t num_walks, int64_t seed, int64_t first_walk, bool non_backtracking,
                                            double p_halt, bool return_edges) {
  constexpr const char* op = "random_walk";
  const DeviceGuard guard(start_.get_device_index());
  STD_TORCH_CHECK(rowptr_.is_cuda() && col_.is_cuda() && start_.is_cuda() && (!node_key_ || node_key_->is_cuda()), op,
                  ": all tensors must be on the GPU");
  check_index_dtype(rowptr_, op, "rowptr");
  check_index_dtype(col_, op, "col");
  check_index_dtype(start_, op, "start");
  STD_TORCH_CHECK(rowptr_.numel() > 0, op, ": rowptr must not be empty");
  STD_TORCH_CHECK(walk_length >= 0 && num_walks >= 0, op, ": walk_length and num_walks must not be negative");
  const Tensor rowptr = torch::stable::contiguous(rowptr_), col = torch::stable::contiguous(col_);
  const Tensor start = torch::stable::contiguous(start_);
  const Tensor node_key = node_key_ ? torch::stable::contiguous(*node_key_) : start;
  check_index_dtype(node_key, op, "node_key");
  STD_TORCH_CHECK(node_key.numel() == start.numel(), op, ": node_key must have one entry per start node");
  const int64_t walks = start.numel() * num_walks;
  Tensor nodes = torch::stable::new_empty(start, {start.numel(), num_walks, walk_length + 1});
  Tensor edges = return_edges ? torch::stable::new_empty(start, {start.numel(), num_walks, walk_length})
                              : torch::stable::new_empty(start, {0});
  if (walks == 0) return {nodes, edges};
  const WalkGraph<int64_t> graph{index_data(rowptr), index_data(col), rowptr.numel() - 1, col.numel()};
  const WalkLaws laws{uint64_t(seed), uint64_t(p_halt * 4294967296.0)};
  const auto kernel = laws.halt_below ? non_backtracking ? walk_kernel<NonBacktrackingChoice, HaltBeforeStep>
                                                         : walk_kernel<UniformChoice, HaltBeforeStep>
                      : non_backtracking ? walk_kernel<NonBacktrackingChoice, NeverHalt>
                                         : walk_kernel<UniformChoice, NeverHalt>;
  const unsigned blocks = static_cast<unsigned>(std::min<int64_t>((walks + 255) / 256, int64_t(1) << 20));
  kernel<<<blocks, 256, 0, current_stream(start)>>>(graph, laws, index_data(start), index_data(node_key), walks, num_walks,
                                                    walk_length, first_walk, write<int64_t>(nodes),
                                                    return_edges ? write<int64_t>(edges) : nullptr,
                                                    fault_flag(start.get_device_index()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {nodes, edges};
}

}  // namespace
}  // namespace geo

STABLE_TORCH_LIBRARY_IMPL(geo, CUDA, m) { m.impl("random_walk", TORCH_BOX(&geo::random_walk_cuda)); }
