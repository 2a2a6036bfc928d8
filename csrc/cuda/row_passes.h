// Many classes, or the shifted form: the row kernels between the library's matrix products. All matrices are row-major and dense, in
// the type of accumulation; `n` counts the rows of one block of rows, `first` is the first of them.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/head.h"
#include "cuda/view.h"

namespace fam_ext::gpu {

// What is known of one row after its softmax.
template <typename T>
struct RowFacts {
  T max, py, r, log_total;  // as RowStats of csrc/cpu/softmax_tile.h
  T weighted;               // sum_s p~_s |w_s|^2
  T gap, others;            // loss up to c log_total; sum of the targets of all classes but y
  T coefficient, hard;
  T v, squared_shift, squared_mean;
  int64_t index;
};

template <typename T>
struct RowPass {
  RowView logits, grad_logits;  // (rows, O)
  int64_t rows = 0, first = 0, n = 0, classes = 0, fan_in = 0;
  bool pairwise = false;                            // p holds p itself, else p~
  bool have_shifts = false;                         // `shift` is U, else U + r w_y
  bool products = false;                            // the gradient of v reaches the logits
  const T* weight = nullptr;                        // (O, I), less its mean row
  const T* squares = nullptr;                       // (O): |w_s|^2
  T* p = nullptr;                                   // (n, O)
  T* q = nullptr;                                   // (n, O): D p, or <w_s, u>; becomes g p in the pairwise form
  T *shift = nullptr, *mean = nullptr;              // (n, I): U, and u = w_y + U, which becomes g u
  RowFacts<T>* facts = nullptr;                     // (n)
  T* factors = nullptr;                             // (n): g, the gradient that reaches v
  int* likely = nullptr;                            // (n): y, the most likely class
  T* values = nullptr;                              // (rows)
  const T* upstream = nullptr;                      // (rows)
  T *row_loss = nullptr, *row_curvature = nullptr;  // (rows), of a head
};

// Softmax of every row into p, relative to its most likely class; p_y is 0, or with U at hand -r, in the shifted form.
template <typename T, bool kHead>
cudaError_t launch_softmax_rows(const RowPass<T>& pass, const Head<T>& head, cudaStream_t stream);
// v, from q in the pairwise form, from the shifts in the other, which also gives U and u; what a head makes of it.
template <typename T, bool kHead>
cudaError_t launch_row_values(const RowPass<T>& pass, const Head<T>& head, cudaStream_t stream);
// The gradient of the logits; `p` and `mean`, or `q`, are made ready for the product that gives the weight's gradient.
template <typename T, bool kHead>
cudaError_t launch_row_gradients(const RowPass<T>& pass, const Head<T>& head, bool grad_weight, cudaStream_t stream);

// D_st = |w_s - w_t|^2 from differences: a warp for a few pairs where classes are few, else a block for 64 x 64 pairs.
template <typename T>
cudaError_t launch_class_distances(const T* weight, int64_t classes, int64_t fan_in, T* distances, cudaStream_t stream);
// sums_s += sum_n g_n p~_ns, and t_s += sum_{n: y_n = s} g_n U_n, every sum in the order of the rows.
template <typename T>
cudaError_t launch_column_sums(const RowPass<T>& pass, T* sums, T* t, cudaStream_t stream);

// The targets' class weights, before the rows, and the totals, after them.
template <typename T>
cudaError_t launch_head_prepare(const Head<T>& head, int64_t rows, int64_t classes, cudaStream_t stream);
template <typename T>
cudaError_t launch_head_totals(const Head<T>& head, const RowPass<T>& pass, cudaStream_t stream);

}  // namespace fam_ext::gpu
