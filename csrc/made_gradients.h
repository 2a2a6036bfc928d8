// Backward of an operation whose gradients were made in the forward pass.
#pragma once

#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/ops/_foreach_mul.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>

#include <initializer_list>
#include <string>

#include "gradient_dtype.h"

namespace fam_ext {

// The upstream gradient of a training loss is 1 almost always: then the gradients are handed out as they are. On a GPU nobody knows
// without waiting for it.
inline bool is_one(const at::Tensor& grad) {
  if (!grad.device().is_cpu() || at::isTensorSubclassLike(grad)) return false;
  return grad.scalar_type() == at::kFloat ? *grad.const_data_ptr<float>() == 1.0f : grad.item<double>() == 1.0;
}

// With create_graph=True: differentiating what is handed out must fail, not miss terms.
inline void refuse_second_derivative(const std::string& why, torch::autograd::variable_list& grads) {
  if (!at::GradMode::is_enabled()) return;
  torch::autograd::variable_list inputs;
  for (const at::Tensor& grad : grads) {
    if (grad.defined()) inputs.push_back(grad.detach().set_requires_grad(true));
  }
  auto refuse = std::make_shared<torch::autograd::DelayedError>(why, static_cast<int64_t>(inputs.size()));
  const torch::autograd::variable_list guarded = (*refuse)(std::move(inputs));
  size_t next = 0;
  for (at::Tensor& grad : grads) {
    if (grad.defined()) grad = guarded[next++];
  }
}

// The dtypes of the inputs, a byte each, where gradients of some were made in float32 in place of less; else 0.
inline int64_t rounded_dtypes(std::initializer_list<const at::Tensor*> inputs) {
  int64_t dtypes = 0, shift = 0;
  bool any = false;
  for (const at::Tensor* input : inputs) {
    any = any || gradient_dtype(*input) != input->scalar_type();
    dtypes |= static_cast<int64_t>(input->scalar_type()) << shift;
    shift += 8;
  }
  return any ? dtypes : 0;
}

// upstream * gradient, rounded once. On the CPU a factor without dimensions keeps its digits; a GPU would first round it to the
// gradient's dtype.
inline at::Tensor scaled_gradient(const at::Tensor& gradient, const at::Tensor& upstream, bool one,
                                  at::ScalarType dtype) {
  if (one) return gradient.to(dtype);
  const bool whole = upstream.is_cpu() || gradient.scalar_type() == upstream.scalar_type();
  return gradient.mul(whole ? upstream : upstream.reshape({1})).to(dtype);
}

// grads[k] = upstream * made[k] for all that was made; `dtypes` as rounded_dtypes gave them.
inline void hand_out(const torch::autograd::variable_list& made, const at::Tensor& upstream, int64_t dtypes,
                     const char* op, torch::autograd::variable_list& grads) {
  {
    const at::AutoGradMode no_graph(false);
    torch::autograd::variable_list alike;  // of the upstream gradient's dtype: one launch on a GPU
    for (const at::Tensor& gradient : made) {
      if (gradient.defined() && dtypes == 0 && gradient.scalar_type() == upstream.scalar_type())
        alike.push_back(gradient);
    }
    const bool together = upstream.is_cuda() && alike.size() > 1, one = is_one(upstream);
    if (together) alike = at::_foreach_mul(alike, upstream);
    size_t next = 0;
    for (size_t k = 0; k < made.size(); ++k) {
      if (!made[k].defined()) continue;
      const auto dtype = dtypes == 0 ? made[k].scalar_type() : static_cast<at::ScalarType>(dtypes >> 8 * k & 0xff);
      const bool done = together && made[k].scalar_type() == upstream.scalar_type();
      grads[k] = done ? alike[next++] : scaled_gradient(made[k], upstream, one, dtype);
    }
  }
  if (!at::GradMode::is_enabled()) return;
  refuse_second_derivative(
      std::string(op) +
          " can be differentiated once only: its gradients were made in the forward pass. For second "
          "derivatives pass backend=\"reference\", which is plain PyTorch.",
      grads);
}

}  // namespace fam_ext
