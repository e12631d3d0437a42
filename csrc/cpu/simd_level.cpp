// The choice of the SIMD level, and its name for geo.info().
#include "simd_level.h"

#include <cstdlib>
#include <cstring>

namespace geo {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

SimdLevel best_level() {
#ifdef GEO_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      return SimdLevel::kAvx512;
    return SimdLevel::kAvx2;
  }
#endif
  return SimdLevel::kBaseline;
}

SimdLevel choose_level() {
  const SimdLevel best = best_level();
  const char* wanted = std::getenv("GEO_SIMD");
  for (int level = 0; wanted && level <= static_cast<int>(best); ++level)
    if (std::strcmp(wanted, kNames[level]) == 0) return static_cast<SimdLevel>(level);
  return best;  // geo/_native.py warns where a wish could not be met
}

}  // namespace

SimdLevel simd_level() {
  static const SimdLevel level = choose_level();
  return level;
}

}  // namespace geo

extern "C" __attribute__((visibility("default"))) const char* geo_simd_level() {
  return geo::kNames[static_cast<int>(geo::simd_level())];
}
