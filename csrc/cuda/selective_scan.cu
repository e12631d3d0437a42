// CUDA launchers of selective_scan and selective_scan_backward: a thread takes a channel of a unit of rows with a group of
// its states in registers, so that a warp, 32 channels of one unit, reads each B and C once.
//
// A unit is a segment. Where segments and channels are too few for the device, segments of at least two pieces are cut into
// pieces, a unit each: these are first scanned from 0, then their ends are joined along the segment, where
// exp(A * sum of Delta) takes a state through a piece, and then they are scanned again from the right states. The gradient
// goes the same way back. Everything is cut by the shapes and ptr alone, and all sums have a fixed order.
#include "../selective_scan.h"

#include <optional>
#include <tuple>
#include <utility>

#include "device.h"

namespace geo {
namespace {

constexpr int kWarp = 32, kWarps = 4;            // channels of a warp, warps of a block
constexpr int64_t kPiece = 64;                   // rows, at least
constexpr int64_t kEnough = int64_t(1) << 17;    // segments times channels that need no pieces
constexpr int kForward = 16, kFew = 8;           // states of a group; forward, kFew where there are no more
constexpr int kBack = 8, kReplay = 8;            // states of a group of the gradient, rows between the states it keeps
constexpr int64_t kSumRows = 64;                 // rows that one thread adds up

// T is the accumulation type of the rows' type S.
template <typename S>
struct Job {
  using T = typename accumulate<S>::type;
  const int64_t* ptr;
  int64_t T_, E, N, segments, slots, channel_blocks;  // slots: places for pieces, 0 where nothing is cut
  bool softplus, reverse, zoh;
  const S *u, *delta, *B, *C, *z, *grad_y;
  const T *A, *D, *bias, *initial, *grad_last;
  S *y, *du, *ddelta, *dz;
  T *last, *dinitial;
  T *state, *total, *arriving;          // of pieces: [slots, E, N], [slots, E], [slots, E, N]
  T *fed_grad, *rate_grad, *sum_y;      // sums over states, [T, E]
  T* kept;                              // [T / kReplay + 1, E, kBack]
  T *dA, *dB, *dC, *dD, *dbias;         // parts: [workers, E, N], [channel_blocks, T, N] twice, [chunks, E] twice
  int64_t workers;
};

// Pieces, as in segments.h: piece k of a segment from row p on has slot p / kPiece + k.
GEO_HD bool is_cut(int64_t slots, int64_t begin, int64_t end) { return slots > 0 && end - begin >= 2 * kPiece; }
GEO_HD int64_t count_pieces(int64_t begin, int64_t end) { return (end - begin) / kPiece; }

struct Unit {
  int64_t segment, begin, end, slot;  // rows; -1 unless it is a piece
  bool valid, first, last;            // of its segment, in the order of the scan
};
template <typename S>
__device__ Unit unit_of(const Job<S>& job, int64_t index) {
  Unit unit{index, 0, 0, -1, true, true, true};
  if (index < job.segments) {
    segment_range(job.ptr, index, job.T_, unit.begin, unit.end);
    unit.valid = !is_cut(job.slots, unit.begin, unit.end);
    return unit;
  }
  unit.slot = index - job.segments;
  int64_t low = 0, high = job.segments;  // the last segment whose first slot is at most this one
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (job.ptr[middle] / kPiece <= unit.slot)
      low = middle;
    else
      high = middle;
  }
  unit.segment = low;
  int64_t begin, end;
  segment_range(job.ptr, low, job.T_, begin, end);
  const int64_t k = unit.slot - begin / kPiece, pieces = count_pieces(begin, end);
  unit.valid = is_cut(job.slots, begin, end) && k >= 0 && k < pieces;
  unit.begin = begin + k * kPiece;
  unit.end = k + 1 == pieces ? end : unit.begin + kPiece;
  unit.first = k == (job.reverse ? pieces - 1 : 0);
  unit.last = k == (job.reverse ? 0 : pieces - 1);
  return unit;
}
template <typename S>
__device__ __forceinline__ int64_t row_of(const Job<S>& job, const Unit& unit, int64_t i) {
  return job.reverse ? unit.end - 1 - i : unit.begin + i;
}

__device__ __forceinline__ float power_of_two(float t) { return exp2f(t); }
__device__ __forceinline__ double power_of_two(double t) { return exp2(t); }

// What stands at a row of a channel.
template <typename T>
struct Row {
  T step, slope, x, fed;  // Delta, dDelta / ddelta, u, and what B is multiplied by
};
template <typename S>
__device__ __forceinline__ Row<typename Job<S>::T> read_row(const Job<S>& job, int64_t row, int64_t e) {
  using T = typename Job<S>::T;
  Row<T> out;
  out.step = T(widen(job.delta[row * job.E + e])) + (job.bias ? job.bias[e] : T(0));
  out.slope = T(1);
  if (job.softplus) {
    const Softplus<T> soft = softplus<T>(out.step);
    out.step = soft.value;
    out.slope = soft.slope;
  }
  out.x = T(widen(job.u[row * job.E + e]));
  out.fed = job.zoh ? out.x : out.step * out.x;
  return out;
}
// dy before the gate.
template <typename S>
__device__ __forceinline__ typename Job<S>::T read_grad(const Job<S>& job, int64_t row, int64_t e) {
  using T = typename Job<S>::T;
  const T g = T(widen(job.grad_y[row * job.E + e]));
  return job.z ? g * gate<T>(T(widen(job.z[row * job.E + e]))).value : g;
}

// The states [first, first + kStates) of a channel; those from N on stay 0.
template <typename S, int kStates, bool kZoh>
struct States {
  using T = typename Job<S>::T;
  T rate[kStates], inverse[kZoh ? kStates : 1];
  int64_t e, first, count;

