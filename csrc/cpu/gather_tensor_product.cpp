// CPU launchers of gather_tensor_product_segment_sum and gather_tensor_product_grad.
#include "../gather_tensor_product.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "../gather_linear.h"
#include "gather_tensor_product_table.h"
#include "parallel.h"

namespace geo {
namespace {

const GatherProductTable<float>& table(float) { return choose_table(GEO_TABLES(gather_product_float)); }
const GatherProductTable<double>& table(double) { return choose_table(GEO_TABLES(gather_product_double)); }
const GatherProductTable<bfloat16>& table(bfloat16) { return choose_table(GEO_TABLES(gather_product_bfloat16)); }
const GatherProductTable<float16>& table(float16) { return choose_table(GEO_TABLES(gather_product_float16)); }

constexpr int64_t kRowsPerEdge = 8;  // of a chunk (gather_linear.h): an edge is at least as much work as so many rows there

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// The blocks of one end's rows, each listed once, and their places in packed rows.
class Blocks {
 public:
  explicit Blocks(int64_t lanes) : lanes_(lanes) {}

  const ProductBlock& add(const char* op, int64_t first, int64_t mul, int64_t d) {
    const auto place = std::lower_bound(list_.begin(), list_.end(), first,
                                        [](const ProductBlock& b, int64_t column) { return b.first < column; });
    if (place != list_.end() && place->first == first) {
      STD_TORCH_CHECK(place->mul == mul && place->d == d, op, ": two paths have blocks of different sizes at ", first);
      return *place;
    }
    const auto next = list_.insert(place, {first, mul, d, row_, round_up(mul, lanes_)});
    row_ += d * next->pitch;
    covered_ += mul * d;
    return *next;
  }
  void check(const char* op) const {
    for (size_t i = 1; i < list_.size(); ++i)
      STD_TORCH_CHECK(list_[i - 1].first + list_[i - 1].mul * list_[i - 1].d <= list_[i].first, op, ": the block at ",
                      list_[i].first, " overlaps the one before it");
  }
  const ProductBlock* data() const { return list_.data(); }
  int64_t size() const { return int64_t(list_.size()); }
  int64_t row() const { return row_; }
  int64_t covered() const { return covered_; }

 private:
  int64_t lanes_, row_ = 0, covered_ = 0;
  std::vector<ProductBlock> list_;
};

// The table of paths, for a pass that gathers rows of `out` (reversed) or of `x`.
template <class S>
class Paths {
 public:
  using T = typename accumulate<S>::type;

