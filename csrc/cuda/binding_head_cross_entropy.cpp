#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <tuple>

#include "cuda/binding_rows.h"
#include "gradient_dtype.h"
#include "shape_checks.h"

namespace fam_ext::gpu {
namespace {

using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Blocks that share the sum over the targets, apart from the pass for few classes, which has its own number.
int shares_of(int64_t rows) { return static_cast<int>(std::clamp<int64_t>(rows / 4096, 1, 64)); }

// (loss, flatness, d loss/d logits, d loss/d features, d loss/d weight), as csrc/cpu/head_cross_entropy.cpp. A class index out of range
// stops the kernel by an assertion, as torch's nll_loss does: to raise from here the host would have to wait.
Result head_cross_entropy_forward(const at::Tensor& logits, const at::Tensor& features, const at::Tensor& weight,
                                  const at::Tensor& target, const std::optional<at::Tensor>& class_weight,
                                  int64_t ignore_index, double label_smoothing, bool mean, double strength,
                                  bool curvature_grad, bool pairwise, bool grad_logits, bool grad_features,
                                  bool grad_weight) {
  const Scope scope(logits);
  check_head(logits, features, weight, target, class_weight);
  const auto is_double = [](const at::Tensor& t) { return t.scalar_type() == at::kDouble; };
  const at::ScalarType acc = is_double(logits) || is_double(features) || is_double(weight) ? at::kDouble : at::kFloat;
  const at::Tensor w = weight.to(acc).contiguous();
  const at::Tensor omega = class_weight ? class_weight->to(acc).contiguous() : at::Tensor();
  const bool soft = target.is_floating_point();
  const at::Tensor indices = soft ? at::Tensor() : target.contiguous();
  const at::Tensor dz = gradient_of(logits, grad_logits);
  // held constant, the Hessian sends nothing to the features
  const bool feature_rows = grad_features && curvature_grad;
  const at::Tensor dphi = gradient_of(features, grad_features);
  if (!curvature_grad) dphi.zero_();
  const auto scalar_options = logits.options().dtype(acc).memory_format(std::nullopt);
  const at::Tensor loss = at::empty({}, scalar_options), flatness = at::empty({}, scalar_options);
  const at::Tensor denominators = at::empty({kPartials + 1}, w.options().dtype(at::kDouble));
  at::Tensor dw = gradient_of(weight, false);
  AT_DISPATCH_FLOATING_TYPES(acc, "head_cross_entropy", [&] {
    at::Tensor keep_logits, keep_features, keep_target, distances;
    OutputView dz_view(dz, 1, grad_logits), dphi_view(dphi, dphi.dim() - 1, feature_rows);
    Rows<scalar_t, true> rows;
    rows.logits = input_view(logits, 1, keep_logits);
    rows.grad_logits = dz_view.view;
    rows.through_curvature = curvature_grad;
    rows.grad_weight = grad_weight;
    Head<scalar_t>& head = rows.head;
    head.features = input_view(features, features.dim() - 1, keep_features);
    head.grad_features = dphi_view.view;
    if (soft) head.soft = input_view(target.to(acc), 1, keep_target);
    if (!soft) head.indices = indices.const_data_ptr<int64_t>();
    if (omega.defined()) head.omega = omega.const_data_ptr<scalar_t>();
    head.ignore_index = ignore_index, head.smoothing = label_smoothing, head.strength = strength;
    head.mean = mean, head.curvature_grad = curvature_grad;
    head.denominators = denominators.mutable_data_ptr<double>();
    head.shares = shares_of(rows.logits.rows);
    head.loss = loss.mutable_data_ptr<scalar_t>();
    head.flatness = flatness.mutable_data_ptr<scalar_t>();
    if (pairwise) distances = at::empty({w.size(0), w.size(0)}, w.options());
    const at::Tensor result = run_rows(rows, w, distances, pairwise, false, scope.stream());
    dz_view.finish();
    dphi_view.finish();
    if (grad_weight) dw = result.to(gradient_dtype(weight));
  });
  return {loss, flatness, dz, dphi, dw};
}

}  // namespace

TORCH_LIBRARY_IMPL(FAM_EXT_CUDA_LIBRARY, FAM_EXT_CUDA_KEY, m) {
  m.impl("head_cross_entropy_forward", &head_cross_entropy_forward);
}

}  // namespace fam_ext::gpu
