// Leaf kernels of the walks of graph random features, compiled once per SIMD level (see vec.h).
//
// The walks of many starts go in lockstep, so that their cache misses overlap and their draws fill vectors. Each pass
// does one thing for all of them, and asks for the memory that the next one needs.
#include "../grf_walks_table.h"

#include "random_lane.h"

namespace geo {
namespace GEO_SIMD_NAMESPACE {
namespace {

constexpr int kLanes = vec<uint64_t>::lanes;
typedef int32_t vint __attribute__((vector_size(GEO_VECTOR_BYTES)));
typedef int32_t vint_loose __attribute__((vector_size(GEO_VECTOR_BYTES), aligned(4), may_alias));
constexpr int kInts = GEO_VECTOR_BYTES / 4;

GEO_NOINLINE void note(Outcome* outcome, int fault, int64_t position) {
  if (outcome->fault >= 0 && (outcome->fault < fault || (outcome->fault == fault && outcome->position <= position)))
    return;
  *outcome = {fault, position};
}

void draw_all(const GrfBatch& batch, int64_t count, uint64_t seed, uint64_t step, bool antithetic) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const vbits64 key = lanes(batch.key + i);
    vbits64 c0 = key, c1 = lanes(batch.walk + i), c2 = vbits64{} + step, c3 = vbits64{};
    philox<VectorLane>(c0, c1, c2, c3, seed);
    lanes(batch.choice + i) = choice_bits<VectorLane>(c0, c1);
    vbits64 decider = {};
    if (antithetic) {
      decider = lanes(batch.decider + i);
      c0 = key, c1 = decider, c2 = vbits64{} + step, c3 = vbits64{};
      philox<VectorLane>(c0, c1, c2, c3, seed);
    }
    lanes(batch.halt + i) = halt_word(c2, decider);
  }
}

template <class I>
GEO_INLINE const I* column(const GrfGraph& graph, int64_t edge) {
  return reinterpret_cast<const I*>(static_cast<const char*>(graph.edges) + edge * graph.edge_bytes);
}

// No branch depends on what was drawn.
template <class I, bool kSlot>
int64_t depart(const GrfGraph& graph, const GrfBatch& batch, int64_t count, uint64_t halt_below, int64_t flags,
               Outcome* outcome) {
  const WalkGraph<I> rows{static_cast<const I*>(graph.ptr), nullptr, graph.num_nodes, graph.num_edges};
  const uint32_t *node = batch.node, *row_of_walk = batch.row;
  const uint64_t *choice = batch.choice, *halt = batch.halt;
  uint64_t *key = batch.key, *walk = batch.walk, *decider = batch.decider, *choice_of_next = batch.choice;
  uint32_t *from = batch.from, *owner = batch.owner, *row_of_next = batch.row + count;
  int64_t *begin = batch.begin, *degree = batch.degree, *edge = batch.edge;
  const bool antithetic = flags & kAntithetic, packed = sizeof(I) == 4;
  int64_t to = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Row row = row_of(rows, node[i]);
    if (row.bad >= 0) note(outcome, kBadRowptr, row.bad);
    bool goes = (halt[i] >= halt_below) & (row.degree > 0);
    if (graph.units && row.degree > 0) goes &= graph.units[row.begin + row.degree - 1] > 0;
    key[to] = key[i];
    walk[to] = walk[i];
    if (antithetic) decider[to] = decider[i];
    from[to] = uint32_t(i);
    row_of_next[to] = row_of_walk[i];
    if (!kSlot || !packed) {
      begin[to] = row.begin;
      degree[to] = row.degree;
    }
    if (kSlot) {
      edge[to] = row.begin + below(choice[i], row.degree);
      __builtin_prefetch(column<I>(graph, edge[to]));
    } else {
      owner[to] = owner[i];
      choice_of_next[to] = choice[i];
    }
    to += goes;
  }
  return to;
}

