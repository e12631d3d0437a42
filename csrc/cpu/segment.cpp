// CPU launchers of the segment ops, of scatter_sum and of the sort behind SegmentPlan.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "parallel.h"
#include "segment_table.h"

namespace geo {

bool sorted_ptr(const int64_t* index, int64_t num_rows, int64_t size, int64_t* ptr) {
  constexpr int64_t kBlock = 1024;
  int64_t starts[kBlock], last = -1, filled = 0;
  for (int64_t begin = 0; begin < num_rows; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, num_rows);
    int64_t num = 0;
    bool falls = false;
    for (int64_t e = begin; e < end; ++e) {  // no branch: where runs start is hard to predict
      const int64_t i = index[e];
      starts[num] = e;
      num += i != last;
      falls |= i < last;
      last = i;
    }
    if (falls || index[begin] < 0 || last >= size) return false;
    for (int64_t k = 0; k < num; ++k)
      for (; filled <= index[starts[k]]; ++filled) ptr[filled] = starts[k];
  }
  for (; filled <= size; ++filled) ptr[filled] = num_rows;
  return true;
}

namespace {

const SegmentTable& segment_table(float) { return choose_table(GEO_TABLES(segment_float)); }
const SegmentTable& segment_table(double) { return choose_table(GEO_TABLES(segment_double)); }
const SegmentTable& segment_table(bfloat16) { return choose_table(GEO_TABLES(segment_bfloat16)); }
const SegmentTable& segment_table(float16) { return choose_table(GEO_TABLES(segment_float16)); }

std::vector<int64_t> with_rows(const Tensor& t, int64_t rows) {
  std::vector<int64_t> sizes(t.sizes().begin(), t.sizes().end());
  sizes[0] = rows;
  return sizes;
}

int64_t row_width(const Tensor& t) {
  int64_t width = 1;
  for (int64_t d = 1; d < t.dim(); ++d) width *= t.size(d);
  return width;
}

// Contiguous tensors of an op, and what was looked at to get them.
struct Segments {
  Tensor src, ptr;
  std::optional<Tensor> perm, index;
  int64_t num_rows, num_segments, width;

  Segments(const char* op, const Tensor& src_, const Tensor& ptr_, const std::optional<Tensor>& perm_,
           const std::optional<Tensor>& index_, int64_t num_rows_)
      : src(made_contiguous(src_)), ptr(made_contiguous(ptr_)), num_rows(num_rows_) {
    STD_TORCH_CHECK(src.dim() >= 1, op, ": src must have one row per edge");
    check_index_dtype(ptr, op, "ptr");
    num_segments = ptr.numel() - 1;
    width = row_width(src);
    check_ptr(op, index_data(ptr), num_segments, num_rows);
    perm = per_row(op, "edge_perm", perm_);
    index = per_row(op, "dst_index", index_);
  }
  const int64_t* order() const { return perm ? index_data(*perm) : nullptr; }

