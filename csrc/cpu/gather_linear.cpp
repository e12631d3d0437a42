// CPU launchers of gather_linear_mul_segment_sum and gather_linear_mul_grad.
#include "../gather_linear.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "gather_linear_table.h"
#include "parallel.h"

namespace geo {
namespace {

const GatherLinearTable<float>& table(float) { return choose_table(GEO_TABLES(gather_linear_float)); }
const GatherLinearTable<double>& table(double) { return choose_table(GEO_TABLES(gather_linear_double)); }
const GatherLinearTable<bfloat16>& table(bfloat16) { return choose_table(GEO_TABLES(gather_linear_bfloat16)); }
const GatherLinearTable<float16>& table(float16) { return choose_table(GEO_TABLES(gather_linear_float16)); }

// A [rows, O, C] tensor as the leaf reads and writes it: in the accumulation type, C padded to whole vectors. That is the
// tensor itself where it has this form already.
template <class S>
class NodeRows {
 public:
  using T = typename accumulate<S>::type;

  static NodeRows reading(const Tensor& tensor, int64_t pitch) {
    NodeRows rows(tensor, const_cast<S*>(read<S>(tensor)), pitch);
    if (!rows.copy_.empty()) rows.transfer([](S* from, T* to) { *to = widen(*from); });
    return rows;
  }
  static NodeRows writing(const Tensor& tensor, int64_t pitch) {
    advise_huge_pages(write<S>(tensor), tensor.numel() * int64_t(sizeof(S)));
    return NodeRows(tensor, write<S>(tensor), pitch);
  }

  // After writing: round and drop the padding.
  void finish() {
    if (!copy_.empty()) transfer([](S* to, T* from) { narrow(*from, to); });
  }
  T* data() const { return data_; }

 private:
  NodeRows(const Tensor& tensor, S* values, int64_t pitch)
      : tensor_(values), rows_(tensor.size(0) * tensor.size(1)), C_(tensor.size(2)), pitch_(pitch) {
    if constexpr (std::is_same_v<S, T>) {
      if (C_ == pitch_) {
        data_ = tensor_;
        return;
      }
    }
    copy_.resize(rows_ * pitch_ + 64 / sizeof(T));
    data_ = aligned(copy_);
  }

  template <class F>
  void transfer(F&& f) {
    S* tensor = tensor_;
    T* data = data_;
    const int64_t C = C_, pitch = pitch_;
    parallel_blocks(rows_, block_of(pitch * int64_t(sizeof(T))), [=](int64_t, int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        for (int64_t c = 0; c < C; ++c) f(tensor + r * C + c, data + r * pitch + c);
    });
  }

  S* tensor_;
  int64_t rows_, C_, pitch_;
  std::vector<T> copy_;
  T* data_ = nullptr;
};

// W [C, B] in the accumulation type, packed for the leaf.
template <class S>
class Weight {
 public:
  using T = typename accumulate<S>::type;
  Weight(const GatherLinearTable<S>& leaf, const Tensor& weight) : leaf_(leaf), C_(weight.size(0)), B_(weight.size(1)) {
    const S* from = read<S>(weight);
    values_.resize(C_ * B_);
    for (int64_t i = 0; i < C_ * B_; ++i) values_[i] = widen(from[i]);
  }
  const T* by_basis() { return pack(by_basis_, B_, C_, 1, B_); }
  const T* by_channel() { return pack(by_channel_, C_, B_, B_, 1); }

