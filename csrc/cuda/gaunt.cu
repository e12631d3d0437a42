// CUDA launcher of gaunt_product. A sample is one channel of one row.
//
//   straight    a thread a sample, operands and output in registers: the small degrees of float32 that has_straight
//   equal       a thread a sample, separable, three equal degrees of float32 known to the compiler: a pair of nodes at a time,
//               the output in registers, the operands in shared memory
//   any         a block a few samples in shared memory, whose threads share the components: other degrees, float64, and
//               lists of couplings
//
// Samples stand in shared memory one after another at an odd distance, so that neither neighbouring samples nor neighbouring
// numbers of a sample meet in a bank. Sums have one order whatever the schedule; there are no atomics.
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../gaunt_args.h"
#include "../gaunt_tables.h"
#include "device.h"

namespace geo {
namespace {

constexpr int kWarp = 32;

// Coefficients [R, (lmax+1)^2, channels] and the factors of their degrees [R or 1, lmax+1, scale_channels], or null.
struct Operand {
  const void *data, *scale;
  int64_t channels, scale_channels, scale_row;  // scale_row: numbers from row to row, 0 where all share one
  int lmax;
};

struct Samples {
  Operand x, y, z;  // z.data is null: the output stands beside it
  void* out;        // [R, (L3+1)^2, C], or with `sum` one channel, the sum of all
  int64_t rows, C;
  ScalarType dtype;
  bool sum;
  bool packed;  // few channels: numbers are read and written as they lie, and meet their threads in shared memory
};

// Where a thread works; beyond the last sample it is not active.
struct Place {
  int64_t row, c;
  bool active;
};

// Where the numbers of a place begin; they follow one another at a distance of `channels`.
template <class S>
__device__ __forceinline__ const S* data_at(const Operand& of, const Place& at) {
  return static_cast<const S*>(of.data) + at.row * square(of.lmax + 1) * of.channels + (of.channels == 1 ? 0 : at.c);
}
template <class S>
__device__ __forceinline__ const S* scale_at(const Operand& of, const Place& at) {
  return static_cast<const S*>(of.scale) + at.row * of.scale_row + (of.scale_channels == 1 ? 0 : at.c);
}
template <class S>
__device__ __forceinline__ S* out_at(const Samples& a, const Place& at) {
  return static_cast<S*>(a.out) + at.row * square(a.z.lmax + 1) * a.C + at.c;
}

// f(from, sample, i): number `from` of a tensor with `size` components a row is component i of a sample of the tile, the n
// samples from `first` on. Neighbouring threads have neighbouring numbers; all threads of the block come here.
template <class F>
__device__ __forceinline__ void for_packed(int64_t first, int n, int64_t C, int size, F&& f) {
  const int64_t row0 = first / C;
  const int rows = int((first + n - 1) / C - row0) + 1, width = size * int(C);
  for (int r = threadIdx.x / kWarp; r < rows; r += blockDim.x / kWarp)
    for (int j = threadIdx.x % kWarp; j < width; j += kWarp) {
      const int i = C == 1 ? j : int(unsigned(j) / unsigned(C));
      const int sample = int((row0 + r) * C - first) + j - i * int(C);
      if (sample >= 0 && sample < n) f((row0 + r) * width + j, sample, i);
    }
}

__device__ __forceinline__ bool comes_packed(const Samples& a, const Operand& from) {
  return a.packed && from.channels == a.C;
}

// -- a thread a sample -------------------------------------------------------------------------------------------------
// Arrays are in registers where all their indices are known to the compiler: every loop over them is unrolled.
template <int kX, int kY, int kZ, bool kBracket>
struct Straight {
  static constexpr int L1 = kX, L2 = kY, L3 = kZ, kThreads = 128;
  static constexpr bool kShared = false;  // operands are in registers
  struct Tables {};
  static Tables tables() { return {}; }
  __device__ static __forceinline__ void product(const Tables&, const float* x, const float* y, float* out) {
    straight_product<L1, L2, L3, kBracket, float, float>(x, y, out);
  }
};

// The coefficients of one function at one polar angle; that of m = 0 is real.
template <int L>
struct Series {
  float re[L + 1], im[L + 1];
};

enum class Field { kPlain, kTurn, kMinusTurn };  // kTurn: times -i m, the slope in the azimuth; it has no m = 0

template <int L, Field kField, bool kSlope>
__device__ __forceinline__ void to_polar(const float* x, const float* table, Series<L>& node, Series<L>& mirror) {
  constexpr bool kSwap = kField != Field::kPlain;
#pragma unroll
  for (int m = kSwap; m <= L; ++m)
#pragma unroll
    for (int part = 0; part < (m ? 2 : 1); ++part) {
      float even = 0, odd = 0;  // in l - m
#pragma unroll
      for (int l = m; l <= L; ++l) {
        float& sum = (l - m) % 2 ? odd : even;
        sum += x[l * l + l + (part ? -m : m)] * table[polar_row(L, l, m)];
      }
      const bool minus = kSwap && (part == 0) == (kField == Field::kTurn);
      const float sum = even + odd, difference = kSlope ? odd - even : even - odd;
      ((part == 1) != kSwap ? node.im : node.re)[m] = minus ? -sum : sum;
      ((part == 1) != kSwap ? mirror.im : mirror.re)[m] = minus ? -difference : difference;
    }
}

// z += the convolution of x and y. kZero: the first index of x and of y that is not zero.
template <int L, int kZeroX, int kZeroY>
__device__ __forceinline__ void convolve(const Series<L>& x, const Series<L>& y, Series<L>& z) {
  float sum = 0;
#pragma unroll
  for (int a = 1; a <= L; ++a) {
    sum += x.re[a] * y.re[a];
    sum += x.im[a] * y.im[a];
  }
  z.re[0] += sum + sum;
  if (kZeroX + kZeroY == 0) z.re[0] += x.re[0] * y.re[0];
#pragma unroll
  for (int c = 1; c <= L; ++c)
#pragma unroll
    for (int i = c - L; i <= L; ++i) {
      const int j = c - i, a = i < 0 ? -i : i, b = j < 0 ? -j : j;
      if (a < kZeroX || b < kZeroY) continue;
      z.re[c] += x.re[a] * y.re[b];
      if (b) z.im[c] += x.re[a] * (j < 0 ? -y.im[b] : y.im[b]);
      if (a && b) z.re[c] -= (i < 0 ? -x.im[a] : x.im[a]) * (j < 0 ? -y.im[b] : y.im[b]);
      if (a) z.im[c] += (i < 0 ? -x.im[a] : x.im[a]) * y.re[b];
    }
}

template <int L, bool kBracket>
struct Equal {
  static constexpr int L1 = L, L2 = L, L3 = L, kThreads = 64;
  static constexpr bool kShared = true;
  static constexpr int kHalf = polar_half(3 * L), kRows = polar_rows(L);
  static constexpr int kPairs = polar_nodes(3 * L) / 2;  // the equator comes after them, where there is one

