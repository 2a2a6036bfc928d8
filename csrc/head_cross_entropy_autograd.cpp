// Autograd of head_cross_entropy. The forward operation has made the gradients already, so dispatch is all that backward costs;
// it lives in C++ because at these sizes a Python autograd function would cost more than the operation.
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_foreach_mul.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/library.h>

#include <tuple>

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

// The upstream gradient of a training loss is 1 almost always: then the gradients are handed out as they are. On a GPU nobody knows
// without waiting for it.
bool is_one(const Tensor& grad) {
  if (!grad.device().is_cpu() || at::isTensorSubclassLike(grad)) return false;
  return grad.scalar_type() == at::kFloat ? *grad.const_data_ptr<float>() == 1.0f : grad.item<double>() == 1.0;
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
    ctx->mark_non_differentiable({flatness});
    ctx->set_materialize_grads(false);
    return {loss, flatness};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    variable_list grads(11);
    if (!upstream[0].defined()) return grads;
    const variable_list saved = ctx->get_saved_variables();
    {
      const at::AutoGradMode no_graph(false);
      variable_list made;
      for (const Tensor& gradient : saved) {
        if (gradient.defined()) made.push_back(gradient);
      }
      if (upstream[0].is_cuda() && made.size() > 1) {
        made = at::_foreach_mul(made, upstream[0]);  // one launch, where the dtypes are the same
      } else if (!is_one(upstream[0])) {
        for (Tensor& gradient : made) gradient = gradient.mul(upstream[0]);
      }
      for (size_t k = 0, next = 0; k < saved.size(); ++k) {
        if (saved[k].defined()) grads[k] = made[next++];
      }
    }
    if (!at::GradMode::is_enabled()) return grads;
    // create_graph=True: differentiating what is handed out must fail, not miss terms
    variable_list inputs;
    for (size_t k = 0; k < saved.size(); ++k) {
      if (grads[k].defined()) inputs.push_back(grads[k].detach().set_requires_grad(true));
    }
    auto refuse = std::make_shared<torch::autograd::DelayedError>(
        "head_cross_entropy can be differentiated once only: its gradients were made in the forward pass. For second "
        "derivatives pass backend=\"reference\", which is plain PyTorch.",
        static_cast<int64_t>(inputs.size()));
    const variable_list guarded = (*refuse)(std::move(inputs));
    for (size_t k = 0, next = 0; k < saved.size(); ++k) {
      if (grads[k].defined()) grads[k] = guarded[next++];
    }
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
