// CPU launchers of pair_mlp and pair_mlp_backward.
//
// Small graphs are taken whole, in lists of about equal work. The nodes of a large one are cut into blocks, and its pairs
// of blocks (I, J) are taken in rounds, I + J = r mod the number of blocks: in a round each block has one partner, so the
// tasks of a round add to rows of their own, and each row is added to in the order of the rounds. Gradients of weights are
// summed for each list, or place in a round, and these in order. All is cut by the sizes alone.
#include "../pair_mlp_args.h"

#include <torch/csrc/stable/library.h>

#include <memory>
#include <tuple>
#include <vector>

#include "pair_mlp_table.h"
#include "parallel.h"

namespace geo {
namespace {

constexpr int64_t kMostLists = 64;       // of graphs, and blocks of a large graph
constexpr int64_t kMostSumBytes = 32 << 20;  // of all lists
constexpr int64_t kListPairs = 1 << 12;  // of a list, at least
constexpr int64_t kBlock = 32;           // nodes of a block, at least
constexpr int64_t kShare = 16;           // a graph is large with one pair in so many

const PairMLPTable& table(float) { return choose_table(GEO_TABLES(pair_mlp_float)); }
const PairMLPTable& table(double) { return choose_table(GEO_TABLES(pair_mlp_double)); }

int64_t pairs_of(int64_t nodes) { return nodes * (nodes + 1) / 2; }

// Memory of T from a multiple of 64 bytes on, all 0.
template <class T>
class Buffer {
 public:
  T* get(int64_t size) {
    data_.assign(size + 64 / sizeof(T), T(0));
    return aligned(data_);
  }

 private:
  std::vector<T> data_;
};

// to[row] = from[row] filled up with zeros, or with kTurn from[:, row]
template <class T>
void fill_rows(T* to, const T* from, int64_t rows, int64_t columns, int64_t wide, bool turn) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) to[r * wide + c] = turn ? from[c * rows + r] : from[r * columns + c];
    std::fill(to + r * wide + columns, to + (r + 1) * wide, T(0));
  }
}

// The layers as the leaves read them, and the work cut into tasks.
template <class T>
struct Job {
  const PairMLPTable& leaf = table(T{});
  const PairMLPArgs& in;
  PairJob job{};
  std::vector<PairLayer> layers;
  int64_t sum_size = 0;
  std::vector<Buffer<T>> buffers;
  const int64_t* ptr;
  int64_t total = 0;              // pairs
  int64_t most_lists = kMostLists;
  int64_t lists = 0;              // of graphs, or places of a round: how many sums there are
  std::vector<int64_t> first{0};  // graphs of each list

  Job(const PairMLPArgs& inputs, bool backward, bool need_eigvecs) : in(inputs), ptr(index_data(inputs.ptr)) {
    const T* params = read<T>(in.params);
    int64_t widest = 0;
    for (int64_t l = 0; l < in.num_layers(); ++l) {
      PairLayer at{};
      at.in = in.widths[l];
      at.out = in.widths[l + 1];
      at.wide_in = wide(at.in);
      at.wide_out = wide(at.out);
      at.relu = l > 0 || in.leading;
      at.sum = sum_size;
      sum_size += (at.in + 1) * at.wide_out;
      widest = std::max({widest, at.wide_in, at.wide_out});
      const bool turned = backward && (l > 0 || need_eigvecs);
      T* bias = make(at.wide_out);
      if (l == 0) {
        at.weight = rows(read<T>(in.filters), in.graphs * at.in, at.out);
        if (turned) {
          T* to = make(in.graphs * at.out * at.wide_in);
          for (int64_t g = 0; g < in.graphs; ++g)
            fill_rows(to + g * at.out * at.wide_in, read<T>(in.filters) + g * at.in * at.out, at.out, at.in, at.wide_in, true);
          at.transposed = to;
        }
        if (in.leading) params = copy(params, at.out, bias);
      } else {
        T* weight = make(at.in * at.wide_out);
        fill_rows(weight, params, at.in, at.out, at.wide_out, true);
        at.weight = weight;
        if (turned) at.transposed = rows(params, at.out, at.in);
        params = copy(params + at.in * at.out, at.out, bias);
      }
      at.bias = bias;
      layers.push_back(at);
    }
    job.layers = layers.data();
    job.num_layers = in.num_layers();
    job.eigvecs = rows(read<T>(in.eigvecs), in.nodes, in.widths[0]);
    job.zeros = make(widest);
    if (backward)
      most_lists = std::clamp<int64_t>(kMostSumBytes / int64_t(sizeof(T)) / std::max<int64_t>(1, sum_size), 1, kMostLists);
    cut();
  }