  __device__ __forceinline__ States(const Job<S>& job, int64_t e, int64_t first)
      : e(e), first(first), count(min(job.N - first, int64_t(kStates))) {
    GEO_UNROLL(16) for (int n = 0; n < kStates; ++n) {
      const T a = n < count ? job.A[e * job.N + first + n] : T(0);
      rate[n] = a * ExpNumbers<T>::log2e;
      if constexpr (kZoh) inverse[n] = T(1) / a;
    }
  }
  __device__ __forceinline__ ScanStep<T> step(int n, T d) const {
    if constexpr (kZoh)
      return zoh_step<T>(d, rate[n], inverse[n]);
    else
      return {power_of_two(d * rate[n]), T(1)};
  }
  __device__ __forceinline__ T weight(const S* rows, const Job<S>& job, int64_t row, int n) const {
    return n < count ? T(widen(rows[row * job.N + first + n])) : T(0);
  }
  // h moves on by a row.
  __device__ __forceinline__ void advance(const Job<S>& job, int64_t row, const Row<T>& at, T (&h)[kStates]) const {
    GEO_UNROLL(16) for (int n = 0; n < kStates; ++n) {
      const ScanStep<T> s = step(n, at.step);
      h[n] = s.decay * h[n] + s.gain * at.fed * weight(job.B, job, row, n);
    }
  }
  // to and from [*, E, N]; a null pointer is 0
  __device__ __forceinline__ void get(const Job<S>& job, const T* from, int64_t i, T (&h)[kStates]) const {
    GEO_UNROLL(16) for (int n = 0; n < kStates; ++n)
      h[n] = from && n < count ? from[(i * job.E + e) * job.N + first + n] : T(0);
  }
  __device__ __forceinline__ void put(const Job<S>& job, T* to, int64_t i, const T (&h)[kStates]) const {
    GEO_UNROLL(16) for (int n = 0; n < kStates; ++n)
      if (n < count) to[(i * job.E + e) * job.N + first + n] = h[n];
  }
  // h before the unit's first row
  __device__ __forceinline__ void start(const Job<S>& job, const Unit& unit, T (&h)[kStates]) const {
    if (unit.slot < 0)
      get(job, job.initial, unit.segment, h);
    else
      get(job, job.state, unit.slot, h);
  }
};

// Pieces alone, from a state of 0 and, for the gradient, with nothing arriving at their ends.
template <typename S, int kStates, bool kZoh>
__global__ void scan_pieces_kernel(Job<S> job, int64_t first, bool back) {
  using T = typename Job<S>::T;
  for (int64_t work = blockIdx.x * int64_t(blockDim.y) + threadIdx.y; work < job.slots * job.channel_blocks;
       work += int64_t(gridDim.x) * blockDim.y) {
    const Unit unit = unit_of(job, job.segments + work / job.channel_blocks);
    const int64_t e = work % job.channel_blocks * kWarp + threadIdx.x, rows = unit.end - unit.begin;
    if (!unit.valid || e >= job.E) continue;
    const States<S, kStates, kZoh> states(job, e, first);
    T h[kStates] = {}, total = 0;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = row_of(job, unit, i);
      const Row<T> at = read_row(job, row, e);
      total += at.step;
      states.advance(job, row, at, h);
    }
    states.put(job, job.state, unit.slot, h);
    job.total[unit.slot * job.E + e] = total;
    if (!back) continue;
    T g[kStates] = {};
    for (int64_t i = rows - 1; i >= 0; --i) {
      const int64_t row = row_of(job, unit, i);
      const Row<T> at = read_row(job, row, e);
      const T grad = read_grad(job, row, e);
      GEO_UNROLL(16) for (int n = 0; n < kStates; ++n)
        g[n] = states.step(n, at.step).decay * (g[n] + grad * states.weight(job.C, job, row, n));
    }
    states.put(job, job.arriving, unit.slot, g);
  }
}

