// Leaf kernels of random walks, compiled once per SIMD level (see vec.h).
//
// Many walks go in lockstep, so that their cache misses overlap and their draws fill vectors: a step draws for all of them,
// then finds each one's edge, then follows it, and asks for the memory that the next of these needs.
#include "../random_walk_table.h"

#include "random_lane.h"

namespace geo {
namespace GEO_SIMD_NAMESPACE {
namespace {

constexpr int kGroup = 64;  // walks
constexpr int kLanes = vec<uint64_t>::lanes;

struct Group {
  alignas(64) uint64_t key[kGroup], walk[kGroup], choice[kGroup], halt[kGroup];
  int64_t at[kGroup], before[kGroup], edge[kGroup];  // at: -1 where the walk has ended
};

GEO_NOINLINE void draw_all(Group& group, int count, uint64_t seed, int64_t step) {
  for (int i = 0; i < count; i += kLanes) {
    vbits64 c0 = lanes(group.key + i), c1 = lanes(group.walk + i), c2 = vbits64{} + uint64_t(step), c3 = vbits64{};
    philox<VectorLane>(c0, c1, c2, c3, seed);
    lanes(group.choice + i) = choice_bits<VectorLane>(c0, c1);
    lanes(group.halt + i) = c2;
  }
}

GEO_INLINE void note(Outcome& outcome, int fault, int64_t position) {
  if (outcome.fault >= 0 && (outcome.fault < fault || (outcome.fault == fault && outcome.position <= position))) return;
  outcome = {fault, position};
}

template <class I, class Choice, class Halting>
GEO_NOINLINE Outcome walk(const WalkJob& job, int64_t first, int64_t last) {
  const WalkGraph<I> graph{static_cast<const I*>(job.ptr), static_cast<const I*>(job.col), job.num_nodes, job.num_edges};
  const int64_t length = job.walk_length;
  Outcome outcome{-1, 0};
  Group group{};
  int64_t s = first / job.num_walks, k = first % job.num_walks;
  for (int64_t base = first; base < last; base += kGroup) {
    const int count = last - base < kGroup ? int(last - base) : kGroup;
    int64_t* nodes = job.nodes + base * (length + 1);
    for (int i = 0; i < count; ++i) {
      int64_t node = job.start[s];
      group.key[i] = uint64_t(job.node_key ? job.node_key[s] : node);
      group.walk[i] = uint64_t(job.first_walk + k);
      if (uint64_t(node) >= uint64_t(graph.num_nodes)) {
        note(outcome, kBadStart, s);
        node = 0;  // whatever: with a fault there is no result
      }
      group.at[i] = nodes[i * (length + 1)] = node;
      group.before[i] = -1;
      if (++k == job.num_walks) ++s, k = 0;
    }
    if (graph.num_nodes == 0) continue;
    for (int i = 0; i < count; ++i) __builtin_prefetch(graph.ptr + group.at[i]);
    for (int64_t step = 0; step < length; ++step) {
      draw_all(group, count, job.laws.seed, step);
      for (int i = 0; i < count; ++i) {
        const int64_t at = group.at[i];
        int64_t edge = -1;
        if (Halting::kHalts && (at < 0 || Halting::ends(job.laws, uint32_t(group.halt[i])))) {
          group.at[i] = -1;
        } else {
          const Row row = row_of(graph, at);
          if (row.degree > 0) {
            const Walker walker{group.key[i], group.walk[i], uint64_t(step), at, group.before[i]};
            edge = Choice::edge(graph, job.laws, walker, row.begin, row.degree, group.choice[i]);
            __builtin_prefetch(graph.col + edge);
          } else if (row.bad >= 0) {
            note(outcome, kBadRowptr, row.bad);
          }
        }
        group.edge[i] = edge;
      }
      int64_t* to = nodes + step + 1;
      for (int i = 0; i < count; ++i, to += length + 1) {
        const int64_t edge = group.edge[i];
        if (edge >= 0) {
          const int64_t next = int64_t(graph.col[edge]);
          if (uint64_t(next) >= uint64_t(graph.num_nodes)) {
            note(outcome, kBadCol, edge);
          } else {
            __builtin_prefetch(graph.ptr + next);
            if (Choice::kLooksBack) group.before[i] = group.at[i];
            group.at[i] = next;
          }
        }
        *to = group.at[i];
      }
      if (job.edges)
        for (int i = 0; i < count; ++i) job.edges[(base + i) * length + step] = group.edge[i];
    }
  }
  return outcome;
}

}  // namespace

#define GEO_WALKS(I)                                                                              \
  {                                                                                               \
    {walk<I, UniformChoice, NeverHalt>, walk<I, UniformChoice, HaltBeforeStep>}, {                \
      walk<I, NonBacktrackingChoice, NeverHalt>, walk<I, NonBacktrackingChoice, HaltBeforeStep> \
    }                                                                                             \
  }
const WalkTable random_walk = {{GEO_WALKS(int64_t), GEO_WALKS(uint32_t)}};

}  // namespace GEO_SIMD_NAMESPACE
}  // namespace geo
