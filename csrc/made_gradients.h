// Backward of an operation whose gradients were made in the forward pass.
#pragma once

#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/ops/_foreach_mul.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>

#include <string>

namespace fam_ext {

// The upstream gradient of a training loss is 1 almost always: then the gradients are handed out as they are. On a GPU nobody knows
// without waiting for it.
inline bool is_one(const at::Tensor& grad) {
  if (!grad.device().is_cpu() || at::isTensorSubclassLike(grad)) return false;
  return grad.scalar_type() == at::kFloat ? *grad.const_data_ptr<float>() == 1.0f : grad.item<double>() == 1.0;
}

// With create_graph=True: differentiating what is handed out must fail, not miss terms.
inline void refuse_second_derivative(const char* op, torch::autograd::variable_list& grads) {
  if (!at::GradMode::is_enabled()) return;
  torch::autograd::variable_list inputs;
  for (const at::Tensor& grad : grads) {
    if (grad.defined()) inputs.push_back(grad.detach().set_requires_grad(true));
  }
  auto refuse = std::make_shared<torch::autograd::DelayedError>(
      std::string(op) +
          " can be differentiated once only: its gradients were made in the forward pass. For second derivatives pass "
          "backend=\"reference\", which is plain PyTorch.",
      static_cast<int64_t>(inputs.size()));
  const torch::autograd::variable_list guarded = (*refuse)(std::move(inputs));
  size_t next = 0;
  for (at::Tensor& grad : grads) {
    if (grad.defined()) grad = guarded[next++];
  }
}

// grads[k] = upstream * made[k] for all that was made.
inline void hand_out(const torch::autograd::variable_list& made, const at::Tensor& upstream, const char* op,
                     torch::autograd::variable_list& grads) {
  {
    const at::AutoGradMode no_graph(false);
    torch::autograd::variable_list scaled;
    for (const at::Tensor& gradient : made) {
      if (gradient.defined()) scaled.push_back(gradient);
    }
    if (upstream.is_cuda() && scaled.size() > 1) {
      scaled = at::_foreach_mul(scaled, upstream);  // one launch, where the dtypes are the same
    } else if (!is_one(upstream)) {
      for (at::Tensor& gradient : scaled) gradient = gradient.mul(upstream);
    }
    size_t next = 0;
    for (size_t k = 0; k < made.size(); ++k) {
      if (made[k].defined()) grads[k] = scaled[next++];
    }
  }
  refuse_second_derivative(op, grads);
}

}  // namespace fam_ext
