// Formulas of relative flatness for softmax rows, shared by every kernel. T is a number or a SIMD vector of numbers.
// Letters as in docs/design.md: p softmax, w_s weight rows, D_st = |w_s - w_t|^2, v = Tr Cov_p(w).
#pragma once

#if defined(__CUDACC__) || defined(__HIPCC__)
#define FAM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FAM_HOST_DEVICE inline
#endif

namespace fam_ext {

// Rounding error of d = a - b (Knuth's TwoSum): a - b = d + difference_error(a, b, d) exactly, for finite d.
// |z_s - z_y| is about 20 where max p = 1 - 1e-8, and half a unit in the last place of 20 is 1e-6 of exp(z_s - z_y).
template <typename T>
FAM_HOST_DEVICE T difference_error(T a, T b, T d) {
  const T bb = a - d;
  return (a - (d + bb)) - (b - bb);
}

// Pairwise form, q = D p: dv/dz_s = p_s (q_s - 2v).
template <typename T>
FAM_HOST_DEVICE T pairwise_logit_grad(T p, T q, T v) {
  return p * (q - (v + v));
}

// Shifted form: |w_s - u|^2 from |w_s|^2, <w_s, u> and |u|^2; dv/dz_s = p_s (|w_s - u|^2 - v).
template <typename T>
FAM_HOST_DEVICE T squared_distance(T squared_a, T dot, T squared_b) {
  return squared_a - (dot + dot) + squared_b;
}

}  // namespace fam_ext