  void cut() {
    for (int64_t g = 0; g < in.graphs; ++g) total += pairs_of(ptr[g + 1] - ptr[g]);
    const int64_t enough = std::max(kListPairs, total / most_lists + 1);
    int64_t pairs = 0;
    for (int64_t g = 0; g < in.graphs; ++g) {
      const int64_t n = ptr[g + 1] - ptr[g];
      if (large(g))
        lists = std::max(lists, places((n + block_size(n) - 1) / block_size(n)));
      else
        pairs += pairs_of(n);
      if (pairs < enough && g + 1 < in.graphs) continue;
      first.push_back(g + 1);
      pairs = 0;
    }
    lists = std::max(lists, int64_t(first.size()) - 1);
  }

  int64_t wide(int64_t width) const { return (width + leaf.lanes - 1) / leaf.lanes * leaf.lanes; }
  T* make(int64_t size) {
    buffers.emplace_back();
    return buffers.back().get(size);
  }
  // Rows as they stand, where they are whole vectors, or filled up.
  const T* rows(const T* from, int64_t count, int64_t width) {
    if (wide(width) == width) return from;
    T* to = make(count * wide(width));
    fill_rows(to, from, count, width, wide(width), false);
    return to;
  }
  static const T* copy(const T* from, int64_t size, T* to) {
    std::copy_n(from, size, to);
    return from + size;
  }

  bool large(int64_t graph) const {
    const int64_t n = ptr[graph + 1] - ptr[graph];
    return n >= 2 * kBlock && pairs_of(n) * kShare > total;
  }
  int64_t block_size(int64_t n) const {
    const int64_t most = std::min(kMostLists, 2 * most_lists - 1);  // of places, most_lists
    return std::max(kBlock, (n + most - 1) / most);
  }
  static int64_t places(int64_t blocks) { return blocks / 2 + 1; }

  // run(thread, list, block) for all blocks of pairs, with start(first, last) before those of a graph and
  // done(graph, first, last) behind them: the lists that they are in.
  template <class Run, class Start, class Done>
  void for_blocks(Run&& run, Start&& start, Done&& done) const {
    parallel_blocks(int64_t(first.size()) - 1, 1, [&](int64_t thread, int64_t begin, int64_t end) {
      for (int64_t list = begin; list < end; ++list)
        for (int64_t g = first[list]; g < first[list + 1]; ++g) {
          if (large(g)) continue;
          start(list, list + 1);
          run(thread, list, PairBlock{g, ptr[g], ptr[g + 1], ptr[g], ptr[g + 1]});
          done(g, list, list + 1);
        }
    });
    for (int64_t g = 0; g < in.graphs; ++g) {
      if (!large(g)) continue;
      const int64_t n = ptr[g + 1] - ptr[g], size = block_size(n), blocks = (n + size - 1) / size;
      const auto begin_of = [&](int64_t block) { return ptr[g] + std::min(n, block * size); };
      start(0, places(blocks));
      for (int64_t round = 0; round < blocks; ++round) {
        std::vector<PairBlock> tasks;
        for (int64_t i = 0; i < blocks; ++i) {
          const int64_t j = (round + blocks - i) % blocks;
          if (i <= j) tasks.push_back({g, begin_of(i), begin_of(i + 1), begin_of(j), begin_of(j + 1)});
        }
        parallel_blocks(int64_t(tasks.size()), 1, [&](int64_t thread, int64_t begin, int64_t end) {
          for (int64_t place = begin; place < end; ++place) run(thread, place, tasks[place]);
        });
      }
      done(g, 0, places(blocks));
    }
  }
};

// Where rows of vectors are written: the tensor itself, or a buffer that is copied to it in the end.
template <class T>
class Rows {
 public:
  Rows(const Tensor& to, int64_t rows, int64_t width, int64_t wide) : to_(write<T>(to)), rows_(rows), width_(width), wide_(wide) {
    if (wide != width) data = buffer_.get(rows * wide);
    else std::fill_n(data = to_, rows * width, T(0));
  }
  void finish() const {
    for (int64_t r = 0; wide_ != width_ && r < rows_; ++r) std::copy_n(data + r * wide_, width_, to_ + r * width_);
  }
  T* data;

 private:
  Buffer<T> buffer_;
  T* to_;
  int64_t rows_, width_, wide_;
};

