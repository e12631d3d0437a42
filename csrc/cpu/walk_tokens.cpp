// CPU kernels of walk_tokens and walk_adjacency. Rows of the graph are sorted by node; nothing else in it is trusted.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "parallel.h"

namespace geo {
namespace {

enum TokenFault : int { kBadRoot = 0, kBadWalk = 1, kBadLength = 2 };

struct Graph {
  const int64_t* ptr;
  const int64_t* col;
  int64_t num_nodes, num_edges;
};

Graph checked_graph(const char* op, const Tensor& rowptr, const Tensor& col) {
  check_index_dtype(rowptr, op, "rowptr");
  check_index_dtype(col, op, "col");
  STD_TORCH_CHECK(rowptr.numel() > 0, op, ": rowptr must not be empty");
  const Graph graph{index_data(rowptr), index_data(col), rowptr.numel() - 1, col.numel()};
  STD_TORCH_CHECK(graph.num_nodes < UINT32_MAX && graph.num_edges < UINT32_MAX, op,
                  ": not implemented for graphs of 2^32 nodes or edges");
  check_ptr(op, graph.ptr, graph.num_nodes, graph.num_edges);
  return graph;
}

// What the tokens of a block of roots add to the result.
struct Part {
  std::vector<uint32_t> nodes, edges, sources, targets;
};

// The members of a token, and where each stands in it: the root first, the others ascending.
class Members {
 public:
  std::vector<uint32_t> ids;  // ascending, the root among them

  void finish(uint32_t root) {
    std::sort(ids.begin(), ids.end());
    ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
    root_ = std::lower_bound(ids.begin(), ids.end(), root) - ids.begin();
    for (uint32_t id : ids) filter_[id / 64 % kWords] |= uint64_t(1) << (id % 64);
  }
  void clear() {
    for (uint32_t id : ids) filter_[id / 64 % kWords] = 0;
    ids.clear();
  }
  int64_t size() const { return int64_t(ids.size()); }
  uint32_t at(int64_t place) const { return ids[place == 0 ? root_ : place - (place <= root_)]; }
  uint32_t place(int64_t i) const { return uint32_t(i == root_ ? 0 : i + (i < root_)); }
  // Its place in `ids`, or -1. Most nodes are no members, which the filter, a few bits in the nearest cache, mostly tells.
  int64_t find(uint64_t id) const {
    if (!(filter_[id / 64 % kWords] >> (id % 64) & 1)) return -1;
    const auto i = std::lower_bound(ids.begin(), ids.end(), id);
    return i != ids.end() && *i == id ? i - ids.begin() : -1;
  }

