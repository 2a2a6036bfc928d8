// Row kernels of linear_cross_entropy on the CPU, between the matrix products of fam_ext/ops/_linear_cross_entropy_chunks.py. Rows are
// contiguous and SIMD lanes are classes (or features). Letters and order of the steps as in kernels/linear_cross_entropy.py: y the
// most likely class, e_s = exp(z_s - z_y) for s != y and e_y = 0, r = 1 - p_y, p~ = e / (1 + sum e) but for p~_y = -r, m the mean row.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/index_select.h>
#include <torch/library.h>

#include <limits>
#include <vector>

#include "cpu/row_grain.h"
#include "cpu/softmax_tile.h"
#include "shape_checks.h"

namespace fam_ext {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kBlockClasses = 1024;  // classes of one task: what it keeps of them stays in the nearest cache
constexpr int64_t kSumTerms = 32;        // rows between two levels of a sum over rows
enum Factor { kRest, kTrace, kSquaredShift, kSquaredMean, kUpstream, kCoefficient, kHard, kSoft, kOthers, kFactors };

// `count` numbers, the lanes behind them `fill`.
template <typename T>
Vec<T> load(const T* source, int64_t count, T fill = T(0)) {
  if (count == Vec<T>::size()) return Vec<T>::loadu(source);
  __at_align__ T lanes[Vec<T>::size()];
  std::fill_n(std::copy_n(source, count, lanes), Vec<T>::size() - count, fill);
  return Vec<T>::loadu(lanes);
}

// f(first, count) for every vector of `width` numbers.
template <typename T, typename F>
void for_each_vector(int64_t width, const F& f) {
  constexpr int64_t L = Vec<T>::size();
  for (int64_t i = 0; i < width; i += L) f(i, std::min(L, width - i));
}

// The tensors of a row kernel: vectors are dense, rows of matrices contiguous.
void check_vector(const char* op, const char* name, const Tensor& t, int64_t size) {
  TORCH_CHECK_VALUE(t.dim() == 1 && t.size(0) == size && t.is_contiguous(), "linear_cross_entropy_", op, ": ", name,
                    " must be (", size, ") and contiguous, got ", t.sizes());
}
void check_matrix(const char* op, const char* name, const Tensor& t, int64_t rows, int64_t width, bool dense) {
  const bool rows_contiguous = t.dim() == 2 && (t.size(1) <= 1 || t.stride(1) == 1);
  TORCH_CHECK_VALUE(rows_contiguous && t.size(0) == rows && t.size(1) == width && (!dense || t.is_contiguous()),
                    "linear_cross_entropy_", op, ": ", name, " must be (", rows, ", ", width,
                    dense ? ") and contiguous, got " : ") with contiguous rows, got ", t.sizes(), " with strides ",
                    t.strides());
}

// The largest number of a row and the first place it stands at; -inf and 0 where there is none.
template <typename T>
std::pair<T, int64_t> maximum(const T* z, int64_t classes) {
  constexpr T lowest = -std::numeric_limits<T>::infinity();
  constexpr int64_t L = Vec<T>::size();
  Vec<T> largest(lowest), where(0);
  for_each_vector<T>(classes, [&](int64_t s, int64_t count) {
    const Vec<T> x = load(z + s, count, lowest), larger = x > largest;
    largest = Vec<T>::blendv(largest, x, larger);
    where = Vec<T>::blendv(where, Vec<T>(static_cast<T>(s / L)), larger);
  });
  const LaneArray<T> values(largest), blocks(where);
  T top = lowest;
  int64_t y = 0;
  for (int64_t lane = 0; lane < L; ++lane) {
    const int64_t s = static_cast<int64_t>(blocks[lane]) * L + lane;
    if (values[lane] > top || (values[lane] == top && s < y)) top = values[lane], y = s;
  }
  return {top, std::min(y, classes - 1)};
}

// One row of z becomes e. Returns y; `stats`: sum e, sum e |w_s - m|^2, z_y - z_t, sum omega_s (z_y - z_s).
template <typename T>
int64_t softmax_row(T* z, int64_t classes, const T* bias, const T* squares, const T* omega, bool smooth, int64_t target,
                    T (&stats)[4]) {
  if (bias != nullptr) {
    for_each_vector<T>(classes, [&](int64_t s, int64_t count) {
      (load(z + s, count) + load(bias + s, count)).store(z + s, static_cast<int>(count));
    });
  }
  const auto [top, y] = maximum(z, classes);
  const Vec<T> max(top), zero(0), lowest(std::numeric_limits<T>::lowest());
  stats[2] = top - z[target];
  if (smooth) {
    LongSum<T> gaps;
    for_each_vector<T>(classes, [&](int64_t s, int64_t count) {
      const Vec<T> share = omega == nullptr ? Vec<T>(1) : load(omega + s, count);
      gaps.add_product(share, max - load(z + s, count, top));
    });
    stats[3] = detail::horizontal_sum(gaps.total());
  }
  z[y] = -std::numeric_limits<T>::infinity();  // e_y = 0
  LongSum<T> total, weighted;
  for_each_vector<T>(classes, [&](int64_t s, int64_t count) {
    const Vec<T> x = load(z + s, count, -std::numeric_limits<T>::infinity()), d = x - max;
    const Vec<T> error = Vec<T>::blendv(zero, difference_error(x, max, d), d > lowest);
    Vec<T> e = d.exp();
    e = at::vec::fmadd(e, error, e);
    total.add(e);
    weighted.add_product(e, load(squares + s, count));
    e.store(z + s, static_cast<int>(count));
  });
  // nan where the largest logit is not finite, as softmax is
  stats[0] = detail::horizontal_sum(total.total()) + (top - top);
  stats[1] = detail::horizontal_sum(weighted.total());
  return y;
}

// z (rows, V), rows contiguous, becomes e; best (rows) and stats (4, rows) are written.
void softmax_rows(const Tensor& z, const OptionalTensor& bias, const Tensor& squares, const OptionalTensor& omega,
                  const Tensor& target, bool smooth, const Tensor& best, const Tensor& stats) {
  const char* op = "softmax_rows";
  TORCH_CHECK_VALUE(z.dim() == 2 && z.size(1) >= 1, "linear_cross_entropy_softmax_rows: z must be (rows, V)");
  const int64_t rows = z.size(0), classes = z.size(1), stride = z.stride(0);
  check_matrix(op, "z", z, rows, classes, false);
  check_matrix(op, "stats", stats, 4, rows, true);
  check_vector(op, "squares", squares, classes);
  check_vector(op, "target", target, rows);
  check_vector(op, "best", best, rows);
  if (bias) check_vector(op, "bias", *bias, classes);
  if (omega) check_vector(op, "omega", *omega, classes);
  const auto* index = target.const_data_ptr<int64_t>();
  auto* y = best.mutable_data_ptr<int64_t>();
  AT_DISPATCH_FLOATING_TYPES(z.scalar_type(), "linear_cross_entropy", [&] {
    auto *data = z.mutable_data_ptr<scalar_t>(), *out = stats.mutable_data_ptr<scalar_t>();
    const auto* b = bias ? bias->const_data_ptr<scalar_t>() : nullptr;
    const auto *q = squares.const_data_ptr<scalar_t>(), *w = omega ? omega->const_data_ptr<scalar_t>() : nullptr;
    at::parallel_for(0, rows, row_grain(classes), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        scalar_t row[4] = {};
        TORCH_CHECK_INDEX(index[n] >= 0 && index[n] < classes,
                          "linear_cross_entropy_softmax_rows: target out of range");
        y[n] = softmax_row(data + n * stride, classes, b, q, w, smooth, index[n], row);
        for (int64_t k = 0; k < 4; ++k) out[k * rows + n] = row[k];
      }
    });
  });
}

