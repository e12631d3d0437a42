#pragma once
// What the launcher in irreps.cpp calls: leaf kernels over raw pointers, one table per SIMD level.
#include <stdint.h>

#include "simd_level.h"

namespace geo {

struct IrrepsTable {
  // `blocks` [mul, n] to `rows` [n, mul] and, with `inverse`, back; the elements have `bytes` bytes.
  void (*transpose)(void* blocks, void* rows, int64_t mul, int64_t n, int64_t bytes, bool inverse);
};

GEO_DECLARE_TABLE(IrrepsTable, irreps)

}  // namespace geo
