#pragma once
// Tables of a product of given degrees, made on the host in float64 and kept: for the separable form the Legendre functions
// at the nodes, for the sparse form the list of couplings.
#include <map>
#include <memory>
#include <mutex>
#include <tuple>
#include <vector>

#include "gaunt.h"

namespace geo {

// Rows as polar_row says, columns the half nodes. `in` has two fields for each input where the product is a bracket: the
// slope in the polar angle, and m over the sine. The factors of the azimuthal series are in all of them.
template <class T>
struct SeparableTables {
  std::vector<T> in[2][2], out;
};

template <class T>
struct SparseTables {
  std::vector<int32_t> i, j;    // of pairs; x_i y_j, and where `both`, x_j y_i added or (bracket) subtracted
  std::vector<uint8_t> both;
  std::vector<int32_t> ptr, pair;  // of each output its terms
  std::vector<T> value;
};

struct RuntimeRule {
  int lmax, half;
  std::vector<double> weight, sine;
  std::vector<std::vector<double>> value, slope;

  RuntimeRule(int lmax_, int degree) : lmax(lmax_), half(polar_half(degree)), weight(half), sine(half) {
    for (int q = 0; q < half; ++q) {
      double cosine;
      gauss_node(polar_nodes(degree), q, &cosine, &weight[q]);
      sine[q] = root(1 - cosine * cosine);
      value.emplace_back(size_t(square(lmax + 1)));
      slope.emplace_back(size_t(square(lmax + 1)));
      legendre(lmax, cosine, value[q].data(), slope[q].data());
    }
  }
};

template <class T>
SeparableTables<T> make_separable(int L1, int L2, int L3, bool bracket) {
  const RuntimeRule rule(larger(L1, larger(L2, L3)), L1 + L2 + L3);
  SeparableTables<T> tables;
  const auto fill = [&](int lmax, auto&& entry) {
    std::vector<T> table(size_t(polar_rows(lmax) * rule.half));
    for (int m = 0; m <= lmax; ++m)
      for (int l = m; l <= lmax; ++l)
        for (int q = 0; q < rule.half; ++q)
          table[size_t(polar_row(lmax, l, m) * rule.half + q)] = T(entry(q, m * (rule.lmax + 1) + l, m));
    return table;
  };
  const double half = root(0.5), two = root(2);
  const auto value = [&](int q, int at, int m) { return rule.value[q][at] * (m ? half : 1); };
  const auto slope = [&](int q, int at, int m) { return rule.slope[q][at] * (m ? half : 1); };
  const auto turn = [&](int q, int at, int m) { return m * rule.value[q][at] / rule.sine[q] * half; };
  for (int slot = 0; slot < 2; ++slot) {
    const int lmax = slot ? L2 : L1;
    if (bracket) {
      tables.in[slot][0] = fill(lmax, slope);
      tables.in[slot][1] = fill(lmax, turn);
    } else {
      tables.in[slot][0] = fill(lmax, value);
    }
  }
  tables.out = fill(L3, [&](int q, int at, int m) { return rule.weight[q] * rule.value[q][at] * (m ? two : 1); });
  return tables;
}

template <class T>
SparseTables<T> make_sparse(int L1, int L2, int L3, bool bracket) {
  RuntimeRule rule(larger(L1, larger(L2, L3)), L1 + L2 + L3);
  for (int q = 0; q < rule.half; ++q)
    if (2 * q + 1 != polar_nodes(L1 + L2 + L3)) rule.weight[q] *= 2;  // its mirror too
  SparseTables<T> tables;
  struct Term {
    int pair, out;
    double value;
  };
  std::vector<Term> terms;
  for (int l1 = 0; l1 <= L1; ++l1)
    for (int m1 = -l1; m1 <= l1; ++m1)
      for (int l2 = 0; l2 <= L2; ++l2)
        for (int m2 = -l2; m2 <= l2; ++m2) {
          const int i = l1 * l1 + l1 + m1, j = l2 * l2 + l2 + m2;
          const bool both = i != j && i < square(L2 + 1) && j < square(L1 + 1);
          if (both && i > j) continue;
          const size_t before = terms.size();
          for (int l3 = l1 > l2 ? l1 - l2 : l2 - l1; l3 <= smaller(L3, l1 + l2); ++l3)
            for (int m3 = -l3; m3 <= l3; ++m3) {
              const double value = coupling(rule, bracket, l1, m1, l2, m2, l3, m3);
              if (value > 1e-9 || value < -1e-9) terms.push_back({int(tables.i.size()), l3 * l3 + l3 + m3, value});
            }
          if (terms.size() == before) continue;
          tables.i.push_back(i);
          tables.j.push_back(j);
          tables.both.push_back(both);
        }
  tables.ptr.assign(size_t(square(L3 + 1) + 1), 0);
  for (const Term& term : terms) ++tables.ptr[size_t(term.out + 1)];
  for (int k = 0; k < square(L3 + 1); ++k) tables.ptr[size_t(k + 1)] += tables.ptr[size_t(k)];
  tables.pair.resize(terms.size());
  tables.value.resize(terms.size());
  std::vector<int32_t> next(tables.ptr.begin(), tables.ptr.end() - 1);
  for (const Term& term : terms) {
    const size_t at = size_t(next[size_t(term.out)]++);
    tables.pair[at] = term.pair;
    tables.value[at] = T(term.value);
  }
  return tables;
}

// Made once for each choice of degrees, and kept.
template <class Tables, class Make>
const Tables& kept_tables(int L1, int L2, int L3, bool bracket, Make&& make) {
  static std::mutex mutex;
  static std::map<std::tuple<int, int, int, bool>, std::unique_ptr<Tables>> kept;
  const std::lock_guard<std::mutex> lock(mutex);
  std::unique_ptr<Tables>& tables = kept[{L1, L2, L3, bracket}];
  if (!tables) tables = std::make_unique<Tables>(make(L1, L2, L3, bracket));
  return *tables;
}

}  // namespace geo
