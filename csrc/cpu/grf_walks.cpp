// CPU launchers of grf_walks and grf_paths: batches of starts whose walks go in lockstep, and what they leave, sorted.
#include <torch/csrc/stable/library.h>

#include <memory>
#include <optional>
#include <vector>

#include "grf_walks_table.h"
#include "parallel.h"

namespace geo {
namespace {

const GrfTable& table() { return choose_table(GEO_TABLES(grf_walks)); }

constexpr int64_t kBatch = 256;  // walks in lockstep, where a start has no more
constexpr int64_t kLeastChunk = int64_t(1) << 16, kMostChunk = int64_t(1) << 24;  // bytes of results
constexpr int64_t kMaxCount = INT64_C(0x7fffffff);  // of nodes, and of what one batch leaves

template <class P>
constexpr int kKind = 0;  // place in the table
template <>
constexpr int kKind<double> = 1;
template <>
constexpr int kKind<int64_t> = 2;

// The arguments of both ops.
struct GrfArgs {
  GrfGraph graph{};
  WalkLaws laws{};
  const char* op;
  Tensor rowptr, col, start, halt_below;
  std::optional<Tensor> node_key, walk, units;
  int64_t num_walks, per_start, first_walk, max_length, flags;
  bool packed = false;
};

std::optional<Tensor> contiguous_if_any(const std::optional<Tensor>& t) {
  if (!t) return std::nullopt;
  return made_contiguous(*t);
}

GrfArgs checked(const char* op, const Tensor& rowptr, const Tensor& col, const Tensor& start,
                const std::optional<Tensor>& node_key, const std::optional<Tensor>& walk,
                const std::optional<Tensor>& units, const Tensor& halt_below, int64_t num_walks, int64_t seed,
                int64_t first_walk, int64_t max_length, int64_t flags) {
  check_index_dtype(rowptr, op, "rowptr");
  check_index_dtype(col, op, "col");
  check_index_dtype(start, op, "start");
  check_index_dtype(halt_below, op, "halt_below");
  STD_TORCH_CHECK(rowptr.numel() > 0, op, ": rowptr must not be empty");
  STD_TORCH_CHECK(halt_below.numel() > 0, op, ": halt_below must not be empty");
  STD_TORCH_CHECK(num_walks > 0 && max_length >= 0, op, ": num_walks must be positive and max_length not negative");
  GrfArgs args{};
  args.op = op;
  args.rowptr = made_contiguous(rowptr);
  args.col = made_contiguous(col);
  args.start = made_contiguous(start);
  args.halt_below = made_contiguous(halt_below);
  args.node_key = contiguous_if_any(node_key);
  args.walk = contiguous_if_any(walk);
  args.units = contiguous_if_any(units);
  args.graph.num_nodes = rowptr.numel() - 1;
  args.graph.num_edges = col.numel();
  const auto check_size = [&](const std::optional<Tensor>& t, const char* name, int64_t size) {
    if (!t) return;
    check_index_dtype(*t, op, name);
    STD_TORCH_CHECK(t->numel() == size, op, ": ", name, " must have ", size, " entries, got ", t->numel());
  };
  check_size(args.node_key, "node_key", args.graph.num_nodes);
  check_size(args.units, "units", args.graph.num_edges);
  check_size(args.walk, "walk", start.numel());
  args.graph.node_key = args.node_key ? index_data(*args.node_key) : nullptr;
  args.graph.units = args.units ? index_data(*args.units) : nullptr;
  args.laws.seed = uint64_t(seed);
  args.num_walks = num_walks;
  args.per_start = walk ? 1 : num_walks;
  args.first_walk = first_walk;
  args.max_length = max_length;
  args.flags = flags;
  STD_TORCH_CHECK(args.graph.num_nodes < kMaxCount && args.per_start < kMaxCount, op,
                  ": not implemented for 2^31 nodes or walks of a start");
  return args;
}

// The steps to expect, roughly.
double expected_steps(const GrfArgs& args) {
  const double halt = double(index_data(args.halt_below)[0]) / double(kProbabilityOne);
  const double steps = std::min(double(args.max_length), (1 - halt) / std::max(halt, 1e-9));
  return double(args.start.numel()) * double(args.per_start) * steps;
}

// A copy of the graph that takes one cache line a step, with the factors of the loads; P = int64: without. To make it
// reads each edge once, in order: dearer than a step that it makes cheaper, and steps are many.
template <class P>
struct PackedEdge {
  uint32_t col;
  P factor;
};
template <>
struct PackedEdge<int64_t> {
  uint32_t col;
};
struct PackedGraph {
  std::unique_ptr<uint32_t[]> ptr;
  std::unique_ptr<char[]> edges;
};

template <class P>
PackedGraph pack(GrfArgs& args, const void* weight_) {
  GrfGraph& graph = args.graph;
  const int64_t num_nodes = graph.num_nodes, num_edges = graph.num_edges;
  const int64_t *from_ptr = index_data(args.rowptr), *from_col = index_data(args.col);
  graph.ptr = from_ptr;
  graph.edges = from_col;
  graph.edge_bytes = sizeof(int64_t);
  graph.weight = weight_;
  args.packed = num_edges < UINT32_MAX && expected_steps(args) * 4 >= double(num_edges + num_nodes);
  if (!args.packed) return {};
  Faults faults;  // rows that overlap have no factors of their own: walks look at such a graph itself
  parallel_blocks(num_nodes, int64_t(1) << 13, [&](int64_t, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      if (from_ptr[i] > from_ptr[i + 1]) return faults.add(kBadRowptr, i);
  });
  args.packed = faults.first().fault == kNoFault && from_ptr[0] >= 0 && from_ptr[num_nodes] <= num_edges;
  if (!args.packed) return {};
  PackedGraph to{std::unique_ptr<uint32_t[]>(new uint32_t[num_nodes + 1]),
                 std::unique_ptr<char[]>(new char[num_edges * sizeof(PackedEdge<P>)])};
  PackedEdge<P>* edges = reinterpret_cast<PackedEdge<P>*>(to.edges.get());
  advise_huge_pages(to.ptr.get(), num_nodes * int64_t(sizeof(uint32_t)));
  advise_huge_pages(edges, num_edges * int64_t(sizeof(PackedEdge<P>)));
  const auto inside = [](int64_t value, int64_t end) {
    return uint64_t(value) < uint64_t(end) ? uint32_t(value) : UINT32_MAX;
  };
  parallel_blocks(num_nodes + 1, int64_t(1) << 13, [&](int64_t, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      to.ptr[i] = uint32_t(from_ptr[i]);
      if constexpr (!std::is_same_v<P, int64_t>) {
        if (i == num_nodes) continue;
        const P* weight = static_cast<const P*>(weight_);
        const int64_t begin = from_ptr[i], end = from_ptr[i + 1];
        for (int64_t e = begin; e < end; ++e)
          edges[e] = {inside(from_col[e], num_nodes),
                      weight[e] * over_probability<P>(graph.units, begin, end - begin, e)};
      }
    }
  });
  if constexpr (std::is_same_v<P, int64_t>)
    parallel_blocks(num_edges, int64_t(1) << 16, [&](int64_t, int64_t first, int64_t last) {
      for (int64_t e = first; e < last; ++e) edges[e] = {inside(from_col[e], num_nodes)};
    });
  graph.ptr = to.ptr.get();
  graph.edges = edges;
  graph.edge_bytes = sizeof(PackedEdge<P>);
  return to;
}

// Memory that grows and is not cleared.
template <class T>
class Buffer {
 public:
  T* reserve(int64_t count, int64_t kept = 0) {
    if (count + kGrfPad > size_) {
      const int64_t size = std::max(2 * size_, count + kGrfPad);
      std::unique_ptr<char[]> data(new char[size * sizeof(T) + 64]);
      T* first = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(data.get()) + 63) & ~uintptr_t(63));
      std::copy_n(first_, kept, first);
      data_ = std::move(data);
      first_ = first;
      size_ = size;
    }
    return first_;
  }
  T* data() const { return first_; }

 private:
  std::unique_ptr<char[]> data_;
  T* first_ = nullptr;
  int64_t size_ = 0;
};

