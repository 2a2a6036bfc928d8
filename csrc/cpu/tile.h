// Tiles: a few rows of a tensor, loaded class-major so that SIMD lanes are rows. Any strides, any floating dtype, no copies.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <c10/util/Half.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace fam_ext {

template <typename T>
using Vec = at::vec::Vectorized<T>;

// The lanes of a vector as numbers.
template <typename T>
struct LaneArray {
  __at_align__ T values[Vec<T>::size()];
  explicit LaneArray(const Vec<T>& v) { v.store(values); }
  T operator[](int64_t lane) const { return values[lane]; }
};

// A sum of many vectors in two levels: its rounding error grows with the square root of the number of terms over 32.
template <typename T>
class LongSum {
 public:
  explicit LongSum(const Vec<T>& start = Vec<T>(0)) : outer_(start), inner_(0) {}
  void add(const Vec<T>& x) {
    inner_ = inner_ + x;
    if (++count_ % 32 == 0) flush();
  }
  void add_product(const Vec<T>& a, const Vec<T>& b) {
    inner_ = at::vec::fmadd(a, b, inner_);
    if (++count_ % 32 == 0) flush();
  }
  Vec<T> total() const { return outer_ + inner_; }

 private:
  void flush() {
    outer_ = outer_ + inner_;
    inner_ = Vec<T>(0);
  }
  Vec<T> outer_, inner_;
  int64_t count_ = 0;
};

// The rows of a tensor whose dimension `width_dim` holds one row's entries: (B, O, *pos) with 1, or (*rows, I) with the last.
// Row dimensions are merged where their strides allow, in row-major order.
struct RowLayout {
  c10::SmallVector<int64_t, 4> sizes, strides;
  int64_t rows = 1, width = 1, width_stride = 1;

  RowLayout(const at::Tensor& tensor, int64_t width_dim) {
    width = tensor.size(width_dim);
    width_stride = tensor.stride(width_dim);
    for (int64_t d = 0; d < tensor.dim(); ++d) {
      if (d == width_dim) continue;
      rows *= tensor.size(d);
      if (tensor.size(d) == 1) continue;
      if (!sizes.empty() && strides.back() == tensor.size(d) * tensor.stride(d)) {
        sizes.back() *= tensor.size(d);
        strides.back() = tensor.stride(d);
      } else {
        sizes.push_back(tensor.size(d));
        strides.push_back(tensor.stride(d));
      }
    }
    if (sizes.empty()) {
      sizes.push_back(1);
      strides.push_back(0);
    }
  }

  int64_t offset(int64_t row) const {
    int64_t result = 0;
    for (int64_t d = static_cast<int64_t>(sizes.size()) - 1; d > 0; --d) {
      result += (row % sizes[d]) * strides[d];
      row /= sizes[d];
    }
    return result + row * strides[0];
  }

  // Whether the `lanes` rows from `row` on are neighbours in memory.
  bool adjacent(int64_t row, int64_t lanes) const {
    return strides.back() == 1 && row % sizes.back() + lanes <= sizes.back();
  }
};

// One tensor seen as rows, with its dtype hidden behind T, the accumulation type.
template <typename T>
struct Rows {
  static constexpr int64_t kLanes = Vec<T>::size();

  // tile[s * ld + lane] = row (first + lane), entry s; lanes past `lanes` are zero.
  void (*load)(const void*, const RowLayout&, int64_t first, int64_t lanes, T* tile, int64_t ld);
  void (*store)(void*, const RowLayout&, int64_t first, int64_t lanes, const T* tile, int64_t ld);
  // sum of the squares of one row, and out = factor * row
  T (*squared_norm)(const void*, int64_t offset, int64_t stride, int64_t width);
  void (*scale)(const void*, int64_t offset, int64_t stride, T factor, void* out, int64_t out_offset,
                int64_t out_stride, int64_t width);

  const void* data;
  RowLayout layout;

  Rows(const at::Tensor& tensor, int64_t width_dim);

  void load_tile(int64_t first, int64_t lanes, T* tile, int64_t ld) const {
    load(data, layout, first, lanes, tile, ld);
  }
  void store_tile(int64_t first, int64_t lanes, const T* tile, int64_t ld) const {
    store(const_cast<void*>(data), layout, first, lanes, tile, ld);
  }
  T row_squared_norm(int64_t row) const {
    return squared_norm(data, layout.offset(row), layout.width_stride, layout.width);
  }
  // out's row = factor * this row; out has this tensor's dtype, or float32 where that is float16
  void scale_row(int64_t row, T factor, const Rows& out) const {
    scale(data, layout.offset(row), layout.width_stride, factor, const_cast<void*>(out.data), out.layout.offset(row),
          out.layout.width_stride, layout.width);
  }
};