Tensor pair_mlp_cpu(const Tensor& eigvecs, const Tensor& filters, const Tensor& ptr, const Tensor& params,
                    std::vector<int64_t> widths, bool leading) {
  constexpr const char* op = "pair_mlp";
  const PairMLPArgs in(op, eigvecs, filters, ptr, params, widths, leading);
  check_ptr(op, index_data(in.ptr), in.graphs, in.nodes);
  Tensor out = in.buffer({in.nodes, in.widths.back()});
  if (out.numel() == 0) return out;
  in.dispatch(op, [&](auto zero) {
    using T = decltype(zero);
    Job<T> job(in, false, false);
    Rows<T> rows(out, in.nodes, in.widths.back(), job.wide(in.widths.back()));
    job.job.out = rows.data;
    std::vector<Buffer<T>> memory(torch::stable::get_num_threads());
    std::vector<T*> scratch(memory.size());
    job.for_blocks(
        [&](int64_t thread, int64_t, const PairBlock& block) {
          if (!scratch[thread]) scratch[thread] = memory[thread].get(job.leaf.scratch(job.job, false));
          job.leaf.forward(job.job, block, scratch[thread]);
        },
        [](int64_t, int64_t) {}, [](int64_t, int64_t, int64_t) {});
    rows.finish();
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> pair_mlp_backward_cpu(const Tensor& grad_, const Tensor& eigvecs,
                                                         const Tensor& filters, const Tensor& ptr, const Tensor& params,
                                                         std::vector<int64_t> widths, bool leading, bool need_eigvecs) {
  constexpr const char* op = "pair_mlp_backward";
  const PairMLPArgs in(op, eigvecs, filters, ptr, params, widths, leading);
  check_ptr(op, index_data(in.ptr), in.graphs, in.nodes);
  const Tensor grad = in.grad(op, grad_);
  Tensor deigvecs = need_eigvecs ? in.buffer({in.nodes, in.widths[0]}) : in.buffer({0});
  Tensor dfilters = in.buffer({in.graphs, in.widths[0], in.widths[1]}), dparams = in.buffer({in.params.numel()});
  in.dispatch(op, [&](auto zero) {
    using T = decltype(zero);
    Job<T> job(in, true, need_eigvecs);
    const PairLayer& head = job.layers[0];
    Rows<T> rows(deigvecs, need_eigvecs ? in.nodes : 0, head.in, head.wide_in);
    job.job.deigvecs = rows.data;
    job.job.grad = job.rows(read<T>(grad), in.nodes, in.widths.back());
    const int64_t size = (job.sum_size + 15) / 16 * 16, head_size = head.in * head.wide_out;
    Buffer<T> memory_of_sums;
    T* sums = memory_of_sums.get(std::max<int64_t>(1, job.lists) * size);
    std::vector<Buffer<T>> memory(torch::stable::get_num_threads());
    std::vector<T*> scratch(memory.size());
    job.for_blocks(
        [&](int64_t thread, int64_t list, const PairBlock& block) {
          if (!scratch[thread]) scratch[thread] = memory[thread].get(job.leaf.scratch(job.job, true));
          job.leaf.backward(job.job, block, scratch[thread], sums + list * size);
        },
        [&](int64_t first, int64_t last) {  // the filters' gradient is that of one graph
          for (int64_t list = first; list < last; ++list) std::fill_n(sums + list * size, head_size, T(0));
        },
        [&](int64_t graph, int64_t first, int64_t last) {
          T *total = sums + first * size, *to = write<T>(dfilters) + graph * head.in * head.out;
          for (int64_t list = first + 1; list < last; ++list)
            for (int64_t i = 0; i < head_size; ++i) total[i] += sums[list * size + i];
          for (int64_t r = 0; r < head.in; ++r) std::copy_n(total + r * head.wide_out, head.out, to + r * head.out);
        });
    if (need_eigvecs) rows.finish();
    for (int64_t list = 1; list < job.lists; ++list)
      for (int64_t i = head_size; i < job.sum_size; ++i) sums[i] += sums[list * size + i];
    T* to = write<T>(dparams);
    for (int64_t l = in.leading ? 0 : 1; l < in.num_layers(); ++l) {
      const PairLayer& at = job.layers[l];
      const T* sum = sums + at.sum;
      for (int64_t f = 0; l && f < at.out; ++f)
        for (int64_t c = 0; c < at.in; ++c) *to++ = sum[c * at.wide_out + f];
      to = std::copy_n(sum + at.in * at.wide_out, at.out, to);
    }
  });
  return {deigvecs, dfilters, dparams};
}

}  // namespace
}  // namespace geo

STABLE_TORCH_LIBRARY_IMPL(geo, CPU, m) {
  m.impl("pair_mlp", TORCH_BOX(&geo::pair_mlp_cpu));
  m.impl("pair_mlp_backward", TORCH_BOX(&geo::pair_mlp_backward_cpu));
}