// Which walks of one start stand at one node. Returns the most that do.
int32_t group(const GrfBatch& batch, int64_t count) {
  int32_t most = 0;
  const uint64_t mask = uint64_t(batch.num_heads - 1);
  for (int64_t i = 0; i < batch.num_heads; ++i) batch.head[i] = -1;
  int64_t begin = 0;  // of the walks of this start
  for (int64_t i = 0; i < count; ++i) {
    if (batch.owner[i] != batch.owner[begin]) begin = i;
    const uint32_t node = batch.node[batch.from[i]];
    int32_t& head = batch.head[(uint64_t(node) * 0x9E3779B97F4A7C15u >> 32) & mask];
    int32_t at = head;
    while (at >= begin && batch.node[batch.from[at]] != node) at = batch.chain[at];
    const bool found = at >= begin;
    batch.before[i] = found ? at : -1;
    batch.first[i] = found ? batch.first[at] : int32_t(i);
    batch.place[i] = found ? batch.place[at] + 1 : 0;
    batch.chain[i] = head;
    head = int32_t(i);
    most = batch.place[i] < most ? most : batch.place[i] + 1;
  }
  return most;
}

// The slots of repelling walks, in batch.target. Few at a node: back over all that came before.
void take_slots_of_few(const GrfBatch& batch, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t degree = batch.degree[i];
    int64_t place = batch.place[i];
    if (place >= degree) place %= degree;
    int64_t slot = place + below(batch.choice[i], degree - place);
    batch.target[i] = slot;
    int64_t at = i;
    for (int64_t other = place - 1; other >= 0; --other) {
      at = batch.before[at];
      slot = follow_swap(slot, batch.target[at], other);
    }
    batch.edge[i] = batch.begin[i] + slot;
  }
}

// Many: over the swaps of the slot alone. The walks of a block are found by the hash of their target, the last one
// first, in what held those at a node: `first` becomes the first walk of the block, `place` the place in it, `before` the
// last walk whose target is this place.
void take_slots_of_many(const GrfBatch& batch, int64_t count) {
  const uint64_t mask = uint64_t(batch.num_heads - 1);
  for (int64_t i = 0; i < batch.num_heads; ++i) batch.head[i] = -1;
  const auto head_of = [&](int32_t block, int64_t target) -> int32_t& {
    return batch.head[((uint64_t(block) + (uint64_t(target) << 32)) * 0x9E3779B97F4A7C15u >> 40) & mask];
  };
  const auto last_with = [&](int32_t block, int64_t target) {
    int32_t at = head_of(block, target);
    while (at >= block && (batch.first[at] != block || batch.target[at] != target)) at = batch.chain[at];
    return at >= block ? at : -1;
  };
  for (int64_t i = 0; i < count; ++i) {
    const int32_t place = int32_t(batch.place[i] % batch.degree[i]);
    const int32_t block = place ? batch.first[batch.before[i]] : int32_t(i);
    int64_t slot = place + below(batch.choice[i], batch.degree[i] - place);
    const int32_t same = last_with(block, slot);
    batch.before[i] = slot == place ? same : last_with(block, place);
    batch.target[i] = slot;
    batch.first[i] = block;
    batch.place[i] = place;
    int32_t& head = head_of(block, slot);
    batch.chain[i] = head;
    head = int32_t(i);
    for (int32_t at = same; at >= 0; at = batch.before[at]) slot = batch.place[at];
    batch.edge[i] = batch.begin[i] + slot;
  }
}

constexpr int32_t kFewAtNode = 64;

