#pragma once
// The 16-bit floats as plain bits: storage only, all arithmetic is float32.
#include <stdint.h>
#include <string.h>

#include "macros.h"

namespace geo {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// The type a kernel computes in for a type it reads and writes.
template <class S>
struct accumulate {
  typedef S type;
};
template <>
struct accumulate<bfloat16> {
  typedef float type;
};
template <>
struct accumulate<float16> {
  typedef float type;
};

GEO_HD float bits_to_float(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
GEO_HD uint32_t float_to_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}

GEO_HD float widen(float v) { return v; }
GEO_HD double widen(double v) { return v; }
GEO_HD float widen(bfloat16 v) { return bits_to_float(uint32_t(v.bits) << 16); }
GEO_HD float widen(float16 v) {
  const uint32_t sign = uint32_t(v.bits & 0x8000u) << 16, magnitude = v.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);  // inf, nan
  if (magnitude < 0x400u) {  // subnormal: magnitude * 2^-24, exact
    const float f = float(magnitude) * 5.9604644775390625e-8f;
    return sign ? -f : f;
  }
  return bits_to_float(sign | ((magnitude << 13) + 0x38000000u));
}

// Round to nearest even; NaN stays NaN.
GEO_HD void narrow(float v, float* out) { *out = v; }
GEO_HD void narrow(double v, double* out) { *out = v; }
GEO_HD void narrow(float v, bfloat16* out) {
  const uint32_t u = float_to_bits(v);
  out->bits = uint16_t(v != v ? 0x7fc0u : (u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}
GEO_HD void narrow(float v, float16* out) {
  const uint32_t u = float_to_bits(v), sign = u >> 16 & 0x8000u, magnitude = u & 0x7fffffffu;
  uint32_t h;
  if (magnitude > 0x7f800000u) {
    h = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
    h = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 rounds at 2^-24
    h = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    h = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  out->bits = uint16_t(sign | h);
}

}  // namespace geo
