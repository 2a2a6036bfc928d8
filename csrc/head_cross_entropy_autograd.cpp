// Autograd of head_cross_entropy. The forward operation has made the gradients already, so dispatch is all that backward costs;
// it lives in C++ because at these sizes a Python autograd function would cost more than the operation.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <tuple>

#include "made_gradients.h"

namespace fam_ext {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> call_forward(
    const Tensor& logits, const Tensor& features, const Tensor& weight, const Tensor& target,
    const std::optional<Tensor>& class_weight, int64_t ignore_index, double label_smoothing, bool mean, double strength,
    bool curvature_grad, bool pairwise, bool grad_logits, bool grad_features, bool grad_weight) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fam_ext::head_cross_entropy_forward", "")
                             .typed<decltype(call_forward)>();
  return op.call(logits, features, weight, target, class_weight, ignore_index, label_smoothing, mean, strength,
                 curvature_grad, pairwise, grad_logits, grad_features, grad_weight);
}

struct HeadCrossEntropy : torch::autograd::Function<HeadCrossEntropy> {
  static variable_list forward(AutogradContext* ctx, const Tensor& logits, const Tensor& features, const Tensor& weight,
                               const Tensor& target, const std::optional<Tensor>& class_weight, int64_t ignore_index,
                               double label_smoothing, bool mean, double strength, bool curvature_grad, bool pairwise) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const bool needed[3] = {logits.requires_grad(), features.requires_grad() && curvature_grad, weight.requires_grad()};
    auto [loss, flatness, dz, dphi, dw] =
        call_forward(logits, features, weight, target, class_weight, ignore_index, label_smoothing, mean, strength,
                     curvature_grad, pairwise, needed[0], needed[1], needed[2]);
    const Tensor grads[3] = {dz, dphi, dw};
    variable_list saved;
    for (int k = 0; k < 3; ++k) saved.push_back(needed[k] ? grads[k] : Tensor());
    ctx->save_for_backward(saved);
    if (const int64_t float16 = float16_inputs({&logits, &features, &weight})) ctx->saved_data["float16"] = float16;
    ctx->mark_non_differentiable({flatness});
    ctx->set_materialize_grads(false);
    return {loss, flatness};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    variable_list grads(11);
    if (!upstream[0].defined()) return grads;
    const auto float16 = ctx->saved_data.find("float16");
    hand_out(ctx->get_saved_variables(), upstream[0], float16 == ctx->saved_data.end() ? 0 : float16->second.toInt(),
             "head_cross_entropy", grads);
    return grads;
  }
};

std::tuple<Tensor, Tensor> values_only(const Tensor& logits, const Tensor& features, const Tensor& weight,
                                       const Tensor& target, const std::optional<Tensor>& class_weight,
                                       int64_t ignore_index, double label_smoothing, bool mean, double strength,
                                       bool curvature_grad, bool pairwise) {
  auto result = call_forward(logits, features, weight, target, class_weight, ignore_index, label_smoothing, mean,
                             strength, curvature_grad, pairwise, false, false, false);
  return {std::get<0>(result), std::get<1>(result)};
}

std::tuple<Tensor, Tensor> differentiable(const Tensor& logits, const Tensor& features, const Tensor& weight,
                                          const Tensor& target, const std::optional<Tensor>& class_weight,
                                          int64_t ignore_index, double label_smoothing, bool mean, double strength,
                                          bool curvature_grad, bool pairwise) {
  if (!at::GradMode::is_enabled()) {  // inside the function above it always is off
    const at::AutoDispatchBelowADInplaceOrView guard;
    return values_only(logits, features, weight, target, class_weight, ignore_index, label_smoothing, mean, strength,
                       curvature_grad, pairwise);
  }
  const variable_list result = HeadCrossEntropy::apply(logits, features, weight, target, class_weight, ignore_index,
                                                       label_smoothing, mean, strength, curvature_grad, pairwise);
  return {result[0], result[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(fam_ext, Autograd, m) { m.impl("head_cross_entropy", &differentiable); }
TORCH_LIBRARY_IMPL(fam_ext, CompositeExplicitAutograd, m) { m.impl("head_cross_entropy", &values_only); }

}  // namespace fam_ext
