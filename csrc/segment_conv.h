#pragma once
// A depthwise causal convolution along segments of rows and the gradient of its weight, from
// T = sum over t, j of w[j] * x[t - j] * g[t], rows t and t - j being of one segment.
#include <stdint.h>

#include "macros.h"

namespace geo {

// One term of either sum: out[t] over j, and dw[j] over t. V is a number or a SIMD vector of channels.
template <class V>
GEO_HD V conv_step(V sum, V a, V b) {
  return sum + a * b;
}

// How many rows of the segment [begin, end) come before row t in the order that the taps look back along.
GEO_HD int64_t conv_reach(int64_t t, int64_t begin, int64_t end, bool reverse) { return reverse ? end - 1 - t : t - begin; }

// Rows are cut into chunks by this rule alone, for the gradient of the weight; the chunks' sums are added in order.
constexpr int64_t kConvChunkRows = 512;  // at least
constexpr int64_t kConvMaxChunks = 64;

GEO_HD int64_t conv_chunks(int64_t num_rows) {
  const int64_t chunks = num_rows / kConvChunkRows;
  return chunks < 1 ? 1 : chunks > kConvMaxChunks ? kConvMaxChunks : chunks;
}

// The segment of row t: the last that starts at t or before. Needs a row.
GEO_HD int64_t conv_segment(const int64_t* ptr, int64_t num_segments, int64_t t) {
  int64_t low = 0, high = num_segments;  // the answer lies in [low, high)
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (ptr[middle] <= t)
      low = middle;
    else
      high = middle;
  }
  return low;
}

}  // namespace geo