 private:
  std::optional<Tensor> per_row(const char* op, const char* name, const std::optional<Tensor>& t) const {
    if (!t) return std::nullopt;
    check_index_dtype(*t, op, name);
    STD_TORCH_CHECK(t->numel() == num_rows, op, ": ", name, " must have one entry per edge");
    return made_contiguous(*t);
  }
};

void raise(const char* op, const Found& found, const int64_t* perm, int64_t num_rows, const char* index_name,
           const int64_t* index, int64_t num_segments) {
  if (found.fault == kEdgePerm)
    raise_out_of_range(op, "edge_perm", found.position, perm[found.position], 0, num_rows - 1);
  if (found.fault == kDstIndex)
    raise_out_of_range(op, index_name, found.position, index[found.position], 0, num_segments - 1);
}

// -- sums and products -------------------------------------------------------------------------------------------------
// The hub that each first slot belongs to, -1 elsewhere: noted by whoever takes a hub's first piece.
std::vector<int64_t> hub_list(int64_t num_rows) { return std::vector<int64_t>(num_slots(num_rows), -1); }

template <class T>
T joined(Combine combine, T a, T b) {
  if (combine == kSum) return a + b;
  if (combine == kProduct) return a * b;
  return a == a && (b != b || (combine == kLeast ? b < a : b > a)) ? b : a;
}

template <class S>
void reduce_segments(const char* op, const SegmentArgs& a, Combine combine, int64_t num_segments) {
  using T = typename accumulate<S>::type;
  if (a.width == 0 || num_segments == 0) return;
  const SegmentTable& leaf = segment_table(S{});
  const int64_t* p = a.ptr;
  const int64_t width = a.width;
  advise_huge_pages(a.out, num_segments * width * int64_t(sizeof(S)));
  std::vector<T> pieces(num_slots(a.num_rows) * width);
  std::vector<int64_t> hubs = hub_list(a.num_rows);
  Faults faults;
  auto note = [&](const Outcome& outcome) { faults.add(outcome.fault, outcome.position); };
  parallel_segments(
      p, num_segments, block_of(width * sizeof(S)),
      [&](int64_t, int64_t first, int64_t last) { note(leaf.reduce[combine](a, first, last)); },
      [&](int64_t, int64_t i, int64_t begin, int64_t end, int64_t slot) {
        if (begin == p[i]) hubs[slot] = i;
        note(leaf.piece[combine](a, begin, end, &pieces[slot * width], nullptr));
      });
  raise(op, faults.first(), a.perm, a.num_rows, nullptr, nullptr, 0);
  for (int64_t slot = 0; slot < int64_t(hubs.size()); ++slot) {
    const int64_t i = hubs[slot];
    if (i < 0) continue;
    const T* rows = &pieces[slot * width];
    for (int64_t f = 0; f < width; ++f) {
      T total = rows[f];
      for (int64_t k = 1; k < num_pieces(p[i], p[i + 1]); ++k)
        total = joined(combine, total, rows[k * width + f]);
      narrow(a.mean ? total / T(p[i + 1] - p[i]) : total, static_cast<S*>(a.out) + i * width + f);
    }
  }
}

// Unsorted rows this narrow are taken where they belong, in the order they stand, not fetched through a permutation.
bool takes_in_place(int64_t width) { return width > 0 && width <= 32; }
template <class S>
bool ranks_in_place(int64_t width, int64_t num_rows) {
  return sizeof(S) < 8 && width > 0 && width <= 4 && num_rows <= UINT32_MAX;
}

// The parts' sums (products), combined in order. Counts come from ptr, or, where that is null and a mean is wanted, are taken alongside.
template <class S>
void take_rows(const char* op, const char* index_name, const ScatterArgs& a, Combine combine, const int64_t* ptr, bool mean,
               S* out) {
  using T = typename accumulate<S>::type;
  constexpr bool kSame = std::is_same<S, T>::value;
  const SegmentTable& leaf = segment_table(S{});
  const int64_t num = a.size * a.width;
  const int64_t parts = num_parts(a.num_rows, a.size);
  advise_huge_pages(out, num * int64_t(sizeof(S)));
  const int64_t extra = (kSame ? parts - 1 : parts) * num;
  const std::unique_ptr<T[]> buffer(new T[extra]);
  if (extra) advise_huge_pages(buffer.get(), extra * int64_t(sizeof(T)));
  const bool counted = mean && !ptr;
  STD_TORCH_CHECK(!counted || a.num_rows <= INT32_MAX * parts, op, ": too many rows");
  const std::unique_ptr<int32_t[]> counts(counted ? new int32_t[parts * a.size] : nullptr);
  auto part = [&](int64_t k) {
    if constexpr (kSame) return k ? &buffer[(k - 1) * num] : out;
    else return &buffer[k * num];
  };
  Faults faults;
  parallel_blocks(parts, 1, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      std::fill_n(part(k), num, T(combine == kProduct));
      int32_t* count = counted ? &counts[k * a.size] : nullptr;
      if (count) std::fill_n(count, a.size, 0);
      const Outcome outcome =
          leaf.take[combine](a, a.num_rows * k / parts, a.num_rows * (k + 1) / parts, part(k), count);
      faults.add(outcome.fault, outcome.position);
    }
  });
  raise(op, faults.first(), nullptr, 0, index_name, a.index, a.size);
  if (kSame && parts == 1 && !mean) return;
  parallel_blocks(a.size, block_of(a.width * parts * int64_t(sizeof(T))), [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t k = 1; k < parts; ++k) {
      T* to = part(0);
      const T* more = part(k);
      if (combine == kSum)
        for (int64_t f = begin * a.width; f < end * a.width; ++f) to[f] += more[f];
      else
        for (int64_t f = begin * a.width; f < end * a.width; ++f) to[f] *= more[f];
    }
    for (int64_t i = begin; mean && i < end; ++i) {
      int64_t length = 0;
      for (int64_t k = 0; counted && k < parts; ++k) length += counts[k * a.size + i];
      if (!counted) length = ptr[i + 1] - ptr[i];
      const T divisor = T(std::max<int64_t>(1, length));
      for (int64_t f = i * a.width; f < (i + 1) * a.width; ++f) part(0)[f] /= divisor;
    }
    if constexpr (!kSame)
      for (int64_t f = begin * a.width; f < end * a.width; ++f) narrow(part(0)[f], out + f);
  });
}

