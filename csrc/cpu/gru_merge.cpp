// CPU launchers of gru_merge and gru_merge_backward.
//
// Pairs are taken in blocks of panels. Gradients of weights are summed for each of some parts, cut by the number of pairs
// alone, and these in order.
#include "../gru_merge_args.h"

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "gru_merge_table.h"
#include "parallel.h"

namespace geo {
namespace {

constexpr int64_t kBlock = 2 * kMergePairs;      // pairs that a thread takes at a time
constexpr int64_t kPartPairs = 8 * kMergePairs;  // of a part, at least
constexpr int64_t kMostParts = 32;

const GRUMergeTable& table(float) { return choose_table(GEO_TABLES(gru_merge_float)); }
const GRUMergeTable& table(double) { return choose_table(GEO_TABLES(gru_merge_double)); }

// The job as the leaves read it.
template <class T>
struct Job {
  const GRUMergeTable& leaf = table(T{});
  const GRUMergeArgs& in;
  const int64_t F, L = leaf.lanes, wide;
  GRUMergeJob job{};
  std::vector<T> weight, bias, back;

  explicit Job(const GRUMergeArgs& inputs) : in(inputs), F(in.features), wide((F + L - 1) / L * L) {
    job.features = F;
    job.wide = wide;
    job.rows = in.rows;
    job.pairs = in.pairs;
    job.left = index_data(in.left);
    job.right = index_data(in.right);
    job.x = read<T>(in.x);
    const T *w = read<T>(in.weight), *b = read<T>(in.bias);
    T *to = make(weight, 6 * wide * F), *mixed = make(back, 6 * F * wide);
    for (int64_t k = 0; k < 6; ++k)
      for (int64_t f = 0; f < F; ++f) {
        T* row = mixed + (k * F + f) * wide;
        mix(w + (k % 2 * F + f) * F, w + ((3 + k % 2) * F + f) * F, k < 2 ? T(0.5) : T(-0.5), row);
        if (k >= 4) std::copy_n(w + ((k == 4 ? 2 : 5) * F + f) * F, F, row);
        T* at = to + (f / L * 6 + (k < 4 ? 0 : 4)) * F * L + k % 4 * L + f % L;
        for (int64_t d = 0, step = (k < 4 ? 4 : 2) * L; d < F; ++d) at[d * step] = row[d];
      }
    job.weight = to;
    job.back = mixed;
    job.bias = to = make(bias, 4 * wide);
    for (int64_t f = 0; f < F; ++f) {
      T* at = to + f / L * 4 * L + f % L;
      at[0] = b[f] + b[3 * F + f];
      at[L] = b[F + f] + b[4 * F + f];
      at[2 * L] = b[2 * F + f];
      at[3 * L] = b[5 * F + f];
    }
  }

  // to = one / 2 + half other, F numbers
  void mix(const T* one, const T* other, T half, T* to) const {
    for (int64_t i = 0; i < F; ++i) to[i] = one[i] * T(0.5) + other[i] * half;
  }

  // Memory from a multiple of 64 bytes on, all 0.
  static T* make(std::vector<T>& data, int64_t size) {
    data.assign(size + 64 / sizeof(T), T(0));
    return aligned(data);
  }