  struct Tables {
    float in[kHalf][kBracket ? 2 : 1][kRows], out[kHalf][kRows];
  };
  static const Tables& tables() {
    static const Tables kept = [] {
      const SeparableTables<float> from = make_separable<float>(L, L, L, kBracket);
      Tables to;
      for (int q = 0; q < kHalf; ++q)
        for (int row = 0; row < kRows; ++row) {
          const size_t at = size_t(row * kHalf + q);
          for (int field = 0; field < (kBracket ? 2 : 1); ++field) to.in[q][field][row] = from.in[0][field][at];
          to.out[q][row] = from.out[at];
        }
      return to;
    }();
    return kept;
  }

  // Adds the products of one field of x and one of y at the nodes q and its mirror.
  template <Field kX, Field kY>
  __device__ static __forceinline__ void add(const Tables& t, int q, const float* x, const float* y, Series<L>& node,
                                             Series<L>& mirror) {
    Series<L> xs[2], ys[2];
    to_polar<L, kX, kBracket && kX == Field::kPlain>(x, t.in[q][kX != Field::kPlain], xs[0], xs[1]);
    to_polar<L, kY, kBracket && kY == Field::kPlain>(y, t.in[q][kY != Field::kPlain], ys[0], ys[1]);
    constexpr int kZeroX = kX != Field::kPlain, kZeroY = kY != Field::kPlain;
    convolve<L, kZeroX, kZeroY>(xs[0], ys[0], node);
    if (q < kPairs) convolve<L, kZeroX, kZeroY>(xs[1], ys[1], mirror);
  }

