// Cross-entropy of rows of logits in all of torch's variants, with the curvature term of a linear head on top: the Policy of
// head_cross_entropy for trace_rows.h.
//
// Row i has targets q_s = h [s = t] + f_s: a hard share h and a soft share f (label smoothing, or a distribution), both with class
// weights and the reduction multiplied in. Then loss_i = sum_s q_s (lse - z_s), dloss/dz_s = c p_s - q_s with c = sum_s q_s, and the
// Hessian is c (diag(p) - p p^T): c is also the row's coefficient in kappa = sum_i c_i |phi_i|^2 v_i.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>

#include <optional>
#include <vector>

#include "cpu/softmax_tile.h"

namespace fam_ext {

struct CrossEntropyOptions {
  const char* caller;       // for messages
  at::Tensor target;        // (N) int64 in row order, or probabilities like the logits
  at::Tensor class_weight;  // (O) contiguous in the accumulation dtype, or undefined
  int64_t ignore_index;
  double label_smoothing;
  bool mean;
  double strength;
  bool curvature_grad;
};

template <typename T>
class CrossEntropyRows {
 public:
  CrossEntropyRows(const CrossEntropyOptions& options, int64_t rows, int64_t classes, const Rows<T>* features,
                   const Rows<T>* grad_features)
      : options_(options),
        classes_(classes),
        features_(features),
        grad_features_(grad_features),
        omega_(options.class_weight.defined() ? options.class_weight.template const_data_ptr<T>() : nullptr),
        share_(static_cast<T>(options.label_smoothing / static_cast<double>(classes))),
        hard_(rows),
        coefficient_(rows),
        loss_(rows),
        curvature_(rows),
        upstream_(rows) {
    if (options.target.is_floating_point()) {
      soft_.emplace(options.target, 1);
      empty_mean_ = options.mean && rows == 0;
      scale_ = options.mean && rows != 0 ? static_cast<T>(1.0 / static_cast<double>(rows)) : T(1);
      std::fill(coefficient_.begin(), coefficient_.end(), T(1));  // the sum of the targets, known at before_exp
    } else {
      indices_ = options.target.template const_data_ptr<int64_t>();
      read_indices();
    }
  }

  void begin(int64_t first, int64_t lanes, T* z, int64_t ld) {
    for (int64_t lane = 0; lane < lanes; ++lane) {
      if (coefficient_[first + lane] != T(0)) continue;
      for (int64_t s = 0; s < classes_; ++s) z[s * ld + lane] = T(0);  // an ignored row may hold anything
    }
  }

  void before_exp(int64_t first, int64_t lanes, const T* z, int64_t ld, const RowStats<T>& stats) {
    const LaneArray<T> max(stats.max);
    LongSum<T> gap;
    CompensatedSum<T> total;
    for_each_soft_target(first, lanes, [&](int64_t s, const Vec<T>& f) {
      gap.add_product(f, stats.max - Vec<T>::loadu(z + s * ld));
      total.add(f);
    });
    const LaneArray<T> soft_gap(gap.total()), soft_total(total.total());
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const int64_t n = first + lane;
      loss_[n] = soft_gap[lane];
      if (soft_) {
        coefficient_[n] = soft_total[lane];
      } else if (coefficient_[n] != T(0)) {
        loss_[n] += hard_[n] * (max[lane] - z[index(n) * ld + lane]);
      }
    }
  }