Tensor segment_sum_cpu(const Tensor& src, const Tensor& ptr, const std::optional<Tensor>& perm,
                       const std::optional<Tensor>& index, bool mean) {
  constexpr const char* op = "segment_sum";
  const Segments s(op, src, ptr, perm, index, src.dim() ? src.size(0) : 0);
  Tensor out = torch::stable::new_empty(s.src, with_rows(s.src, s.num_segments));
  dispatch_floating(s.src.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    if (s.perm && s.index && takes_in_place(s.width)) {
      const ScatterArgs a{read<S>(s.src), index_data(*s.index), s.num_rows, s.num_segments, s.width};
      take_rows(op, "dst_index", a, kSum, index_data(s.ptr), mean, write<S>(out));
    } else {
      const SegmentArgs a{read<S>(s.src), write<S>(out), nullptr, index_data(s.ptr), s.order(), s.num_rows, s.width, mean};
      reduce_segments<S>(op, a, kSum, s.num_segments);
    }
  });
  return out;
}

Tensor segment_prod_cpu(const Tensor& src, const Tensor& ptr, const std::optional<Tensor>& perm,
                        const std::optional<Tensor>& index) {
  constexpr const char* op = "segment_prod";
  const Segments s(op, src, ptr, perm, index, src.dim() ? src.size(0) : 0);
  Tensor out = torch::stable::new_empty(s.src, with_rows(s.src, s.num_segments));
  dispatch_floating(s.src.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    if (s.perm && s.index && takes_in_place(s.width)) {
      const ScatterArgs a{read<S>(s.src), index_data(*s.index), s.num_rows, s.num_segments, s.width};
      return take_rows(op, "dst_index", a, kProduct, nullptr, false, write<S>(out));
    }
    const SegmentArgs a{read<S>(s.src), write<S>(out), nullptr, index_data(s.ptr), s.order(), s.num_rows, s.width, false};
    reduce_segments<S>(op, a, kProduct, s.num_segments);
  });
  return out;
}

// -- minima and maxima -------------------------------------------------------------------------------------------------
template <class S>
void extreme_segments(const char* op, const SegmentArgs& a, bool largest, int64_t num_segments) {
  if (a.width == 0 || num_segments == 0) return;
  const SegmentTable& leaf = segment_table(S{});
  const Combine combine = largest ? kMaximum : kMinimum;
  const int64_t* p = a.ptr;
  const int64_t width = a.width;
  S* out = static_cast<S*>(a.out);
  advise_huge_pages(out, num_segments * width * int64_t(sizeof(S)));
  advise_huge_pages(a.arg, num_segments * width * int64_t(sizeof(int64_t)));
  std::vector<S> pieces(num_slots(a.num_rows) * width);
  std::vector<int64_t> args(num_slots(a.num_rows) * width), hubs = hub_list(a.num_rows);
  Faults faults;
  auto note = [&](const Outcome& outcome) { faults.add(outcome.fault, outcome.position); };
  parallel_segments(
      p, num_segments, block_of(width * sizeof(S)),
      [&](int64_t, int64_t first, int64_t last) { note(leaf.reduce[combine](a, first, last)); },
      [&](int64_t, int64_t i, int64_t begin, int64_t end, int64_t slot) {
        if (begin == p[i]) hubs[slot] = i;
        note(leaf.piece[combine](a, begin, end, &pieces[slot * width], &args[slot * width]));
      });
  raise(op, faults.first(), a.perm, a.num_rows, nullptr, nullptr, 0);
  for (int64_t slot = 0; slot < int64_t(hubs.size()); ++slot) {  // the first on a tie, NaN over all
    const int64_t i = hubs[slot];
    if (i < 0) continue;
    for (int64_t f = 0; f < width; ++f) {
      int64_t best = slot;
      for (int64_t k = slot + 1; k < slot + num_pieces(p[i], p[i + 1]); ++k) {
        const auto v = widen(pieces[k * width + f]), b = widen(pieces[best * width + f]);
        if (b == b && (v != v || (largest ? v > b : v < b))) best = k;
      }
      out[i * width + f] = pieces[best * width + f];
      a.arg[i * width + f] = args[best * width + f];
    }
  }
}