// What a row of e W becomes: see mean_rows.
template <typename T>
void mean_row(T* shift, const T* wy, const T* m, const T* phi, int64_t fan_in, T rest, T weighted, T square,
              T curvature_factor, T* mean, T* scaled, T (&row_sums)[4]) {
  const T inverse = 1 / (1 + rest), r = rest * inverse;
  LongSum<T> dot, squared, squared_mean, along, norm;
  for_each_vector<T>(fan_in, [&](int64_t i, int64_t count) {
    const Vec<T> w = load(wy + i, count), offset = load(m + i, count), x = load(phi + i, count);
    const Vec<T> u = load(shift + i, count) * Vec<T>(inverse) - Vec<T>(r) * w, centered = w - offset,
                 whole = centered + u;
    dot.add_product(centered, u);
    squared.add_product(u, u);
    squared_mean.add_product(whole, whole);
    along.add_product(offset, whole);
    norm.add_product(x, x);
    if (mean == nullptr) return;
    u.store(shift + i, static_cast<int>(count));
    whole.store(mean + i, static_cast<int>(count));
  });
  const auto sum = [](const LongSum<T>& lanes) { return detail::horizontal_sum(lanes.total()); };
  row_sums[1] = sum(squared);
  row_sums[0] = at_least_zero(shifted_trace(weighted * inverse - r * square, sum(dot), row_sums[1]));
  row_sums[2] = sum(squared_mean) + 2 * sum(along);
  row_sums[3] = sum(norm);
  if (mean == nullptr) return;
  const T factor = -2 * row_sums[3] * curvature_factor;
  for_each_vector<T>(fan_in, [&](int64_t i, int64_t count) {
    const Vec<T> whole = load(mean + i, count), u = load(shift + i, count);
    (Vec<T>(factor * inverse) * whole).store(scaled + i, static_cast<int>(count));
    (Vec<T>(factor) * (u - Vec<T>(r) * whole)).store(shift + i, static_cast<int>(count));
  });
}