// What the walks of one batch have left.
struct Run {
  int64_t first_start;
  int64_t count;
  const void* entries;
};

// One thread's walks.
template <class P>
class Walks {
 public:
  explicit Walks(const GrfArgs& args) : args_(args) {
    const int64_t starts = std::max<int64_t>(1, kBatch / args.per_start), count = starts * args.per_start;
    batch_.key = key_.reserve(count);
    batch_.walk = walk_.reserve(count);
    batch_.decider = decider_.reserve(count);
    batch_.choice = choice_.reserve(count);
    batch_.halt = halt_.reserve(count);
    batch_.owner = owner_.reserve(count);
    batch_.from = from_.reserve(count);
    batch_.begin = begin_.reserve(count);
    batch_.degree = degree_.reserve(count);
    batch_.edge = edge_.reserve(count);
    // vectors draw for what stands behind the walks, too
    for (uint64_t* words : {batch_.key, batch_.walk, batch_.decider}) std::fill_n(words, count + kGrfPad, 0);
    if (args.flags & kRepelling) {
      batch_.target = target_.reserve(count);
      batch_.place = place_.reserve(count);
      batch_.first = first_.reserve(count);
      batch_.before = before_.reserve(count);
      batch_.chain = chain_.reserve(count);
      batch_.num_heads = 64;
      while (batch_.num_heads < count && batch_.num_heads < 1 << 16) batch_.num_heads *= 2;
      batch_.head = head_.reserve(batch_.num_heads);
    }
  }

