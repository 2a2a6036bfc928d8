#include "cpu/class_weights.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>

#include <vector>

#include "cpu/tile.h"

namespace fam_ext {
namespace {

constexpr int64_t kBlock = 4;
// below this many classes one pass over W beats the call of a matrix product
constexpr int64_t kDirectClasses = 32;

int64_t row_grain(int64_t fan_in) { return std::max<int64_t>(1, 65536 / std::max<int64_t>(fan_in, 1)); }

// Squared distances between rows s0..s0+3 and t0..t0+3, in registers.
template <typename T>
void distance_block(const T* weight, int64_t classes, int64_t fan_in, int64_t s0, int64_t t0, T* out) {
  constexpr int64_t L = Vec<T>::size();
  const T *rows_s[kBlock], *rows_t[kBlock];
  for (int64_t k = 0; k < kBlock; ++k) {
    rows_s[k] = weight + std::min(s0 + k, classes - 1) * fan_in;
    rows_t[k] = weight + std::min(t0 + k, classes - 1) * fan_in;
  }
  Vec<T> sums[kBlock][kBlock];
  for (auto& row : sums) std::fill_n(row, kBlock, Vec<T>(0));
  const auto add = [&](const auto& load) {
    Vec<T> b[kBlock];
    for (int64_t j = 0; j < kBlock; ++j) b[j] = load(rows_t[j]);
    for (int64_t k = 0; k < kBlock; ++k) {
      const Vec<T> a = load(rows_s[k]);
      for (int64_t j = 0; j < kBlock; ++j) {
        const Vec<T> d = a - b[j];
        sums[k][j] = at::vec::fmadd(d, d, sums[k][j]);
      }
    }
  };
  int64_t i = 0;
  for (; i + L <= fan_in; i += L) add([i](const T* row) { return Vec<T>::loadu(row + i); });
  if (i < fan_in) add([i, fan_in](const T* row) { return detail::load_as<T, T>(row + i, 1, fan_in - i); });
  for (int64_t s = s0; s < std::min(s0 + kBlock, classes); ++s) {
    for (int64_t t = t0; t < std::min(t0 + kBlock, classes); ++t) {
      out[s * classes + t] = out[t * classes + s] = detail::horizontal_sum(sums[s - s0][t - t0]);
    }
  }
}

template <typename T>
T squared_distance_to(const T* row, const T* point, int64_t fan_in) {
  constexpr int64_t L = Vec<T>::size();
  Vec<T> sums[2] = {Vec<T>(0), Vec<T>(0)};
  for (int64_t i = 0; i < fan_in; i += L) {
    const int64_t count = std::min(L, fan_in - i);
    const Vec<T> d = detail::load_as<T, T>(row + i, 1, count) - detail::load_as<T, T>(point + i, 1, count);
    Vec<T>& sum = sums[i / L % 2];
    sum = at::vec::fmadd(d, d, sum);
  }
  return detail::horizontal_sum(sums[0] + sums[1]);
}

// out_s = 2 sum_t M_st (w_s - w_t) over the columns [begin, end)
template <typename T>
void laplacian_columns(const T* m, const T* weight, T* out, int64_t classes, int64_t fan_in, int64_t begin,
                       int64_t end) {
  constexpr int64_t L = Vec<T>::size();
  for (int64_t i = begin; i < end; i += L) {
    const int64_t count = std::min(L, end - i);
    for (int64_t s = 0; s < classes; ++s) {
      const Vec<T> ws = detail::load_as<T, T>(weight + s * fan_in + i, 1, count);
      Vec<T> sum(0);
      for (int64_t t = 0; t < classes; ++t) {
        const Vec<T> d = ws - detail::load_as<T, T>(weight + t * fan_in + i, 1, count);
        sum = at::vec::fmadd(Vec<T>(m[s * classes + t]), d, sum);
      }
      (sum + sum).store(out + s * fan_in + i, static_cast<int>(count));
    }
  }
}

// W less its mean row.
template <typename T>
at::Tensor centered(const at::Tensor& weight, const std::vector<T>& mean) {
  const int64_t classes = weight.size(0), fan_in = weight.size(1);
  at::Tensor result = at::empty_like(weight);
  const T* w = weight.template const_data_ptr<T>();
  T* out = result.template mutable_data_ptr<T>();
  at::parallel_for(0, classes, row_grain(fan_in), [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      for (int64_t i = 0; i < fan_in; ++i) out[s * fan_in + i] = w[s * fan_in + i] - mean[i];
    }
  });
  return result;
}

template <typename T>
std::vector<T> mean_row(const at::Tensor& weight) {
  const int64_t classes = weight.size(0), fan_in = weight.size(1);
  const T* w = weight.template const_data_ptr<T>();
  std::vector<T> mean(fan_in, T(0));
  at::parallel_for(0, fan_in, std::max<int64_t>(64, 65536 / classes), [&](int64_t begin, int64_t end) {
    for (int64_t s = 0; s < classes; ++s) {
      for (int64_t i = begin; i < end; ++i) mean[i] += w[s * fan_in + i];
    }
    for (int64_t i = begin; i < end; ++i) mean[i] /= static_cast<T>(classes);
  });
  return mean;
}

// Sum over classes of |w_s|^2.
template <typename T>
double total_squares(const at::Tensor& squared_norms) {
  const T* squares = squared_norms.template const_data_ptr<T>();
  double total = 0;
  for (int64_t s = 0; s < squared_norms.numel(); ++s) total += squares[s];
  return total;
}

// Whether a common offset carries at least a quarter of the squared norms.
bool offset_matters(double offset_squares, double squares) { return 4 * offset_squares > squares; }

}  // namespace