 private:
  const T* pack(std::vector<T>& to, int64_t depth, int64_t columns, int64_t depth_stride, int64_t column_stride) {
    to.resize(leaf_.packed_size(depth, columns) + 64 / sizeof(T));
    leaf_.pack(aligned(to), values_.data(), depth, columns, depth_stride, column_stride);
    return aligned(to);
  }
  const GatherLinearTable<S>& leaf_;
  int64_t C_, B_;
  std::vector<T> values_, by_basis_, by_channel_;
};

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Run all chunks of the job; out's rows and, where it is given, dweight [C, B] are complete afterwards.
template <class S>
void run(const char* op, const char* in_name, const char* perm_name, const GatherLinearTable<S>& leaf,
         const GatherLinear<S>& job, S* dweight) {
  using T = typename accumulate<S>::type;
  const int64_t row = job.O * job.pitch, weights = job.B * job.pitch;
  const int64_t chunks = linear_chunks(job.num_edges, job.basis_O);
  const int64_t scratch = round_up(leaf.scratch(job), 64 / sizeof(T));
  const int64_t threads = max_threads(chunks, 1);
  constexpr int64_t kLine = 64 / sizeof(T);
  std::vector<T> head_buffer(job.out ? chunks * row + kLine : 0), scratches(threads * scratch + kLine);
  std::vector<T> partial_buffer(dweight ? chunks * weights + kLine : 0);
  T *heads = aligned(head_buffer), *partial = aligned(partial_buffer);
  Faults faults;
  parallel_blocks(chunks, 1, [&](int64_t thread, int64_t first, int64_t last) {
    for (int64_t k = first; k < last; ++k) {
      GatherLinearChunk<S> chunk{};
      chunk.begin = linear_chunk_begin(k, chunks, job.num_edges);
      chunk.end = linear_chunk_begin(k + 1, chunks, job.num_edges);
      chunk.last = k + 1 == chunks;
      chunk.head = job.out ? heads + k * row : nullptr;
      chunk.dweight = dweight ? partial + k * weights : nullptr;
      chunk.scratch = aligned(scratches) + thread * scratch;
      const Outcome outcome = leaf.run(job, chunk);
      faults.add(outcome.fault, outcome.position);
    }
  });
  const Found found = faults.first();
  if (found.fault == kSrcIndex)
    raise_out_of_range(op, in_name, found.position, job.in_index[found.position], 0, job.num_in - 1);
  if (found.fault == kEdgePerm)
    raise_out_of_range(op, perm_name, found.position, job.perm[found.position], 0, job.num_edges - 1);
  if (job.out) {
    int64_t segment = 0;
    for (int64_t k = 1; k < chunks; ++k) {
      const int64_t begin = linear_chunk_begin(k, chunks, job.num_edges);
      while (job.ptr[segment + 1] <= begin) ++segment;
      if (job.ptr[segment] == begin) continue;  // it began here: no head
      const T* head = heads + k * row;
      T* out = job.out + segment * row;
      for (int64_t i = 0; i < row; ++i) out[i] += head[i];
    }
  }
  if (dweight) {
    parallel_blocks(job.B, std::max<int64_t>(1, 65536 / std::max<int64_t>(1, chunks * job.pitch)),
                    [&](int64_t, int64_t begin, int64_t end) {
                      std::vector<T> sum(job.pitch);
                      for (int64_t b = begin; b < end; ++b) {
                        std::fill(sum.begin(), sum.end(), T(0));
                        for (int64_t k = 0; k < chunks; ++k) {
                          const T* from = partial + k * weights + b * job.pitch;
                          for (int64_t c = 0; c < job.pitch; ++c) sum[c] += from[c];
                        }
                        for (int64_t c = 0; c < job.C; ++c) narrow(sum[c], dweight + c * job.B + b);
                      }
                    });
  }
}

template <class S>
GatherLinear<S> make_job(const Tensor& basis, const Tensor& weight, int64_t O, int64_t lanes) {
  GatherLinear<S> job{};
  job.basis = read<S>(basis);
  job.num_edges = basis.size(0);
  job.O = O;
  job.basis_O = basis.size(1);
  job.B = basis.size(2);
  job.C = weight.size(0);
  job.pitch = round_up(job.C, lanes);
  return job;
}

void check_operands(const char* op, const Tensor& x, const Tensor& basis, const Tensor& weight) {
  STD_TORCH_CHECK(x.dim() == 3 && basis.dim() == 3 && weight.dim() == 2, op,
                  ": x and basis must have three axes, weight two");
  STD_TORCH_CHECK(x.scalar_type() == basis.scalar_type() && x.scalar_type() == weight.scalar_type(), op,
                  ": x, basis and weight must have one dtype");
  STD_TORCH_CHECK(basis.size(1) == x.size(1) || basis.size(1) == 1, op, ": axis 1 of basis must be that of x, or 1");
  STD_TORCH_CHECK(weight.size(0) == x.size(2) && weight.size(1) == basis.size(2), op, ": weight must be [C, B]");
}

Tensor gather_linear_mul_segment_sum_cpu(const Tensor& x_, const Tensor& basis_, const Tensor& weight_,
                                         const Tensor& src_index_, const std::optional<Tensor>&, const Tensor& ptr_,
                                         const std::optional<Tensor>& perm_, const std::optional<Tensor>&,
                                         const std::optional<Tensor>&) {
  constexpr const char* op = "gather_linear_mul_segment_sum";
  check_operands(op, x_, basis_, weight_);
  check_index_dtype(src_index_, op, "src_index");
  check_index_dtype(ptr_, op, "ptr");
  if (perm_) check_index_dtype(*perm_, op, "edge_perm");
  const Tensor x = made_contiguous(x_), basis = made_contiguous(basis_);
  const Tensor weight = made_contiguous(weight_), ptr = made_contiguous(ptr_);
  const Tensor src_index = made_contiguous(src_index_);
  const Tensor perm = perm_ ? made_contiguous(*perm_) : ptr;
  const int64_t num_edges = basis.size(0), num_segments = ptr.numel() - 1;
  STD_TORCH_CHECK(src_index.numel() == num_edges, op, ": src_index must have one entry per row of basis");
  STD_TORCH_CHECK(!perm_ || perm.numel() == num_edges, op, ": edge_perm must have one entry per row of basis");
  STD_TORCH_CHECK(num_segments >= 0, op, ": ptr must not be empty");
  check_ptr(op, index_data(ptr), num_segments, num_edges);
  if (num_edges == 0 || basis.size(2) == 0 || x.size(1) * x.size(2) == 0)
    return torch::stable::new_zeros(x, {num_segments, x.size(1), x.size(2)});
  Tensor out = torch::stable::new_empty(x, {num_segments, x.size(1), x.size(2)});
  dispatch_floating(x.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    const GatherLinearTable<S>& leaf = table(S{});
    GatherLinear<S> job = make_job<S>(basis, weight, x.size(1), leaf.lanes);
    Weight<S> packed(leaf, weight);
    const NodeRows<S> in = NodeRows<S>::reading(x, job.pitch);
    NodeRows<S> sum = NodeRows<S>::writing(out, job.pitch);
    job.in = in.data();
    job.out = sum.data();
    job.by_basis = packed.by_basis();
    job.ptr = index_data(ptr);
    job.perm = perm_ ? index_data(perm) : nullptr;
    job.in_index = index_data(src_index);
    job.num_segments = num_segments;
    job.num_in = x.size(0);
    run<S>(op, "src_index", "edge_perm", leaf, job, nullptr);
    sum.finish();
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> gather_linear_mul_grad_cpu(
    const Tensor& x_, const Tensor& g_, const Tensor& basis_, const Tensor& weight_, const Tensor&,
    const Tensor& dst_index_, const Tensor&, const std::optional<Tensor>&, const Tensor& t_ptr_,
    const std::optional<Tensor>& t_perm_, bool need_x, bool need_basis, bool need_weight) {
  constexpr const char* op = "gather_linear_mul_grad";
  check_operands(op, x_, basis_, weight_);
  STD_TORCH_CHECK(g_.dim() == 3 && g_.size(1) == x_.size(1) && g_.size(2) == x_.size(2), op, ": g must be [N, O, C]");
  STD_TORCH_CHECK(g_.scalar_type() == x_.scalar_type(), op, ": x and g must have one dtype");
  check_index_dtype(dst_index_, op, "dst_index");
  check_index_dtype(t_ptr_, op, "t_ptr");
  if (t_perm_) check_index_dtype(*t_perm_, op, "t_perm");
  const Tensor x = made_contiguous(x_), g = made_contiguous(g_);
  const Tensor basis = made_contiguous(basis_), weight = made_contiguous(weight_);
  const Tensor dst_index = made_contiguous(dst_index_), ptr = made_contiguous(t_ptr_);
  const Tensor perm = t_perm_ ? made_contiguous(*t_perm_) : ptr;
  const int64_t num_edges = basis.size(0), num_segments = ptr.numel() - 1;
  STD_TORCH_CHECK(num_segments == x.size(0), op, ": t_ptr must have one entry more than x has rows");
  STD_TORCH_CHECK(dst_index.numel() == num_edges, op, ": dst_index must have one entry per row of basis");
  STD_TORCH_CHECK(!t_perm_ || perm.numel() == num_edges, op, ": t_perm must have one entry per row of basis");
  check_ptr(op, index_data(ptr), num_segments, num_edges);
  const bool empty = num_edges == 0 || basis.size(2) == 0 || x.size(1) * x.size(2) == 0;
  const auto make = [&](const Tensor& like, bool needed) {
    if (!needed) return torch::stable::new_empty(like, {0});
    return empty ? torch::stable::new_zeros(like, like.sizes()) : torch::stable::new_empty(like, like.sizes());
  };
  const Tensor dx = make(x, need_x), dbasis = make(basis, need_basis), dweight = make(weight, need_weight);
  if (empty || !(need_x || need_basis || need_weight)) return {dx, dbasis, dweight};
  dispatch_floating(x.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    const GatherLinearTable<S>& leaf = table(S{});
    GatherLinear<S> job = make_job<S>(basis, weight, x.size(1), leaf.lanes);
    Weight<S> packed(leaf, weight);
    const NodeRows<S> in = NodeRows<S>::reading(g, job.pitch);
    std::optional<NodeRows<S>> own, sum;
    job.in = in.data();
    if (need_x) {
      sum = NodeRows<S>::writing(dx, job.pitch);
      job.out = sum->data();
      job.by_basis = packed.by_basis();
    }
    if (need_basis || need_weight) {
      own = NodeRows<S>::reading(x, job.pitch);
      job.own = own->data();
    }
    if (need_basis) {
      const int64_t bytes = dbasis.numel() * int64_t(sizeof(S));
      job.dbasis = write<S>(dbasis);
      job.by_channel = packed.by_channel();
      job.stream = bytes >= (int64_t(1) << 25) && reinterpret_cast<uintptr_t>(job.dbasis) % 64 == 0;
      advise_huge_pages(job.dbasis, bytes);
    }
    job.ptr = index_data(ptr);
    job.perm = t_perm_ ? index_data(perm) : nullptr;
    job.in_index = index_data(dst_index);
    job.num_segments = num_segments;
    job.num_in = g.size(0);
    run<S>(op, "dst_index", "t_perm", leaf, job, need_weight ? write<S>(dweight) : nullptr);
    if (sum) sum->finish();
  });
  return {dx, dbasis, dweight};
}

}  // namespace
}  // namespace geo

STABLE_TORCH_LIBRARY_IMPL(geo, CPU, m) {
  m.impl("gather_linear_mul_segment_sum", TORCH_BOX(&geo::gather_linear_mul_segment_sum_cpu));
  m.impl("gather_linear_mul_grad", TORCH_BOX(&geo::gather_linear_mul_grad_cpu));
}
