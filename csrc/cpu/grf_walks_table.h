#pragma once
// What the launcher in grf_walks.cpp calls: leaf kernels over raw pointers, one table per SIMD level.
#include <stdint.h>

#include "../grf_walks.h"
#include "gather_mul_table.h"
#include "simd_level.h"

namespace geo {

constexpr int kGrfPad = 16;  // entries behind each array that vectors may read and write

// The graph that walks go on. Packed, ptr is uint32 and edges are records of `edge_bytes` that begin with a uint32
// column (2^32 - 1 where it was out of range) and end with the factor of the load, if there are loads; else ptr and
// edges are int64, and the factor is weight times over_probability.
struct GrfGraph {
  const void* ptr;
  const void* edges;
  const void* weight;
  const int64_t* units;     // or null
  const int64_t* node_key;  // or null
  int64_t num_nodes, num_edges, edge_bytes;
};

// The walks of some starts that have not ended yet, ascending. `node`, `row` and `payload` begin at the present length;
// the next length comes right behind the `count` entries of this one.
struct GrfBatch {
  uint64_t* key;      // of the start
  uint64_t* walk;     // its number
  uint64_t* decider;  // see halt_decider
  uint64_t* choice;
  uint64_t* halt;
  uint32_t* owner;  // its start, in the batch
  uint32_t* from;   // where it stood among the walks of the length before
  int64_t* begin;   // the row of its node
  int64_t* degree;
  int64_t* edge;
  // Repelling walks: see follow_swap; the place among the walks of the start at the same node, the first and the last
  // one before of these, and the last one before whose node has the same hash, or -1; by hash, the last one.
  int64_t* target;
  int32_t* place;
  int32_t* first;
  int32_t* before;
  int32_t* chain;
  int32_t* head;
  int64_t num_heads;  // a power of two
  uint32_t* node;
  uint32_t* row;  // where its record belongs
  void* payload;  // float, double: load; int64: edge
};

// Records in order of length, to be put in order of row. Entry r of a row goes to next[row]++.
struct GrfBuckets {
  uint32_t* node;
  int32_t* length;
  void* payload;
  int32_t* next;
};

template <class T>
struct GrfEntry {
  uint32_t col;
  int32_t length;
  T value;
};

struct GrfTable {
  // Random words of one step.
  void (*draw)(const GrfBatch&, int64_t count, uint64_t seed, uint64_t step, bool antithetic);
  // Drop the walks that end; returns how many go on, with their rows. [packed][slot]: with the edge, drawn by position.
  int64_t (*depart[2][2])(const GrfGraph&, const GrfBatch&, int64_t count, uint64_t halt_below, int64_t flags,
                          Outcome*);
  // The edges of those that go on, otherwise. [packed]
  void (*choose[2])(const GrfGraph&, const GrfBatch&, int64_t count, int64_t flags);
  // Along them. `gain`: over_survival. [packed][float, double, int64]
  void (*follow[2][3])(const GrfGraph&, const GrfBatch&, int64_t count, int64_t num_before, double gain, Outcome*);
  void (*bucket[3])(const GrfBatch&, const GrfBuckets&, int64_t count, int32_t length);  // [float, double, int64]
  // Sort each row by node, stably, and sum the entries of one node and length, over `walks`. Returns the number of
  // entries, those of row i in counts[i]. scratch: two of the longest row. [float, double]
  int64_t (*coalesce[2])(const GrfBuckets&, const int32_t* row_ptr, int64_t num_rows, int64_t num_nodes, double walks,
                         uint64_t* scratch, void* entries, int64_t* counts);
};
GEO_DECLARE_TABLE(GrfTable, grf_walks)

}  // namespace geo