  void value(int64_t first, int64_t lanes, const Vec<T>& v, const RowStats<T>& stats) {
    const LaneArray<T> traces(v), log_totals(stats.log_total);
    const T strength = static_cast<T>(options_.strength);
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const int64_t n = first + lane;
      const T c = coefficient_[n];
      loss_[n] += c * log_totals[lane];
      const T scaled = c == T(0) ? T(0) : c * features_->row_squared_norm(n);
      curvature_[n] = c == T(0) ? T(0) : scaled * traces[lane];
      upstream_[n] = strength * scaled;
      if (grad_features_ != nullptr)
        features_->scale_row(n, c == T(0) ? T(0) : 2 * strength * c * traces[lane], *grad_features_);
    }
  }

  Vec<T> upstream(int64_t first, int64_t lanes) const {
    return detail::load_as<T, T>(upstream_.data() + first, 1, lanes);
  }
  int64_t row_cost() const { return features_->layout.width * (grad_features_ == nullptr ? 1 : 2); }
  bool through_curvature() const { return options_.curvature_grad; }

  // dz_s += c p_s - q_s; at y as (c - q_y) - c r, since p_y may be 1 to the last digit
  void add_loss_grad(int64_t first, int64_t lanes, const T* p, int64_t ld, const RowStats<T>& stats, T* dz,
                     int64_t dz_ld) const {
    const Vec<T> c = detail::load_as<T, T>(coefficient_.data() + first, 1, lanes), zero(0), minus_r = zero - stats.r;
    for (int64_t s = 0; s < classes_; ++s) {
      const Vec<T> p_tilde = Vec<T>::blendv(Vec<T>::loadu(p + s * ld), minus_r, stats.y == Vec<T>(static_cast<T>(s)));
      at::vec::fmadd(c, p_tilde, Vec<T>::loadu(dz + s * dz_ld)).store(dz + s * dz_ld);
    }
    CompensatedSum<T> others;  // sum of the soft targets of all classes but y
    for_each_soft_target(first, lanes, [&](int64_t s, const Vec<T>& f) {
      const Vec<T> rest = Vec<T>::blendv(f, zero, stats.y == Vec<T>(static_cast<T>(s)));
      others.add(rest);
      (Vec<T>::loadu(dz + s * dz_ld) - rest).store(dz + s * dz_ld);
    });
    const LaneArray<T> y(stats.y), soft_others(others.total());
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const int64_t n = first + lane, best = static_cast<int64_t>(y[lane]);
      T at_best = soft_others[lane];
      if (!soft_ && coefficient_[n] != T(0) && index(n) != best) {
        dz[index(n) * dz_ld + lane] -= hard_[n];
        at_best += hard_[n];
      }
      dz[best * dz_ld + lane] += at_best;
    }
  }

  double loss() const {
    // torch's mean over no valid row is 0/0
    return sum(loss_) + (empty_mean_ ? std::numeric_limits<double>::quiet_NaN() : 0.0);
  }
  double flatness() const { return sum(curvature_); }

 private:
  int64_t index(int64_t n) const { return indices_[n]; }

  static double sum(const std::vector<T>& values) {
    double result = 0;
    for (const T x : values) result += x;
    return result;
  }

  // Checks every index, and sets the hard share and the coefficient of every row.
  void read_indices() {
    const double smoothing = options_.label_smoothing;
    double omega_sum = static_cast<double>(classes_), denominator = 0;
    if (omega_ != nullptr) {
      omega_sum = 0;
      for (int64_t s = 0; s < classes_; ++s) omega_sum += omega_[s];
    }
    const int64_t rows = static_cast<int64_t>(hard_.size());
    for (int64_t n = 0; n < rows; ++n) {
      const int64_t t = index(n);
      if (t == options_.ignore_index) continue;
      TORCH_CHECK_INDEX(t >= 0 && t < classes_, options_.caller, ": target must be a class index from 0 to ",
                        classes_ - 1, " or ignore_index (", options_.ignore_index, "), got ", t);
      hard_[n] = omega_ == nullptr ? T(1) : omega_[t];
      coefficient_[n] =
          static_cast<T>(index_coefficient(smoothing, hard_[n], omega_sum, static_cast<double>(classes_)));
      denominator += hard_[n];
    }
    empty_mean_ = options_.mean && denominator == 0;
    // class weights that sum to 0 divide by 0, as torch's mean does; ignored rows stay at 0
    scale_ = options_.mean ? static_cast<T>(1 / denominator) : T(1);
    for (int64_t n = 0; n < rows; ++n) {
      if (index(n) == options_.ignore_index) continue;
      hard_[n] *= static_cast<T>(1 - smoothing) * scale_;
      coefficient_[n] *= scale_;
    }
  }

  // f(s, soft share of class s in every lane); nothing where targets are indices without smoothing
  template <typename F>
  void for_each_soft_target(int64_t first, int64_t lanes, const F& f) const {
    if (soft_) {
      constexpr int64_t L = Vec<T>::size();
      std::vector<Vec<T>> tile(classes_);
      T* q = reinterpret_cast<T*>(tile.data());
      soft_->load_tile(first, lanes, q, L);
      const T keep = static_cast<T>(1 - options_.label_smoothing);
      for (int64_t s = 0; s < classes_; ++s) {
        const T factor = omega_ == nullptr ? scale_ : scale_ * omega_[s];
        f(s, (Vec<T>::loadu(q + s * L) * Vec<T>(keep) + Vec<T>(share_)) * Vec<T>(factor));
      }
    } else if (share_ != T(0)) {
      __at_align__ T valid[Vec<T>::size()] = {};
      for (int64_t lane = 0; lane < lanes; ++lane) {
        if (coefficient_[first + lane] != T(0)) valid[lane] = share_ * scale_;
      }
      const Vec<T> row_share = Vec<T>::loadu(valid);
      for (int64_t s = 0; s < classes_; ++s) f(s, omega_ == nullptr ? row_share : row_share * Vec<T>(omega_[s]));
    }
  }

  const CrossEntropyOptions& options_;
  int64_t classes_;
  const Rows<T>* features_;
  const Rows<T>* grad_features_;
  const T* omega_;
  const int64_t* indices_ = nullptr;
  T share_;      // label_smoothing / O
  T scale_ = 1;  // of the reduction
  bool empty_mean_ = false;
  std::optional<Rows<T>> soft_;
  std::vector<T> hard_, coefficient_, loss_, curvature_, upstream_;  // per row
};

}  // namespace fam_ext