  static int64_t starts_of_batch(const GrfArgs& args) { return std::max<int64_t>(1, kBatch / args.per_start); }

  // The walks of the starts first..last - 1. Rows of records: a start's (loads), or a walk's (paths).
  Outcome run(int64_t first, int64_t last) {
    constexpr bool kPaths = std::is_same_v<P, int64_t>;
    const int64_t per_start = args_.per_start, count = (last - first) * per_start;
    const int64_t* start = index_data(args_.start);
    const int64_t* halt_below = index_data(args_.halt_below);
    const GrfGraph& graph = args_.graph;
    GrfBatch batch = batch_;
    reserve(count, 0);
    int64_t i = 0;
    for (int64_t s = first; s < last; ++s) {
      const int64_t node = start[s];
      if (uint64_t(node) >= uint64_t(graph.num_nodes)) return {kBadStart, s};
      const uint64_t key = uint64_t(graph.node_key ? graph.node_key[node] : node);
      for (int64_t k = 0; k < per_start; ++k, ++i) {
        const uint64_t walk = uint64_t(args_.walk ? index_data(*args_.walk)[s] : k);
        const uint64_t number = uint64_t(args_.first_walk) + walk;
        batch.key[i] = key;
        batch.walk[i] = number;
        batch.decider[i] = halt_decider(number, walk, uint64_t(args_.num_walks), args_.flags & kAntithetic);
        batch.owner[i] = uint32_t(s - first);
        node_.data()[i] = uint32_t(node);
        row_.data()[i] = uint32_t(kPaths ? i : s - first);
        payload_.data()[i] = kPaths ? P(-1) : P(1);
      }
    }
    offset_.assign({0, count});
    const bool slot = !(args_.flags & (kRepelling | kRendezvous)) && !graph.units;
    Outcome outcome{-1, 0};
    for (int64_t step = 0; step < args_.max_length; ++step) {
      const int64_t begin = offset_[step], alive = offset_[step + 1] - begin;
      reserve(offset_[step + 1] + alive, offset_[step + 1]);
      batch.node = node_.data() + begin;
      batch.row = row_.data() + begin;
      batch.payload = payload_.data() + begin;
      const uint64_t below = uint64_t(halt_below[std::min(step, args_.halt_below.numel() - 1)]);
      table_.draw(batch, alive, args_.laws.seed, uint64_t(step), args_.flags & kAntithetic);
      const int64_t left = table_.depart[args_.packed][slot](graph, batch, alive, below, args_.flags, &outcome);
      if (left == 0 || outcome.fault >= 0) break;
      if (!slot) table_.choose[args_.packed](graph, batch, left, args_.flags);
      table_.follow[args_.packed][kKind<P>](graph, batch, left, alive, over_survival<double>(below), &outcome);
      if (outcome.fault >= 0) break;
      offset_.push_back(offset_.back() + left);
      STD_TORCH_CHECK(offset_.back() < kMaxCount, args_.op, ": the walks of one start take 2^31 steps");
    }
    return outcome;
  }

