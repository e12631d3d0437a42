#pragma once
// What the launcher in fiber.cpp calls: leaf kernels over raw pointers, one table per SIMD level.
#include <stdint.h>

#include "simd_level.h"

namespace geo {

struct FiberSum {  // out[v, p, c] = sum over o of x[v, o, c] * kernel[p * stride_p + o * stride_o + c]
  const void* x;
  const void* kernel;
  void* out;
  int64_t O, P, C, stride_p, stride_o;
};

struct FiberOuter {  // sum[p, o, c] = sum over v of a[v, p, c] * b[v, o, c]
  const void* a;
  const void* b;
  int64_t P, O, C;
};

struct FiberTable {
  void (*sum)(const FiberSum&, int64_t begin, int64_t end);                // nodes [begin, end)
  void (*outer)(const FiberOuter&, int64_t begin, int64_t end, void* sum);  // in the accumulation type
};

GEO_DECLARE_TABLE(FiberTable, fiber_float)
GEO_DECLARE_TABLE(FiberTable, fiber_double)
GEO_DECLARE_TABLE(FiberTable, fiber_bfloat16)
GEO_DECLARE_TABLE(FiberTable, fiber_float16)

}  // namespace geo
