#pragma once
// How sums over segments are cut, for every backend. The rule reads ptr alone, so a sum is bitwise the same on any
// number of threads.
//
// A hub is a segment of at least two chunks. It is summed as len / kHubChunk pieces, the last one taking the remainder,
// and the pieces are added in order. Piece k of a hub that starts at edge p has slot p / kHubChunk + k: the slots of
// different hubs never meet and all lie below E / kHubChunk, so a buffer of that many rows holds every piece without a
// scan. (ops/plan.py holds the same number and rule.)
#include <stdint.h>

#include "macros.h"

namespace geo {

constexpr int64_t kHubChunk = 4096;  // edges

GEO_HD int64_t num_slots(int64_t num_edges) { return num_edges / kHubChunk; }
GEO_HD bool is_hub(int64_t begin, int64_t end) { return end - begin >= 2 * kHubChunk; }
GEO_HD int64_t num_pieces(int64_t begin, int64_t end) { return (end - begin) / kHubChunk; }
GEO_HD int64_t first_slot(int64_t begin) { return begin / kHubChunk; }
GEO_HD int64_t piece_begin(int64_t begin, int64_t k) { return begin + k * kHubChunk; }
GEO_HD int64_t piece_end(int64_t begin, int64_t end, int64_t k) {
  return k + 1 == num_pieces(begin, end) ? end : begin + (k + 1) * kHubChunk;
}

// The last segment whose first slot is at most `slot`: the only one that can own it. Needs num_segments > 0.
GEO_HD int64_t slot_owner(const int64_t* ptr, int64_t num_segments, int64_t slot) {
  int64_t low = 0, high = num_segments;  // the answer lies in [low, high)
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (first_slot(ptr[middle]) <= slot)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// Which index a kernel found out of range; the Python wrapper lists them in the same order.
enum Fault : int { kNoFault = -1, kSrcIndex = 0, kDstIndex = 1, kEdgePerm = 2, kPtr = 3 };

}  // namespace geo