  // run(begin, end, scratch) for blocks of the `total` pairs, or parts of them; raises where an index is out of range.
  template <class Run>
  void over(const char* op, int64_t total, int64_t block, bool backward, Run&& run) const {
    std::vector<std::vector<T>> memory(max_threads(total, block));
    Faults faults;
    parallel_blocks(total, block, [&](int64_t thread, int64_t begin, int64_t end) {
      std::vector<T>& own = memory[thread];
      T* scratch = own.empty() ? make(own, leaf.scratch(job, backward)) : aligned(own);
      const MergeOutcome outcome = run(begin, end, scratch);
      faults.add(outcome.fault, outcome.position);
    });
    const Found found = faults.first();
    if (found.fault == kNoFault) return;
    const int64_t* index = found.fault ? job.right : job.left;
    raise_out_of_range(op, found.fault ? "right" : "left", found.position, index[found.position], 0, in.rows - 1);
  }
};

Tensor gru_merge_cpu(const Tensor& x, const Tensor& left, const Tensor& right, const Tensor& weight, const Tensor& bias) {
  constexpr const char* op = "gru_merge";
  const GRUMergeArgs in(op, x, left, right, weight, bias);
  Tensor out = in.buffer({in.pairs, in.features});
  in.dispatch(op, [&](auto zero) {
    using T = decltype(zero);
    Job<T> job(in);
    job.job.out = write<T>(out);
    job.over(op, in.pairs, kBlock, false, [&](int64_t begin, int64_t end, T* scratch) {
      return job.leaf.forward(job.job, begin, end, scratch);
    });
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> gru_merge_backward_cpu(const Tensor& grad_, const Tensor& x, const Tensor& left,
                                                          const Tensor& right, const Tensor& weight, const Tensor& bias,
                                                          bool need_x) {
  constexpr const char* op = "gru_merge_backward";
  const GRUMergeArgs in(op, x, left, right, weight, bias);
  const Tensor grad = in.grad(op, grad_);
  Tensor sides = in.buffer({need_x ? 2 * in.pairs : 0, in.features});
  Tensor dweight = in.buffer({6 * in.features, in.features}), dbias = in.buffer({6 * in.features});
  in.dispatch(op, [&](auto zero) {
    using T = decltype(zero);
    Job<T> job(in);
    const int64_t F = job.F, wide = job.wide;
    job.job.grad = read<T>(grad);
    if (need_x) job.job.sides = write<T>(sides);
    const int64_t panels = (in.pairs + kMergePairs - 1) / kMergePairs;
    const int64_t parts = std::clamp<int64_t>(in.pairs / kPartPairs, 1, kMostParts);
    const int64_t size = ((6 * F + 4) * wide + 15) / 16 * 16;
    std::vector<T> memory;
    T* sums = job.make(memory, parts * size);
    job.over(op, parts, 1, true, [&](int64_t first, int64_t last, T* scratch) {
      MergeOutcome outcome{-1, 0};
      for (int64_t part = first; part < last && outcome.fault < 0; ++part) {
        const int64_t begin = panels * part / parts * kMergePairs, end = panels * (part + 1) / parts * kMergePairs;
        outcome = job.leaf.backward(job.job, begin, std::min(end, in.pairs), scratch, sums + part * size);
      }
      return outcome;
    });
    for (int64_t part = 1; part < parts; ++part)
      for (int64_t i = 0; i < size; ++i) sums[i] += sums[part * size + i];
    const auto row = [&](int64_t k, int64_t f) { return sums + (k * F + f) * wide; };
    for (int64_t k = 0; k < 6; ++k)
      for (int64_t f = 0; f < F; ++f) {
        T* to = write<T>(dweight) + (k * F + f) * F;
        if (k % 3 == 2)
          std::copy_n(row(k == 2 ? 4 : 5, f), F, to);
        else
          job.mix(row(k % 3, f), row(k % 3 + 2, f), k < 3 ? T(0.5) : T(-0.5), to);
      }
    for (int64_t k = 0; k < 6; ++k)
      std::copy_n(sums + 6 * F * wide + (k == 5 ? 3 : k % 3) * wide, F, write<T>(dbias) + k * F);
  });
  return {sides, dweight, dbias};
}

}  // namespace
}  // namespace geo

STABLE_TORCH_LIBRARY_IMPL(geo, CPU, m) {
  m.impl("gru_merge", TORCH_BOX(&geo::gru_merge_cpu));
  m.impl("gru_merge_backward", TORCH_BOX(&geo::gru_merge_backward_cpu));
}