  Paths(const char* op, const GatherProductTable<S>& leaf, const Tensor& paths, const Tensor& coefficients, int64_t dim_x,
        int64_t dim_sh, int64_t dim_out, int64_t num_weights, bool reversed)
      : in(leaf.lanes), own(leaf.lanes) {
    const auto* table = reinterpret_cast<const TensorPath*>(index_data(paths));
    const double* values = read<double>(coefficients);
    const int64_t lanes = leaf.lanes;
    int64_t weight = 0, value = 0;
    std::vector<int64_t> groups, starts, rows;  // of the paths in the list
    for (int64_t number = 0; number < paths.size(0); ++number) {
      const TensorPath& path = table[number];
      STD_TORCH_CHECK(path_fits(path, dim_x, dim_sh, dim_out, num_weights - weight, coefficients.numel() - value), op,
                      ": row ", number, " of paths does not fit the other arguments");
      if (path.mul > 0) {
        const ProductBlock x = (reversed ? own : in).add(op, path.x, path.mul, path.d1);
        const ProductBlock out = (reversed ? in : own).add(op, path.out, path.mul, path.d3);
        ProductPath p{};
        p.in = reversed ? out.packed : x.packed;
        p.own = reversed ? x.packed : out.packed;
        p.d_in = reversed ? path.d3 : path.d1;
        p.d_own = reversed ? path.d1 : path.d3;
        p.mul = path.mul;
        p.pitch = x.pitch;
        p.sh = path.sh;
        p.d_sh = path.d2;
        p.weight = path.has_weight ? weight : -1;
        p.shared_weight = num_shared;
        p.terms = int64_t(term_ptr.size());
        int64_t group = 0;
        while (group < int64_t(matrices.size()) && (matrices[group].sh != path.sh || matrices[group].d_sh != path.d2)) ++group;
        if (group == int64_t(matrices.size())) matrices.push_back({path.sh, path.d2, 0, 0, 0});
        p.matrix = matrices[group].size;  // within the group, for now
        matrices[group].size += path.d1 * path.d3;
        groups.push_back(group);
        starts.push_back(value);
        term_ptr.push_back(int64_t(terms.size()));
        for (int64_t j = 0; j < path.d2; ++j) {
          for (int64_t entry = 0; entry < p.d_own * p.d_in; ++entry) {
            const T c = coefficient(values + value, path, j, entry, reversed);
            if (c != 0) terms.push_back({entry, c});
          }
          term_ptr.push_back(int64_t(terms.size()));
        }
        matrix_max = std::max(matrix_max, path.d1 * path.d3);
        pitch_max = std::max(pitch_max, p.pitch);
        if (path.has_weight) num_shared += p.pitch;
        list.push_back(p);
        rows.push_back(number);
      }
      weight += path.mul * path.has_weight;
      value += path.d1 * path.d2 * path.d3;
    }
    STD_TORCH_CHECK(weight == num_weights, op, ": the paths have ", weight, " weights, weight has ", num_weights);
    STD_TORCH_CHECK(value == coefficients.numel(), op, ": the paths have ", value, " coefficients, got ",
                    coefficients.numel());
    in.check(op);
    own.check(op);
    for (ProductMatrices& m : matrices) {
      m.size = round_up(m.size, lanes);
      m.matrix = matrix_row;
      m.coefficients = int64_t(dense.size());
      matrix_row += m.size;
      dense.resize(dense.size() + m.d_sh * m.size);
    }
    for (size_t n = 0; n < list.size(); ++n) {
      const ProductMatrices& m = matrices[groups[n]];
      const TensorPath& path = table[rows[n]];
      for (int64_t j = 0; j < m.d_sh; ++j)
        for (int64_t entry = 0; entry < path.d1 * path.d3; ++entry)
          dense[m.coefficients + j * m.size + list[n].matrix + entry] =
              coefficient(values + starts[n], path, j, entry, reversed);
      list[n].matrix += m.matrix;
    }
  }

  // What component j of sh gives to an entry [d_own, d_in] of the path's matrix.
  static T coefficient(const double* values, const TensorPath& path, int64_t j, int64_t entry, bool reversed) {
    const int64_t i = reversed ? entry / path.d3 : entry % path.d1, k = reversed ? entry % path.d3 : entry / path.d1;
    return static_cast<T>(values[(i * path.d2 + j) * path.d3 + k]);
  }

  Blocks in, own;
  std::vector<ProductPath> list;
  std::vector<ProductMatrices> matrices;
  std::vector<T> dense;
  std::vector<ProductTerm<T>> terms;
  std::vector<int64_t> term_ptr;
  int64_t matrix_row = 0, matrix_max = 0, pitch_max = 0, num_shared = 0;
};

// Elements that start at a multiple of 64 bytes and are not initialised.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : values_(new T[size + 64 / sizeof(T)]) {}
  T* data() const { return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(values_.get()) + 63) & ~uintptr_t(63)); }

 private:
  std::unique_ptr<T[]> values_;
};

// Rows of nodes, packed.
template <class S>
Buffer<typename accumulate<S>::type> packed_rows(const GatherProductTable<S>& leaf, const Tensor& rows,
                                                 const Blocks& blocks) {
  using T = typename accumulate<S>::type;
  const int64_t num_rows = rows.size(0), dim = rows.size(1), row = blocks.row();
  Buffer<T> buffer(num_rows * row);
  T* to = buffer.data();
  const S* from = read<S>(rows);
  advise_huge_pages(to, num_rows * row * int64_t(sizeof(T)));
  const bool padded = row != blocks.covered();
  parallel_blocks(num_rows, block_of(row * int64_t(sizeof(T))), [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      if (padded) std::memset(to + r * row, 0, sizeof(T) * row);
      leaf.pack(to + r * row, from + r * dim, blocks.data(), blocks.size());
    }
  });
  return buffer;
}

template <class S>
void fill_zero(const Tensor& t) {
  if (t.numel() > 0) std::memset(write<S>(t), 0, sizeof(S) * t.numel());
}

