// The shifted form of trace_rows.h: everything relative to the most likely class, three (N,O)x(O,I) products.
#pragma once

#include "cpu/trace_rows.h"

namespace fam_ext {

// Most rows of a block: the gradient of the weight is a sum over blocks of sums over rows, whose rounding errors grow with the
// length of the parts.
constexpr int64_t kShiftedRows = 8192;

// The rows of one block after U = p~ W is known.
template <typename T>
struct ShiftedRow {
  T v, squared_shift, squared_mean;  // v, |U|^2, |u|^2
};

// v = sum_s p~_s |w_s|^2 - 2 <w_y, U> - |U|^2 for one row, where U = shift - r w_y; writes U and u = w_y + U where wanted.
template <typename T>
ShiftedRow<T> shifted_row(const T* shift, const T* wy, T r, T weighted_squares, int64_t fan_in, T* whole_shift,
                          T* mean) {
  constexpr int64_t L = lanes_of<T>();
  Vec<T> dot(0), squared(0), squared_mean(0);
  for (int64_t i = 0; i < fan_in; i += L) {
    const int64_t count = std::min(L, fan_in - i);
    const Vec<T> b = detail::load_as<T, T>(wy + i, 1, count);
    const Vec<T> a = at::vec::fmadd(Vec<T>(-r), b, detail::load_as<T, T>(shift + i, 1, count)), u = a + b;
    dot = at::vec::fmadd(a, b, dot);
    squared = at::vec::fmadd(a, a, squared);
    squared_mean = at::vec::fmadd(u, u, squared_mean);
    if (whole_shift != nullptr) a.store(whole_shift + i, static_cast<int>(count));
    if (mean != nullptr) u.store(mean + i, static_cast<int>(count));
  }
  const T d = detail::horizontal_sum(dot), uu = detail::horizontal_sum(squared);
  return {at_least_zero(shifted_trace(weighted_squares, d, uu)), uu, detail::horizontal_sum(squared_mean)};
}

// What the passes over one block of rows leave behind, by row of the block.
template <typename T>
struct ShiftedBlock {
  std::vector<T> weighted;  // sum_s p~_s |w_s|^2
  std::vector<ShiftedRow<T>> values;
  std::vector<int64_t> y;
  std::vector<T> g, r;  // the gradient that reaches v, 1 - p_y

  explicit ShiftedBlock(int64_t tiles) : weighted(tiles * lanes_of<T>()), values(tiles * lanes_of<T>()) {}