// The same of unsorted rows, taken where they belong.
template <class S>
void rank_rows(const char* op, const ScatterArgs& a, bool largest, S* out, int64_t* arg) {
  const SegmentTable& leaf = segment_table(S{});
  const int64_t num = a.size * a.width, parts = num_parts(a.num_rows, a.size);
  advise_huge_pages(out, num * int64_t(sizeof(S)));
  advise_huge_pages(arg, num * int64_t(sizeof(int64_t)));
  const std::unique_ptr<uint64_t[]> best(new uint64_t[parts * num]);
  advise_huge_pages(best.get(), parts * num * int64_t(sizeof(uint64_t)));
  Faults faults;
  parallel_blocks(parts, 1, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      std::fill_n(&best[k * num], num, uint64_t{0});
      const Outcome outcome =
          leaf.rank(a, a.num_rows * k / parts, a.num_rows * (k + 1) / parts, largest, &best[k * num]);
      faults.add(outcome.fault, outcome.position);
    }
  });
  raise(op, faults.first(), nullptr, 0, "index", a.index, a.size);
  const S* src = static_cast<const S*>(a.src);
  parallel_blocks(num, block_of(8 * parts), [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      uint64_t top = 0;
      int64_t row = a.num_rows;
      for (int64_t k = 0; k < parts; ++k) {
        const uint64_t key = best[k * num + i];
        if (key >> 32 <= top >> 32) continue;  // the first on a tie
        top = key;
        row = a.num_rows * k / parts + int64_t(uint32_t(~key));
      }
      arg[i] = row;
      out[i] = row < a.num_rows ? src[row * a.width + i % a.width] : S{};
    }
  });
}

std::tuple<Tensor, Tensor> segment_extreme_cpu(const Tensor& src, const Tensor& ptr, const std::optional<Tensor>& perm,
                                               bool largest) {
  constexpr const char* op = "segment_extreme";
  const Segments s(op, src, ptr, perm, std::nullopt, src.dim() ? src.size(0) : 0);
  const std::vector<int64_t> sizes = with_rows(s.src, s.num_segments);
  Tensor out = torch::stable::new_empty(s.src, sizes), arg = torch::stable::new_empty(s.ptr, sizes);
  dispatch_floating(s.src.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    const SegmentArgs a{read<S>(s.src), write<S>(out), write<int64_t>(arg), index_data(s.ptr),
                        s.order(),      s.num_rows,    s.width,             false};
    extreme_segments<S>(op, a, largest, s.num_segments);
  });
  return {out, arg};
}

Tensor segment_extreme_value_cpu(const Tensor& src, const Tensor& ptr, const std::optional<Tensor>& perm, bool largest) {
  constexpr const char* op = "segment_extreme_value";
  const Segments s(op, src, ptr, perm, std::nullopt, src.dim() ? src.size(0) : 0);
  Tensor out = torch::stable::new_empty(s.src, with_rows(s.src, s.num_segments));
  dispatch_floating(s.src.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    const SegmentArgs a{read<S>(s.src), write<S>(out), nullptr, index_data(s.ptr), s.order(), s.num_rows, s.width, false};
    reduce_segments<S>(op, a, largest ? kGreatest : kLeast, s.num_segments);
  });
  return out;
}

// -- copies ------------------------------------------------------------------------------------------------------------
// Rows by index where there is one and no ptr or a perm besides, else by ptr.
void copy_rows(const char* op, const char* index_name, RowsArgs& a, const Tensor& src, Tensor& out, int64_t width) {
  a.from = static_cast<const char*>(src.const_data_ptr());
  a.to = static_cast<char*>(out.mutable_data_ptr());
  a.bytes = width * int64_t(src.element_size());
  if (a.bytes == 0) return;
  const bool by_index = a.index && (a.perm || !a.ptr);
  a.stream = (by_index || !a.perm) && a.num_rows * a.bytes >= int64_t(1) << 25 && a.bytes % 64 == 0 &&
             reinterpret_cast<uintptr_t>(a.to) % 64 == 0;
  advise_huge_pages(a.to, a.num_rows * a.bytes);
  const RowsTable& leaf = choose_table(GEO_TABLES(segment_rows));
  Faults faults;
  parallel_blocks(a.num_rows, block_of(a.bytes), [&](int64_t, int64_t begin, int64_t end) {
    const Outcome outcome = by_index ? leaf.take(a, begin, end) : leaf.spread(a, begin, end);
    faults.add(outcome.fault, outcome.position);
  });
  raise(op, faults.first(), a.perm, a.num_rows, index_name, a.index, a.num_segments);
}

