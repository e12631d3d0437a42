// CPU launchers of selective_scan and selective_scan_backward.
//
// Work is cut into tiles of segments and blocks of channels, by the sizes alone: sums over rows and over channels are those
// of the tiles and blocks, in order. It is done in batches of rows, so that what is kept for a batch does not grow with
// their number: of several tiles, or, where one holds too much of the work, of a window of its rows. Where even the
// blocks of a window are fewer than the threads, the states of a channel are shared among tasks, too. Neither changes a bit
// (selective_scan_table.h).
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
constexpr int64_t kFewTiles = 16;
constexpr int64_t kWideBlock = 128, kFewBlocks = 8;                    // channels of a block; with few tiles, blocks
constexpr int64_t kSmall = 1 << 15;                                    // states that are updated: one task
constexpr int64_t kBatchRows = 1 << 13;                                // of several tiles, at least; of a window, at most
constexpr int64_t kWindow = 1 << 17;                                   // rows times states of a window, about

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
  int64_t segments;
  std::vector<int64_t> tiles{0};  // of segments
  bool narrow_blocks;
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
    for (int64_t s = 0; s < segments; ++s) {
      const bool large = job.ptr[s + 1] - job.ptr[s] >= 2 * rows;  // alone
      if (large && tiles.back() < s) tiles.push_back(s);
      if (large || s + 1 == segments || job.ptr[s + 1] - job.ptr[tiles.back()] >= rows) tiles.push_back(s + 1);
    }
    int64_t most = 0;
    for (int64_t k = 0; k < num_tiles(); ++k) most = std::max(most, tile_rows(k));
    narrow_blocks = num_tiles() < kFewTiles || most > job.T / kFewTiles;
  }
  int64_t states() const { return job.groups * kStateGroup; }
  int64_t num_tiles() const { return int64_t(tiles.size()) - 1; }
  int64_t tile_rows(int64_t tile) const { return job.ptr[tiles[tile + 1]] - job.ptr[tiles[tile]]; }

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
        rate[n * job.width + c] = A[c * job.N + n] * ExpNumbers<T>::log2e;
        inverse[n * job.width + c] = T(1) / A[c * job.N + n];
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

  // All tasks of a mode: those of some tiles, blocks of channels, shares of the states and, of one tile, chunks.
  struct Tasks {
    int64_t first_tile, last_tile, block, shares, first_chunk = 0, last_chunk = INT64_MAX;
  };
  void run(const Inputs& in, const Tasks& tasks, ScanMode mode, bool back) {
    const int64_t blocks = (job.E + tasks.block - 1) / tasks.block, shares = tasks.shares;
    const int64_t total = (tasks.last_tile - tasks.first_tile) * blocks * shares;
    buffers.resize(std::max<size_t>(buffers.size(), max_threads(total, 1)));
    capacity.resize(buffers.size());
    parallel_blocks(total, is_small() ? total : 1, [&](int64_t thread, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        ScanTask task{};
        task.mode = mode;
        task.first_group = job.groups * (i % shares) / shares;
        task.last_group = job.groups * (i % shares + 1) / shares;
        task.block = i / shares % blocks;
        task.first_channel = task.block * tasks.block;
        task.last_channel = std::min(job.E, task.first_channel + tasks.block);
        task.tile = tasks.first_tile + i / shares / blocks;
        task.first_segment = in.tiles[task.tile];
        task.last_segment = in.tiles[task.tile + 1];
        task.first_chunk = tasks.first_chunk;
        task.last_chunk = tasks.last_chunk;
        const int64_t size = leaf.scratch(job, task, back) + kScanLanes;
        if (size > capacity[thread]) {
          buffers[thread].reset(new T[size]);
          capacity[thread] = size;
        }
        const uintptr_t at = (reinterpret_cast<uintptr_t>(buffers[thread].get()) + 63) & ~uintptr_t(63);
        (back ? leaf.backward : leaf.forward)(job, task, reinterpret_cast<void*>(at));
      }
    });
  }
  bool is_small() const { return job.T * job.E * job.N < kSmall; }

  // Everything, with blocks of `block` channels. `kinds` sums are kept for every group where its states are shared; after
  // each batch, done(first row, rows), and before it the sums over channels have room, [blocks, rows, states] each.
  template <class F>
  void run(const Inputs& in, int64_t block, int kinds, bool back, F&& done) {
    const int64_t threads = torch::stable::get_num_threads(), tiles = in.num_tiles();
    const int64_t blocks = (job.E + block - 1) / block, states = in.states();
    const auto alone = [&](int64_t tile) {
      const int64_t rows = in.tile_rows(tile);
      return in.tiles[tile + 1] == in.tiles[tile] + 1 && !is_small() && rows >= 2 * kTileRows &&
             (rows > std::max(kBatchRows, job.T / 8) || rows * 2 * threads > job.T * blocks);
    };
    const auto batch = [&](int64_t first_row, int64_t rows) {
      job.first_row = first_row;
      job.rows = rows;
      const int64_t size = back ? 2 * blocks * rows * states : 0;
      if (size > room) {
        sums.reset(new T[size]);
        room = size;
      }
      job.dB = sums.get();
      job.dC = sums.get() + size / 2;
    };
    for (int64_t first = 0, last; first < tiles; first = last) {
      last = first + 1;
      if (alone(first)) {
        run_alone(in, first, block, kinds, back, batch, done);
        continue;
      }
      int64_t rows = in.tile_rows(first);
      const int64_t enough = std::max(kBatchRows, job.T / 8);
      for (; last < tiles && !alone(last) && (!back || rows < enough || (last - first) * blocks < 2 * threads); ++last)
        rows += in.tile_rows(last);
      const int64_t first_row = job.ptr[in.tiles[first]];
      batch(first_row, rows);
      run(in, {first, last, block, 1}, ScanMode::kWhole, back);
      done(first_row, rows);
    }
  }
  // A tile of one segment, in windows.
  template <class Batch, class F>
  void run_alone(const Inputs& in, int64_t tile, int64_t block, int kinds, bool back, Batch&& batch, F&& done) {
    const int64_t threads = torch::stable::get_num_threads(), blocks = (job.E + block - 1) / block;
    const int64_t low = job.ptr[in.tiles[tile]], high = job.ptr[in.tiles[tile + 1]], states = in.states();
    const int64_t chunks = (high - low + kScanChunk - 1) / kScanChunk;
    const int64_t shares = std::clamp<int64_t>(threads / blocks, 1, job.groups);
    // States are kept for as many pieces as take about two rows of u for each row.
    job.piece = (states + 2 * kScanChunk - 1) / (2 * kScanChunk);
    const int64_t rows = std::clamp(kWindow / states, kTileRows, kBatchRows) / (shares > 1 ? 2 : 1);
    const int64_t window = (rows / kScanChunk + job.piece - 1) / job.piece * job.piece;
    const int64_t length = back || shares > 1 ? window : chunks, windows = (chunks + length - 1) / length;
    std::unique_ptr<T[]> carried(new T[states * job.width]), parts, kept;
    job.carried = carried.get();
    if (back) {
      const int64_t size = (chunks + job.piece - 1) / job.piece * states * job.width;
      kept.reset(new T[size]);
      advise_huge_pages(kept.get(), size * int64_t(sizeof(T)));
      job.kept = kept.get();
      run(in, {tile, tile + 1, block, shares}, ScanMode::kKeep, true);
    }
    if (shares > 1) parts.reset(new T[kinds * job.groups * std::min(high - low, length * kScanChunk) * job.width]);
    job.parts = parts.get();
    for (int64_t i = 0; i < windows; ++i) {
      const int64_t first = (back ? windows - 1 - i : i) * length, last = std::min(chunks, first + length);
      const int64_t begin = first * kScanChunk, end = std::min(high - low, last * kScanChunk);
      const int64_t first_row = job.reverse ? high - end : low + begin;
      batch(first_row, end - begin);
      Tasks tasks{tile, tile + 1, block, shares, first, last};
      run(in, tasks, shares > 1 ? ScanMode::kPart : ScanMode::kWhole, back);
      tasks.shares = 1;
      if (shares > 1) run(in, tasks, ScanMode::kFinish, back);
      done(first_row, end - begin);
    }
    job.carried = job.kept = job.parts = nullptr;
  }

 private:
  std::vector<std::unique_ptr<T[]>> buffers;  // of threads
  std::vector<int64_t> capacity;
  std::unique_ptr<T[]> sums;
  int64_t room = 0;
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
    job.run(in, in.narrow_blocks ? job.leaf.lanes : kWideBlock, 1, false, [](int64_t, int64_t) {});
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
    const int64_t narrow_block = std::clamp(size.E / kFewBlocks / kScanLanes * kScanLanes, kScanLanes, kWideBlock);
    const int64_t block = in.narrow_blocks ? narrow_block : kWideBlock, blocks = (size.E + block - 1) / block;
    std::vector<T> sum_A(tiles * states * width), sum_D(tiles * width), sum_bias(tiles * width);
    job.job.grad_y = read<S>(grad_y);
    job.job.grad_last = grad_last ? read<T>(*grad_last) : nullptr;
    job.job.du = fresh<S>(du);
    job.job.ddelta = fresh<S>(ddelta);
    job.job.dz = in.z ? fresh<S>(dz) : nullptr;
    job.job.dinitial = in.initial ? fresh<T>(dinitial) : nullptr;
    job.job.dA = sum_A.data();
    job.job.dD = sum_D.data();
    job.job.dbias = sum_bias.data();
    S *to_B = write<S>(dB), *to_C = write<S>(dC);
    job.run(in, block, in.z ? 3 : 2, true, [&](int64_t first_row, int64_t rows) {
      T *sum_B = static_cast<T*>(job.job.dB), *sum_C = static_cast<T*>(job.job.dC);
      const int64_t part = rows * states;
      parallel_blocks(rows, 1 << 8, [&](int64_t, int64_t begin, int64_t end) {
        for (int64_t k = 1; k < blocks; ++k)
          for (int64_t i = begin * states; i < end * states; ++i) {
            sum_B[i] += sum_B[k * part + i];
            sum_C[i] += sum_C[k * part + i];
          }
        for (int64_t t = begin; t < end; ++t)
          for (int64_t n = 0; n < size.N; ++n) {
            narrow(blocks ? sum_B[t * states + n] : T(0), to_B + (first_row + t) * size.N + n);
            narrow(blocks ? sum_C[t * states + n] : T(0), to_C + (first_row + t) * size.N + n);
          }
      });
    });

    std::vector<T> wide(std::max(states, int64_t{1}) * width);
    add_up(sum_A, tiles, states * width, wide.data());
    for (int64_t c = 0; c < size.E; ++c)
      for (int64_t n = 0; n < size.N; ++n) write<T>(dA)[c * size.N + n] = wide[n * width + c];
    add_up(sum_D, tiles, width, wide.data());
    if (in.D) std::copy_n(wide.data(), size.E, write<T>(dD));
    add_up(sum_bias, tiles, width, wide.data());
    if (in.bias) std::copy_n(wide.data(), size.E, write<T>(dbias));
  });
  return out;
}

}  // namespace
}  // namespace geo

STABLE_TORCH_LIBRARY_IMPL(geo, CPU, m) {
  m.impl("selective_scan", TORCH_BOX(&geo::selective_scan_cpu));
  m.impl("selective_scan_backward", TORCH_BOX(&geo::selective_scan_backward_cpu));
}