  __device__ static __forceinline__ void product(const Tables& t, const float* x, const float* y, float* out) {
#pragma unroll
    for (int k = 0; k < square(L + 1); ++k) out[k] = 0;
#pragma unroll 1
    for (int q = 0; q < kHalf; ++q) {
      asm volatile("" ::: "memory");  // x and y are read anew for each q: there are no registers to keep them in
      Series<L> node, mirror;
#pragma unroll
      for (int m = 0; m <= L; ++m) node.re[m] = node.im[m] = mirror.re[m] = mirror.im[m] = 0;
      if constexpr (kBracket) {
        add<Field::kPlain, Field::kTurn>(t, q, x, y, node, mirror);
        add<Field::kMinusTurn, Field::kPlain>(t, q, x, y, node, mirror);
      } else {
        add<Field::kPlain, Field::kPlain>(t, q, x, y, node, mirror);
      }
#pragma unroll
      for (int m = 0; m <= L; ++m)
#pragma unroll
        for (int part = 0; part < (m ? 2 : 1); ++part) {
          const float a = part ? node.im[m] : node.re[m], b = part ? mirror.im[m] : mirror.re[m];
          const float even = a + b, odd = a - b;
#pragma unroll
          for (int l = m; l <= L; ++l)
            out[l * l + l + (part ? -m : m)] += ((l - m) % 2 ? odd : even) * t.out[q][polar_row(L, l, m)];
        }
    }
  }
};

// f(S{}) with the storage type of numbers computed with in float32: one kernel serves all.
template <class F>
__device__ __forceinline__ void with_storage(ScalarType dtype, F&& f) {
  if (dtype == ScalarType::Float)
    f(float{});
  else if (dtype == ScalarType::BFloat16)
    f(bfloat16{});
  else
    f(float16{});
}

// An operand of this thread's sample, to registers or to its place in shared memory, where packed numbers already are.
template <int L>
__device__ __forceinline__ void take(const Samples& a, const Operand& from, const Place& at, const float* packed, float* to) {
  if (comes_packed(a, from)) {
#pragma unroll
    for (int i = 0; i < square(L + 1); ++i) to[i] = packed[i];
  } else {
    with_storage(a.dtype, [&](auto zero) GEO_INLINED {
      const auto* data = data_at<decltype(zero)>(from, at);
#pragma unroll
      for (int i = 0; i < square(L + 1); ++i) to[i] = widen(data[i * from.channels]);
    });
  }
}

template <int L>
__device__ __forceinline__ void scale_by(const Samples& a, const Operand& from, const Place& at, float* to) {
  if (!from.scale) return;
  float scale[L + 1];
  with_storage(a.dtype, [&](auto zero) GEO_INLINED {
    const auto* data = scale_at<decltype(zero)>(from, at);
#pragma unroll
    for (int l = 0; l <= L; ++l) scale[l] = widen(data[l * from.scale_channels]);
  });
  unrolled<0, L + 1>([&](auto l) GEO_INLINED {
#pragma unroll
    for (int i = square(l.value); i < square(l.value + 1); ++i) to[i] *= scale[l.value];
  });
}

// Neighbouring threads have neighbouring channels. With `sum`, `team` threads of a warp share a row: each step they add up
// their channels along a tree, and thread k of a warp keeps the sums of components k, k + 32, ... from step to step.
template <class P>
__global__ void __launch_bounds__(P::kThreads)
    thread_kernel(const __grid_constant__ Samples a, const __grid_constant__ typename P::Tables tables, int64_t tiles,
                  int team) {
  constexpr int d1 = square(P::L1 + 1), d2 = square(P::L2 + 1), d3 = square(P::L3 + 1);
  constexpr int kDistance = larger(d1 + d2, d3) | 1, kKept = (d3 + kWarp - 1) / kWarp;
  extern __shared__ __align__(16) unsigned char room[];
  float* const shared = reinterpret_cast<float*>(room);
  float* const own = shared + threadIdx.x * kDistance;
  const int lane = threadIdx.x % kWarp;
  const int64_t samples = a.rows * a.C, steps = a.sum ? (a.C + team - 1) / team : 1;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t first = tile * P::kThreads, sample = first + threadIdx.x;
    const int n = int(min(samples - first, int64_t(P::kThreads)));
    if (a.packed) {
      __syncthreads();  // the last tile has been written
      const auto gather = [&](const Operand& from, int size, float* to) {
        if (!comes_packed(a, from)) return;
        with_storage(a.dtype, [&](auto zero) {
          const auto* data = static_cast<const decltype(zero)*>(from.data);
          for_packed(first, n, a.C, size, [&](int64_t i, int of, int k) { to[of * kDistance + k] = widen(data[i]); });
        });
      };
      gather(a.x, d1, shared);
      gather(a.y, d2, shared + d1);
      __syncthreads();
    }
    float z[d3], kept[kKept];
#pragma unroll
    for (int k = 0; k < kKept; ++k) kept[k] = 0;
    for (int64_t step = 0; step < steps; ++step) {
      Place at;
      at.row = sample / (a.sum ? team : a.C);
      at.c = sample - at.row * (a.sum ? team : a.C) + step * team;
      at.active = at.row < a.rows && at.c < a.C;
      if (at.active) {
        float held[P::kShared ? 1 : d1 + d2];
        float* const x = P::kShared ? own : held;
        take<P::L1>(a, a.x, at, own, x);
        take<P::L2>(a, a.y, at, own + d1, x + d1);
        scale_by<P::L1>(a, a.x, at, x);
        scale_by<P::L2>(a, a.y, at, x + d1);
        P::product(tables, x, x + d1, z);
        scale_by<P::L3>(a, a.z, at, z);
      } else {
#pragma unroll
        for (int k = 0; k < d3; ++k) z[k] = 0;
      }
      if (a.sum) {
        unrolled<0, d3>([&](auto k) GEO_INLINED {
          for (int other = team / 2; other; other /= 2) z[k.value] += __shfl_xor_sync(0xffffffffu, z[k.value], other);
          if (k.value % kWarp == lane) kept[k.value / kWarp] += z[k.value];
        });
      } else if (a.packed) {
#pragma unroll
        for (int k = 0; k < d3; ++k) own[k] = z[k];
      } else if (at.active) {
        with_storage(a.dtype, [&](auto zero) GEO_INLINED {
          auto* out = out_at<decltype(zero)>(a, at);
#pragma unroll
          for (int k = 0; k < d3; ++k) narrow(z[k], out + k * a.C);
        });
      }
    }
    if (a.sum && sample / team < a.rows)
      with_storage(a.dtype, [&](auto zero) GEO_INLINED {
        auto* out = static_cast<decltype(zero)*>(a.out) + sample / team * d3;
#pragma unroll
        for (int k = 0; k < d3; ++k)
          if (((k ^ lane) & (team - 1)) == 0) narrow(steps > 1 ? kept[k / kWarp] : z[k], out + k);
      });
    if (a.packed) {
      __syncthreads();
      with_storage(a.dtype, [&](auto zero) {
        auto* out = static_cast<decltype(zero)*>(a.out);
        for_packed(first, n, a.C, d3, [&](int64_t i, int of, int k) { narrow(shared[of * kDistance + k], out + i); });
      });
    }
  }
}

unsigned grid_of(int64_t tiles) { return unsigned(std::min<int64_t>(tiles, int64_t(1) << 20)); }

template <class P>
void launch_thread(const Samples& a, cudaStream_t stream) {
  constexpr int d1 = square(P::L1 + 1), d2 = square(P::L2 + 1), d3 = square(P::L3 + 1);
  constexpr size_t most = P::kThreads * size_t(larger(d1 + d2, d3) | 1) * sizeof(float);
  static_assert(most <= 48 << 10);
  int team = 1;
  while (a.sum && team < a.C && team < kWarp) team *= 2;
  const int64_t threads = a.rows * (a.sum ? team : a.C), tiles = (threads + P::kThreads - 1) / P::kThreads;
  thread_kernel<P><<<grid_of(tiles), P::kThreads, P::kShared || a.packed ? most : 0, stream>>>(a, P::tables(), tiles, team);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

using Launcher = void (*)(const Samples&, cudaStream_t);

// The kernel of degrees that has_straight, for numbers computed with in float32.
Launcher straight_launcher(int L1, int L2, int L3, bool bracket) {
  constexpr int n = kStraightDegree + 1;
  Launcher found = nullptr;
  if (larger(L1, larger(L2, L3)) > kStraightDegree) {
    unrolled<n, kStraightEqual + 1>([&](auto degree) {
      constexpr int L = degree.value;
      if (L1 == L) found = bracket ? launch_thread<Straight<L, L, L, true>> : launch_thread<Straight<L, L, L, false>>;
    });
    return found;
  }
  unrolled<0, n * n * n>([&](auto at) {
    constexpr int i = at.value, X = i / n / n, Y = i / n % n, Z = i % n;
    if (i == (L1 * n + L2) * n + L3)
      found = bracket ? launch_thread<Straight<X, Y, Z, true>> : launch_thread<Straight<X, Y, Z, false>>;
  });
  return found;
}

constexpr int kEqualFrom = 3, kEqualTo = 8;  // degrees that have kernels of their own where all three are equal

Launcher equal_launcher(int L1, int L2, int L3, bool bracket) {
  Launcher found = nullptr;
  if (L1 != L2 || L2 != L3) return found;
  unrolled<kEqualFrom, kEqualTo + 1>([&](auto degree) {
    constexpr int L = degree.value;
    if (L1 == L) found = bracket ? launch_thread<Equal<L, true>> : launch_thread<Equal<L, false>>;
  });
  return found;
}

// -- a block a few samples -----------------------------------------------------------------------------------------------
constexpr int kThreads = 256;
constexpr int kMostPairs = 4;  // of nodes at a time

// What the product reads, on the device, and where a sample's numbers stand in shared memory.
template <class T>
struct AnyProduct {
  bool bracket, sparse;
  const T* polar;          // separable: for each node, what SeparableTables has: in[0], in[1], out
  const int32_t* ptr;      // sparse: of each output its terms
  const uint32_t* factor;  // i, j << 15, both << 30
  const T* value;
  int lanes, pairs, distance;  // samples and pairs of nodes at a time; numbers from sample to sample
};

// Numbers that the series of one pair of nodes take.
GEO_HD_CONSTEXPR int pair_size(int L1, int L2, int L3, bool bracket) {
  return (bracket ? 2 : 1) * 2 * (series_size(L1) + wide_size(L2)) + 2 * series_size(L3);
}
GEO_HD_CONSTEXPR int polar_size(int L1, int L2, int L3, bool bracket) {
  return (bracket ? 2 : 1) * (polar_rows(L1) + polar_rows(L2)) + polar_rows(L3);
}

// Component (m, part) of the series of x at one node and, `size` behind, at its mirror.
template <bool kWide, class T>
__device__ __forceinline__ void to_polar_any(const T* x, int lmax, const T* table, int order, bool slope, Field field,
                                             T* grid) {
  const int size = kWide ? wide_size(lmax) : series_size(lmax), second = kWide ? wide_part(lmax) : lmax + 1;
  const int m = order < 0 ? -order : order;
  T even = 0, odd = 0;
  for (int l = m; l <= lmax; ++l) {
    const T term = x[l * l + l + order] * table[polar_row(lmax, l, m)];
    if ((l - m) % 2)
      odd += term;
    else
      even += term;
  }
  const bool swap = field != Field::kPlain, imaginary = (order < 0) != swap;
  const bool minus = swap && (order >= 0) == (field == Field::kTurn);
  const T sum = minus ? -(even + odd) : even + odd;
  const T difference = slope != minus ? odd - even : even - odd;
  T* to = grid + (kWide ? wide_zero(lmax) : 0) + (imaginary ? second : 0);
  to[m] = sum;
  to[size + m] = difference;
  if (kWide && m) {
    to[-m] = imaginary ? -sum : sum;
    to[size - m] = imaginary ? -difference : difference;
  }
}

// The separable product of one sample by `workers` threads, of which this is one: all threads of the block come here. `work`
// is zero where nothing is written: around the wide series, and where they have no m = 0.
template <class T>
__device__ void separable_any(const Samples& a, const AnyProduct<T>& p, const T* x, const T* y, T* z, T* work,
                              int worker, int workers) {
  const int L1 = a.x.lmax, L2 = a.y.lmax, L3 = a.z.lmax, fields = p.bracket ? 2 : 1;
  const int nodes = polar_nodes(L1 + L2 + L3), half = polar_half(L1 + L2 + L3);
  const int size1 = series_size(L1), size2 = wide_size(L2), size3 = series_size(L3);
  const int field_size = 2 * (size1 + size2), pair = pair_size(L1, L2, L3, p.bracket);
  const int rows1 = polar_rows(L1), rows2 = polar_rows(L2), table_size = polar_size(L1, L2, L3, p.bracket);
  const int orders1 = 2 * L1 + 1, orders2 = 2 * L2 + 1, runs = L3 / kSeriesTile + 1;
  for (int q0 = 0; q0 < half; q0 += p.pairs) {
    const int count = min(p.pairs, half - q0);
    for (int item = worker; item < count * fields * (orders1 + orders2); item += workers) {
      const int order = item % (orders1 + orders2), field = item / (orders1 + orders2) % fields;
      const int q = item / (orders1 + orders2) / fields;
      const T* table = p.polar + (q0 + q) * table_size;
      T* grid = work + q * pair + field * field_size;
      if (order < orders1) {
        to_polar_any<false>(x, L1, table + field * rows1, order - L1, p.bracket && !field,
                            field ? Field::kMinusTurn : Field::kPlain, grid);
      } else {
        const bool turn = p.bracket && !field;
        to_polar_any<true>(y, L2, table + fields * rows1 + (turn ? rows2 : 0), order - orders1 - L2, p.bracket && field,
                           turn ? Field::kTurn : Field::kPlain, grid + 2 * size1);
      }
    }
    __syncthreads();
    for (int item = worker; item < count * 2 * runs; item += workers) {
      const int c = item % runs * kSeriesTile, side = item / runs % 2, q = item / runs / 2;
      T re[kSeriesTile] = {}, im[kSeriesTile] = {};
      const T* grid = work + q * pair;
      if (side == 0 || 2 * (q0 + q) + 1 != nodes)  // the equator is its own mirror
        for (int field = 0; field < fields; ++field, grid += field_size)
          series_product<kSeriesTile>(grid + side * size1, L1, grid + 2 * size1 + side * size2, L2, c, re, im);
      T* to = work + q * pair + fields * field_size + side * size3 + c;
#pragma unroll
      for (int k = 0; k < kSeriesTile; ++k)
        if (c + k <= L3) {
          to[k] = re[k];
          to[L3 + 1 + k] = im[k];
        }
    }
    __syncthreads();
    for (int k = worker; k < square(L3 + 1); k += workers) {
      int l = int(sqrtf(float(k)));
      const int order = k - l * l - l, m = order < 0 ? -order : order;
      T sum = q0 ? z[k] : T(0);
      const T* table = p.polar + q0 * table_size + fields * (rows1 + rows2) + polar_row(L3, l, m);
      const T* from = work + fields * field_size + (order < 0 ? L3 + 1 : 0) + m;
      for (int q = 0; q < count; ++q, table += table_size, from += pair)
        sum += ((l - m) % 2 ? from[0] - from[size3] : from[0] + from[size3]) * *table;
      z[k] = sum;
    }
  }
}

template <class T>
__device__ void sparse_any(const AnyProduct<T>& p, int size, const T* x, const T* y, T* z, int worker, int workers) {
  for (int k = worker; k < size; k += workers) {
    T sum = 0;
    for (int t = p.ptr[k]; t < p.ptr[k + 1]; ++t) {
      const uint32_t factor = p.factor[t];
      const int i = factor & 0x7fff, j = factor >> 15 & 0x7fff;
      T term = x[i] * y[j];
      if (factor >> 30) term = p.bracket ? term - x[j] * y[i] : term + x[j] * y[i];
      sum += term * p.value[t];
    }
    z[k] = sum;
  }
}

// A tile is `lanes` samples, or with `sum` a row, whose channels are added a tile's lanes at a time.
template <class S>
__global__ void __launch_bounds__(kThreads)
    block_kernel(const __grid_constant__ Samples a, const __grid_constant__ AnyProduct<typename accumulate<S>::type> p,
                 int64_t tiles) {
  using T = typename accumulate<S>::type;
  extern __shared__ __align__(16) unsigned char room[];
  T* const shared = reinterpret_cast<T*>(room);
  T* const total = shared + p.lanes * p.distance;
  const int lane = threadIdx.x % p.lanes, worker = threadIdx.x / p.lanes, workers = kThreads / p.lanes;
  const int d1 = square(a.x.lmax + 1), d2 = square(a.y.lmax + 1), d3 = square(a.z.lmax + 1);
  T *const x = shared + lane * p.distance, *const y = x + d1, *const z = y + d2, *const work = z + d3;
  const int64_t samples = a.rows * a.C, steps = a.sum ? (a.C + p.lanes - 1) / p.lanes : 1;
  const auto scale = [&](const Operand& from, const Place& at, T* to) {
    if (from.scale && at.active)
      for (int l = worker; l <= from.lmax; l += workers) {
        const T factor = widen(scale_at<S>(from, at)[l * from.scale_channels]);
        for (int i = l * l; i < (l + 1) * (l + 1); ++i) to[i] *= factor;
      }
  };
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x)
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t first = tile * p.lanes;
      Place at;
      at.row = a.sum ? tile : (first + lane) / a.C;
      at.c = a.sum ? step * p.lanes + lane : first + lane - at.row * a.C;
      at.active = at.row < a.rows && at.c < a.C;
      const int n = int(min(a.sum ? a.C - step * p.lanes : samples - first, int64_t(p.lanes)));
      __syncthreads();  // the last output has been written
      const auto gather = [&](const Operand& from, int size, T* to) {
        if (comes_packed(a, from)) {
          const S* data = static_cast<const S*>(from.data);
          T* tile_to = to - lane * p.distance;
          for_packed(first, n, a.C, size, [&](int64_t i, int of, int k) { tile_to[of * p.distance + k] = widen(data[i]); });
        } else if (at.active) {
          const S* data = data_at<S>(from, at);
          for (int i = worker; i < size; i += workers) to[i] = widen(data[i * from.channels]);
        }
      };
      gather(a.x, d1, x);
      gather(a.y, d2, y);
      if (!p.sparse)
        for (int i = worker; i < p.pairs * pair_size(a.x.lmax, a.y.lmax, a.z.lmax, p.bracket); i += workers) work[i] = 0;
      __syncthreads();
      scale(a.x, at, x);
      scale(a.y, at, y);
      __syncthreads();
      if (p.sparse)
        sparse_any(p, d3, x, y, z, worker, workers);
      else
        separable_any(a, p, x, y, z, work, worker, workers);
      __syncthreads();
      scale(a.z, at, z);
      __syncthreads();
      if (a.sum) {
        for (int k = threadIdx.x; k < d3; k += kThreads) {
          T sum = 0;
          for (int i = 0; i < n; ++i) sum += shared[i * p.distance + d1 + d2 + k];
          total[k] = step ? total[k] + sum : sum;
          if (step == steps - 1) narrow(total[k], static_cast<S*>(a.out) + tile * d3 + k);
        }
      } else if (a.packed) {
        S* out = static_cast<S*>(a.out);
        for_packed(first, n, a.C, d3,
                   [&](int64_t i, int of, int k) { narrow(shared[of * p.distance + d1 + d2 + k], out + i); });
      } else if (at.active) {
        S* out = out_at<S>(a, at);
        for (int k = worker; k < d3; k += workers) narrow(z[k], out + k * a.C);
      }
    }
}