// shift (rows, I) is e W. row_sums (4, rows): v, |U|^2, |u - m|^2 + 2 <m, u - m>, |phi|^2. Where gradients are wanted: means = u - m,
// scaled = -2 g / (1 + sum e) (u - m), and shift becomes -2 g (U - r (u - m)), with g = curvature_factor |phi|^2.
void mean_rows(const Tensor& shift, const Tensor& weight, const Tensor& offset, const Tensor& features,
               const Tensor& squares, const Tensor& best, const Tensor& stats, const Tensor& curvature_factor,
               const OptionalTensor& means, const OptionalTensor& scaled, const Tensor& row_sums) {
  const char* op = "mean_rows";
  TORCH_CHECK_VALUE(shift.dim() == 2 && weight.dim() == 2,
                    "linear_cross_entropy_mean_rows: shift and weight must be matrices");
  const int64_t rows = shift.size(0), fan_in = shift.size(1), classes = weight.size(0);
  check_matrix(op, "shift", shift, rows, fan_in, true);
  TORCH_CHECK_VALUE(weight.size(1) == fan_in && is_floating(weight),
                    "linear_cross_entropy_mean_rows: weight must be floating, (V, ", fan_in, ")");
  check_matrix(op, "features", features, rows, fan_in, true);
  check_matrix(op, "stats", stats, 4, rows, true);
  check_matrix(op, "row_sums", row_sums, 4, rows, true);
  check_vector(op, "offset", offset, fan_in);
  check_vector(op, "squares", squares, classes);
  check_vector(op, "best", best, rows);
  check_vector(op, "curvature_factor", curvature_factor, rows);
  TORCH_CHECK_VALUE(means.has_value() == scaled.has_value(), "linear_cross_entropy_mean_rows: means without scaled");
  if (means) check_matrix(op, "means", *means, rows, fan_in, true);
  if (scaled) check_matrix(op, "scaled", *scaled, rows, fan_in, true);
  const Tensor likely = at::index_select(weight, 0, best).to(shift.scalar_type()).contiguous();
  const auto* y = best.const_data_ptr<int64_t>();
  AT_DISPATCH_FLOATING_TYPES(shift.scalar_type(), "linear_cross_entropy", [&] {
    auto *u = shift.mutable_data_ptr<scalar_t>(), *out = row_sums.mutable_data_ptr<scalar_t>();
    auto *mean = means ? means->mutable_data_ptr<scalar_t>() : nullptr,
         *right = scaled ? scaled->mutable_data_ptr<scalar_t>() : nullptr;
    const auto *w = likely.const_data_ptr<scalar_t>(), *m = offset.const_data_ptr<scalar_t>(),
               *phi = features.const_data_ptr<scalar_t>(), *q = squares.const_data_ptr<scalar_t>(),
               *sums = stats.const_data_ptr<scalar_t>(), *factor = curvature_factor.const_data_ptr<scalar_t>();
    at::parallel_for(0, rows, row_grain(fan_in), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const int64_t at = n * fan_in;
        scalar_t row[4] = {};
        mean_row(u + at, w + at, m, phi + at, fan_in, sums[n], sums[rows + n], q[y[n]], factor[n],
                 mean == nullptr ? nullptr : mean + at, right == nullptr ? nullptr : right + at, row);
        for (int64_t k = 0; k < 4; ++k) out[k * rows + n] = row[k];
      }
    });
  });
}

