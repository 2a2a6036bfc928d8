// Targets of cross-entropy on the device: class weights, label smoothing, ignored rows and the reduction.
#pragma once

#include "cuda/device.cuh"
#include "cuda/head.h"

namespace fam_ext::gpu {

// What a row's targets are, all of the reduction's factor multiplied in.
template <typename T>
struct RowTarget {
  int64_t index = -1;  // of the hard share, or -1
  T hard = T(0), coefficient = T(0);
};

// What all rows' targets add up to.
struct TargetSums {
  double valid = 0;  // sum_i omega_{t_i} over the rows that are not ignored
  double omega = 0;  // sum_s omega_s
};

// Share `share` of `shares` of the first sum, in every thread; the block's threads together.
template <typename T>
__device__ double valid_share(const Head<T>& h, int64_t rows, int64_t classes, int share, int shares, double* scratch) {
  double sum = 0;
  if (h.soft.data == nullptr) {
    const int64_t step = static_cast<int64_t>(shares) * blockDim.x;
    for (int64_t n = static_cast<int64_t>(share) * blockDim.x + threadIdx.x; n < rows; n += step) {
      const int64_t t = h.indices[n];
      if (t == h.ignore_index) continue;
      assert(0 <= t && t < classes && "head_cross_entropy: target must be a class index or ignore_index");
      sum += h.omega == nullptr ? 1.0 : static_cast<double>(h.omega[t]);
    }
  }
  return block_sum(sum, scratch);
}

template <typename T>
__device__ double omega_sum(const Head<T>& h, int64_t classes, double* scratch) {
  if (h.omega == nullptr) return static_cast<double>(classes);
  double sum = 0;
#pragma unroll 1
  for (int64_t s = threadIdx.x; s < classes; s += blockDim.x) sum += static_cast<double>(h.omega[s]);
  return block_sum(sum, scratch);
}

// A block's share of the sums, for read_target_sums.
template <typename T>
__device__ void write_target_sums(const Head<T>& h, int64_t rows, int64_t classes, int share, double* scratch) {
  const double valid = valid_share(h, rows, classes, share, h.shares, scratch);
  if (threadIdx.x == 0) h.denominators[share] = valid;
  if (share != 0) return;
  const double omega = omega_sum(h, classes, scratch);
  if (threadIdx.x == 0) h.denominators[kPartials] = omega;
}

// The same numbers in every block and thread.
template <typename T>
__device__ TargetSums read_target_sums(const Head<T>& h, double* scratch) {
  double sum = 0;
#pragma unroll 1
  for (int k = static_cast<int>(threadIdx.x); k < h.shares; k += static_cast<int>(blockDim.x)) sum += h.denominators[k];
  return {block_sum(sum, scratch), h.denominators[kPartials]};
}

// The reduction's factor.
template <typename T>
__device__ __forceinline__ T reduction_scale(const Head<T>& h, int64_t rows, const TargetSums& sums) {
  if (!h.mean) return T(1);
  if (h.soft.data != nullptr) return static_cast<T>(1.0 / static_cast<double>(rows));
  return static_cast<T>(1 / sums.valid);  // class weights that sum to 0 divide by 0, as torch's mean does
}

// For soft targets the coefficient is their sum, not known yet: 1.
template <typename T>
__device__ __forceinline__ RowTarget<T> row_target(const Head<T>& h, int64_t row, int64_t classes, T scale,
                                                   double omega_total) {
  RowTarget<T> result;
  if (h.soft.data != nullptr) {
    result.coefficient = T(1);
    return result;
  }
  const int64_t t = h.indices[row];
  if (t == h.ignore_index) return result;
  assert(0 <= t && t < classes && "head_cross_entropy: target must be a class index or ignore_index");
  const double omega = h.omega == nullptr ? 1.0 : static_cast<double>(h.omega[t]);
  const double c = index_coefficient(h.smoothing, omega, omega_total, static_cast<double>(classes));
  result.coefficient = static_cast<T>(c) * scale;
  if (result.coefficient == T(0)) return result;  // the row does not count
  result.index = t;
  result.hard = static_cast<T>(omega) * (static_cast<T>(1 - h.smoothing) * scale);
  return result;
}

template <typename T>
__device__ __forceinline__ bool has_soft_shares(const Head<T>& h) {
  return h.soft.data != nullptr || h.smoothing != 0;
}

// f_s of one row; `start` is the offset of the row in `soft`
template <typename T>
__device__ __forceinline__ T soft_share(const Head<T>& h, int64_t start, int64_t s, int64_t classes, T scale,
                                        T coefficient) {
  const T share = static_cast<T>(h.smoothing / static_cast<double>(classes));
  const T omega = h.omega == nullptr ? T(1) : h.omega[s];
  if (h.soft.data != nullptr) {
    const T q = static_cast<const T*>(h.soft.data)[start + s * h.soft.width_stride];
    return (q * static_cast<T>(1 - h.smoothing) + share) * (scale * omega);
  }
  return coefficient == T(0) ? T(0) : share * scale * omega;
}

// dloss/dz_s = c p_s - q_s. At y, where p_y may be 1 to the last digit, (c - q_y) - c r: `others` is sum_{s != y} q_s.
template <typename T>
__device__ __forceinline__ T loss_gradient(const RowTarget<T>& target, int64_t s, int64_t y, T p, T r, T others,
                                           T soft) {
  if (s == y) return others - target.coefficient * r;
  return target.coefficient * p - soft - (s == target.index ? target.hard : T(0));
}

// What a row adds to loss and kappa once v is known, and the gradient that reaches v.
template <typename T>
struct RowValue {
  T loss, curvature, upstream, feature_factor;
};
template <typename T>
__device__ __forceinline__ RowValue<T> row_value(const Head<T>& h, T coefficient, T gap, T log_total, T squares, T v) {
  const T strength = static_cast<T>(h.strength);
  RowValue<T> result{gap + coefficient * log_total, T(0), T(0), T(0)};
  if (coefficient == T(0)) return result;
  const T scaled = coefficient * squares;
  result.curvature = scaled * v;
  result.upstream = strength * scaled;
  result.feature_factor = 2 * strength * coefficient * v;
  return result;
}

// Writes loss + strength * kappa and kappa; torch's mean over no valid row is 0/0.
template <typename T>
__device__ __forceinline__ void write_totals(const Head<T>& h, double loss, double kappa, double denominator) {
  const double terms = h.soft.data == nullptr ? denominator : static_cast<double>(h.soft.rows);
  if (h.mean && terms == 0) loss = terms / terms;
  *h.loss = static_cast<T>(loss + h.strength * kappa);
  *h.flatness = static_cast<T>(kappa);
}

}  // namespace fam_ext::gpu