// Along each segment of pieces: what is left at their ends becomes what comes in at the next one's. Item = (segment, e, n).
template <typename S>
__global__ void join_pieces_kernel(Job<S> job, bool back) {
  using T = typename Job<S>::T;
  const int64_t size = job.E * job.N;
  for (int64_t item = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; item < job.segments * size;
       item += int64_t(gridDim.x) * blockDim.x) {
    const int64_t segment = item / size, of = item % size, e = of / job.N;
    int64_t begin, end;
    segment_range(job.ptr, segment, job.T_, begin, end);
    if (!is_cut(job.slots, begin, end)) continue;
    const int64_t pieces = count_pieces(begin, end), slot = begin / kPiece;
    const T rate = job.A[of] * ExpNumbers<T>::log2e;
    T h = job.initial ? job.initial[item] : T(0);
    for (int64_t i = 0; i < pieces; ++i) {
      const int64_t k = slot + (job.reverse ? pieces - 1 - i : i);
      const T own = job.state[k * size + of];
      job.state[k * size + of] = h;
      h = power_of_two(rate * job.total[k * job.E + e]) * h + own;
    }
    if (!back) continue;
    T g = job.grad_last ? job.grad_last[item] : T(0);
    for (int64_t i = pieces - 1; i >= 0; --i) {
      const int64_t k = slot + (job.reverse ? pieces - 1 - i : i);
      const T own = job.arriving[k * size + of];
      job.arriving[k * size + of] = g;
      g = power_of_two(rate * job.total[k * job.E + e]) * g + own;
    }
  }
}

// The states from `first` on; y is written with the last ones, and is kept in sum_y before.
template <typename S, int kStates, bool kZoh>
__global__ void scan_kernel(Job<S> job, int64_t first) {
  using T = typename Job<S>::T;
  const bool last = first + kStates >= job.N;
  for (int64_t work = blockIdx.x * int64_t(blockDim.y) + threadIdx.y;
       work < (job.segments + job.slots) * job.channel_blocks; work += int64_t(gridDim.x) * blockDim.y) {
    const Unit unit = unit_of(job, work / job.channel_blocks);
    const int64_t e = work % job.channel_blocks * kWarp + threadIdx.x, rows = unit.end - unit.begin;
    if (!unit.valid || e >= job.E) continue;
    const States<S, kStates, kZoh> states(job, e, first);
    const T skip = job.D ? job.D[e] : T(0);
    T h[kStates];
    states.start(job, unit, h);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = row_of(job, unit, i), at_e = row * job.E + e;
      const Row<T> at = read_row(job, row, e);
      states.advance(job, row, at, h);
      T sum = first ? job.sum_y[at_e] : skip * at.x;
      GEO_UNROLL(16) for (int n = 0; n < kStates; ++n) sum += h[n] * states.weight(job.C, job, row, n);
      if (last)
        narrow(job.z ? sum * gate<T>(T(widen(job.z[at_e]))).value : sum, job.y + at_e);
      else
        job.sum_y[at_e] = sum;
    }
    if (job.last && unit.last) states.put(job, job.last, unit.segment, h);
  }
}