template <typename T>
struct ClassBlock {
  int64_t first, count;      // of the classes
  const T *squares, *omega;  // at its first class; omega may be null
  T f[kFactors];             // of the row
  int64_t y, target;         // of the row, counted from the block's first class
};

// dz of one row and one block of classes; g p~ is added to `sums`.
template <typename T>
void grad_row(const ClassBlock<T>& block, const T* e, const T* dots, T* dz, bool smooth, T* sums) {
  const T *f = block.f, inverse = 1 / (1 + f[kRest]);
  const Vec<T> inv(inverse), c(f[kCoefficient]), soft(f[kSoft]), g(f[kUpstream]), v(f[kTrace]), mean(f[kSquaredMean]);
  for_each_vector<T>(block.count, [&](int64_t s, int64_t count) {
    const int lanes = static_cast<int>(count);
    const Vec<T> p = load(e + s, count) * inv;
    Vec<T> out = c * p;
    if (smooth) out = out - (block.omega == nullptr ? soft : soft * load(block.omega + s, count));
    if (dots != nullptr) {
      const Vec<T> d = at_least_zero(squared_distance(load(block.squares + s, count), load(dots + s, count), mean));
      out = at::vec::fmadd(g * p, d - v, out);
    }
    if (sums != nullptr) at::vec::fmadd(g, p, load(sums + s, count)).store(sums + s, lanes);
    out.store(dz + s, lanes);
  });
  if (block.target >= 0 && block.target < block.count) dz[block.target] -= f[kHard];
  if (block.y < 0 || block.y >= block.count) return;
  // the targets come in as c - q_y = those of all the others: p_y may be 1 to the last digit
  const T p_tilde = -f[kRest] * inverse, through = f[kUpstream] * inverse * (f[kSquaredShift] - f[kTrace]);
  dz[block.y] = f[kCoefficient] * p_tilde + f[kOthers] + (dots == nullptr ? T(0) : through);
  if (sums != nullptr) sums[block.y] += f[kUpstream] * p_tilde;
}

// A sum over rows for every class of a block, in two levels, so that its rounding error grows with the length of a part only.
template <typename T>
struct BlockSum {
  std::vector<T> inner, outer;
  BlockSum(bool wanted, int64_t count) : inner(wanted ? count : 0), outer(wanted ? count : 0) {}
  T* part() { return inner.empty() ? nullptr : inner.data(); }
  void flush() {
    for (size_t k = 0; k < inner.size(); ++k) outer[k] += inner[k], inner[k] = 0;
  }
  void add_to(T* total) {
    flush();
    for (size_t k = 0; k < outer.size(); ++k) total[k] += outer[k];
  }
};

