#pragma once
// One step of a random walk, put together from two laws: which edge is taken, and where the walk ends.
#include "random.h"

namespace geo {

// Rows of edges: those of node v are ptr[v]..ptr[v + 1] - 1, and edge e leads to col[e]. Nothing in them is trusted.
template <class I>
struct WalkGraph {
  const I* ptr;
  const I* col;
  int64_t num_nodes, num_edges;
};

struct WalkLaws {
  uint64_t seed;
  uint64_t halt_below;  // of 2^32
};

// The walk whose next step is to be drawn.
struct Walker {
  uint64_t node_key, walk, step;
  int64_t node, previous;  // previous: -1 before the first step
};

enum WalkFault : int { kBadStart = 0, kBadRowptr = 1, kBadCol = 2 };  // what stands at a position is out of range

// Halting laws -------------------------------------------------------------------------------------------------------
struct NeverHalt {
  static constexpr bool kHalts = false;
  GEO_HD_INLINE bool ends(const WalkLaws&, uint32_t) { return false; }
};
struct HaltBeforeStep {  // with the same probability each time: lengths are geometric
  static constexpr bool kHalts = true;
  GEO_HD_INLINE bool ends(const WalkLaws& laws, uint32_t word) { return word < laws.halt_below; }
};

// Choice laws: the edge that is taken out of the row begin..begin + degree - 1, degree > 0 ----------------------------
struct UniformChoice {
  static constexpr bool kLooksBack = false;
  template <class I>
  GEO_HD_INLINE int64_t edge(const WalkGraph<I>&, const WalkLaws&, const Walker&, int64_t begin, int64_t degree,
                             uint64_t bits) {
    return begin + below(bits, degree);
  }
};

// Uniform among the edges that do not lead back to the previous node; among all where each of them does. Draws that lead
// back are drawn anew a few times, which is all that happens in a row with few such edges, however long; then those edges
// are counted.
constexpr int kRedraws = 8;
template <class I>
GEO_HD int64_t redraw_edge(const WalkGraph<I>& graph, const WalkLaws& laws, const Walker& at, int64_t begin, int64_t degree,
                           int64_t edge) {
  const I* row = graph.col + begin;
  const I back = I(at.previous);
  for (int kind = 1; kind < kRedraws; ++kind) {
    edge = begin + below(draw(laws.seed, at.node_key, at.walk, at.step, kind).choice, degree);
    if (graph.col[edge] != back) return edge;
  }
  int64_t others = 0;
  for (int64_t i = 0; i < degree; ++i) others += row[i] != back;
  if (others == 0) return edge;
  int64_t skip = below(draw(laws.seed, at.node_key, at.walk, at.step, kRedraws).choice, others);
  int64_t i = 0;
  while (row[i] == back || skip-- > 0) ++i;
  return begin + i;
}
struct NonBacktrackingChoice {
  static constexpr bool kLooksBack = true;
  template <class I>
  GEO_HD_INLINE int64_t edge(const WalkGraph<I>& graph, const WalkLaws& laws, const Walker& at, int64_t begin,
                             int64_t degree, uint64_t bits) {
    const int64_t edge = begin + below(bits, degree);
    if (degree == 1 || at.previous < 0 || graph.col[edge] != I(at.previous)) return edge;
    return redraw_edge(graph, laws, at, begin, degree, edge);
  }
};

// The step itself -----------------------------------------------------------------------------------------------------
// The edges of a node below num_nodes: degree 0 where rowptr is out of order, and then its bad position, else -1.
struct Row {
  int64_t begin, degree, bad;
};
template <class I>
GEO_HD Row row_of(const WalkGraph<I>& graph, int64_t node) {
  const uint64_t begin = uint64_t(graph.ptr[node]), end = uint64_t(graph.ptr[node + 1]);
  if (begin <= end && end <= uint64_t(graph.num_edges)) return {int64_t(begin), int64_t(end - begin), -1};
  return {0, 0, begin > uint64_t(graph.num_edges) ? node : node + 1};
}

}  // namespace geo