// Lane l of a warp ends up with the sum over lanes of v[l / (kWarp / K)]: halves of the values change sides, K/2 of them at
// first, until one is left, whose sum the last lanes share.
template <int K, typename T>
__device__ __forceinline__ T sum_lanes(T (&v)[K]) {
  int distance = kWarp / 2;
  GEO_UNROLL(8) for (int half = K / 2; half >= 1; half /= 2) {
    const bool upper = threadIdx.x & distance;
    GEO_UNROLL(16) for (int i = 0; i < half; ++i) {
      const T keep = upper ? v[i + half] : v[i], give = upper ? v[i] : v[i + half];
      v[i] = keep + __shfl_xor_sync(0xffffffffu, give, distance);
    }
    distance /= 2;
  }
  for (; distance >= 1; distance /= 2) v[0] += __shfl_xor_sync(0xffffffffu, v[0], distance);
  return v[0];
}

// The states [first, first + kBack). Worker w takes the units w, w + workers, ...: dA is summed along them.
template <typename S, bool kZoh>
__global__ void back_kernel(Job<S> job, int64_t first) {
  using T = typename Job<S>::T;
  const int64_t work = blockIdx.x * int64_t(blockDim.y) + threadIdx.y;  // of a whole warp
  const int64_t worker = work / job.channel_blocks, block = work % job.channel_blocks;
  if (worker >= job.workers) return;
  const int64_t channel = block * kWarp + threadIdx.x, e = min(channel, job.E - 1);
  const bool active = channel < job.E;  // others walk along with a gradient of 0
  const States<S, kBack, kZoh> states(job, e, first);
  T rate_sum[kBack] = {};
  for (int64_t index = worker; index < job.segments + job.slots; index += job.workers) {
    const Unit unit = unit_of(job, index);
    if (!unit.valid) continue;
    const int64_t rows = unit.end - unit.begin, chunks = (rows + kReplay - 1) / kReplay, kept = unit.begin / kReplay;
    T h[kBack], g[kBack];
    states.start(job, unit, h);
    for (int64_t i = 0; i < (chunks - 1) * kReplay; ++i) {
      const int64_t row = row_of(job, unit, i);
      states.advance(job, row, read_row(job, row, e), h);
      if ((i + 1) % kReplay == 0 && active) {
        GEO_UNROLL(16) for (int n = 0; n < kBack; ++n)
          job.kept[((kept + (i + 1) / kReplay) * job.E + e) * kBack + n] = h[n];
      }
    }
    __syncwarp();  // threads beyond the last channel read what its own thread has kept
    if (unit.slot < 0)
      states.get(job, job.grad_last, unit.segment, g);
    else
      states.get(job, job.arriving, unit.slot, g);
    for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
      const int64_t begin = chunk * kReplay, count = min(rows - begin, int64_t(kReplay));
      T before[kReplay][kBack], step[kReplay], fed[kReplay], dy[kReplay];
      if (chunk == 0) {
        states.start(job, unit, h);
      } else {
        GEO_UNROLL(16) for (int n = 0; n < kBack; ++n) h[n] = job.kept[((kept + chunk) * job.E + e) * kBack + n];
      }
      GEO_UNROLL(8) for (int k = 0; k < kReplay; ++k) {
        if (k < count) {
          const int64_t row = row_of(job, unit, begin + k);
          const Row<T> at = read_row(job, row, e);
          step[k] = at.step;
          fed[k] = at.fed;
          dy[k] = active ? read_grad(job, row, e) : T(0);
          GEO_UNROLL(16) for (int n = 0; n < kBack; ++n) before[k][n] = h[n];
          states.advance(job, row, at, h);
        }
      }
      // h is that after row k.
      GEO_UNROLL(8) for (int k = kReplay - 1; k >= 0; --k) {
        if (k < count) {
          const int64_t row = row_of(job, unit, begin + k), at_e = row * job.E + e;
          T lanes[2 * kBack], fed_grad = 0, rate_grad = 0, gain_grad = 0, sum_y = 0;
          GEO_UNROLL(16) for (int n = 0; n < kBack; ++n) {
            const ScanStep<T> s = states.step(n, step[k]);
            const T b = states.weight(job.B, job, row, n), c = states.weight(job.C, job, row, n);
            const T all = active ? g[n] + dy[k] * c : T(0), decayed = all * s.decay, w = decayed * before[k][n];
            if constexpr (kZoh) {
              gain_grad += decayed * b;
              rate_sum[n] += all * b * fed[k] * zoh_gain_grad<T>(step[k], states.rate[n], states.inverse[n], s);
            }
            fed_grad += all * s.gain * b;
            rate_grad += w * states.rate[n];
            rate_sum[n] += w * step[k];
            sum_y += h[n] * c;
            lanes[n] = active ? all * s.gain * fed[k] : T(0);
            lanes[kBack + n] = active ? dy[k] * h[n] : T(0);
            g[n] = decayed;
            h[n] = before[k][n];
          }
          if constexpr (kZoh) rate_grad += gain_grad * fed[k] * T(1 / kScanLog2);
          if (active) {
            job.fed_grad[at_e] = (first ? job.fed_grad[at_e] : T(0)) + fed_grad;
            job.rate_grad[at_e] = (first ? job.rate_grad[at_e] : T(0)) + rate_grad;
            if (job.z) job.sum_y[at_e] = (first ? job.sum_y[at_e] : T(0)) + sum_y;
          }
          const T sum = sum_lanes(lanes);
          constexpr int kShare = kWarp / (2 * kBack);  // lanes with one sum
          const int place = int(threadIdx.x) / kShare, n = place % kBack;
          if (threadIdx.x % kShare == 0 && n < states.count)
            (place < kBack ? job.dB : job.dC)[(block * job.T_ + row) * job.N + first + n] = sum;
        }
      }
    }
    if (job.dinitial && unit.first && active) states.put(job, job.dinitial, unit.segment, g);
  }
  if (active) states.put(job, job.dA, worker, rate_sum);
}