Tensor gather_csr_cpu(const Tensor& src, const Tensor& ptr, const std::optional<Tensor>& perm,
                      const std::optional<Tensor>& index, int64_t num_out) {
  constexpr const char* op = "gather_csr";
  const Segments s(op, src, ptr, perm, index, num_out);
  STD_TORCH_CHECK(s.src.size(0) == s.num_segments, op, ": src must have ", s.num_segments, " rows");
  Tensor out = torch::stable::new_empty(s.src, with_rows(s.src, num_out));
  RowsArgs a{};
  a.ptr = index_data(s.ptr);
  a.perm = s.order();
  a.index = s.index ? index_data(*s.index) : nullptr;
  a.num_segments = s.num_segments;
  a.num_rows = num_out;
  copy_rows(op, "dst_index", a, s.src, out, s.width);
  return out;
}

Tensor gather_index_cpu(const Tensor& src_, const Tensor& index_) {
  constexpr const char* op = "gather_index";
  check_index_dtype(index_, op, "index");
  STD_TORCH_CHECK(src_.dim() >= 1, op, ": src must have one row per segment");
  const Tensor src = made_contiguous(src_), index = made_contiguous(index_);
  Tensor out = torch::stable::new_empty(src, with_rows(src, index.numel()));
  RowsArgs a{};
  a.index = index_data(index);
  a.num_segments = src.size(0);
  a.num_rows = index.numel();
  copy_rows(op, "index", a, src, out, row_width(src));
  return out;
}

// -- sorting -----------------------------------------------------------------------------------------------------------
// Counting sort: the rows grouped by segment, in their own order inside each, whatever the number of parts.
template <class Count>
void counting_sort(const char* op, const int64_t* index, int64_t num_rows, int64_t size, int64_t* ptr, int64_t* order) {
  const int64_t parts = std::clamp<int64_t>(num_rows / (size + 4096), 1, torch::stable::get_num_threads());
  std::vector<Count> next(parts * size);
  Faults faults;
  auto each_part = [&](auto&& f) {
    parallel_blocks(parts, 1, [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) f(num_rows * k / parts, num_rows * (k + 1) / parts, next.data() + k * size);
    });
  };
  each_part([&](int64_t begin, int64_t end, Count* count) {
    for (int64_t e = begin; e < end; ++e) {
      if (uint64_t(index[e]) >= uint64_t(size)) return faults.add(kDstIndex, e);
      ++count[index[e]];
    }
  });
  raise(op, faults.first(), nullptr, 0, "index", index, size);
  int64_t total = 0;
  for (int64_t i = 0; i < size; ++i) {
    ptr[i] = total;
    for (int64_t k = 0; k < parts; ++k) {
      const Count count = next[k * size + i];
      next[k * size + i] = Count(total);
      total += count;
    }
  }
  ptr[size] = total;
  each_part([&](int64_t begin, int64_t end, Count* place) {
    for (int64_t e = begin; e < end; ++e) order[place[index[e]]++] = e;
  });
}
void counting_sort(const char* op, const int64_t* index, int64_t num_rows, int64_t size, int64_t* ptr, int64_t* order) {
  advise_huge_pages(order, num_rows * int64_t(sizeof(int64_t)));
  if (num_rows <= INT32_MAX)
    counting_sort<int32_t>(op, index, num_rows, size, ptr, order);
  else
    counting_sort<int64_t>(op, index, num_rows, size, ptr, order);
}

std::tuple<Tensor, Tensor> csr_from_index_cpu(const Tensor& index_, int64_t size) {
  constexpr const char* op = "csr_from_index";
  check_index_dtype(index_, op, "index");
  STD_TORCH_CHECK(size >= 0, op, ": size must not be negative, got ", size);
  const Tensor index = made_contiguous(index_);
  const int64_t num_rows = index.numel();
  Tensor ptr = torch::stable::new_empty(index, {size + 1}), perm = torch::stable::new_empty(index, {num_rows});
  int64_t* order = write<int64_t>(perm);
  if (sorted_ptr(index_data(index), num_rows, size, write<int64_t>(ptr))) {
    advise_huge_pages(order, num_rows * int64_t(sizeof(int64_t)));
    for (int64_t e = 0; e < num_rows; ++e) order[e] = e;
  } else {
    counting_sort(op, index_data(index), num_rows, size, write<int64_t>(ptr), order);
  }
  return {ptr, perm};
}