  // Records in order of row, then of length.
  const int32_t* sort_by_row(int64_t num_rows) {
    const int64_t total = offset_.back();
    int32_t* row_ptr = row_ptr_.reserve(num_rows + 1);
    std::fill_n(row_ptr, num_rows + 1, 0);
    const uint32_t* row = row_.data();
    constexpr bool kPaths = std::is_same_v<P, int64_t>;
    // all walks of a start are there at first: one record, with the sum of their loads
    const int64_t first = kPaths ? 0 : offset_[1];
    for (int64_t i = first; i < total; ++i) ++row_ptr[row[i] + 1];
    for (int64_t i = 0; i < num_rows; ++i) row_ptr[i + 1] += row_ptr[i] + !kPaths;
    std::copy_n(row_ptr, num_rows, next_.reserve(num_rows));
    GrfBuckets& to = buckets_;
    to = {bucket_node_.reserve(total), bucket_length_.reserve(total), bucket_payload_.reserve(total), next_.data()};
    if constexpr (!kPaths)
      for (int64_t i = 0; i < num_rows; ++i) {
        const int32_t at = to.next[i]++;
        to.node[at] = node_.data()[i * args_.per_start];
        to.length[at] = 0;
        static_cast<P*>(to.payload)[at] = P(args_.per_start);
      }
    GrfBatch batch{};
    for (size_t length = !kPaths; length + 1 < offset_.size(); ++length) {
      batch.node = node_.data() + offset_[length];
      batch.row = row_.data() + offset_[length];
      batch.payload = payload_.data() + offset_[length];
      table_.bucket[kKind<P>](batch, to, offset_[length + 1] - offset_[length], int32_t(length));
    }
    return row_ptr;
  }

  // Deposits of the batch that begins at this start; counts[i]: those of its start i.
  void deposit(int64_t first_start, int64_t num_starts, int64_t* counts) {
    if constexpr (!std::is_same_v<P, int64_t>) {
      const int32_t* row_ptr = sort_by_row(num_starts);
      int32_t longest = 0;
      for (int64_t i = 0; i < num_starts; ++i) longest = std::max(longest, row_ptr[i + 1] - row_ptr[i]);
      uint64_t* scratch = scratch_.reserve(2 * int64_t(longest));
      char* to = room(row_ptr[num_starts] * int64_t(sizeof(GrfEntry<P>)));
      const int64_t count = table_.coalesce[kKind<P>](buckets_, row_ptr, num_starts, args_.graph.num_nodes,
                                                      double(args_.num_walks), scratch, to, counts);
      keep(first_start, count, to, count * int64_t(sizeof(GrfEntry<P>)));
    }
  }

  // Paths of the batch; counts[i]: nodes of its path i.
  void path(int64_t first_start, int64_t num_starts, int64_t* counts) {
    const int64_t num_paths = num_starts * args_.per_start;
    const int32_t* row_ptr = sort_by_row(num_paths);
    const int64_t count = row_ptr[num_paths];
    for (int64_t i = 0; i < num_paths; ++i) counts[i] = row_ptr[i + 1] - row_ptr[i];
    char* to = room(count * 12);
    std::copy_n(static_cast<const int64_t*>(buckets_.payload), count, reinterpret_cast<int64_t*>(to));
    std::copy_n(buckets_.node, count, reinterpret_cast<uint32_t*>(to + count * 8));
    keep(first_start, count, to, count * 12);
  }

  std::vector<Run> runs;

 private:
  void reserve(int64_t count, int64_t kept) {
    node_.reserve(count, kept);
    row_.reserve(count, kept);
    payload_.reserve(count, kept);
  }
  char* room(int64_t bytes) {
    if (bytes > left_) {
      left_ = std::max(bytes, std::clamp(chunk_bytes_, kLeastChunk, kMostChunk));
      chunk_bytes_ += left_;
      chunks_.emplace_back(new char[left_]);
      next_byte_ = chunks_.back().get();
      advise_huge_pages(next_byte_, left_);
    }
    return next_byte_;
  }
  void keep(int64_t first_start, int64_t count, const void* entries, int64_t bytes) {
    bytes = (bytes + 7) & ~int64_t(7);
    runs.push_back({first_start, count, entries});
    next_byte_ += std::min(bytes, left_);
    left_ -= std::min(bytes, left_);
  }

