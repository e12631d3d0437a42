// CPU launchers of selective_scan and selective_scan_backward.
//
// Work is cut into tiles of segments and blocks of channels, by the sizes alone: sums over rows and over channels are those
// of the tiles and blocks, in order. Where that gives too few tasks for the threads, the states of a channel are shared
// among tasks, too, which does not change a bit (selective_scan_table.h).
#include "../selective_scan.h"

#include <torch/csrc/stable/library.h>

#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "parallel.h"
#include "selective_scan_table.h"

namespace geo {
namespace {

constexpr int64_t kTileRows = 256, kMaxTiles = 128;                    // at least, and about at most
constexpr int64_t kFewTiles = 16, kNarrowBlock = 32, kWideBlock = 128;  // channels of a block, with few tiles and many
constexpr int64_t kSmall = 1 << 15;                                    // states that are updated: one task
constexpr int64_t kMostParts = int64_t(1) << 29;                       // bytes

const SelectiveScanTable& table(float) { return choose_table(GEO_TABLES(selective_scan_float)); }
const SelectiveScanTable& table(double) { return choose_table(GEO_TABLES(selective_scan_double)); }
const SelectiveScanTable& table(bfloat16) { return choose_table(GEO_TABLES(selective_scan_bfloat16)); }
const SelectiveScanTable& table(float16) { return choose_table(GEO_TABLES(selective_scan_float16)); }

ScalarType wide_type(ScalarType dtype) { return dtype == ScalarType::Double ? dtype : ScalarType::Float; }

void check(const char* op, const char* name, const Tensor& t, ScalarType dtype, std::initializer_list<int64_t> sizes) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, op, ": ", name, " must be ", torch::headeronly::toString(dtype), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
  bool same = t.dim() == int64_t(sizes.size());
  int64_t d = 0;
  for (int64_t size : sizes) same = same && t.size(d++) == size;
  STD_TORCH_CHECK(same, op, ": the shape of ", name, " does not fit");
}

using Optional = std::optional<Tensor>;

// The inputs, checked and contiguous.
struct Inputs {
  Tensor u, delta, A, B, C, ptr;
  Optional D, z, bias, initial;
  ScalarType dtype, wide;
  int64_t segments, longest = 0;
  std::vector<int64_t> tiles{0};  // of segments
  Scan job{};

  Inputs(const char* op, const Tensor& u_, const Tensor& delta_, const Tensor& A_, const Tensor& B_, const Tensor& C_,
         const Optional& D_, const Optional& z_, const Optional& bias_, const Optional& initial_, const Tensor& ptr_,
         bool softplus, bool reverse, bool zoh)
      : u(made_contiguous(u_)), delta(made_contiguous(delta_)), A(made_contiguous(A_)), B(made_contiguous(B_)),
        C(made_contiguous(C_)), ptr(made_contiguous(ptr_)), D(contiguous(D_)), z(contiguous(z_)),
        bias(contiguous(bias_)), initial(contiguous(initial_)), dtype(u_.scalar_type()), wide(wide_type(dtype)) {
    STD_TORCH_CHECK(u.dim() == 2 && A.dim() == 2, op, ": u must be [T, E] and A [E, N]");
    check_index_dtype(ptr, op, "ptr");
    STD_TORCH_CHECK(ptr.numel() > 0, op, ": ptr must not be empty");
    job.T = u.size(0);
    job.E = u.size(1);
    job.N = A.size(1);
    segments = ptr.numel() - 1;
    check(op, "delta", delta, dtype, {job.T, job.E});
    check(op, "A", A, wide, {job.E, job.N});
    check(op, "B", B, dtype, {job.T, job.N});
    check(op, "C", C, dtype, {job.T, job.N});
    if (D) check(op, "D", *D, wide, {job.E});
    if (z) check(op, "z", *z, dtype, {job.T, job.E});
    if (bias) check(op, "delta_bias", *bias, wide, {job.E});
    if (initial) check(op, "initial_state", *initial, wide, {segments, job.E, job.N});
    job.ptr = index_data(ptr);
    check_ptr(op, job.ptr, segments, job.T);
    job.groups = (job.N + kStateGroup - 1) / kStateGroup;
    job.width = (job.E + kScanLanes - 1) / kScanLanes * kScanLanes;
    job.softplus = softplus;
    job.reverse = reverse;
    job.zoh = zoh;
    const int64_t rows = std::max(kTileRows, job.T / kMaxTiles);
    for (int64_t s = 0; s < segments; ++s)
      if (s + 1 == segments || job.ptr[s + 1] - job.ptr[tiles.back()] >= rows) tiles.push_back(s + 1);
  }
  int64_t states() const { return job.groups * kStateGroup; }
  int64_t num_tiles() const { return int64_t(tiles.size()) - 1; }

 private:
  static Optional contiguous(const Optional& t) { return t ? Optional(made_contiguous(*t)) : t; }
};

// The pointers of a job, and what its leaves read that is not an input as it stands.
template <class S>
struct Job {
  using T = typename accumulate<S>::type;
  const SelectiveScanTable& leaf = table(S{});
  Scan job;
  std::vector<T> rate, inverse, D, bias;