// From the sums over states: the gradients of the rows, and parts of those of D and the bias. Item = chunk of rows.
template <typename S>
__global__ void row_grads_kernel(Job<S> job, int64_t chunks, int64_t tiles) {
  using T = typename Job<S>::T;
  GEO_FOR_ITEMS(chunk, e, chunks, job.E, tiles) {
    const T skip = job.D ? job.D[e] : T(0);
    T skip_sum = 0, bias_sum = 0;
    for (int64_t row = chunk * kSumRows; row < min((chunk + 1) * kSumRows, job.T_); ++row) {
      const int64_t at_e = row * job.E + e;
      const Row<T> at = read_row(job, row, e);
      const T grad = read_grad(job, row, e), fed_grad = job.fed_grad[at_e];
      narrow(skip * grad + (job.zoh ? fed_grad : at.step * fed_grad), job.du + at_e);
      T step_grad = job.rate_grad[at_e] * T(kScanLog2);
      if (!job.zoh) step_grad += at.x * fed_grad;
      step_grad *= at.slope;
      narrow(step_grad, job.ddelta + at_e);
      bias_sum += step_grad;
      skip_sum += grad * at.x;
      if (job.z) {
        const T slope = gate<T>(T(widen(job.z[at_e]))).slope;
        narrow(T(widen(job.grad_y[at_e])) * slope * (skip * at.x + job.sum_y[at_e]), job.dz + at_e);
      }
    }
    job.dD[chunk * job.E + e] = skip_sum;
    job.dbias[chunk * job.E + e] = bias_sum;
  }
}

// out[i, f] = the sum of the rows [i * count, (i + 1) * count) of from, of `rows`
template <typename T, typename S>
__global__ void sum_rows_kernel(const T* __restrict__ from, S* __restrict__ out, int64_t rows, int64_t count, int64_t width,
                                int64_t items, int64_t tiles) {
  GEO_FOR_ITEMS(item, f, items, width, tiles) {
    T sum = 0;
    for (int64_t row = item * count; row < min((item + 1) * count, rows); ++row) sum += from[row * width + f];
    narrow(sum, out + item * width + f);
  }
}

ScalarType wide_type(ScalarType dtype) { return dtype == ScalarType::Double ? dtype : ScalarType::Float; }

