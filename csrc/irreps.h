#pragma once
// Features of irreps from blocks [mul, 2l+1] to rows of components with the channels last, and back (ops/irreps.py).
#include <stdint.h>

#include <vector>

#include "dispatch.h"

namespace geo {

struct IrrepsBlock {
  int64_t n, start, row;  // components, place in the flat layout or -1, first row in the other
};

// The blocks, in order; checks that they lie where they should.
inline std::vector<IrrepsBlock> irreps_blocks(const char* op, const std::vector<int64_t>& degrees,
                                              const std::vector<int64_t>& starts, int64_t mul, int64_t size,
                                              int64_t* rows) {
  STD_TORCH_CHECK(degrees.size() == starts.size() && mul >= 0 && size >= 0, op, ": as many degrees as starts are needed");
  std::vector<IrrepsBlock> blocks;
  *rows = 0;
  for (size_t i = 0; i < degrees.size(); ++i) {
    const int64_t n = 2 * degrees[i] + 1;
    STD_TORCH_CHECK(n > 0 && starts[i] >= -1 && (starts[i] < 0 || starts[i] + mul * n <= size), op,
                    ": a block lies outside the features");
    blocks.push_back({n, starts[i], *rows});
    *rows += n;
  }
  return blocks;
}

}  // namespace geo
