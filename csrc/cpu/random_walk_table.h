#pragma once
// What the launcher in random_walk.cpp calls: leaf kernels over raw pointers, one table per SIMD level.
#include <stdint.h>

#include "../random_walk.h"
#include "gather_mul_table.h"
#include "simd_level.h"

namespace geo {

// Walk w = s * num_walks + k is the k-th from start[s]; its counter holds node_key[s] (null: start[s]) and first_walk + k.
struct WalkJob {
  const void* ptr;  // int64, or uint32 where everything below 0 or beyond num_edges has become 2^32 - 1
  const void* col;  // the same, beyond num_nodes - 1
  int64_t num_nodes, num_edges;
  WalkLaws laws;
  const int64_t* start;
  const int64_t* node_key;
  int64_t num_walks, walk_length, first_walk;
  int64_t* nodes;  // [walks, walk_length + 1]
  int64_t* edges;  // [walks, walk_length] or null
};

struct WalkTable {
  // Walks [first, last). Outcome: the least WalkFault of all, and its least position. [packed][non-backtracking][halting]
  Outcome (*walk[2][2][2])(const WalkJob&, int64_t first, int64_t last);
};
GEO_DECLARE_TABLE(WalkTable, random_walk)

}  // namespace geo
