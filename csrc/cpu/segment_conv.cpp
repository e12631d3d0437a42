// CPU launchers of segment_causal_conv1d and segment_causal_conv1d_weight.
#include "../segment_conv.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "parallel.h"
#include "segment_conv_table.h"

namespace geo {
namespace {

const SegmentConvTable& table(float) { return choose_table(GEO_TABLES(segment_conv_float)); }
const SegmentConvTable& table(double) { return choose_table(GEO_TABLES(segment_conv_double)); }
const SegmentConvTable& table(bfloat16) { return choose_table(GEO_TABLES(segment_conv_bfloat16)); }
const SegmentConvTable& table(float16) { return choose_table(GEO_TABLES(segment_conv_float16)); }

// The leaf goes down the rows once for each vector of channels: so many rows that they stay in the first-level cache.
int64_t block_rows(int64_t row_bytes) {
  return std::clamp<int64_t>((int64_t(1) << 14) / std::max<int64_t>(1, row_bytes), 32, 1024);
}

// call(segment, begin, end) for the blocks of rows [begin, end)
template <class F>
void for_blocks(const SegmentConv& job, int64_t segments, int64_t begin, int64_t end, int64_t rows, F&& call) {
  for (; begin < end; begin += rows)
    call(conv_segment(job.ptr, segments, begin), begin, std::min(begin + rows, end));
}

void check(const char* op, const Tensor& x, const Tensor& ptr) {
  STD_TORCH_CHECK(x.dim() == 2, op, ": x must have two axes");
  check_index_dtype(ptr, op, "ptr");
  STD_TORCH_CHECK(ptr.numel() > 0, op, ": ptr must not be empty");
  check_ptr(op, index_data(ptr), ptr.numel() - 1, x.size(0));
}

template <class S>
constexpr ScalarType wide_dtype = sizeof(S) == 8 ? ScalarType::Double : ScalarType::Float;

Tensor segment_conv_cpu(const Tensor& x_, const Tensor& weight_, const std::optional<Tensor>& bias_, const Tensor& ptr_,
                        bool reverse) {
  constexpr const char* op = "segment_causal_conv1d";
  const Tensor x = made_contiguous(x_), weight = made_contiguous(weight_), ptr = made_contiguous(ptr_);
  check(op, x, ptr);
  SegmentConv job{};
  job.E = x.size(1);
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) == job.E && weight.size(1) >= 1, op, ": weight must be [E, K]");
  job.K = weight.size(1);
  job.ptr = index_data(ptr);
  job.reverse = reverse;
  Tensor out = torch::stable::new_empty(x, {x.size(0), job.E});
  if (out.numel() == 0) return out;
  dispatch_floating(x.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    using T = typename accumulate<S>::type;
    const SegmentConvTable& leaf = table(S{});
    STD_TORCH_CHECK(weight.scalar_type() == wide_dtype<S>, op, ": weight must be of the type x is accumulated in");
    std::vector<T> taps(job.K * job.E);
    for (int64_t c = 0; c < job.E; ++c)
      for (int64_t j = 0; j < job.K; ++j) taps[j * job.E + c] = read<T>(weight)[c * job.K + j];
    Tensor bias;
    if (bias_) {
      bias = made_contiguous(*bias_);
      STD_TORCH_CHECK(bias.scalar_type() == wide_dtype<S> && bias.dim() == 1 && bias.size(0) == job.E, op,
                      ": bias must be [E], of the type x is accumulated in");
      job.bias = read<T>(bias);
    }
    job.x = read<S>(x);
    job.weight = taps.data();
    job.other = write<S>(out);
    advise_huge_pages(write<S>(out), out.numel() * int64_t(sizeof(S)));
    const int64_t rows = block_rows(job.E * int64_t(sizeof(S)));
    parallel_blocks(x.size(0), rows * 8, [&](int64_t, int64_t begin, int64_t end) {
      for_blocks(job, ptr.numel() - 1, begin, end, rows,
                 [&](int64_t segment, int64_t low, int64_t high) { leaf.conv(job, segment, low, high); });
    });
  });
  return out;
}

Tensor segment_conv_weight_cpu(const Tensor& grad_, const Tensor& x_, const Tensor& ptr_, int64_t kernel_size,
                               bool reverse) {
  constexpr const char* op = "segment_causal_conv1d_weight";
  const Tensor x = made_contiguous(x_), grad = made_contiguous(grad_), ptr = made_contiguous(ptr_);
  check(op, x, ptr);
  STD_TORCH_CHECK(grad.dim() == 2 && grad.size(0) == x.size(0) && grad.size(1) == x.size(1), op,
                  ": grad must have the shape of x");
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type(), op, ": grad and x must have one dtype");
  STD_TORCH_CHECK(kernel_size >= 1, op, ": kernel_size must be at least 1");
  SegmentConv job{};
  job.E = x.size(1);
  job.K = kernel_size;
  job.ptr = index_data(ptr);
  job.reverse = reverse;
  Tensor out = x;
  dispatch_floating(x.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    using T = typename accumulate<S>::type;
    const SegmentConvTable& leaf = table(S{});
    out = torch::stable::new_empty(x, {job.E, job.K}, wide_dtype<S>);
    job.x = read<S>(x);
    job.other = read<S>(grad);
    const int64_t num_rows = x.size(0), size = job.K * job.E, chunks = conv_chunks(num_rows);
    const int64_t rows = block_rows(2 * job.E * int64_t(sizeof(S)));
    std::vector<T> partial(chunks * size);
    parallel_blocks(chunks, 1, [&](int64_t, int64_t first, int64_t last) {
      for (int64_t k = first; k < last; ++k)
        for_blocks(job, ptr.numel() - 1, num_rows * k / chunks, num_rows * (k + 1) / chunks, rows,
                   [&](int64_t segment, int64_t low, int64_t high) {
                     leaf.weight(job, segment, low, high, partial.data() + k * size);
                   });
    });
    T* to = write<T>(out);
    for (int64_t k = 1; k < chunks; ++k)
      for (int64_t i = 0; i < size; ++i) partial[i] += partial[k * size + i];
    for (int64_t c = 0; c < job.E; ++c)
      for (int64_t j = 0; j < job.K; ++j) to[c * job.K + j] = partial[j * job.E + c];
  });
  return out;
}

}  // namespace
}  // namespace geo

STABLE_TORCH_LIBRARY_IMPL(geo, CPU, m) {
  m.impl("segment_causal_conv1d", TORCH_BOX(&geo::segment_conv_cpu));
  m.impl("segment_causal_conv1d_weight", TORCH_BOX(&geo::segment_conv_weight_cpu));
}
