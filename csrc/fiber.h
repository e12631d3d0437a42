#pragma once
// The sum over orientations at one node and its gradient, from T = sum_{v,p,o,c} x[v,o,c] * k[p,o,c] * g[v,p,c].
#include <stdint.h>

#include "macros.h"

namespace geo {

// One term of either sum: out[v,p,c] over o, and dk[p,o,c] over v. V is a number or a SIMD vector of channels.
template <class V>
GEO_HD V fiber_step(V sum, V a, V b) {
  return sum + a * b;
}

// Nodes are cut into chunks by this rule alone; the chunks' sums for dk are added in order.
constexpr int64_t kFiberChunkNodes = 64;  // at least
constexpr int64_t kFiberMaxChunks = 16;

GEO_HD int64_t fiber_chunks(int64_t num_nodes) {
  const int64_t chunks = num_nodes / kFiberChunkNodes;
  return chunks < 1 ? 1 : chunks > kFiberMaxChunks ? kFiberMaxChunks : chunks;
}

}  // namespace geo
