#pragma once
// Laws of the walks of graph random features, beyond those of random_walk.h. ops/walk_step.py says the same in PyTorch.
#include "random_walk.h"

namespace geo {

enum GrfFlag : int64_t { kAntithetic = 1, kRepelling = 2, kRendezvous = 4 };

constexpr uint64_t kProbabilityOne = uint64_t(1) << 32;  // probabilities are multiples of 2^-32
constexpr uint64_t kLowWord = 0xffffffffu;

// Halting: of antithetic walks the second half goes by the words of the first, turned by half a turn. A decider holds
// the number of the walk whose word it is, and above it what is to be added.
GEO_HD uint64_t halt_decider(uint64_t number, uint64_t walk, uint64_t num_walks, bool antithetic) {
  const uint64_t half = num_walks / 2;
  if (!antithetic || walk < half) return number & kLowWord;
  return ((number - half) & kLowWord) | (uint64_t(1) << 63);
}
template <class V>
GEO_HD V halt_word(V word, V decider) {
  return (word + (decider >> 32)) & kLowWord;
}

// Rendezvous choice: the neighbour with the least hash, a signed number, of the step's random bits and its key (the
// finaliser of splitmix64, Steele, Lea and Flood 2014).
GEO_HD int64_t neighbour_hash(uint64_t bits, uint64_t key) {
  uint64_t x = bits + key * 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return int64_t(x ^ (x >> 31));
}

// Choice by running sums of probabilities in each row: the first edge with more units up to it than the point.
GEO_HD int64_t edge_at(const int64_t* units, int64_t begin, int64_t degree, uint64_t point) {
  int64_t low = begin, high = begin + degree - 1;
  while (low < high) {
    const int64_t middle = (low + high) >> 1;
    if (units[middle] > int64_t(point))
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}
// The point of walk `rank` of a group of `size` at one node: equal distances, turned by the first walk's word.
GEO_HD uint64_t systematic_point(uint64_t word, int64_t rank, int64_t size) {
  return (word + (uint64_t(rank) << 32) / uint64_t(size)) & kLowWord;
}

// One over the probability of an edge of a row.
template <class T>
GEO_HD T over_probability(const int64_t* units, int64_t begin, int64_t degree, int64_t edge) {
  if (units == nullptr) return T(degree);
  const int64_t count = units[edge] - (edge > begin ? units[edge - 1] : 0);
  return count > 0 ? T(4294967296.0 / double(count)) : T(0);
}
// One over the probability to go on.
template <class T>
GEO_HD T over_survival(uint64_t halt_below) {
  return halt_below < kProbabilityOne ? T(4294967296.0 / double(kProbabilityOne - halt_below)) : T(0);
}

// Repelling walks: within a block of as many walks as the node has edges, walk `place` swaps the entries `place` and
// `target` >= place of a permutation of the slots and takes what then stands at `place`. What stands at an entry is
// found by going back over the walks before (_distinct in ops/walk_step.py). Call this with each, the last one first.
GEO_HD int64_t follow_swap(int64_t slot, int64_t target, int64_t place) { return target == slot ? place : slot; }

}  // namespace geo