  explicit Job(const Inputs& in)
      : job(in.job), rate(in.states() * job.width), inverse(rate.size()), D(job.width), bias(job.width) {
    const T* A = read<T>(in.A);
    for (int64_t c = 0; c < job.E; ++c)
      for (int64_t n = 0; n < job.N; ++n) {
        const T a = A[c * job.N + n], over = T(1) / a;
        rate[n * job.width + c] = a * ExpNumbers<T>::log2e;
        inverse[n * job.width + c] = over - over == T(0) ? over : T(0);
      }
    for (int64_t c = 0; in.D && c < job.E; ++c) D[c] = read<T>(*in.D)[c];
    for (int64_t c = 0; in.bias && c < job.E; ++c) bias[c] = read<T>(*in.bias)[c];
    job.u = read<S>(in.u);
    job.delta = read<S>(in.delta);
    job.B = read<S>(in.B);
    job.C = read<S>(in.C);
    job.z = in.z ? read<S>(*in.z) : nullptr;
    job.initial = in.initial ? read<T>(*in.initial) : nullptr;
    job.rate = rate.data();
    job.inverse = inverse.data();
    job.D = D.data();
    job.bias = bias.data();
  }

  // All tasks, with blocks of `block` channels; `kinds` sums are kept for every group where its states are shared.
  void run(const Inputs& in, int64_t block, int kinds, bool back) {
    const int64_t blocks = (job.E + block - 1) / block, tasks = in.num_tiles() * blocks;
    const bool small = job.T * job.E * job.N < kSmall;
    const int64_t threads = torch::stable::get_num_threads(), part = job.groups * job.T * job.width * kinds;
    const bool share = threads > 1 && !small && tasks < 2 * threads && part * int64_t(sizeof(T)) <= kMostParts;
    const int64_t shares = share ? std::min(job.groups, (2 * threads + tasks - 1) / std::max<int64_t>(1, tasks)) : 1;
    std::unique_ptr<T[]> parts;
    if (shares > 1) {
      parts.reset(new T[part]);
      job.parts = parts.get();
    }
    const auto run = [&](ScanMode mode, int64_t shares) {
      const int64_t total = tasks * shares;
      std::vector<std::unique_ptr<T[]>> buffers(max_threads(total, 1));
      std::vector<int64_t> sizes(buffers.size());
      parallel_blocks(total, small ? total : 1, [&](int64_t thread, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          ScanTask task{};
          task.mode = mode;
          task.first_group = job.groups * (i % shares) / shares;
          task.last_group = job.groups * (i % shares + 1) / shares;
          task.block = i / shares % blocks;
          task.first_channel = task.block * block;
          task.last_channel = std::min(job.E, task.first_channel + block);
          task.tile = i / shares / blocks;
          task.first_segment = in.tiles[task.tile];
          task.last_segment = in.tiles[task.tile + 1];
          const int64_t size = leaf.scratch(job, task, back) + kScanLanes;
          if (size > sizes[thread]) {
            buffers[thread].reset(new T[size]);
            sizes[thread] = size;
          }
          const uintptr_t at = (reinterpret_cast<uintptr_t>(buffers[thread].get()) + 63) & ~uintptr_t(63);
          (back ? leaf.backward : leaf.forward)(job, task, reinterpret_cast<void*>(at));
        }
      });
    };
    if (shares == 1) return run(ScanMode::kWhole, 1);
    run(ScanMode::kPart, shares);
    run(ScanMode::kFinish, 1);
  }
};

template <class S>
S* fresh(const Tensor& t) {
  S* data = write<S>(t);
  advise_huge_pages(data, t.numel() * int64_t(sizeof(S)));
  return data;
}

std::tuple<Tensor, Tensor> selective_scan_cpu(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                                              const Tensor& C, const Optional& D, const Optional& z,
                                              const Optional& delta_bias, const Optional& initial_state,
                                              const Tensor& ptr, bool delta_softplus, bool reverse, bool zoh,
                                              bool return_last_state) {
  constexpr const char* op = "selective_scan";
  const Inputs in(op, u, delta, A, B, C, D, z, delta_bias, initial_state, ptr, delta_softplus, reverse, zoh);
  Tensor y = torch::stable::new_empty(in.u, in.u.sizes());
  Tensor last = return_last_state ? torch::stable::new_empty(in.u, {in.segments, in.job.E, in.job.N}, in.wide)
                                  : torch::stable::new_empty(in.u, {0}, in.wide);
  dispatch_floating(in.dtype, op, [&](auto zero) {
    using S = decltype(zero);
    using T = typename accumulate<S>::type;
    Job<S> job(in);
    job.job.y = fresh<S>(y);
    job.job.last = return_last_state ? fresh<T>(last) : nullptr;
    job.run(in, in.num_tiles() < kFewTiles ? job.leaf.lanes : kWideBlock, 1, false);
  });
  return {y, last};
}