// dz (rows, V) of the classes first..first + count - 1, from e (rows, V) and dots (rows, count) = <w_s, u - m>, where dz may lie. Factors
// (9, rows) as enum Factor has them. class_sums (V) += sum_n g_n p~_n, bias_sums (V) += sum_n dz_n.
void grad_logits(const Tensor& e, const OptionalTensor& dots, const Tensor& dz, int64_t first, int64_t count,
                 const Tensor& squares, const OptionalTensor& omega, bool smooth, const Tensor& target,
                 const Tensor& best, const Tensor& factors, const OptionalTensor& class_sums,
                 const OptionalTensor& bias_sums) {
  const char* op = "grad_logits";
  TORCH_CHECK_VALUE(e.dim() == 2, "linear_cross_entropy_grad_logits: e must be (rows, V)");
  const int64_t all = e.size(1);
  TORCH_CHECK_VALUE(first >= 0 && count >= 0 && first <= all && count <= all - first,
                    "linear_cross_entropy_grad_logits: there are no classes from ", first, " to ", first, " + ", count);
  check_matrix(op, "e", e, e.size(0), all, false);
  check_matrix(op, "dz", dz, e.size(0), all, false);
  check_matrix(op, "factors", factors, kFactors, e.size(0), true);
  check_vector(op, "squares", squares, all);
  check_vector(op, "target", target, e.size(0));
  check_vector(op, "best", best, e.size(0));
  if (dots) check_matrix(op, "dots", *dots, e.size(0), count, false);
  if (omega) check_vector(op, "omega", *omega, all);
  if (class_sums) check_vector(op, "class_sums", *class_sums, all);
  if (bias_sums) check_vector(op, "bias_sums", *bias_sums, all);
  const int64_t rows = e.size(0), e_row = e.stride(0), dz_row = dz.stride(0), dot_row = dots ? dots->stride(0) : 0;
  const auto *t = target.const_data_ptr<int64_t>(), *y = best.const_data_ptr<int64_t>();
  AT_DISPATCH_FLOATING_TYPES(e.scalar_type(), "linear_cross_entropy", [&] {
    const auto *p = e.const_data_ptr<scalar_t>(), *f = factors.const_data_ptr<scalar_t>(),
               *q = squares.const_data_ptr<scalar_t>(), *w = omega ? omega->const_data_ptr<scalar_t>() : nullptr,
               *dot = dots ? dots->const_data_ptr<scalar_t>() : nullptr;
    auto *out = dz.mutable_data_ptr<scalar_t>(),
         *sums = class_sums ? class_sums->mutable_data_ptr<scalar_t>() : nullptr,
         *totals = bias_sums ? bias_sums->mutable_data_ptr<scalar_t>() : nullptr;
    at::parallel_for(0, (count + kBlockClasses - 1) / kBlockClasses, 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const int64_t offset = k * kBlockClasses, s = first + offset;
        ClassBlock<scalar_t> block{s, std::min(kBlockClasses, count - offset), q + s, w == nullptr ? w : w + s, {}, 0,
                                   0};
        BlockSum<scalar_t> weighted_sum(sums != nullptr, block.count), summed(totals != nullptr, block.count);
        for (int64_t n = 0; n < rows; ++n) {
          for (int64_t j = 0; j < kFactors; ++j) block.f[j] = f[j * rows + n];
          block.y = y[n] - s, block.target = t[n] - s;
          scalar_t* row = out + n * dz_row + s;
          grad_row(block, p + n * e_row + s, dot == nullptr ? dot : dot + n * dot_row + offset, row, smooth,
                   weighted_sum.part());
          if (scalar_t* part = summed.part()) {
            for (int64_t j = 0; j < block.count; ++j) part[j] += row[j];
          }
          if (n % kSumTerms == kSumTerms - 1) weighted_sum.flush(), summed.flush();
        }
        if (sums != nullptr) weighted_sum.add_to(sums + s);
        if (totals != nullptr) summed.add_to(totals + s);
      }
    });
  });
}

// out[classes_n - first] += source_n for every row n whose class is one of out's, each thread a range of columns.
void add_rows(const Tensor& source, const Tensor& classes, const Tensor& out, int64_t first) {
  TORCH_CHECK_VALUE(source.dim() == 2 && out.dim() == 2, "linear_cross_entropy_add_rows: expected matrices");
  check_matrix("add_rows", "source", source, source.size(0), source.size(1), true);
  check_matrix("add_rows", "out", out, out.size(0), source.size(1), false);
  check_vector("add_rows", "classes", classes, source.size(0));
  const int64_t rows = source.size(0), fan_in = source.size(1), count = out.size(0), stride = out.stride(0);
  const auto* y = classes.const_data_ptr<int64_t>();
  const int64_t grain = std::max<int64_t>(64, 65536 / std::max<int64_t>(rows, 1));
  AT_DISPATCH_FLOATING_TYPES(source.scalar_type(), "linear_cross_entropy", [&] {
    const auto* from = source.const_data_ptr<scalar_t>();
    auto* to = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, fan_in, grain, [&](int64_t begin, int64_t end) {
      for (int64_t n = 0; n < rows; ++n) {
        if (y[n] < first || y[n] - first >= count) continue;
        scalar_t* row = to + (y[n] - first) * stride;
        for (int64_t i = begin; i < end; ++i) row[i] += from[n * fan_in + i];
      }
    });
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(fam_ext, CPU, m) {
  m.impl("linear_cross_entropy_softmax_rows", &softmax_rows);
  m.impl("linear_cross_entropy_mean_rows", &mean_rows);
  m.impl("linear_cross_entropy_grad_logits", &grad_logits);
  m.impl("linear_cross_entropy_add_rows", &add_rows);
}

}  // namespace fam_ext