// A copy on the current device of what `make` makes on the host, kept for good. The first call of each choice allocates and
// waits, and hence cannot be captured in a graph.
template <class Tag, class Make>
const char* kept_on_device(int device, int L1, int L2, int L3, bool bracket, Make&& make) {
  static std::mutex mutex;
  static std::map<std::tuple<int, int, int, int, bool>, char*> kept;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_tuple(device, L1, L2, L3, bracket);
  const auto found = kept.find(key);
  if (found != kept.end()) return found->second;
  const std::vector<char> bytes = make();
  char* data = nullptr;
  STD_CUDA_CHECK(cudaMalloc(reinterpret_cast<void**>(&data), bytes.size()));
  STD_CUDA_CHECK(cudaMemcpy(data, bytes.data(), bytes.size(), cudaMemcpyHostToDevice));
  STD_CUDA_CHECK(cudaDeviceSynchronize());  // other streams do not wait for the copy
  kept[key] = data;
  return data;
}

template <class T>
void append(std::vector<char>& bytes, const std::vector<T>& from) {
  const char* data = reinterpret_cast<const char*>(from.data());
  bytes.insert(bytes.end(), data, data + from.size() * sizeof(T));
}

template <class T>
void set_separable(AnyProduct<T>& p, int device, int L1, int L2, int L3) {
  const char* data = kept_on_device<SeparableTables<T>>(device, L1, L2, L3, p.bracket, [&] {
    const SeparableTables<T> from = make_separable<T>(L1, L2, L3, p.bracket);
    const size_t half = size_t(polar_half(L1 + L2 + L3));
    std::vector<T> to;
    for (size_t q = 0; q < half; ++q)
      for (const std::vector<T>* table : {&from.in[0][0], &from.in[0][1], &from.in[1][0], &from.in[1][1], &from.out})
        for (size_t at = q; at < table->size(); at += half) to.push_back((*table)[at]);
    std::vector<char> bytes;
    append(bytes, to);
    return bytes;
  });
  p.polar = reinterpret_cast<const T*>(data);
}

