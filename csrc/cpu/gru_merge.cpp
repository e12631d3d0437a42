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
constexpr int64_t kMostSumBytes = 32 << 20;  // of all parts

const GRUMergeTable& table(float) { return choose_table(GEO_TABLES(gru_merge_float)); }
const GRUMergeTable& table(double) { return choose_table(GEO_TABLES(gru_merge_double)); }

// The job as the leaves read it.
template <class T>
struct Job {
  const GRUMergeTable& leaf = table(T{});
  const GRUMergeArgs& in;
  const int64_t F, L = leaf.lanes, wide;
  GRUMergeJob job{};
  const T* const w;
  std::vector<T> weight, bias, back;

  Job(const GRUMergeArgs& inputs, bool backward)
      : in(inputs), F(in.features), wide((F + L - 1) / L * L), w(read<T>(in.weight)) {
    job.features = F;
    job.wide = wide;
    job.rows = in.rows;
    job.pairs = in.pairs;
    job.left = index_data(in.left);
    job.right = index_data(in.right);
    job.x = read<T>(in.x);
    T *to = make(weight, 6 * wide * F), *biases = make(bias, 4 * wide);
    std::vector<T> rows(L * F);
    for (int64_t f = 0; f < F; f += L)
      for (int64_t k = 0; k < 6; ++k) {
        const int64_t count = std::min(L, F - f), step = (k < 4 ? 4 : 2) * L;
        for (int64_t i = 0; i < count; ++i) copy_row(k, f + i, rows.data() + i * F);
        T* at = to + (f * 6 + (k < 4 ? 0 : 4 * L)) * F + k % 4 * L;
        for (int64_t d = 0; d < F; ++d, at += step)
          for (int64_t i = 0; i < count; ++i) at[i] = rows[i * F + d];
      }
    job.weight = to;
    const T* b = read<T>(in.bias);
    for (int64_t f = 0; f < F; ++f) {
      T* at = biases + f / L * 4 * L + f % L;
      at[0] = b[f] + b[3 * F + f];
      at[L] = b[F + f] + b[4 * F + f];
      at[2 * L] = b[2 * F + f];
      at[3 * L] = b[5 * F + f];
    }
    job.bias = biases;
    if (!backward) return;
    job.back = to = make(back, 6 * F * wide);
    for (int64_t i = 0; i < 6 * F; ++i) copy_row(i / F, i % F, to + i * wide);
  }

  // Row f of matrix k.
  void copy_row(int64_t k, int64_t f, T* to) const {
    const auto row = [&](int64_t gate) { return w + (gate * F + f) * F; };
    if (k >= 4)
      std::copy_n(row(k == 4 ? 2 : 5), F, to);
    else
      mix(row(k % 2), row(3 + k % 2), k < 2 ? T(0.5) : T(-0.5), to);
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
      if (outcome.fault >= 0) faults.add(0, 2 * outcome.position + outcome.fault);
    });
    const Found found = faults.first();
    if (found.fault == kNoFault) return;
    const int64_t position = found.position / 2;
    const bool right = found.position % 2;
    raise_out_of_range(op, right ? "right" : "left", position, (right ? job.right : job.left)[position], 0, in.rows - 1);
  }
};

Tensor gru_merge_cpu(const Tensor& x, const Tensor& left, const Tensor& right, const Tensor& weight, const Tensor& bias) {
  constexpr const char* op = "gru_merge";
  const GRUMergeArgs in(op, x, left, right, weight, bias);
  Tensor out = in.buffer({in.pairs, in.features});
  in.dispatch(op, [&](auto zero) {
    using T = decltype(zero);
    Job<T> job(in, false);
    job.job.out = write<T>(out);
    job.over(op, in.pairs, kBlock, false, [&](int64_t begin, int64_t end, T* scratch) {
      return job.leaf.forward(job.job, begin, end, scratch);
    });
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> gru_merge_backward_cpu(const Tensor& grad_, const Tensor& x, const Tensor& left,
                                                          const Tensor& right, const Tensor& weight, const Tensor& bias,
                                                          bool need_x, bool need_weights) {
  constexpr const char* op = "gru_merge_backward";
  const GRUMergeArgs in(op, x, left, right, weight, bias);
  const Tensor grad = in.grad(op, grad_);
  const int64_t gates = need_weights ? 6 * in.features : 0;
  Tensor sides = in.buffer({need_x ? 2 * in.pairs : 0, in.features});
  Tensor dweight = in.buffer({gates, in.features}), dbias = in.buffer({gates});
  in.dispatch(op, [&](auto zero) {
    using T = decltype(zero);
    Job<T> job(in, need_x);
    const int64_t F = job.F, wide = job.wide;
    job.job.grad = read<T>(grad);
    if (need_x) job.job.sides = write<T>(sides);
    const int64_t size = need_weights ? ((6 * F + 4) * wide + 15) / 16 * 16 : 0;
    const int64_t most = std::clamp<int64_t>(kMostSumBytes / int64_t(sizeof(T)) / std::max<int64_t>(size, 1), 1, kMostParts);
    const int64_t panels = (in.pairs + kMergePairs - 1) / kMergePairs;
    const int64_t parts = std::clamp<int64_t>(in.pairs / kPartPairs, 1, most);
    std::vector<T> memory;
    T* sums = need_weights ? job.make(memory, parts * size) : nullptr;
    job.over(op, parts, 1, true, [&](int64_t first, int64_t last, T* scratch) {
      MergeOutcome outcome{-1, 0};
      for (int64_t part = first; part < last && outcome.fault < 0; ++part) {
        const int64_t begin = panels * part / parts * kMergePairs, end = panels * (part + 1) / parts * kMergePairs;
        T* to = need_weights ? sums + part * size : nullptr;
        outcome = job.leaf.backward(job.job, begin, std::min(end, in.pairs), scratch, to);
      }
      return outcome;
    });
    if (!need_weights) return;
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