  const GrfArgs& args_;
  const GrfTable& table_ = table();
  GrfBatch batch_{};
  GrfBuckets buckets_{};
  Buffer<uint64_t> key_, walk_, decider_, choice_, halt_, scratch_;
  Buffer<uint32_t> owner_, from_, node_, row_, bucket_node_;
  Buffer<int64_t> begin_, degree_, edge_, target_;
  Buffer<int32_t> place_, first_, before_, chain_, head_, bucket_length_, row_ptr_, next_;
  Buffer<P> payload_, bucket_payload_;
  std::vector<int64_t> offset_;  // where the records of each length begin
  std::vector<std::unique_ptr<char[]>> chunks_;
  char* next_byte_ = nullptr;
  int64_t left_ = 0, chunk_bytes_ = 0;
};

// All walks; counts behind the first entry of ptr become its running sums. Returns what the threads keep.
template <class P, class Finish>
std::vector<std::unique_ptr<Walks<P>>> walk_all(const GrfArgs& args, int64_t rows_of_start, int64_t* ptr,
                                                Finish finish) {
  const int64_t num_starts = args.start.numel(), batch = Walks<P>::starts_of_batch(args);
  const int64_t block = batch * std::max<int64_t>(1, 4096 / (batch * args.per_start));
  std::vector<std::unique_ptr<Walks<P>>> walks(max_threads(num_starts, block));
  Faults faults;
  parallel_blocks(num_starts, block, [&](int64_t thread, int64_t begin, int64_t end) {
    if (!walks[thread]) walks[thread].reset(new Walks<P>(args));
    for (int64_t first = begin; first < end; first += batch) {
      const int64_t last = std::min(first + batch, end);
      const Outcome outcome = walks[thread]->run(first, last);
      faults.add(outcome.fault, outcome.position);
      if (outcome.fault < 0) finish(*walks[thread], first, last - first, ptr + 1 + first * rows_of_start);
    }
  });
  const Found found = faults.first();
  const int64_t at = found.position;
  const int64_t* rowptr = index_data(args.rowptr);
  if (found.fault == kBadStart)
    raise_out_of_range(args.op, "start", at, index_data(args.start)[at], 0, args.graph.num_nodes - 1);
  if (found.fault == kBadRowptr)
    raise_out_of_range(args.op, "rowptr", at, rowptr[at], at ? rowptr[at - 1] : 0, args.graph.num_edges);
  if (found.fault == kBadCol)
    raise_out_of_range(args.op, "col", at, index_data(args.col)[at], 0, args.graph.num_nodes - 1);
  ptr[0] = 0;
  for (int64_t i = 0; i < num_starts * rows_of_start; ++i) ptr[i + 1] += ptr[i];
  return walks;
}

template <class P, class Copy>
void copy_runs(const std::vector<std::unique_ptr<Walks<P>>>& walks, Copy copy) {
  std::vector<Run> runs;
  for (const auto& part : walks)
    if (part) runs.insert(runs.end(), part->runs.begin(), part->runs.end());
  parallel_blocks(int64_t(runs.size()), 16, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) copy(runs[i]);
  });
}