// -- reductions by index: sorted rows as segments, narrow ones where they belong, others sorted first ------------------
struct Scattered {
  Tensor src, index, ptr;
  int64_t num_rows, size, width;

  Scattered(const char* op, const Tensor& src_, const Tensor& index_, int64_t size_) : size(size_) {
    check_index_dtype(index_, op, "index");
    STD_TORCH_CHECK(src_.dim() >= 1 && src_.size(0) == index_.numel(), op, ": index must have one entry per row of src");
    STD_TORCH_CHECK(size >= 0, op, ": dim_size must not be negative, got ", size);
    src = made_contiguous(src_);
    index = made_contiguous(index_);
    ptr = torch::stable::new_empty(index, {size + 1});
    num_rows = index.numel();
    width = row_width(src);
  }
  const int64_t* rows_ptr() const { return index_data(ptr); }
  ScatterArgs args(const void* rows) const { return {rows, index_data(index), num_rows, size, width}; }
  // Whether the index rises; ptr is then filled.
  bool is_sorted() const { return sorted_ptr(index_data(index), num_rows, size, write<int64_t>(ptr)); }
  // Fills ptr, and gives the rows in its order.
  Tensor sort(const char* op) const {
    Tensor perm = torch::stable::new_empty(index, {num_rows});
    counting_sort(op, index_data(index), num_rows, size, write<int64_t>(ptr), write<int64_t>(perm));
    return perm;
  }
};

Tensor scatter_sum_cpu(const Tensor& src_, const Tensor& index_, int64_t size, bool mean) {
  constexpr const char* op = "scatter_sum";
  const Scattered s(op, src_, index_, size);
  Tensor out = torch::stable::new_empty(s.src, with_rows(s.src, size));
  dispatch_floating(s.src.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    SegmentArgs a{read<S>(s.src), write<S>(out), nullptr, s.rows_ptr(), nullptr, s.num_rows, s.width, mean};
    if (s.is_sorted()) return reduce_segments<S>(op, a, kSum, size);
    if (takes_in_place(s.width)) return take_rows(op, "index", s.args(a.src), kSum, nullptr, mean, write<S>(out));
    const Tensor perm = s.sort(op);
    a.perm = index_data(perm);
    reduce_segments<S>(op, a, kSum, size);
  });
  return out;
}

// Extremes of the rows with each index, and their rows.
std::tuple<Tensor, Tensor> scatter_extreme_cpu(const Tensor& src_, const Tensor& index_, int64_t size, bool largest) {
  constexpr const char* op = "scatter_extreme";
  const Scattered s(op, src_, index_, size);
  const std::vector<int64_t> sizes = with_rows(s.src, size);
  Tensor out = torch::stable::new_empty(s.src, sizes), arg = torch::stable::new_empty(s.index, sizes);
  dispatch_floating(s.src.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    SegmentArgs a{read<S>(s.src), write<S>(out), write<int64_t>(arg), s.rows_ptr(), nullptr, s.num_rows, s.width, false};
    if (s.is_sorted()) return extreme_segments<S>(op, a, largest, size);
    if (ranks_in_place<S>(s.width, s.num_rows))
      return rank_rows<S>(op, s.args(a.src), largest, write<S>(out), a.arg);
    const Tensor perm = s.sort(op);
    a.perm = index_data(perm);
    extreme_segments<S>(op, a, largest, size);
  });
  return {out, arg};
}

}  // namespace
}  // namespace geo

STABLE_TORCH_LIBRARY_IMPL(geo, CPU, m) {
  m.impl("segment_sum", TORCH_BOX(&geo::segment_sum_cpu));
  m.impl("segment_prod", TORCH_BOX(&geo::segment_prod_cpu));
  m.impl("segment_extreme", TORCH_BOX(&geo::segment_extreme_cpu));
  m.impl("gather_csr", TORCH_BOX(&geo::gather_csr_cpu));
  m.impl("gather_index", TORCH_BOX(&geo::gather_index_cpu));
  m.impl("csr_from_index", TORCH_BOX(&geo::csr_from_index_cpu));
  m.impl("segment_extreme_value", TORCH_BOX(&geo::segment_extreme_value_cpu));
  m.impl("scatter_sum", TORCH_BOX(&geo::scatter_sum_cpu));
  m.impl("scatter_extreme", TORCH_BOX(&geo::scatter_extreme_cpu));
}