// Run all chunks of the job; its out is complete afterwards, and dweight [W] where weights are shared.
template <class S>
void run(const char* op, const char* in_name, const char* perm_name, const GatherProductTable<S>& leaf,
         const GatherProduct<S>& job, S* dweight) {
  using T = typename accumulate<S>::type;
  constexpr int64_t kLine = 64 / sizeof(T);
  const int64_t row = job.own_row, weights = dweight ? job.num_shared : 0;
  const int64_t chunks = linear_chunks(job.num_edges, kRowsPerEdge), scratch = round_up(leaf.scratch(job), kLine);
  const Buffer<T> heads(job.out ? 2 * chunks * row : 0), partial(chunks * weights);
  const Buffer<T> scratches(max_threads(chunks, 1) * scratch);
  T* const tails = heads.data() + chunks * row;
  Faults faults;
  parallel_blocks(chunks, 1, [&](int64_t thread, int64_t first, int64_t last) {
    for (int64_t k = first; k < last; ++k) {
      GatherProductChunk<S> chunk{};
      chunk.begin = linear_chunk_begin(k, chunks, job.num_edges);
      chunk.end = linear_chunk_begin(k + 1, chunks, job.num_edges);
      chunk.last = k + 1 == chunks;
      chunk.head = heads.data() + k * row;
      chunk.tail = tails + k * row;
      chunk.dweight = dweight ? partial.data() + k * weights : nullptr;
      chunk.scratch = scratches.data() + thread * scratch;
      const Outcome outcome = leaf.run(job, chunk);
      faults.add(outcome.fault, outcome.position);
    }
  });
  const Found found = faults.first();
  if (found.fault == kSrcIndex)
    raise_out_of_range(op, in_name, found.position, job.in_index[found.position], 0, job.num_in - 1);
  if (found.fault == kEdgePerm)
    raise_out_of_range(op, perm_name, found.position, job.perm[found.position], 0, job.num_edges - 1);
  if (job.out) {  // segments that lie in several chunks: what their first chunk has, then the heads of the others
    int64_t segment = 0;
    for (int64_t k = 1; k < chunks; ++k) {
      const int64_t begin = linear_chunk_begin(k, chunks, job.num_edges);
      while (job.ptr[segment + 1] <= begin) ++segment;
      if (job.ptr[segment] == begin) continue;
      T* sum = tails + (k - 1) * row;
      for (; k < chunks && linear_chunk_begin(k, chunks, job.num_edges) < job.ptr[segment + 1]; ++k)
        for (int64_t i = 0; i < row; ++i) sum[i] += heads.data()[k * row + i];
      --k;
      S* out = job.out + segment * job.own_dim;
      if (!job.own_covered) std::memset(out, 0, sizeof(S) * job.own_dim);
      leaf.unpack(out, sum, job.own_blocks, job.num_own_blocks);
    }
  }
  if (dweight) {
    for (const ProductPath* p = job.paths; p != job.paths + job.num_paths; ++p) {
      for (int64_t c = 0; p->weight >= 0 && c < p->mul; ++c) {
        T sum = 0;
        for (int64_t k = 0; k < chunks; ++k) sum += partial.data()[k * weights + p->shared_weight + c];
        narrow(sum, dweight + p->weight + c);
      }
    }
  }
}

template <class S>
GatherProduct<S> make_job(const Paths<S>& paths, const Tensor& sh, const Tensor& weight, int64_t dim_own) {
  GatherProduct<S> job{};
  job.sh = read<S>(sh);
  job.weight = read<S>(weight);
  job.dim_sh = sh.size(1);
  job.dim_weight = weight.size(1);
  job.weight_stride = weight.size(0) == sh.size(0) ? weight.size(1) : 0;
  job.paths = paths.list.data();
  job.num_paths = int64_t(paths.list.size());
  job.matrices = paths.matrices.data();
  job.num_matrices = int64_t(paths.matrices.size());
  job.own_blocks = paths.own.data();
  job.num_own_blocks = paths.own.size();
  job.coefficients = paths.dense.data();
  job.terms = paths.terms.data();
  job.term_ptr = paths.term_ptr.data();
  job.in_row = paths.in.row();
  job.own_row = paths.own.row();
  job.own_dim = dim_own;
  job.own_covered = paths.own.covered() == dim_own;
  job.num_shared = paths.num_shared;
  job.matrix_row = paths.matrix_row;
  job.matrix_max = paths.matrix_max;
  job.pitch_max = paths.pitch_max;
  job.num_edges = sh.size(0);
  return job;
}