 private:
  static constexpr uint64_t kWords = 64;
  int64_t root_ = 0;
  uint64_t filter_[kWords] = {};
};

// All edges between members: of each member's row what leads to a member. A row that is much longer than the token, a
// hub's, is searched for each member.
int64_t add_edges(const Graph& graph, const Members& members, Part& part) {
  const int64_t size = members.size();
  const size_t before = part.edges.size();
  for (int64_t source = 0; source < size; ++source) {
    const int64_t node = members.at(source), begin = graph.ptr[node], end = graph.ptr[node + 1];
    const auto add = [&](int64_t edge, int64_t i) {
      part.edges.push_back(uint32_t(edge));
      part.sources.push_back(uint32_t(source));
      part.targets.push_back(members.place(i));
    };
    if (end - begin <= 16 * size) {
      for (int64_t edge = begin; edge < end; ++edge)
        if (const int64_t i = members.find(uint64_t(graph.col[edge])); i >= 0) add(edge, i);
    } else {
      const int64_t* from = graph.col + begin;
      for (int64_t i = 0; i < size; ++i) {
        from = std::lower_bound(from, graph.col + end, int64_t(members.ids[i]));
        for (; from < graph.col + end && *from == int64_t(members.ids[i]); ++from) add(from - graph.col, i);
      }
    }
  }
  return int64_t(part.edges.size() - before);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> walk_tokens_cpu(const Tensor& rowptr_, const Tensor& col_,
                                                                   const Tensor& root_, const Tensor& walks_,
                                                                   const Tensor& lengths_, int64_t num_root_tokens,
                                                                   bool induced) {
  constexpr const char* op = "walk_tokens";
  const Tensor rowptr = made_contiguous(rowptr_), col = made_contiguous(col_), root = made_contiguous(root_);
  const Tensor walks = made_contiguous(walks_), lengths = made_contiguous(lengths_);
  const Graph graph = checked_graph(op, rowptr, col);
  check_index_dtype(root, op, "root");
  check_index_dtype(lengths, op, "lengths");
  STD_TORCH_CHECK(walks.dim() == 4 && walks.scalar_type() == ScalarType::Long, op, ": walks must be int64 with four axes");
  const int64_t S = walks.size(0), T = walks.size(1), M = walks.size(2), W = walks.size(3);
  STD_TORCH_CHECK(root.numel() == S && lengths.numel() == T && num_root_tokens >= 0, op,
                  ": root must have an entry per row of walks, lengths one per token");
  const int64_t tokens = T + num_root_tokens;
  const int64_t* roots = index_data(root);
  const int64_t* length = index_data(lengths);
  const int64_t* visited = index_data(walks);
  for (int64_t t = 0; t < T; ++t)
    if (length[t] < 0 || length[t] >= W) raise_out_of_range(op, "lengths", t, length[t], 0, W - 1);

  Tensor sizes = torch::stable::new_empty(root, {S * tokens}), edge_sizes = torch::stable::new_empty(root, {S * tokens});
  int64_t* const size = write<int64_t>(sizes);
  int64_t* const edge_size = write<int64_t>(edge_sizes);
  constexpr int64_t kRoots = 32;
  const int64_t blocks = (S + kRoots - 1) / kRoots;
  std::vector<Part> parts(blocks);
  Faults faults;
  parallel_blocks(blocks, 1, [&](int64_t, int64_t first, int64_t last) {
    Members members;
    for (int64_t b = first; b < last; ++b) {
      Part& part = parts[b];
      for (int64_t s = b * kRoots; s < std::min(S, (b + 1) * kRoots); ++s) {
        if (uint64_t(roots[s]) >= uint64_t(graph.num_nodes)) {
          faults.add(kBadRoot, s);
          continue;
        }
        for (int64_t t = 0; t < tokens; ++t) {
          members.clear();
          members.ids.push_back(uint32_t(roots[s]));
          for (int64_t k = 0; k < (t < T ? M : 0); ++k) {
            const int64_t at = ((s * T + t) * M + k) * W;
            for (int64_t i = at; i <= at + length[t]; ++i) {
              const int64_t node = visited[i];
              if (uint64_t(node) < uint64_t(graph.num_nodes))
                members.ids.push_back(uint32_t(node));
              else if (node != -1)
                faults.add(kBadWalk, i);
            }
          }
          members.finish(uint32_t(roots[s]));
          for (int64_t place = 0; place < members.size(); ++place) part.nodes.push_back(members.at(place));
          size[s * tokens + t] = members.size();
          edge_size[s * tokens + t] = induced ? add_edges(graph, members, part) : 0;
        }
      }
    }
  });
  const Found found = faults.first();
  const int64_t at = found.position;
  if (found.fault == kBadRoot) raise_out_of_range(op, "root", at, roots[at], 0, graph.num_nodes - 1);
  if (found.fault == kBadWalk) raise_out_of_range(op, "walks", at, visited[at], -1, graph.num_nodes - 1);

  std::vector<int64_t> node_at(blocks + 1), edge_at(blocks + 1);
  for (int64_t b = 0; b < blocks; ++b) {
    node_at[b + 1] = node_at[b] + int64_t(parts[b].nodes.size());
    edge_at[b + 1] = edge_at[b] + int64_t(parts[b].edges.size());
  }
  const int64_t num_rows = node_at[blocks], num_edges = edge_at[blocks];
  Tensor nodes = torch::stable::new_empty(root, {num_rows}), edges = torch::stable::new_empty(root, {num_edges});
  Tensor sub = torch::stable::new_empty(root, {2, num_edges});
  int64_t *node_out = write<int64_t>(nodes), *edge_out = write<int64_t>(edges), *sub_out = write<int64_t>(sub);
  parallel_blocks(blocks, 1, [&](int64_t, int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      Part& part = parts[b];
      std::copy(part.nodes.begin(), part.nodes.end(), node_out + node_at[b]);
      std::copy(part.edges.begin(), part.edges.end(), edge_out + edge_at[b]);
      int64_t row = node_at[b], e = 0;
      for (int64_t t = b * kRoots * tokens; t < std::min(S, (b + 1) * kRoots) * tokens; row += size[t++])
        for (int64_t last_edge = e + edge_size[t]; e < last_edge; ++e) {
          sub_out[edge_at[b] + e] = row + part.sources[e];
          sub_out[num_edges + edge_at[b] + e] = row + part.targets[e];
        }
      part = Part{};
    }
  });
  return {nodes, sizes, edges, sub, edge_sizes};
}

// Whether an edge leads from one node to the other, by the row's order.
bool has_edge(const Graph& graph, int64_t from, int64_t to) {
  const int64_t* begin = graph.col + graph.ptr[from];
  const int64_t* end = graph.col + graph.ptr[from + 1];
  if (end - begin > 16) return std::binary_search(begin, end, to);
  bool found = false;
  for (; begin < end; ++begin) found |= *begin == to;
  return found;
}

Tensor walk_adjacency_cpu(const Tensor& rowptr_, const Tensor& col_, const Tensor& walks_, int64_t window) {
  constexpr const char* op = "walk_adjacency";
  const Tensor rowptr = made_contiguous(rowptr_), col = made_contiguous(col_), walks = made_contiguous(walks_);
  const Graph graph = checked_graph(op, rowptr, col);
  STD_TORCH_CHECK(walks.dim() == 2 && walks.scalar_type() == ScalarType::Long, op, ": walks must be int64 with two axes");
  STD_TORCH_CHECK(window >= 1, op, ": window must be positive");
  const int64_t length = walks.size(1), bits = window - 1;
  Tensor out = torch::stable::new_empty(walks, {walks.size(0), length, bits}, ScalarType::Bool);
  const int64_t* visited = index_data(walks);
  bool* const bit = write<bool>(out);
  Faults faults;
  parallel_blocks(walks.size(0), block_of(length * window * 8), [&](int64_t, int64_t first, int64_t last) {
    for (int64_t w = first; w < last; ++w) {
      const int64_t* walk = visited + w * length;
      bool* to = bit + w * length * bits;
      for (int64_t t = 0; t < length; ++t) {
        if (walk[t] != -1 && uint64_t(walk[t]) >= uint64_t(graph.num_nodes)) return faults.add(kBadWalk, w * length + t);
        for (int64_t k = 2; k <= window; ++k) {
          bool found = false;
          if (k <= t && walk[t] >= 0 && walk[t - k] >= 0)
            found = has_edge(graph, walk[t - k], walk[t]) || has_edge(graph, walk[t], walk[t - k]);
          *to++ = found;
        }
      }
    }
  });
  const Found found = faults.first();
  const int64_t at = found.position;
  if (found.fault == kBadWalk) raise_out_of_range(op, "walks", at, visited[at], -1, graph.num_nodes - 1);
  return out;
}

}  // namespace
}  // namespace geo

STABLE_TORCH_LIBRARY_IMPL(geo, CPU, m) {
  m.impl("walk_tokens", TORCH_BOX(&geo::walk_tokens_cpu));
  m.impl("walk_adjacency", TORCH_BOX(&geo::walk_adjacency_cpu));
}