template <class T>
void set_sparse(AnyProduct<T>& p, int device, int L1, int L2, int L3) {
  const SparseTables<T>& from = kept_tables<SparseTables<T>>(L1, L2, L3, p.bracket, make_sparse<T>);
  const char* data = kept_on_device<SparseTables<T>>(device, L1, L2, L3, p.bracket, [&] {
    std::vector<uint32_t> factor;
    for (const int32_t pair : from.pair) {
      const size_t at = size_t(pair);
      factor.push_back(uint32_t(from.i[at]) | uint32_t(from.j[at]) << 15 | uint32_t(from.both[at]) << 30);
    }
    std::vector<char> bytes;
    append(bytes, from.value);
    append(bytes, factor);
    append(bytes, from.ptr);
    return bytes;
  });
  const size_t terms = from.value.size();
  p.value = reinterpret_cast<const T*>(data);
  p.factor = reinterpret_cast<const uint32_t*>(data + terms * sizeof(T));
  p.ptr = reinterpret_cast<const int32_t*>(data + terms * (sizeof(T) + sizeof(uint32_t)));
}

template <class S>
void launch_block(const char* op, const Samples& a, bool bracket, bool sparse, int device, cudaStream_t stream) {
  using T = typename accumulate<S>::type;
  const int L1 = a.x.lmax, L2 = a.y.lmax, L3 = a.z.lmax;
  AnyProduct<T> p{};
  p.bracket = bracket;
  p.sparse = sparse;
  if (sparse)
    set_sparse(p, device, L1, L2, L3);
  else
    set_separable(p, device, L1, L2, L3);
  int most = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  size_t bytes = 0;
  const int total = a.sum ? square(L3 + 1) : 0;
  const auto fits = [&](int lanes, int pairs, int limit) {
    const int size = square(L1 + 1) + square(L2 + 1) + square(L3 + 1) + pairs * pair_size(L1, L2, L3, bracket);
    p.lanes = lanes;
    p.pairs = pairs;
    p.distance = size | 1;
    bytes = size_t(lanes * p.distance + total) * sizeof(T);
    return bytes <= size_t(limit);
  };
  const auto choose = [&](int limit) {
    for (int lanes = kWarp; lanes; lanes /= 2)
      for (int pairs = sparse ? 0 : smaller(kMostPairs, polar_half(L1 + L2 + L3)); pairs >= !sparse; --pairs)
        if (fits(lanes, pairs, limit)) return true;
    return false;
  };
  STD_TORCH_CHECK(choose(most / 2) || choose(most), op, ": degrees ", L1, ", ", L2, " and ", L3, " need ", bytes,
                  " bytes of shared memory, the GPU has ", most, ": use method='grid'");
  if (bytes > 48 << 10)
    STD_CUDA_CHECK(cudaFuncSetAttribute(block_kernel<S>, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
  const int64_t tiles = a.sum ? a.rows : (a.rows * a.C + p.lanes - 1) / p.lanes;
  block_kernel<S><<<grid_of(tiles), kThreads, bytes, stream>>>(a, p, tiles);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// -- launchers -----------------------------------------------------------------------------------------------------------
// 'auto', unmeasured on a GPU: straight kernels where there are any, else the separable form.
bool takes_sparse(int64_t lmax_x, int64_t lmax_y, int64_t lmax_out) {
  return has_straight(int(lmax_x), int(lmax_y), int(lmax_out));
}

Tensor gaunt_product_cuda(const Tensor& x_, const Tensor& y_, const std::optional<Tensor>& scale_x_,
                          const std::optional<Tensor>& scale_y_, const std::optional<Tensor>& scale_out_, int64_t lmax_x,
                          int64_t lmax_y, int64_t lmax_out, int64_t channels, bool bracket, std::string method) {
  constexpr const char* op = "gaunt_product";
  const DeviceGuard guard(x_.get_device_index());
  STD_TORCH_CHECK(method == "auto" || method == "sparse" || method == "separable", op, ": no method '", method, "'");
  const bool sparse = method == "auto" ? takes_sparse(lmax_x, lmax_y, lmax_out) : method == "sparse";
  const GauntArguments given{x_, y_, scale_x_, scale_y_, scale_out_, lmax_x, lmax_y, lmax_out, channels, nullptr};
  const int64_t C = check_gaunt(op, given), rows = x_.size(0);
  const auto on_gpu = [](const std::optional<Tensor>& t) { return !t || t->is_cuda(); };
  STD_TORCH_CHECK(x_.is_cuda() && y_.is_cuda() && on_gpu(scale_x_) && on_gpu(scale_y_) && on_gpu(scale_out_), op,
                  ": all tensors must be on the GPU");
  Tensor out = torch::stable::new_empty(x_, {rows, (lmax_out + 1) * (lmax_out + 1), channels});
  if (out.numel() == 0) return out;
  if (C == 0) return torch::stable::zero_(out);
  const Tensor x = made_contiguous(x_), y = made_contiguous(y_);
  const auto made = [](const std::optional<Tensor>& scale) {
    return scale ? std::optional<Tensor>(made_contiguous(*scale)) : std::nullopt;
  };
  const auto scale_x = made(scale_x_), scale_y = made(scale_y_), scale_out = made(scale_out_);
  const auto operand = [](const Tensor* data, const std::optional<Tensor>& scale, int64_t lmax) {
    Operand found{};
    found.lmax = int(lmax);
    if (data) {
      found.data = data->const_data_ptr();
      found.channels = data->size(2);
    }
    if (scale) {
      found.scale = scale->const_data_ptr();
      found.scale_channels = scale->size(2);
      found.scale_row = scale->size(0) == 1 ? 0 : (lmax + 1) * scale->size(2);
    }
    return found;
  };
  dispatch_floating(x.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    Samples a{};
    a.x = operand(&x, scale_x, lmax_x);
    a.y = operand(&y, scale_y, lmax_y);
    a.z = operand(nullptr, scale_out, lmax_out);
    a.out = out.mutable_data_ptr();
    a.rows = rows;
    a.C = C;
    a.dtype = x.scalar_type();
    a.sum = channels == 1 && C != 1;
    constexpr int64_t kSector = 32;  // bytes that memory gives at least
    a.packed = !a.sum && C * int64_t(sizeof(S)) < kSector;
    const int L1 = int(lmax_x), L2 = int(lmax_y), L3 = int(lmax_out);
    Launcher launch = nullptr;
    if (!std::is_same_v<S, double>)
      launch = !sparse ? equal_launcher(L1, L2, L3, bracket)
               : has_straight(L1, L2, L3) ? straight_launcher(L1, L2, L3, bracket)
                                          : nullptr;
    if (launch)
      launch(a, current_stream(x));
    else
      launch_block<S>(op, a, bracket, sparse, x.get_device_index(), current_stream(x));
  });
  return out;
}

std::string gaunt_auto_cuda(const Tensor&, int64_t lmax_x, int64_t lmax_y, int64_t lmax_out, bool) {
  return takes_sparse(lmax_x, lmax_y, lmax_out) ? "sparse" : "separable";
}

}  // namespace
}  // namespace geo

STABLE_TORCH_LIBRARY_IMPL(geo, CUDA, m) {
  m.impl("gaunt_product", TORCH_BOX(&geo::gaunt_product_cuda));
  m.impl("gaunt_auto", TORCH_BOX(&geo::gaunt_auto_cuda));
}
