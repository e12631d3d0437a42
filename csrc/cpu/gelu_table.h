#pragma once
// What the launchers in gelu.cpp call: leaf kernels over raw pointers, one table per SIMD level.
#include <stdint.h>

#include "../gelu.h"
#include "simd_level.h"

namespace geo {

// out = g * f_n(x), f_n the derivative of order n (null g: ones). With h: out = h * f_n(x), dx = h * g * f_{n+1}(x).
struct Gelu {
  const void* x;
  const void* g;
  const void* h;
  void* out;
  void* dx;
  int64_t order;
  GeluPolynomial poly, next;
};

struct GeluTable {
  void (*mul)(const Gelu&, int64_t begin, int64_t end);
  void (*grad)(const Gelu&, int64_t begin, int64_t end);
};

GEO_DECLARE_TABLE(GeluTable, gelu_float)
GEO_DECLARE_TABLE(GeluTable, gelu_double)
GEO_DECLARE_TABLE(GeluTable, gelu_bfloat16)
GEO_DECLARE_TABLE(GeluTable, gelu_float16)

}  // namespace geo
