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

// A number that is not negative but for rounding; nan stays nan.
template <typename T>
FAM_HOST_DEVICE T at_least_zero(T x) {
  return x < T(0) ? T(0) : x;
}

// Pairwise form, q = D p: dv/dz_s = p_s (q_s - 2v).
template <typename T>
FAM_HOST_DEVICE T pairwise_logit_grad(T p, T q, T v) {
  return p * (q - (v + v));
}

// Shifted form: |w_s - u|^2 from |w_s|^2, <w_s, u> and |u|^2; dv/dz_s = p_s (|w_s - u|^2 - v). Where both nearly agree, the result is
// rounding, of either sign: take at_least_zero of it.
template <typename T>
FAM_HOST_DEVICE T squared_distance(T squared_a, T dot, T squared_b) {
  return squared_a - (dot + dot) + squared_b;
}

// Shifted form: v from sum_s p~_s |w_s|^2, <w_y, U> and |U|^2. Where all likely rows nearly agree, as those of a vocabulary that were
// never trained, the result is rounding, of either sign: take at_least_zero of it.
template <typename T>
FAM_HOST_DEVICE T shifted_trace(T weighted_squares, T dot, T squared_shift) {
  return weighted_squares - (dot + dot) - squared_shift;
}

// c_i of a class index before the reduction, from the index's class weight and the sum of all.
FAM_HOST_DEVICE double index_coefficient(double smoothing, double omega, double omega_sum, double classes) {
  return (1 - smoothing) * omega + smoothing / classes * omega_sum;
}

// A sum whose rounding errors are summed too: shares of a distribution are often all equal, and then round the same way every time.
template <typename T>
class CompensatedSumOf {
 public:
  FAM_HOST_DEVICE void add(const T& x) {
    const T minus = T(0) - x, next = sum_ - minus;
    error_ = error_ + difference_error(sum_, minus, next);
    sum_ = next;
  }
  FAM_HOST_DEVICE T total() const { return sum_ + error_; }

 private:
  T sum_{0}, error_{0};
};

}  // namespace fam_ext