void check(const char* op, const char* name, const Tensor& t, ScalarType dtype, std::initializer_list<int64_t> sizes) {
  STD_TORCH_CHECK(t.is_cuda(), op, ": all tensors must be on the GPU");
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
  int64_t T, E, N, segments;
  bool softplus, reverse, zoh;

  Inputs(const char* op, const Tensor& u_, const Tensor& delta_, const Tensor& A_, const Tensor& B_, const Tensor& C_,
         const Optional& D_, const Optional& z_, const Optional& bias_, const Optional& initial_, const Tensor& ptr_,
         bool softplus, bool reverse, bool zoh)
      : u(made_contiguous(u_)), delta(made_contiguous(delta_)), A(made_contiguous(A_)), B(made_contiguous(B_)),
        C(made_contiguous(C_)), ptr(made_contiguous(ptr_)), D(contiguous(D_)), z(contiguous(z_)),
        bias(contiguous(bias_)), initial(contiguous(initial_)), dtype(u_.scalar_type()), wide(wide_type(dtype)),
        softplus(softplus), reverse(reverse), zoh(zoh) {
    STD_TORCH_CHECK(u.dim() == 2 && A.dim() == 2, op, ": u must be [T, E] and A [E, N]");
    T = u.size(0);
    E = u.size(1);
    N = A.size(1);
    check(op, "u", u, dtype, {T, E});
    check(op, "delta", delta, dtype, {T, E});
    check(op, "A", A, wide, {E, N});
    check(op, "B", B, dtype, {T, N});
    check(op, "C", C, dtype, {T, N});
    STD_TORCH_CHECK(ptr.is_cuda(), op, ": all tensors must be on the GPU");
    check_ptr_cuda(op, ptr, T);
    segments = ptr.numel() - 1;
    if (D) check(op, "D", *D, wide, {E});
    if (z) check(op, "z", *z, dtype, {T, E});
    if (bias) check(op, "delta_bias", *bias, wide, {E});
    if (initial) check(op, "initial_state", *initial, wide, {segments, E, N});
  }
  template <typename... Sizes>
  Tensor buffer(Sizes... sizes) const {
    return torch::stable::new_empty(u, {int64_t(sizes)...}, wide);
  }

  template <typename S>
  Job<S> job() const {
    using W = typename accumulate<S>::type;
    Job<S> job{};
    job.ptr = index_data(ptr);
    job.T_ = T;
    job.E = E;
    job.N = N;
    job.segments = segments;
    job.slots = segments * E < kEnough ? T / kPiece : 0;
    job.channel_blocks = (E + kWarp - 1) / kWarp;
    job.softplus = softplus;
    job.reverse = reverse;
    job.zoh = zoh;
    job.u = read<S>(u);
    job.delta = read<S>(delta);
    job.A = read<W>(A);
    job.B = read<S>(B);
    job.C = read<S>(C);
    job.D = D ? read<W>(*D) : nullptr;
    job.z = z ? read<S>(*z) : nullptr;
    job.bias = bias ? read<W>(*bias) : nullptr;
    job.initial = initial ? read<W>(*initial) : nullptr;
    return job;
  }

 private:
  static Optional contiguous(const Optional& t) { return t ? Optional(made_contiguous(*t)) : t; }
};

unsigned blocks_for(int64_t work) { return static_cast<unsigned>(std::clamp<int64_t>(work, 1, int64_t(1) << 20)); }

