#pragma once
// Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011): four random words
// of 32 bits as a pure function of a 64-bit seed and a counter of four words. So what is drawn depends neither on threads
// nor on the order of the work, and ops/random_walk.py draws the same in PyTorch.
#include <stdint.h>

#include "macros.h"

namespace geo {

// A word held in 64 bits, whose upper half is ignored: what `product` returns is then at once the low word of the product
// and, shifted, the high one. SIMD kernels have such lanes, too.
struct RandomLane {
  typedef uint64_t type;
  GEO_HD_INLINE type product(type word, uint32_t factor) { return uint64_t(uint32_t(word)) * factor; }
};

// The counter in c0..c3 becomes the block; the upper halves are noise.
template <class Lane>
GEO_HD void philox(typename Lane::type& c0, typename Lane::type& c1, typename Lane::type& c2, typename Lane::type& c3,
                   uint64_t seed) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  GEO_UNROLL(10) for (int round = 0; round < 10; ++round) {
    const typename Lane::type p0 = Lane::product(c0, 0xD2511F53u), p1 = Lane::product(c2, 0xCD9E8D57u);
    c0 = (p1 >> 32) ^ c1 ^ uint64_t(k0);
    c1 = p1;
    c2 = (p0 >> 32) ^ c3 ^ uint64_t(k1);
    c3 = p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// What one step of one walk may use of a block: 64 bits to choose by, and a word of its own to halt by.
struct Draw {
  uint64_t choice;
  uint32_t halt;
};

template <class Lane>
GEO_HD typename Lane::type choice_bits(typename Lane::type c0, typename Lane::type c1) {
  return (c0 << 32) | (c1 & uint64_t(0xffffffffu));
}

// The counter of a draw. `kind` counts the draws of one step.
GEO_HD Draw draw(uint64_t seed, uint64_t node_key, uint64_t walk, uint64_t step, uint64_t kind) {
  uint64_t c0 = node_key, c1 = walk, c2 = step, c3 = kind;
  philox<RandomLane>(c0, c1, c2, c3, seed);
  return {choice_bits<RandomLane>(c0, c1), uint32_t(c2)};
}

// A number below n > 0, as uniform as 64 bits allow: no two probabilities differ by more than 2^-64.
GEO_HD int64_t below(uint64_t bits, int64_t n) {
#ifdef __CUDA_ARCH__
  return int64_t(__umul64hi(bits, uint64_t(n)));
#else
  return int64_t((unsigned __int128)bits * uint64_t(n) >> 64);
#endif
}

}  // namespace geo
