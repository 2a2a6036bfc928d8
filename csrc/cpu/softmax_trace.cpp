#include <ATen/Dispatch.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <tuple>

#include "cpu/trace_shifted.h"
#include "shape_checks.h"

namespace fam_ext {
namespace {

// Policy of trace_rows.h: nothing but v, with a given upstream gradient.
template <typename T>
struct TraceOnly {
  T* values = nullptr;           // (N), written
  const T* gradients = nullptr;  // (N), or null: no gradient is wanted

  void begin(int64_t, int64_t, T*, int64_t) {}
  void before_exp(int64_t, int64_t, const T*, int64_t, const RowStats<T>&) {}
  void value(int64_t first, int64_t lanes, const Vec<T>& v, const RowStats<T>&) {
    if (values != nullptr) v.store(values + first, static_cast<int>(lanes));
  }
  Vec<T> upstream(int64_t first, int64_t lanes) const {
    return gradients == nullptr ? Vec<T>(0) : detail::load_as<T, T>(gradients + first, 1, lanes);
  }
  int64_t row_cost() const { return 1; }
  bool through_curvature() const { return true; }
  void add_loss_grad(int64_t, int64_t, const T*, int64_t, const RowStats<T>&, T*, int64_t) const {}
};

at::ScalarType accumulation_type(const at::Tensor& logits, const at::Tensor& weight) {
  return logits.scalar_type() == at::kDouble || weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

std::tuple<at::Tensor, at::Tensor> softmax_trace(const at::Tensor& logits, const at::Tensor& weight,
                                                 bool pairwise_form) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  check_logits("softmax_trace", logits, weight);
  const at::ScalarType acc = accumulation_type(logits, weight);
  const at::Tensor w = weight.to(acc).contiguous();
  std::vector<int64_t> shape = logits.sizes().vec();
  shape.erase(shape.begin() + 1);
  at::Tensor values = at::empty(shape, logits.options().dtype(acc).memory_format(std::nullopt));
  at::Tensor saved;
  AT_DISPATCH_FLOATING_TYPES(acc, "softmax_trace", [&] {
    const Rows<scalar_t> rows(logits, 1);
    TraceOnly<scalar_t> policy{values.mutable_data_ptr<scalar_t>()};
    if (pairwise_form) {
      saved = class_distances(w);
      pairwise_rows<scalar_t>(rows, saved, policy, nullptr, false);
    } else {
      saved = at::empty({rows.layout.rows, w.size(1)}, w.options());
      shifted_blocks<scalar_t>(rows, w, saved, false, policy, nullptr, false);
    }
  });
  return {values, saved};
}

std::tuple<at::Tensor, at::Tensor> softmax_trace_backward(const at::Tensor& grad, const at::Tensor& logits,
                                                          const at::Tensor& weight, const at::Tensor& saved,
                                                          bool pairwise_form, bool grad_logits, bool grad_weight) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const at::ScalarType acc = accumulation_type(logits, weight);
  check_trace_backward(grad, logits, weight, saved, pairwise_form, acc);
  const at::Tensor w = weight.to(acc).contiguous(), upstream = grad.to(acc).contiguous();
  at::Tensor dz = grad_logits ? at::empty_like(logits) : at::empty({0}, logits.options());
  at::Tensor dw = at::empty({0}, weight.options());
  AT_DISPATCH_FLOATING_TYPES(acc, "softmax_trace_backward", [&] {
    const Rows<scalar_t> rows(logits, 1), grad_rows(dz, grad_logits ? 1 : 0);
    const Rows<scalar_t>* grad_target = grad_logits ? &grad_rows : nullptr;
    TraceOnly<scalar_t> policy{nullptr, upstream.const_data_ptr<scalar_t>()};
    at::Tensor result;
    if (pairwise_form) {
      at::Tensor m = pairwise_rows(rows, saved, policy, grad_target, grad_weight);
      if (grad_weight) result = laplacian_product(m, w, saved);
    } else {
      result = shifted_blocks<scalar_t>(rows, w, saved, true, policy, grad_target, grad_weight);
    }
    if (grad_weight) dw = result.to(weight.scalar_type());
  });
  return {dz, dw};
}

}  // namespace

TORCH_LIBRARY_IMPL(fam_ext, CPU, m) {
  m.impl("softmax_trace", &softmax_trace);
  m.impl("softmax_trace_backward", &softmax_trace_backward);
}

}  // namespace fam_ext
