// The two ways through rows of logits, for softmax_trace and head_cross_entropy alike: few classes in one kernel, or blocks of rows
// between the library's matrix products.
#pragma once

#include <ATen/ops/add.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "cuda/binding.h"
#include "cuda/row_passes.h"
#include "cuda/small_trace.h"

namespace fam_ext::gpu {

constexpr int64_t kBlockEntries = int64_t{1} << 25;  // logits per block of rows

// What an operation wants of its rows.
template <typename T, bool kHead>
struct Rows {
  RowView logits, grad_logits;
  Head<T> head;                 // of head_cross_entropy
  T* values = nullptr;          // of softmax_trace
  const T* upstream = nullptr;  // of its backward
  bool through_curvature = true, grad_weight = false;

  bool grads() const { return grad_weight || grad_logits.data != nullptr; }
};

// Few classes, pairwise. `distances` (O, O) is read when `have_distances`, else written. The gradient of the weight, if wanted.
template <typename T, bool kHead>
at::Tensor small_rows(const Rows<T, kHead>& rows, const at::Tensor& w, const at::Tensor& distances, bool have_distances,
                      cudaStream_t stream) {
  SmallTrace<T> pass;
  pass.logits = rows.logits, pass.grad_logits = rows.grad_logits;
  pass.weight = w.const_data_ptr<T>();
  pass.classes = static_cast<int>(w.size(0));
  pass.fan_in = w.size(1), pass.rows = rows.logits.rows;
  pass.distances = have_distances ? const_cast<T*>(distances.const_data_ptr<T>()) : distances.mutable_data_ptr<T>();
  pass.values = rows.values, pass.upstream = rows.upstream;
  pass.have_distances = have_distances;
  choose_tiles(pass);
  const int64_t pairs = w.size(0) * (w.size(0) - 1) / 2;
  at::Tensor partial_pairs, total_pairs, grad, partial_sums;
  if (rows.grad_weight) {
    partial_pairs = at::empty({pass.shares, std::max<int64_t>(pairs, 1)}, w.options());
    total_pairs = at::empty({std::max<int64_t>(pairs, 1)}, w.options());
    grad = at::empty_like(w);
    pass.partial_pairs = partial_pairs.mutable_data_ptr<T>();
    pass.pairs = total_pairs.mutable_data_ptr<T>();
    pass.grad_weight = grad.mutable_data_ptr<T>();
  }
  if constexpr (kHead) {
    partial_sums = at::empty({2, pass.shares}, w.options().dtype(at::kDouble));
    pass.partial_sums = partial_sums.mutable_data_ptr<double>();
    Head<T> head = rows.head;
    head.shares = pass.prepare_inside ? 1 : pass.shares;
    check_launch(launch_small_head<T>(pass, head, stream));
  } else {
    check_launch(launch_small_trace<T>(pass, stream));
  }
  return grad;
}

// 2 (diag(M 1) - M) W, M symmetric, its diagonal ignored; M is overwritten.
inline at::Tensor laplacian(at::Tensor& m, const at::Tensor& centered) {
  m.fill_diagonal_(0);
  const at::Tensor degrees = m.sum(1);
  m.mul_(-2).diagonal().add_(degrees, 2);
  return at::mm(m, centered);
}

// Any number of classes, either form. `saved`: D (O, O) in the pairwise form; in the other U (N, I), or undefined, read when
// `have_shifts`, else written.
template <typename T, bool kHead>
at::Tensor block_rows(const Rows<T, kHead>& rows, const at::Tensor& w, const at::Tensor& saved, bool pairwise,
                      bool have_shifts, cudaStream_t stream) {
  const int64_t classes = w.size(0), fan_in = w.size(1), count = rows.logits.rows;
  const int64_t step = std::min(count, std::max<int64_t>(256, kBlockEntries / classes));
  // v does not change without the mean row, and a common offset would cost digits
  const at::Tensor centered = pairwise && !rows.grad_weight ? w : w - w.mean(0);
  RowPass<T> pass;
  pass.logits = rows.logits, pass.grad_logits = rows.grad_logits;
  pass.rows = count, pass.classes = classes, pass.fan_in = fan_in;
  pass.pairwise = pairwise, pass.have_shifts = have_shifts;
  pass.products = rows.grad_logits.data != nullptr && rows.through_curvature;
  pass.weight = centered.const_data_ptr<T>();
  pass.values = rows.values, pass.upstream = rows.upstream;

  const auto options = w.options();
  const at::Tensor facts = at::empty({step * static_cast<int64_t>(sizeof(RowFacts<T>))}, options.dtype(at::kByte));
  const at::Tensor factors = at::empty({step}, options), likely = at::empty({step}, options.dtype(at::kInt));
  at::Tensor p = at::empty({step, classes}, options), q, squares, shifts, means, per_row, m, sums;
  if (pairwise || pass.products) q = at::empty({step, classes}, options);
  if (!pairwise) {
    squares = centered.square().sum(1);
    shifts = saved.defined() ? saved : at::empty({step, fan_in}, options);
    if (rows.grads()) means = at::empty({step, fan_in}, options);
    pass.squares = squares.const_data_ptr<T>();
    pass.mean = means.defined() ? means.mutable_data_ptr<T>() : nullptr;
  }
  if constexpr (kHead) {
    per_row = at::empty({2, count}, options);
    pass.row_loss = per_row.mutable_data_ptr<T>();
    pass.row_curvature = pass.row_loss + count;
  }
  if (rows.grad_weight) m = at::zeros({classes, pairwise ? classes : fan_in}, options);
  if (rows.grad_weight && !pairwise) sums = at::zeros({classes}, options);
  pass.facts = static_cast<RowFacts<T>*>(facts.mutable_data_ptr());
  pass.factors = factors.mutable_data_ptr<T>();
  pass.likely = likely.mutable_data_ptr<int>();
  pass.p = p.mutable_data_ptr<T>();
  pass.q = q.defined() ? q.mutable_data_ptr<T>() : nullptr;

  for (pass.first = 0; pass.first < count; pass.first += step) {
    pass.n = std::min(step, count - pass.first);
    const at::Tensor p_rows = p.narrow(0, 0, pass.n);
    at::Tensor q_rows = q.defined() ? q.narrow(0, 0, pass.n) : q, shift_rows;
    if (!pairwise) {
      shift_rows = shifts.narrow(0, saved.defined() ? pass.first : 0, pass.n);
      pass.shift = const_cast<T*>(shift_rows.const_data_ptr<T>());
    }
    check_launch(launch_softmax_rows<T, kHead>(pass, rows.head, stream));
    if (pairwise) {
      at::mm_out(q_rows, p_rows, saved);
    } else if (!have_shifts) {
      at::mm_out(shift_rows, p_rows, centered);
    }
    check_launch(launch_row_values<T, kHead>(pass, rows.head, stream));
    if (!rows.grads()) continue;
    if (!pairwise && pass.products) at::mm_out(q_rows, means.narrow(0, 0, pass.n), centered.t());
    check_launch(launch_row_gradients<T, kHead>(pass, rows.head, rows.grad_weight, stream));
    if (!rows.grad_weight) continue;
    if (pairwise) {
      m.addmm_(q_rows.t(), p_rows);
    } else {
      m.addmm_(p_rows.t(), means.narrow(0, 0, pass.n));
      check_launch(launch_column_sums<T>(pass, sums.mutable_data_ptr<T>(), m.mutable_data_ptr<T>(), stream));
    }
  }
  if constexpr (kHead) check_launch(launch_head_totals<T>(rows.head, pass, stream));
  if (!rows.grad_weight) return {};
  if (pairwise) return laplacian(m, centered);
  return (centered * sums.unsqueeze(1)).sub_(m).mul_(2);
}

// The way that fits. `saved` as above, also for few classes.
template <typename T, bool kHead>
at::Tensor run_rows(const Rows<T, kHead>& rows, const at::Tensor& w, const at::Tensor& saved, bool pairwise,
                    bool have_saved, cudaStream_t stream) {
  if (pairwise && w.size(0) <= kSmallClasses) return small_rows(rows, w, saved, have_saved, stream);
  if (pairwise && !have_saved) {
    check_launch(launch_class_distances<T>(w.const_data_ptr<T>(), w.size(0), w.size(1),
                                           saved.template mutable_data_ptr<T>(), stream));
  }
  if constexpr (kHead) check_launch(launch_head_prepare<T>(rows.head, rows.logits.rows, w.size(0), stream));
  return block_rows(rows, w, saved, pairwise, !pairwise && have_saved, stream);
}

}  // namespace fam_ext::gpu
