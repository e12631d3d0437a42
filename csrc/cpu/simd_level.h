#pragma once
// Which copy of the leaf kernels runs: chosen once, at load, by what the processor has; GEO_SIMD overrules it downwards.
//
// A leaf file csrc/cpu/simd/NAME.cpp defines, in its level's namespace, tables of function pointers declared with
// GEO_DECLARE_TABLE in its header, and launchers read the chosen copy:  geo::choose_table(GEO_TABLES(name)).

namespace geo {

enum class SimdLevel { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

SimdLevel simd_level();

#ifdef GEO_X86
#define GEO_DECLARE_TABLE(Type, name)                   \
  namespace simd_baseline { extern const Type name; }   \
  namespace simd_avx2 { extern const Type name; }       \
  namespace simd_avx512 { extern const Type name; }
#define GEO_TABLES(name) \
  ::geo::simd_baseline::name, ::geo::simd_avx2::name, ::geo::simd_avx512::name
#else
#define GEO_DECLARE_TABLE(Type, name) \
  namespace simd_baseline { extern const Type name; }
#define GEO_TABLES(name) \
  ::geo::simd_baseline::name, ::geo::simd_baseline::name, ::geo::simd_baseline::name
#endif

template <class Table>
const Table& choose_table(const Table& baseline, const Table& avx2, const Table& avx512) {
  switch (simd_level()) {
    case SimdLevel::kAvx512: return avx512;
    case SimdLevel::kAvx2: return avx2;
    default: return baseline;
  }
}

}  // namespace geo
