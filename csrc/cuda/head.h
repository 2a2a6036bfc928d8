// Arguments of the kernels that make cross-entropy out of rows of logits, beside the trace. Plain numbers, for kernels and binding.
#pragma once

#include "cuda/view.h"

namespace fam_ext::gpu {

constexpr int kPartials = 1024;  // most blocks that share a sum over rows

// As in csrc/cpu/cross_entropy_rows.h: row i has targets q_s = hard [s = t] + f_s, and coefficient c = sum_s q_s.
template <typename T>
struct Head {
  RowView features, grad_features;   // (rows, I)
  RowView soft;                      // (rows, O) probabilities in T, or no data: targets are `indices`
  const int64_t* indices = nullptr;  // (rows)
  const T* omega = nullptr;          // (O) class weights, or null
  int64_t ignore_index = 0;
  double smoothing = 0, strength = 0;
  bool mean = false, curvature_grad = false;
  double* denominators = nullptr;  // (kPartials + 1): sums of omega over the targets by share; then sum_s omega_s
  int shares = 1;
  T *loss = nullptr, *flatness = nullptr;  // one number each
};

}  // namespace fam_ext::gpu