namespace detail {

template <typename S, typename T>
Vec<T> load_as(const S* source, int64_t stride, int64_t count) {
  if constexpr (std::is_same_v<S, T>) {
    if (stride == 1) return count == Vec<T>::size() ? Vec<T>::loadu(source) : Vec<T>::loadu(source, count);
  }
  __at_align__ T buffer[Vec<T>::size()] = {};
  if (stride == 1) {
    for (int64_t k = 0; k < count; ++k) buffer[k] = static_cast<T>(source[k]);
  } else {
    for (int64_t k = 0; k < count; ++k) buffer[k] = static_cast<T>(source[k * stride]);
  }
  return Vec<T>::loadu(buffer);
}

template <typename S, typename T>
void load_tile(const void* data, const RowLayout& layout, int64_t first, int64_t lanes, T* tile, int64_t ld) {
  constexpr int64_t L = Vec<T>::size();
  const S* base = static_cast<const S*>(data);
  const int64_t width = layout.width, stride = layout.width_stride;
  if (lanes == L && layout.adjacent(first, lanes)) {
    const S* column = base + layout.offset(first);
    for (int64_t s = 0; s < width; ++s) load_as<S, T>(column + s * stride, 1, L).store(tile + s * ld);
    return;
  }
  if (lanes < L) {
    for (int64_t s = 0; s < width; ++s) Vec<T>(0).store(tile + s * ld);
  }
  for (int64_t lane = 0; lane < lanes; ++lane) {
    const S* row = base + layout.offset(first + lane);
    for (int64_t s = 0; s < width; ++s) tile[s * ld + lane] = static_cast<T>(row[s * stride]);
  }
}

template <typename S, typename T>
void store_tile(void* data, const RowLayout& layout, int64_t first, int64_t lanes, const T* tile, int64_t ld) {
  S* base = static_cast<S*>(data);
  const int64_t width = layout.width, stride = layout.width_stride;
  if (layout.adjacent(first, lanes)) {
    S* column = base + layout.offset(first);
    for (int64_t s = 0; s < width; ++s) {
      for (int64_t lane = 0; lane < lanes; ++lane) column[s * stride + lane] = static_cast<S>(tile[s * ld + lane]);
    }
    return;
  }
  for (int64_t lane = 0; lane < lanes; ++lane) {
    S* row = base + layout.offset(first + lane);
    for (int64_t s = 0; s < width; ++s) row[s * stride] = static_cast<S>(tile[s * ld + lane]);
  }
}

template <typename T>
T horizontal_sum(const Vec<T>& v) {
  return at::vec::vec_reduce_all<T>([](const Vec<T>& a, const Vec<T>& b) { return a + b; }, v);
}

template <typename S, typename T>
T squared_norm(const void* data, int64_t offset, int64_t stride, int64_t width) {
  constexpr int64_t L = Vec<T>::size();
  const S* row = static_cast<const S*>(data) + offset;
  Vec<T> sums[4] = {Vec<T>(0), Vec<T>(0), Vec<T>(0), Vec<T>(0)};
  int64_t k = 0;
  for (; k + 4 * L <= width; k += 4 * L) {
    for (int64_t j = 0; j < 4; ++j) {
      const Vec<T> x = load_as<S, T>(row + (k + j * L) * stride, stride, L);
      sums[j] = at::vec::fmadd(x, x, sums[j]);
    }
  }
  for (; k < width; k += L) {
    const Vec<T> x = load_as<S, T>(row + k * stride, stride, std::min(L, width - k));
    sums[0] = at::vec::fmadd(x, x, sums[0]);
  }
  return horizontal_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// A gradient's dtype in memory, as gradient_dtype.h has it.
template <typename S>
using GradientOf = std::conditional_t<std::is_same_v<S, c10::Half>, float, S>;

template <typename S, typename T>
void scale_row(const void* data, int64_t offset, int64_t stride, T factor, void* out, int64_t out_offset,
               int64_t out_stride, int64_t width) {
  const S* row = static_cast<const S*>(data) + offset;
  using G = GradientOf<S>;
  G* target = static_cast<G*>(out) + out_offset;
  if (factor == T(0)) {  // an ignored row, whatever it holds
    for (int64_t k = 0; k < width; ++k) target[k * out_stride] = static_cast<G>(0);
    return;
  }
  if (stride == 1 && out_stride == 1) {
    for (int64_t k = 0; k < width; ++k) target[k] = static_cast<G>(factor * static_cast<T>(row[k]));
  } else {
    for (int64_t k = 0; k < width; ++k)
      target[k * out_stride] = static_cast<G>(factor * static_cast<T>(row[k * stride]));
  }
}

}  // namespace detail

template <typename T>
Rows<T>::Rows(const at::Tensor& tensor, int64_t width_dim) : data(tensor.const_data_ptr()), layout(tensor, width_dim) {
  const auto use = [this](auto tag) {
    using S = decltype(tag);
    load = detail::load_tile<S, T>;
    store = detail::store_tile<S, T>;
    squared_norm = detail::squared_norm<S, T>;
    scale = detail::scale_row<S, T>;
  };
  switch (tensor.scalar_type()) {
    case at::kFloat:
      use(float{});
      break;
    case at::kDouble:
      use(double{});
      break;
    case at::kBFloat16:
      use(c10::BFloat16{});
      break;
    case at::kHalf:
      use(c10::Half{});
      break;
    default:
      TORCH_CHECK_TYPE(false, "fam_ext: expected a floating tensor, got ", tensor.scalar_type());
  }
}

}  // namespace fam_ext
