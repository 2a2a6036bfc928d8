#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "cuda/binding_rows.h"
#include "shape_checks.h"

namespace fam_ext::gpu {
namespace {

at::ScalarType accumulation_type(const at::Tensor& logits, const at::Tensor& weight) {
  return logits.scalar_type() == at::kDouble || weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

std::tuple<at::Tensor, at::Tensor> softmax_trace(const at::Tensor& logits, const at::Tensor& weight, bool pairwise) {
  check_logits("softmax_trace", logits, weight);
  const Scope scope(logits);
  const at::ScalarType acc = accumulation_type(logits, weight);
  const at::Tensor w = weight.to(acc).contiguous();
  std::vector<int64_t> shape = logits.sizes().vec();
  shape.erase(shape.begin() + 1);
  at::Tensor values = at::empty(shape, logits.options().dtype(acc).memory_format(std::nullopt));
  at::Tensor saved = at::empty({pairwise ? w.size(0) : values.numel(), pairwise ? w.size(0) : w.size(1)}, w.options());
  AT_DISPATCH_FLOATING_TYPES(acc, "softmax_trace", [&] {
    at::Tensor keep;
    Rows<scalar_t, false> rows;
    rows.logits = input_view(logits, 1, keep);
    rows.values = values.mutable_data_ptr<scalar_t>();
    run_rows(rows, w, saved, pairwise, false, scope.stream());
  });
  return {values, saved};
}

std::tuple<at::Tensor, at::Tensor> softmax_trace_backward(const at::Tensor& grad, const at::Tensor& logits,
                                                          const at::Tensor& weight, const at::Tensor& saved,
                                                          bool pairwise, bool grad_logits, bool grad_weight) {
  const Scope scope(logits);
  const at::ScalarType acc = accumulation_type(logits, weight);
  check_trace_backward(grad, logits, weight, saved, pairwise, acc);
  const at::Tensor w = weight.to(acc).contiguous(), upstream = grad.to(acc).contiguous();
  at::Tensor dz = empty_if(logits, grad_logits), dw = at::empty({0}, weight.options());
  AT_DISPATCH_FLOATING_TYPES(acc, "softmax_trace_backward", [&] {
    at::Tensor keep;
    OutputView dz_view(dz, 1, grad_logits);
    Rows<scalar_t, false> rows;
    rows.logits = input_view(logits, 1, keep);
    rows.grad_logits = dz_view.view;
    rows.upstream = upstream.const_data_ptr<scalar_t>();
    rows.grad_weight = grad_weight;
    const at::Tensor result = run_rows(rows, w, saved, pairwise, true, scope.stream());
    dz_view.finish();
    if (grad_weight) dw = result.to(weight.scalar_type());
  });
  return {dz, dw};
}

}  // namespace

TORCH_LIBRARY_IMPL(FAM_EXT_CUDA_LIBRARY, FAM_EXT_CUDA_KEY, m) {
  m.impl("softmax_trace", &softmax_trace);
  m.impl("softmax_trace_backward", &softmax_trace_backward);
}

}  // namespace fam_ext::gpu
