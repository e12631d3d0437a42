// CPU launcher of random_walk.
#include <torch/csrc/stable/library.h>

#include <memory>
#include <optional>

#include "parallel.h"
#include "random_walk_table.h"

namespace geo {
namespace {

const WalkTable& table() { return choose_table(GEO_TABLES(random_walk)); }

// Half the bytes to read at random. What is not below `size` becomes the greatest number, which is not either.
std::unique_ptr<uint32_t[]> packed(const int64_t* from, int64_t count, int64_t size) {
  std::unique_ptr<uint32_t[]> to(new uint32_t[count]);
  advise_huge_pages(to.get(), count * int64_t(sizeof(uint32_t)));
  parallel_blocks(count, int64_t(1) << 16, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) to[i] = uint64_t(from[i]) < uint64_t(size) ? uint32_t(from[i]) : UINT32_MAX;
  });
  return to;
}

std::tuple<Tensor, Tensor> random_walk_cpu(const Tensor& rowptr_, const Tensor& col_, const Tensor& start_,
                                           const std::optional<Tensor>& node_key_, int64_t walk_length,
                                           int64_t num_walks, int64_t seed, int64_t first_walk, bool non_backtracking,
                                           double p_halt, bool return_edges) {
  constexpr const char* op = "random_walk";
  check_index_dtype(rowptr_, op, "rowptr");
  check_index_dtype(col_, op, "col");
  check_index_dtype(start_, op, "start");
  STD_TORCH_CHECK(rowptr_.numel() > 0, op, ": rowptr must not be empty");
  STD_TORCH_CHECK(walk_length >= 0 && num_walks >= 0, op, ": walk_length and num_walks must not be negative");
  const Tensor rowptr = made_contiguous(rowptr_), col = made_contiguous(col_), start = made_contiguous(start_);
  const Tensor node_key = node_key_ ? made_contiguous(*node_key_) : start;
  check_index_dtype(node_key, op, "node_key");
  STD_TORCH_CHECK(node_key.numel() == start.numel(), op, ": node_key must have one entry per start node");
  const int64_t num_starts = start.numel(), walks = num_starts * num_walks;
  Tensor nodes = torch::stable::new_empty(start, {num_starts, num_walks, walk_length + 1});
  Tensor edges = return_edges ? torch::stable::new_empty(start, {num_starts, num_walks, walk_length})
                              : torch::stable::new_empty(start, {0});
  WalkJob job{};
  job.num_nodes = rowptr.numel() - 1;
  job.num_edges = col.numel();
  job.laws = {uint64_t(seed), uint64_t(p_halt * 4294967296.0)};
  job.start = index_data(start);
  job.node_key = node_key_ ? index_data(node_key) : nullptr;
  job.num_walks = num_walks;
  job.walk_length = walk_length;
  job.first_walk = first_walk;
  job.nodes = write<int64_t>(nodes);
  job.edges = return_edges ? write<int64_t>(edges) : nullptr;
  advise_huge_pages(job.nodes, nodes.numel() * int64_t(sizeof(int64_t)));
  if (return_edges) advise_huge_pages(job.edges, edges.numel() * int64_t(sizeof(int64_t)));

  // packing reads each edge once, in order: dearer than a step that it makes cheaper, and steps are many
  const bool pack = job.num_edges < UINT32_MAX && job.num_nodes < UINT32_MAX &&
                    walks * walk_length / 2 >= job.num_edges + job.num_nodes;
  std::unique_ptr<uint32_t[]> packed_ptr, packed_col;
  if (pack) {
    packed_ptr = packed(index_data(rowptr), job.num_nodes + 1, job.num_edges + 1);
    packed_col = packed(index_data(col), job.num_edges, job.num_nodes);
  }
  job.ptr = pack ? static_cast<const void*>(packed_ptr.get()) : index_data(rowptr);
  job.col = pack ? static_cast<const void*>(packed_col.get()) : index_data(col);

  const auto leaf = table().walk[pack][non_backtracking][job.laws.halt_below > 0];
  const int64_t block = std::max<int64_t>(64, (int64_t(1) << 15) / (walk_length + 1) / 64 * 64);
  Faults faults;
  parallel_blocks(walks, block, [&](int64_t, int64_t begin, int64_t end) {
    const Outcome outcome = leaf(job, begin, end);
    faults.add(outcome.fault, outcome.position);
  });
  const Found found = faults.first();
  const int64_t at = found.position;
  if (found.fault == kBadStart) raise_out_of_range(op, "start", at, job.start[at], 0, job.num_nodes - 1);
  if (found.fault == kBadRowptr)
    raise_out_of_range(op, "rowptr", at, index_data(rowptr)[at], at ? index_data(rowptr)[at - 1] : 0, job.num_edges);
  if (found.fault == kBadCol) raise_out_of_range(op, "col", at, index_data(col)[at], 0, job.num_nodes - 1);
  return {nodes, edges};
}

}  // namespace
}  // namespace geo

STABLE_TORCH_LIBRARY_IMPL(geo, CPU, m) { m.impl("random_walk", TORCH_BOX(&geo::random_walk_cpu)); }