at::Tensor class_distances(const at::Tensor& weight) {
  const int64_t classes = weight.size(0), fan_in = weight.size(1);
  at::Tensor distances = at::empty({classes, classes}, weight.options());
  AT_DISPATCH_FLOATING_TYPES(weight.scalar_type(), "class_distances", [&] {
    const scalar_t* w = weight.const_data_ptr<scalar_t>();
    scalar_t* out = distances.mutable_data_ptr<scalar_t>();
    const int64_t blocks = (classes + kBlock - 1) / kBlock;
    const int64_t block_cost = kBlock * kBlock * (fan_in + 16);
    // row k of blocks meets blocks k.. : pairing row k with row blocks-1-k makes the shares equal
    at::parallel_for(0, (blocks + 1) / 2, std::max<int64_t>(1, 131072 / (blocks * block_cost)),
                     [&](int64_t begin, int64_t end) {
                       for (int64_t k = begin; k < end; ++k) {
                         const int64_t partner = blocks - 1 - k;
                         for (int64_t t = k; t < blocks; ++t)
                           distance_block(w, classes, fan_in, k * kBlock, t * kBlock, out);
                         for (int64_t t = partner; partner != k && t < blocks; ++t) {
                           distance_block(w, classes, fan_in, partner * kBlock, t * kBlock, out);
                         }
                       }
                     });
  });
  return distances;
}

at::Tensor class_squares(const at::Tensor& weight, const at::Tensor& offset) {
  const int64_t classes = weight.size(0), fan_in = weight.size(1);
  at::Tensor squares = at::empty({classes}, weight.options());
  AT_DISPATCH_FLOATING_TYPES(weight.scalar_type(), "class_squares", [&] {
    const scalar_t* w = weight.const_data_ptr<scalar_t>();
    const scalar_t* m = offset.defined() ? offset.const_data_ptr<scalar_t>() : nullptr;
    scalar_t* out = squares.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, classes, row_grain(fan_in), [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) {
        out[s] = m == nullptr ? detail::squared_norm<scalar_t, scalar_t>(w, s * fan_in, 1, fan_in)
                              : squared_distance_to(w + s * fan_in, m, fan_in);
      }
    });
  });
  return squares;
}

at::Tensor center_if_offset(const at::Tensor& weight, at::Tensor& squares) {
  at::Tensor result = weight;
  AT_DISPATCH_FLOATING_TYPES(weight.scalar_type(), "center_if_offset", [&] {
    const std::vector<scalar_t> mean = mean_row<scalar_t>(weight);
    double offset = 0;
    for (const scalar_t x : mean) offset += static_cast<double>(x) * x;
    if (!offset_matters(offset * weight.size(0), total_squares<scalar_t>(squares))) return;
    result = centered(weight, mean);
    squares = class_squares(result);
  });
  return result;
}

at::Tensor laplacian_product(at::Tensor& m, const at::Tensor& weight, const at::Tensor& distances) {
  const int64_t classes = weight.size(0), fan_in = weight.size(1);
  at::Tensor result;
  AT_DISPATCH_FLOATING_TYPES(weight.scalar_type(), "laplacian_product", [&] {
    scalar_t* coefficients = m.mutable_data_ptr<scalar_t>();
    if (classes <= kDirectClasses) {
      result = at::empty_like(weight);
      const scalar_t* w = weight.const_data_ptr<scalar_t>();
      scalar_t* out = result.mutable_data_ptr<scalar_t>();
      constexpr int64_t L = Vec<scalar_t>::size();
      const int64_t columns = (fan_in + L - 1) / L;
      at::parallel_for(0, columns, std::max<int64_t>(1, 16384 / (classes * classes)), [&](int64_t begin, int64_t end) {
        laplacian_columns(coefficients, w, out, classes, fan_in, begin * L, std::min(end * L, fan_in));
      });
      return;
    }
    double spread = 0;  // sum_st D_st = 2 O sum_s |w_s - mean|^2
    const scalar_t* d = distances.const_data_ptr<scalar_t>();
    for (int64_t s = 0; s < classes; ++s) {
      double degree = 0, row_spread = 0;
      coefficients[s * classes + s] = 0;
      for (int64_t t = 0; t < classes; ++t) {
        degree += coefficients[s * classes + t];
        row_spread += d[s * classes + t];
        coefficients[s * classes + t] *= -2;
      }
      coefficients[s * classes + s] = static_cast<scalar_t>(2 * degree);
      spread += row_spread;
    }
    const double squares = total_squares<scalar_t>(class_squares(weight));
    const bool center = offset_matters(squares - spread / (2.0 * static_cast<double>(classes)), squares);
    result = at::mm(m, center ? centered(weight, mean_row<scalar_t>(weight)) : weight);
  });
  return result;
}

}  // namespace fam_ext