  void resize(int64_t rows) {
    y.resize(rows);
    r.resize(rows);
    g.assign(rows, T(0));
  }
};

// After the softmax of one tile: y and the sums over classes. Where U is still to be formed p~_y is left 0 and r keeps it: in the
// product, -r w_y would round every later term of the sum to its own digits.
template <typename T>
void shifted_begin_tile(T* p, int64_t ld, int64_t classes, int64_t lanes, int64_t column, const T* squares,
                        const RowStats<T>& stats, bool have_shifts, ShiftedBlock<T>& block) {
  LongSum<T> sum;
  for (int64_t s = 0; s < classes; ++s) sum.add_product(Vec<T>::loadu(p + s * ld), Vec<T>(squares[s]));
  sum.total().store(block.weighted.data() + column);
  const LaneArray<T> best(stats.y), rest(stats.r);
  for (int64_t lane = 0; lane < lanes; ++lane) {
    block.y[column + lane] = static_cast<int64_t>(best[lane]);
    block.r[column + lane] = have_shifts ? T(0) : rest[lane];
    if (!have_shifts) p[block.y[column + lane] * ld + lane] = T(0);
  }
}

// v is known: hands it to the policy, and turns <w_s, u> in `dz` into the gradient of the logits (any content where not `products`).
// Without `dz` no gradient of the logits is formed.
template <typename T, typename Policy>
void shifted_grad_tile(Policy& policy, int64_t first, int64_t lanes, int64_t column, const T* p_tilde, int64_t ld,
                       int64_t classes, const T* squares, const RowStats<T>& stats, bool products,
                       ShiftedBlock<T>& block, T* dz) {
  constexpr int64_t L = lanes_of<T>();
  __at_align__ T values[3][L] = {};
  for (int64_t lane = 0; lane < lanes; ++lane) {
    const ShiftedRow<T>& row = block.values[column + lane];
    values[0][lane] = row.v;
    values[1][lane] = row.squared_shift;
    values[2][lane] = row.squared_mean;
  }
  const Vec<T> v = Vec<T>::loadu(values[0]), at_y = Vec<T>::loadu(values[1]), mean = Vec<T>::loadu(values[2]);
  policy.value(first, lanes, v, stats);
  const Vec<T> upstream = policy.upstream(first, lanes);
  const LaneArray<T> lane_g(upstream);
  for (int64_t lane = 0; lane < lanes; ++lane) block.g[column + lane] = lane_g[lane];
  if (dz == nullptr) return;
  for (int64_t s = 0; s < classes; ++s) {
    Vec<T> out(0);
    if (products) {
      const Vec<T> d = at_least_zero(squared_distance(Vec<T>(squares[s]), Vec<T>::loadu(dz + s * ld), mean));
      const Vec<T> is_y = stats.y == Vec<T>(static_cast<T>(s));
      out = upstream * probability(Vec<T>::loadu(p_tilde + s * ld), s, stats) * (Vec<T>::blendv(d, at_y, is_y) - v);
    }
    out.store(dz + s * ld);
  }
  policy.add_loss_grad(first, lanes, p_tilde, ld, stats, dz, ld);
}

// row n of `rows` (N, I) times factor_n
template <typename T>
void scale_rows(T* rows, const std::vector<T>& factor, int64_t fan_in) {
  const int64_t count = static_cast<int64_t>(factor.size());
  at::parallel_for(0, count, std::max<int64_t>(1, 8192 / std::max<int64_t>(fan_in, 1)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t n = begin; n < end; ++n) {
                       for (int64_t i = 0; i < fan_in; ++i) rows[n * fan_in + i] *= factor[n];
                     }
                   });
}

// sums_s += sum_n factor_n p_sn
template <typename T>
void add_class_sums(const T* p, int64_t ld, int64_t rows, const std::vector<T>& factor, std::vector<T>& sums) {
  const int64_t classes = static_cast<int64_t>(sums.size());
  at::parallel_for(0, classes, std::max<int64_t>(1, 32768 / rows), [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      double sum = 0;
      for (int64_t n = 0; n < rows; ++n) sum += factor[n] * p[s * ld + n];
      sums[s] += static_cast<T>(sum);
    }
  });
}

// target[y_n] += factor_n source_n, each thread a range of columns: no two write the same number
template <typename T>
void scatter_rows(const T* source, const std::vector<int64_t>& y, const std::vector<T>& factor, int64_t fan_in,
                  T* target) {
  const int64_t rows = static_cast<int64_t>(y.size());
  at::parallel_for(0, fan_in, std::max<int64_t>(64, 65536 / std::max<int64_t>(rows, 1)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t n = 0; n < rows; ++n) {
                       const T* from = source + n * fan_in;
                       T* to = target + y[n] * fan_in;
                       for (int64_t i = begin; i < end; ++i) to[i] += factor[n] * from[i];
                     }
                   });
}

// dW = 2 (diag(sum_n g_n p~_n) W - T), T = sum_n g_n p~_n u_n^T + the scattered rows, in place of T
template <typename T>
void finish_weight_grad(const std::vector<T>& sums, const at::Tensor& w, at::Tensor& t) {
  const int64_t classes = w.size(0), fan_in = w.size(1);
  const T* weight = w.template const_data_ptr<T>();
  T* out = t.template mutable_data_ptr<T>();
  at::parallel_for(0, classes, std::max<int64_t>(1, 32768 / std::max<int64_t>(fan_in, 1)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t s = begin; s < end; ++s) {
                       for (int64_t i = s * fan_in; i < (s + 1) * fan_in; ++i)
                         out[i] = 2 * (sums[s] * weight[i] - out[i]);
                     }
                   });
}