template <class I>
void choose(const GrfGraph& graph, const GrfBatch& batch, int64_t count, int64_t flags) {
  if (flags & kRendezvous) {
    for (int64_t i = 0; i < count; ++i) {
      int64_t edge = batch.begin[i], least = INT64_MAX, least_key = 0;
      for (int64_t e = batch.begin[i]; e < batch.begin[i] + batch.degree[i]; ++e) {
        const uint64_t node = uint64_t(*column<I>(graph, e));
        if (node >= uint64_t(graph.num_nodes)) {
          edge = e;  // whatever: to follow it is a fault
          break;
        }
        const int64_t key = graph.node_key ? graph.node_key[node] : int64_t(node);
        const int64_t hash = neighbour_hash(batch.choice[i], uint64_t(key));
        if (hash < least || (hash == least && (key < least_key || e == batch.begin[i]))) {
          edge = e;
          least = hash;
          least_key = key;
        }
      }
      batch.edge[i] = edge;
    }
    return;
  }
  if (!(flags & kRepelling)) {
    for (int64_t i = 0; i < count; ++i)
      batch.edge[i] = edge_at(graph.units, batch.begin[i], batch.degree[i], batch.choice[i] >> 32);
  } else if (graph.units) {
    group(batch, count);
    int32_t* const size = batch.chain;  // which is done with
    for (int64_t i = 0; i < count; ++i) size[batch.first[i]] = batch.place[i] + 1;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t first = batch.first[i];
      const uint64_t point = systematic_point(batch.choice[first] >> 32, batch.place[i], size[first]);
      batch.edge[i] = edge_at(graph.units, batch.begin[i], batch.degree[i], point);
    }
  } else {
    if (group(batch, count) <= kFewAtNode)
      take_slots_of_few(batch, count);
    else
      take_slots_of_many(batch, count);
    for (int64_t i = 0; i < count; ++i) __builtin_prefetch(column<I>(graph, batch.edge[i]));
  }
}

template <class P>
struct Payload {
  template <class I>
  GEO_INLINE P next(const GrfGraph& graph, const GrfBatch& batch, int64_t i, int64_t edge, P gain) {
    P factor;
    if (sizeof(I) == 4) {
      const char* record = static_cast<const char*>(graph.edges) + edge * graph.edge_bytes;
      factor = *reinterpret_cast<const P*>(record + sizeof(P));
    } else {
      factor = static_cast<const P*>(graph.weight)[edge] *
               over_probability<P>(graph.units, batch.begin[i], batch.degree[i], edge);
    }
    return static_cast<const P*>(batch.payload)[batch.from[i]] * factor * gain;
  }
};
template <>
struct Payload<int64_t> {
  template <class I>
  GEO_INLINE int64_t next(const GrfGraph&, const GrfBatch&, int64_t, int64_t edge, int64_t) {
    return edge;
  }
};

template <class I, class P>
void follow(const GrfGraph& graph, const GrfBatch& batch, int64_t count, int64_t num_before, double gain_,
            Outcome* outcome) {
  const I* ptr = static_cast<const I*>(graph.ptr);
  const P gain = P(gain_);
  uint32_t* node = batch.node + num_before;
  P* payload = static_cast<P*>(batch.payload) + num_before;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t edge = batch.edge[i];
    const uint64_t next = uint64_t(*column<I>(graph, edge));
    if (next >= uint64_t(graph.num_nodes)) {
      note(outcome, kBadCol, edge);
      continue;
    }
    __builtin_prefetch(ptr + next);
    node[i] = uint32_t(next);
    payload[i] = Payload<P>::template next<I>(graph, batch, i, edge, gain);
  }
}

template <class P>
void bucket(const GrfBatch& batch, const GrfBuckets& buckets, int64_t count, int32_t length) {
  const P* from = static_cast<const P*>(batch.payload);
  P* to = static_cast<P*>(buckets.payload);
  for (int64_t i = 0; i < count; ++i) {
    const int32_t at = buckets.next[batch.row[i]]++;
    buckets.node[at] = batch.node[i];
    buckets.length[at] = length;
    to[at] = from[i];
  }
}