void check_operands(const char* op, const Tensor& x, const Tensor& sh, const Tensor& weight, const Tensor& coefficients,
                    const Tensor& paths) {
  STD_TORCH_CHECK(x.dim() == 2 && sh.dim() == 2 && weight.dim() == 2, op, ": x, sh and weight must have two axes");
  STD_TORCH_CHECK(x.scalar_type() == sh.scalar_type() && x.scalar_type() == weight.scalar_type(), op,
                  ": x, sh and weight must have one dtype");
  STD_TORCH_CHECK(weight.size(0) == sh.size(0) || weight.size(0) == 1, op, ": weight must have a row per edge, or one");
  STD_TORCH_CHECK(coefficients.dim() == 1 && coefficients.scalar_type() == ScalarType::Double, op,
                  ": coefficients must be float64 with one axis");
  STD_TORCH_CHECK(paths.dim() == 2 && paths.size(1) == kPathColumns && paths.scalar_type() == ScalarType::Long, op,
                  ": paths must be int64 [P, 8]");
}

Tensor gather_tensor_product_segment_sum_cpu(const Tensor& x_, const Tensor& sh_, const Tensor& weight_,
                                             const Tensor& coefficients_, const Tensor& paths_, const Tensor& src_index_,
                                             const std::optional<Tensor>&, const Tensor& ptr_,
                                             const std::optional<Tensor>& perm_, const std::optional<Tensor>&,
                                             const std::optional<Tensor>&, int64_t dim_out, bool transposed) {
  constexpr const char* op = "gather_tensor_product_segment_sum";
  check_operands(op, x_, sh_, weight_, coefficients_, paths_);
  check_index_dtype(src_index_, op, "src_index");
  check_index_dtype(ptr_, op, "ptr");
  if (perm_) check_index_dtype(*perm_, op, "edge_perm");
  const Tensor x = made_contiguous(x_), sh = made_contiguous(sh_), weight = made_contiguous(weight_);
  const Tensor coefficients = made_contiguous(coefficients_), paths = made_contiguous(paths_);
  const Tensor src_index = made_contiguous(src_index_), ptr = made_contiguous(ptr_);
  const Tensor perm = perm_ ? made_contiguous(*perm_) : ptr;
  const int64_t num_edges = sh.size(0), num_segments = ptr.numel() - 1;
  STD_TORCH_CHECK(src_index.numel() == num_edges, op, ": src_index must have one entry per row of sh");
  STD_TORCH_CHECK(!perm_ || perm.numel() == num_edges, op, ": edge_perm must have one entry per row of sh");
  STD_TORCH_CHECK(num_segments >= 0 && dim_out >= 0, op, ": ptr must not be empty, dim_out not negative");
  check_ptr(op, index_data(ptr), num_segments, num_edges);
  Tensor out = torch::stable::new_empty(x, {num_segments, dim_out});
  dispatch_floating(x.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    const GatherProductTable<S>& leaf = table(S{});
    const Paths<S> table(op, leaf, paths, coefficients, transposed ? dim_out : x.size(1), sh.size(1),
                         transposed ? x.size(1) : dim_out, weight.size(1), transposed);
    advise_huge_pages(write<S>(out), out.numel() * int64_t(sizeof(S)));
    if (num_edges == 0 || table.list.empty()) {
      fill_zero<S>(out);
      return;
    }
    GatherProduct<S> job = make_job(table, sh, weight, dim_out);
    const auto in = packed_rows(leaf, x, table.in);
    job.in = in.data();
    job.out = write<S>(out);
    job.ptr = index_data(ptr);
    job.perm = perm_ ? index_data(perm) : nullptr;
    job.in_index = index_data(src_index);
    job.num_segments = num_segments;
    job.num_in = x.size(0);
    run<S>(op, "src_index", "edge_perm", leaf, job, nullptr);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> gather_tensor_product_grad_cpu(
    const Tensor& x_, const Tensor& g_, const Tensor& sh_, const Tensor& weight_, const Tensor& coefficients_,
    const Tensor& paths_, const Tensor&, const Tensor& dst_index_, const Tensor&, const std::optional<Tensor>&,
    const Tensor& t_ptr_, const std::optional<Tensor>& t_perm_, bool transposed, bool need_x, bool need_sh,
    bool need_weight) {
  constexpr const char* op = "gather_tensor_product_grad";
  check_operands(op, x_, sh_, weight_, coefficients_, paths_);
  STD_TORCH_CHECK(g_.dim() == 2 && g_.scalar_type() == x_.scalar_type(), op, ": g must be like x");
  check_index_dtype(dst_index_, op, "dst_index");
  check_index_dtype(t_ptr_, op, "t_ptr");
  if (t_perm_) check_index_dtype(*t_perm_, op, "t_perm");
  const Tensor x = made_contiguous(x_), g = made_contiguous(g_), sh = made_contiguous(sh_);
  const Tensor weight = made_contiguous(weight_), coefficients = made_contiguous(coefficients_);
  const Tensor paths = made_contiguous(paths_), dst_index = made_contiguous(dst_index_), ptr = made_contiguous(t_ptr_);
  const Tensor perm = t_perm_ ? made_contiguous(*t_perm_) : ptr;
  const int64_t num_edges = sh.size(0), num_segments = ptr.numel() - 1;
  STD_TORCH_CHECK(dst_index.numel() == num_edges, op, ": dst_index must have one entry per row of sh");
  STD_TORCH_CHECK(!t_perm_ || perm.numel() == num_edges, op, ": t_perm must have one entry per row of sh");
  STD_TORCH_CHECK(num_segments == x.size(0), op, ": t_ptr must have one entry more than x has rows");
  check_ptr(op, index_data(ptr), num_segments, num_edges);
  const auto like = [](const Tensor& t, bool needed) {
    return needed ? torch::stable::new_empty(t, t.sizes()) : torch::stable::new_empty(t, {0});
  };
  Tensor dx = like(x, need_x), dsh = like(sh, need_sh), dweight = like(weight, need_weight);
  dispatch_floating(x.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    const GatherProductTable<S>& leaf = table(S{});
    const Paths<S> table(op, leaf, paths, coefficients, transposed ? g.size(1) : x.size(1), sh.size(1),
                         transposed ? x.size(1) : g.size(1), weight.size(1), !transposed);
    for (Tensor* t : {&dx, &dsh, &dweight}) advise_huge_pages(write<S>(*t), t->numel() * int64_t(sizeof(S)));
    if (num_edges == 0 || table.list.empty()) {
      for (Tensor* t : {&dx, &dsh, &dweight}) fill_zero<S>(*t);
      return;
    }
    GatherProduct<S> job = make_job(table, sh, weight, x.size(1));
    const auto in = packed_rows(leaf, g, table.in);
    const bool shared = weight.size(0) != num_edges;
    job.in = in.data();
    job.own = need_sh || need_weight ? read<S>(x) : nullptr;
    job.out = need_x ? write<S>(dx) : nullptr;
    job.dsh = need_sh ? write<S>(dsh) : nullptr;
    job.dweight = need_weight && !shared ? write<S>(dweight) : nullptr;
    job.stream = job.dweight && dweight.numel() * int64_t(sizeof(S)) >= (int64_t(1) << 22) &&
                 job.dim_weight * sizeof(S) % 64 == 0 && reinterpret_cast<uintptr_t>(job.dweight) % 64 == 0;
    job.ptr = index_data(ptr);
    job.perm = t_perm_ ? index_data(perm) : nullptr;
    job.in_index = index_data(dst_index);
    job.num_segments = num_segments;
    job.num_in = g.size(0);
    run<S>(op, "dst_index", "t_perm", leaf, job, need_weight && shared ? write<S>(dweight) : nullptr);
  });
  return {dx, dsh, dweight};
}

}  // namespace
}  // namespace geo

STABLE_TORCH_LIBRARY_IMPL(geo, CPU, m) {
  m.impl("gather_tensor_product_segment_sum", TORCH_BOX(&geo::gather_tensor_product_segment_sum_cpu));
  m.impl("gather_tensor_product_grad", TORCH_BOX(&geo::gather_tensor_product_grad_cpu));
}