// The whole pass. `shifts` (N, I), or undefined: U, read when `have_shifts`, else written. Gradients are made when wanted; returns
// the gradient of the weight or an undefined tensor.
template <typename T, typename Policy>
at::Tensor shifted_blocks(const Rows<T>& logits, const at::Tensor& weight, at::Tensor shifts, bool have_shifts,
                          Policy& policy, const Rows<T>* grad_logits, bool grad_weight) {
  at::Tensor class_norms = class_squares(weight);
  const at::Tensor w = center_if_offset(weight, class_norms);
  const int64_t classes = w.size(0), fan_in = w.size(1), rows = logits.layout.rows;
  const int64_t step = std::min(block_rows(rows, classes), kShiftedRows);
  const T *w_data = w.template const_data_ptr<T>(), *squares = class_norms.template const_data_ptr<T>();
  const bool grads = grad_logits != nullptr || grad_weight;
  const bool products = grad_logits != nullptr && policy.through_curvature();

  RowBlock<T> block(classes, step, w.options());
  const int64_t ld = block.ld;
  at::Tensor own_shifts, means, dots, t;
  if (!shifts.defined()) own_shifts = at::empty({step, fan_in}, w.options());
  if (grads) means = at::empty({step, fan_in}, w.options());
  if (grad_logits != nullptr) dots = at::empty_like(block.p);
  ShiftedBlock<T> shifted(static_cast<int64_t>(block.stats.size()));
  std::vector<T> sums(grad_weight ? classes : 0, T(0));

  for (block.first = 0; block.first < rows; block.first += step) {
    block.rows = std::min(step, rows - block.first);
    T* p_data = block.data();
    shifted.resize(block.rows);
    block.for_each_tile(8 * classes, [&](int64_t first, int64_t lanes, int64_t column, RowStats<T>& stats) {
      load_tile_softmax(logits, policy, first, lanes, p_data + column, ld, stats);
      shifted_begin_tile(p_data + column, ld, classes, lanes, column, squares, stats, have_shifts, shifted);
    });
    at::Tensor u = shifts.defined() ? shifts.narrow(0, block.first, block.rows) : own_shifts.narrow(0, 0, block.rows);
    if (!have_shifts) at::mm_out(u, block.view().t(), w);
    const T* u_data = u.template const_data_ptr<T>();
    T* whole = have_shifts ? nullptr : u.template mutable_data_ptr<T>();
    T* mean_data = grads ? means.template mutable_data_ptr<T>() : nullptr;
    at::parallel_for(
        0, block.rows, std::max<int64_t>(1, 8192 / std::max<int64_t>(fan_in, 1)), [&](int64_t begin, int64_t end) {
          for (int64_t n = begin; n < end; ++n) {
            shifted.values[n] = shifted_row(u_data + n * fan_in, w_data + shifted.y[n] * fan_in, shifted.r[n],
                                            shifted.weighted[n], fan_in, have_shifts ? nullptr : whole + n * fan_in,
                                            grads ? mean_data + n * fan_in : nullptr);
            if (!have_shifts) p_data[shifted.y[n] * ld + n] = -shifted.r[n];
          }
        });
    at::Tensor mean_rows = grads ? means.narrow(0, 0, block.rows) : at::Tensor();
    if (products) {
      at::Tensor dot_view = dots.narrow(1, 0, block.rows);
      at::mm_out(dot_view, w, mean_rows.t());
    }
    T* dot_data = grad_logits != nullptr ? dots.template mutable_data_ptr<T>() : nullptr;
    block.for_each_tile(4 * classes + policy.row_cost(),
                        [&](int64_t first, int64_t lanes, int64_t column, RowStats<T>& stats) {
                          T* dz = dot_data == nullptr ? nullptr : dot_data + column;
                          shifted_grad_tile(policy, first, lanes, column, p_data + column, ld, classes, squares, stats,
                                            products, shifted, dz);
                          if (dz != nullptr) grad_logits->store_tile(first, lanes, dz, ld);
                        });
    if (!grad_weight) continue;
    scale_rows(mean_data, shifted.g, fan_in);
    at::Tensor share = at::mm(block.view(), mean_rows);
    scatter_rows(u_data, shifted.y, shifted.g, fan_in, share.template mutable_data_ptr<T>());
    t = t.defined() ? t.add_(share) : share;
    add_class_sums(p_data, ld, block.rows, shifted.g, sums);
  }
  if (!grad_weight) return {};
  if (!t.defined()) t = at::zeros({classes, fan_in}, w.options());  // no rows
  finish_weight_grad(sums, w, t);
  return t;
}

}  // namespace fam_ext