// Where segments are cut, the state before each piece, and with `back` what arrives at its end.
template <int kStates, typename S>
void join_pieces(const Job<S>& job, bool back, cudaStream_t stream) {
  if (job.slots == 0) return;
  const dim3 block(kWarp, kWarps), grid(blocks_for((job.slots * job.channel_blocks + kWarps - 1) / kWarps));
  for (int64_t first = 0; first < job.N; first += kStates) {
    if (job.zoh)
      scan_pieces_kernel<S, kStates, true><<<grid, block, 0, stream>>>(job, first, back);
    else
      scan_pieces_kernel<S, kStates, false><<<grid, block, 0, stream>>>(job, first, back);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  const unsigned blocks = blocks_for((job.segments * job.E * job.N + 255) / 256);
  join_pieces_kernel<S><<<blocks, 256, 0, stream>>>(job, back);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <int kStates, typename S>
void scan(const Job<S>& job, cudaStream_t stream) {
  join_pieces<kStates>(job, false, stream);
  const int64_t work = (job.segments + job.slots) * job.channel_blocks;
  const dim3 block(kWarp, kWarps), grid(blocks_for((work + kWarps - 1) / kWarps));
  for (int64_t first = 0; first < std::max<int64_t>(job.N, 1); first += kStates) {
    if (job.zoh)
      scan_kernel<S, kStates, true><<<grid, block, 0, stream>>>(job, first);
    else
      scan_kernel<S, kStates, false><<<grid, block, 0, stream>>>(job, first);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

std::tuple<Tensor, Tensor> selective_scan_cuda(const Tensor& u_, const Tensor& delta_, const Tensor& A_, const Tensor& B_,
                                               const Tensor& C_, const Optional& D_, const Optional& z_,
                                               const Optional& delta_bias, const Optional& initial_state,
                                               const Tensor& ptr, bool delta_softplus, bool reverse, bool zoh,
                                               bool return_last_state) {
  constexpr const char* op = "selective_scan";
  STD_TORCH_CHECK(u_.is_cuda(), op, ": all tensors must be on the GPU");
  const DeviceGuard guard(u_.get_device_index());
  const Inputs in(op, u_, delta_, A_, B_, C_, D_, z_, delta_bias, initial_state, ptr, delta_softplus, reverse, zoh);
  Tensor y = torch::stable::new_empty(in.u, in.u.sizes());
  Tensor last = return_last_state ? in.buffer(in.segments, in.E, in.N) : in.buffer(0);
  dispatch_floating(in.dtype, op, [&](auto zero) {
    using S = decltype(zero);
    using T = typename accumulate<S>::type;
    Job<S> job = in.job<S>();
    const Tensor state = in.buffer(job.slots, in.E, in.N), total = in.buffer(job.slots, in.E);
    const Tensor sum_y = in.buffer(in.N > kForward ? in.T : int64_t(0), in.E);
    job.state = write<T>(state);
    job.total = write<T>(total);
    job.sum_y = write<T>(sum_y);
    job.y = write<S>(y);
    job.last = return_last_state ? write<T>(last) : nullptr;
    if (in.E == 0) return;
    in.N > kFew ? scan<kForward>(job, current_stream(in.u)) : scan<kFew>(job, current_stream(in.u));
  });
  return {y, last};
}

// out [width] = the sum over the rows of from [rows, width], kSumRows at a time
template <typename T, typename S>
void sum_rows(const Inputs& in, Tensor from, int64_t rows, int64_t width, S* out, cudaStream_t stream) {
  for (; rows > kSumRows; rows = (rows + kSumRows - 1) / kSumRows) {
    const int64_t items = (rows + kSumRows - 1) / kSumRows;
    const Tensor sums = in.buffer(items, width);
    const Launch launch(items, width);
    sum_rows_kernel<T, T><<<launch.grid, launch.block, 0, stream>>>(read<T>(from), write<T>(sums), rows, kSumRows, width,
                                                                    items, launch.tiles);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    from = sums;
  }
  const Launch launch(1, width);
  sum_rows_kernel<T, S><<<launch.grid, launch.block, 0, stream>>>(read<T>(from), out, rows, kSumRows, width, 1, launch.tiles);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients selective_scan_backward_cuda(const Tensor& grad_y_, const Optional& grad_last_, const Tensor& u_,
                                       const Tensor& delta_, const Tensor& A_, const Tensor& B_, const Tensor& C_,
                                       const Optional& D_, const Optional& z_, const Optional& delta_bias,
                                       const Optional& initial_state, const Tensor& ptr, bool delta_softplus,
                                       bool reverse, bool zoh) {
  constexpr const char* op = "selective_scan_backward";
  STD_TORCH_CHECK(u_.is_cuda(), op, ": all tensors must be on the GPU");
  const DeviceGuard guard(u_.get_device_index());
  const Inputs in(op, u_, delta_, A_, B_, C_, D_, z_, delta_bias, initial_state, ptr, delta_softplus, reverse, zoh);
  check(op, "grad_y", grad_y_, in.dtype, {in.T, in.E});
  if (grad_last_) check(op, "grad_last_state", *grad_last_, in.wide, {in.segments, in.E, in.N});
  const Tensor grad_y = made_contiguous(grad_y_);
  const Optional grad_last = grad_last_ ? Optional(made_contiguous(*grad_last_)) : std::nullopt;
  const auto like = [&](const Tensor& t) { return torch::stable::new_empty(t, t.sizes()); };
  const auto like_optional = [&](const Optional& t, ScalarType dtype) {
    return t ? like(*t) : torch::stable::new_empty(in.u, {0}, dtype);
  };
  const Tensor du = like(in.u), ddelta = like(in.delta), dA = like(in.A), dB = like(in.B), dC = like(in.C);
  const Tensor dD = like_optional(in.D, in.wide), dz = like_optional(in.z, in.dtype);
  const Tensor dbias = like_optional(in.bias, in.wide), dinitial = like_optional(in.initial, in.wide);
  dispatch_floating(in.dtype, op, [&](auto zero) {
    using S = decltype(zero);
    using T = typename accumulate<S>::type;
    const cudaStream_t stream = current_stream(in.u);
    Job<S> job = in.job<S>();
    const int64_t units = in.segments + job.slots, chunks = (in.T + kSumRows - 1) / kSumRows;
    job.workers = std::min(units, std::max<int64_t>(256, in.T / 64));
    const Tensor state = in.buffer(job.slots, in.E, in.N), total = in.buffer(job.slots, in.E);
    const Tensor arriving = in.buffer(job.slots, in.E, in.N);
    const Tensor fed_grad = in.buffer(in.T, in.E), rate_grad = in.buffer(in.T, in.E);
    const Tensor sum_y = in.buffer(in.z ? in.T : int64_t(0), in.E), kept = in.buffer(in.T / kReplay + 1, in.E, kBack);
    const Tensor part_A = in.buffer(job.workers, in.E, in.N);
    const Tensor part_B = in.buffer(job.channel_blocks, in.T, in.N), part_C = in.buffer(job.channel_blocks, in.T, in.N);
    const Tensor part_D = in.buffer(chunks, in.E), part_bias = in.buffer(chunks, in.E);
    job.grad_y = read<S>(grad_y);
    job.grad_last = grad_last ? read<T>(*grad_last) : nullptr;
    job.du = write<S>(du);
    job.ddelta = write<S>(ddelta);
    job.dz = in.z ? write<S>(dz) : nullptr;
    job.dinitial = in.initial ? write<T>(dinitial) : nullptr;
    job.state = write<T>(state);
    job.total = write<T>(total);
    job.arriving = write<T>(arriving);
    job.fed_grad = write<T>(fed_grad);
    job.rate_grad = write<T>(rate_grad);
    job.sum_y = write<T>(sum_y);
    job.kept = write<T>(kept);
    job.dA = write<T>(part_A);
    job.dB = write<T>(part_B);
    job.dC = write<T>(part_C);
    job.dD = write<T>(part_D);
    job.dbias = write<T>(part_bias);
    if (in.E > 0) {
      join_pieces<kBack>(job, true, stream);
      const dim3 block(kWarp, kWarps);
      const unsigned grid = static_cast<unsigned>((job.workers * job.channel_blocks + kWarps - 1) / kWarps);
      for (int64_t first = 0; grid > 0 && first < std::max<int64_t>(in.N, 1); first += kBack) {
        if (in.zoh)
          back_kernel<S, true><<<grid, block, 0, stream>>>(job, first);
        else
          back_kernel<S, false><<<grid, block, 0, stream>>>(job, first);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      }
      const Launch launch(chunks, in.E);
      row_grads_kernel<S><<<launch.grid, launch.block, 0, stream>>>(job, chunks, launch.tiles);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
    sum_rows<T>(in, part_A, job.workers, in.E * in.N, write<T>(dA), stream);
    sum_rows<T>(in, part_B, job.channel_blocks, in.T * in.N, write<S>(dB), stream);
    sum_rows<T>(in, part_C, job.channel_blocks, in.T * in.N, write<S>(dC), stream);
    if (in.D) sum_rows<T>(in, part_D, chunks, in.E, write<T>(dD), stream);
    if (in.bias) sum_rows<T>(in, part_bias, chunks, in.E, write<T>(dbias), stream);
  });
  return {du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial};
}

}  // namespace
}  // namespace geo

STABLE_TORCH_LIBRARY_IMPL(geo, CUDA, m) {
  m.impl("selective_scan", TORCH_BOX(&geo::selective_scan_cuda));
  m.impl("selective_scan_backward", TORCH_BOX(&geo::selective_scan_backward_cuda));
}