// Few numbers: each one's place is how many are less, or equal and before it.
constexpr int64_t kFew = 96;
void order_few(const uint32_t* col, int64_t count, uint64_t* order) {
  vint lane;
  for (int l = 0; l < kInts; ++l) lane[l] = l;
  for (int64_t i = 0; i < count; i += kInts) {
    const vint own = *reinterpret_cast<const vint_loose*>(col + i), after = own + 1;
    const int64_t last = i + kInts < count ? i + kInts : count;
    vint rank = {};
    for (int64_t j = 0; j < i; ++j) rank -= (vint)(int32_t(col[j]) < after);
    for (int64_t j = i; j < last; ++j) rank -= (vint)(int32_t(col[j]) < own - (vint)(lane > int32_t(j - i)));
    for (int64_t j = last; j < count; ++j) rank -= (vint)(int32_t(col[j]) < own);
    for (int64_t l = 0; l < last - i; ++l) order[rank[l]] = uint64_t(col[i + l]) << 32 | uint64_t(i + l);
  }
}

// Many: a stable radix sort by bytes.
uint64_t* order_many(const uint32_t* col, int64_t count, int64_t num_nodes, uint64_t* order, uint64_t* other) {
  for (int64_t i = 0; i < count; ++i) order[i] = uint64_t(col[i]) << 32 | uint64_t(i);
  for (int shift = 32; shift < 64 && (shift == 32 || uint64_t(num_nodes - 1) >> (shift - 32)); shift += 8) {
    int32_t start[256] = {};
    for (int64_t i = 0; i < count; ++i) ++start[order[i] >> shift & 255];
    int32_t sum = 0;
    for (int b = 0; b < 256; ++b) {
      const int32_t size = start[b];
      start[b] = sum;
      sum += size;
    }
    for (int64_t i = 0; i < count; ++i) other[start[order[i] >> shift & 255]++] = order[i];
    uint64_t* const swap = order;
    order = other;
    other = swap;
  }
  return order;
}

// Sum what stands next to each other.
template <class P>
GEO_NOINLINE int64_t merge(const uint64_t* order, int64_t count, const int32_t* length, const P* load, P walks,
                           GrfEntry<P>* out) {
  GrfEntry<P>* const begin = out;
  for (int64_t i = 0; i < count;) {
    const uint64_t col = order[i] >> 32;
    const int32_t own = length[order[i] & kLowWord];
    P sum = load[order[i] & kLowWord];
    for (++i; i < count && order[i] >> 32 == col && length[order[i] & kLowWord] == own; ++i)
      sum += load[order[i] & kLowWord];
    *out++ = {uint32_t(col), own, sum / walks};
  }
  return out - begin;
}

template <class P>
int64_t coalesce(const GrfBuckets& buckets, const int32_t* row_ptr, int64_t num_rows, int64_t num_nodes, double walks,
                 uint64_t* scratch, void* entries, int64_t* counts) {
  GrfEntry<P>* out = static_cast<GrfEntry<P>*>(entries);
  for (int64_t row = 0; row < num_rows; ++row) {
    const int64_t first = row_ptr[row], count = row_ptr[row + 1] - first;
    const uint32_t* col = buckets.node + first;
    uint64_t* order = scratch;
    if (count <= kFew)
      order_few(col, count, order);
    else
      order = order_many(col, count, num_nodes, scratch, scratch + count);
    const P* load = static_cast<const P*>(buckets.payload) + first;
    counts[row] = merge(order, count, buckets.length + first, load, P(walks), out);
    out += counts[row];
  }
  return out - static_cast<GrfEntry<P>*>(entries);
}

}  // namespace

#define GEO_GRF_FOLLOW(I) {follow<I, float>, follow<I, double>, follow<I, int64_t>}
const GrfTable grf_walks = {draw_all,
                            {{depart<int64_t, false>, depart<int64_t, true>},
                             {depart<uint32_t, false>, depart<uint32_t, true>}},
                            {choose<int64_t>, choose<uint32_t>},
                            {GEO_GRF_FOLLOW(int64_t), GEO_GRF_FOLLOW(uint32_t)},
                            {bucket<float>, bucket<double>, bucket<int64_t>},
                            {coalesce<float>, coalesce<double>}};

}  // namespace GEO_SIMD_NAMESPACE
}  // namespace geo