// out[i] = the sum over k of from[k][i], in order
template <class T, class S>
void add_up(const std::vector<T>& from, int64_t parts, int64_t size, S* out) {
  for (int64_t i = 0; i < size; ++i) {
    T sum = parts ? from[i] : T(0);
    for (int64_t k = 1; k < parts; ++k) sum += from[k * size + i];
    narrow(sum, out + i);
  }
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients selective_scan_backward_cpu(const Tensor& grad_y_, const Optional& grad_last_, const Tensor& u_,
                                      const Tensor& delta_, const Tensor& A_, const Tensor& B_, const Tensor& C_,
                                      const Optional& D_, const Optional& z_, const Optional& delta_bias,
                                      const Optional& initial_state, const Tensor& ptr, bool delta_softplus,
                                      bool reverse, bool zoh) {
  constexpr const char* op = "selective_scan_backward";
  const Inputs in(op, u_, delta_, A_, B_, C_, D_, z_, delta_bias, initial_state, ptr, delta_softplus, reverse, zoh);
  const Scan& size = in.job;
  check(op, "grad_y", grad_y_, in.dtype, {size.T, size.E});
  if (grad_last_) check(op, "grad_last_state", *grad_last_, in.wide, {in.segments, size.E, size.N});
  const Tensor grad_y = made_contiguous(grad_y_);
  const Optional grad_last = grad_last_ ? Optional(made_contiguous(*grad_last_)) : std::nullopt;
  const auto like = [&](const Tensor& t) { return torch::stable::new_empty(t, t.sizes()); };
  const auto like_optional = [&](const Optional& t, ScalarType dtype) {
    return t ? like(*t) : torch::stable::new_empty(in.u, {0}, dtype);
  };
  const Gradients out{like(in.u),
                      like(in.delta),
                      like(in.A),
                      like(in.B),
                      like(in.C),
                      like_optional(in.D, in.wide),
                      like_optional(in.z, in.dtype),
                      like_optional(in.bias, in.wide),
                      like_optional(in.initial, in.wide)};
  const auto& [du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial] = out;
  dispatch_floating(in.dtype, op, [&](auto zero) {
    using S = decltype(zero);
    using T = typename accumulate<S>::type;
    Job<S> job(in);
    const int64_t tiles = in.num_tiles(), states = in.states(), width = size.width;
    const int64_t block = tiles < kFewTiles ? kNarrowBlock : kWideBlock;
    const int64_t blocks = (size.E + block - 1) / block, row = size.T * states;
    std::vector<T> sum_A(tiles * states * width), sum_D(tiles * width), sum_bias(tiles * width);
    std::unique_ptr<T[]> sum_B(new T[blocks * row]), sum_C(new T[blocks * row]);
    job.job.grad_y = read<S>(grad_y);
    job.job.grad_last = grad_last ? read<T>(*grad_last) : nullptr;
    job.job.du = fresh<S>(du);
    job.job.ddelta = fresh<S>(ddelta);
    job.job.dz = in.z ? fresh<S>(dz) : nullptr;
    job.job.dinitial = in.initial ? fresh<T>(dinitial) : nullptr;
    job.job.dA = sum_A.data();
    job.job.dD = sum_D.data();
    job.job.dbias = sum_bias.data();
    job.job.dB = sum_B.get();
    job.job.dC = sum_C.get();
    job.run(in, block, in.z ? 3 : 2, true);

    std::vector<T> wide(std::max(states, int64_t{1}) * width);
    add_up(sum_A, tiles, states * width, wide.data());
    for (int64_t c = 0; c < size.E; ++c)
      for (int64_t n = 0; n < size.N; ++n) write<T>(dA)[c * size.N + n] = wide[n * width + c];
    add_up(sum_D, tiles, width, wide.data());
    if (in.D) std::copy_n(wide.data(), size.E, write<T>(dD));
    add_up(sum_bias, tiles, width, wide.data());
    if (in.bias) std::copy_n(wide.data(), size.E, write<T>(dbias));
    S *to_B = write<S>(dB), *to_C = write<S>(dC);
    parallel_blocks(size.T, 1 << 12, [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        for (int64_t n = 0; n < size.N; ++n) {
          T b = blocks ? sum_B[t * states + n] : T(0), c = blocks ? sum_C[t * states + n] : T(0);
          for (int64_t k = 1; k < blocks; ++k) {
            b += sum_B[k * row + t * states + n];
            c += sum_C[k * row + t * states + n];
          }
          narrow(b, to_B + t * size.N + n);
          narrow(c, to_C + t * size.N + n);
        }
    });
  });
  return out;
}

}  // namespace
}  // namespace geo

STABLE_TORCH_LIBRARY_IMPL(geo, CPU, m) {
  m.impl("selective_scan", TORCH_BOX(&geo::selective_scan_cpu));
  m.impl("selective_scan_backward", TORCH_BOX(&geo::selective_scan_backward_cpu));
}
