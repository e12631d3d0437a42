#pragma once
// The fused depthwise convolution and its gradient, from the form (see ops/gather_linear.py)
//
//   T = sum_{e,o,c,b} x[src(e),o,c] * g[dst(e),o,c] * W[c,b] * basis[e,o,b].
//
// What a kernel does for one edge, orientation and channel stands here once; V is a number or a SIMD vector of channels.
#include <stdint.h>

#include "macros.h"

namespace geo {

// One step of the kernel's linear, K[c] += basis[b] * W[c, b], and likewise of its two gradients.
template <class V, class S>
GEO_HD V linear_step(V sum, S scale, V vector) {
  return sum + scale * vector;
}

// An edge's part of a segment sum, out += K * x.
template <class V>
GEO_HD V message_step(V out, V kernel, V x) {
  return out + kernel * x;
}

// What the gradients of basis and of weight share, x[src] * g[dst]; summed over the orientations that share a basis.
template <class V>
GEO_HD V product_step(V sum, V x, V g) {
  return sum + x * g;
}

// Edges, in the order of a CSR, are cut into chunks by this rule alone, never by the number of threads; partial sums of
// chunks are added in order. So every sum is bitwise the same on any number of threads. A chunk may begin inside a
// segment (a hub may fill many chunks): that part goes to the chunk's head, which is added to the segment afterwards.
constexpr int64_t kLinearChunkRows = 2048;  // rows of basis that a chunk holds at least, but for small inputs
constexpr int64_t kLinearMaxChunks = 128;

GEO_HD int64_t linear_chunks(int64_t num_edges, int64_t rows_per_edge) {
  const int64_t chunks = num_edges * rows_per_edge / kLinearChunkRows;
  const int64_t most = num_edges < kLinearMaxChunks ? num_edges : kLinearMaxChunks;
  return chunks > most ? most : chunks > 1 ? chunks : 1;
}

GEO_HD int64_t linear_chunk_begin(int64_t chunk, int64_t chunks, int64_t num_edges) {
  const int64_t rest = num_edges % chunks;
  return num_edges / chunks * chunk + (chunk < rest ? chunk : rest);
}

}  // namespace geo