template <class P>
std::tuple<Tensor, Tensor, Tensor, Tensor> deposits(GrfArgs& args, const Tensor& weight) {
  const int64_t num_starts = args.start.numel();
  Tensor ptr = torch::stable::new_empty(args.start, {num_starts + 1});
  PackedGraph packed = pack<P>(args, weight.const_data_ptr());
  const auto walks = walk_all<P>(
      args, 1, write<int64_t>(ptr),
      [](Walks<P>& part, int64_t first, int64_t count, int64_t* counts) { part.deposit(first, count, counts); });
  packed = {};
  const int64_t total = index_data(ptr)[num_starts];
  Tensor col = torch::stable::new_empty(args.start, {total});
  Tensor length = torch::stable::new_empty(args.start, {total}, ScalarType::Int);
  Tensor value = torch::stable::new_empty(weight, {total});
  advise_huge_pages(write<int64_t>(col), total * 8);
  advise_huge_pages(write<int32_t>(length), total * 4);
  advise_huge_pages(write<P>(value), total * int64_t(sizeof(P)));
  copy_runs(walks, [&](const Run& run) {
    const GrfEntry<P>* from = static_cast<const GrfEntry<P>*>(run.entries);
    const int64_t first = index_data(ptr)[run.first_start];
    int64_t* to_col = write<int64_t>(col) + first;
    int32_t* to_length = write<int32_t>(length) + first;
    P* to_value = write<P>(value) + first;
    for (int64_t i = 0; i < run.count; ++i) {
      to_col[i] = from[i].col;
      to_length[i] = from[i].length;
      to_value[i] = from[i].value;
    }
  });
  return {ptr, col, length, value};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> grf_walks_cpu(
    const Tensor& rowptr, const Tensor& col, const Tensor& start, const Tensor& weight_,
    const std::optional<Tensor>& node_key, const std::optional<Tensor>& units, const Tensor& halt_below,
    int64_t num_walks, int64_t seed, int64_t first_walk, int64_t max_length, int64_t flags) {
  GrfArgs args = checked("grf_walks", rowptr, col, start, node_key, std::nullopt, units, halt_below, num_walks, seed,
                         first_walk, max_length, flags);
  STD_TORCH_CHECK(weight_.dim() == 1 && weight_.numel() == col.numel(),
                  "grf_walks: weight must have one entry per edge");
  const Tensor weight = made_contiguous(weight_);
  if (weight.scalar_type() == ScalarType::Float) return deposits<float>(args, weight);
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Double, "grf_walks: weight must be float32 or float64");
  return deposits<double>(args, weight);
}

std::tuple<Tensor, Tensor, Tensor> grf_paths_cpu(const Tensor& rowptr, const Tensor& col, const Tensor& start,
                                                 const std::optional<Tensor>& node_key,
                                                 const std::optional<Tensor>& walk,
                                                 const std::optional<Tensor>& units, const Tensor& halt_below,
                                                 int64_t num_walks, int64_t seed, int64_t first_walk,
                                                 int64_t max_length, int64_t flags) {
  GrfArgs args = checked("grf_paths", rowptr, col, start, node_key, walk, units, halt_below, num_walks, seed,
                         first_walk, max_length, flags);
  STD_TORCH_CHECK(!walk || !(flags & kRepelling), "grf_paths: walk cannot be given for repelling walks");
  const int64_t num_starts = start.numel(), per_start = args.per_start;
  Tensor ptr = torch::stable::new_empty(args.start, {num_starts * per_start + 1});
  PackedGraph packed = pack<int64_t>(args, nullptr);
  const auto walks = walk_all<int64_t>(
      args, per_start, write<int64_t>(ptr),
      [](Walks<int64_t>& part, int64_t first, int64_t count, int64_t* counts) { part.path(first, count, counts); });
  packed = {};
  const int64_t total = index_data(ptr)[num_starts * per_start];
  Tensor node = torch::stable::new_empty(args.start, {total}), edge = torch::stable::new_empty(args.start, {total});
  advise_huge_pages(write<int64_t>(node), total * 8);
  advise_huge_pages(write<int64_t>(edge), total * 8);
  copy_runs(walks, [&](const Run& run) {
    const int64_t first = index_data(ptr)[run.first_start * per_start];
    const int64_t* edges = static_cast<const int64_t*>(run.entries);
    const uint32_t* nodes = reinterpret_cast<const uint32_t*>(edges + run.count);
    std::copy_n(edges, run.count, write<int64_t>(edge) + first);
    std::copy_n(nodes, run.count, write<int64_t>(node) + first);
  });
  return {ptr, node, edge};
}

}  // namespace
}  // namespace geo

STABLE_TORCH_LIBRARY_IMPL(geo, CPU, m) {
  m.impl("grf_walks", TORCH_BOX(&geo::grf_walks_cpu));
  m.impl("grf_paths", TORCH_BOX(&geo::grf_paths_cpu));
}
