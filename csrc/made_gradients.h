// Backward of an operation whose gradients were made in the forward pass.
#pragma once

#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/ops/_foreach_mul.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>

#include <initializer_list>
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

// Which of the inputs are float16, as bits: their gradients were made in float32.
inline int64_t float16_inputs(std::initializer_list<const at::Tensor*> inputs) {
  int64_t bits = 0, bit = 1;
  for (const at::Tensor* input : inputs) {
    if (input->scalar_type() == at::kHalf) bits |= bit;
    bit <<= 1;
  }
  return bits;
}

// upstream * gradient, rounded once, from factors that keep their own dtypes (a tensor without dimensions would be rounded first).
inline at::Tensor scaled_gradient(const at::Tensor& gradient, const at::Tensor& upstream, bool one,
                                  at::ScalarType dtype) {
  if (one) return gradient.to(dtype);
  if (gradient.scalar_type() == upstream.scalar_type() && gradient.scalar_type() == dtype)
    return gradient.mul(upstream);
  return gradient.mul(upstream.reshape({1})).to(dtype);
}

// grads[k] = upstream * made[k] for all that was made; `float16` as float16_inputs gave it.
inline void hand_out(const torch::autograd::variable_list& made, const at::Tensor& upstream, int64_t float16,
                     const char* op, torch::autograd::variable_list& grads) {
  {
    const at::AutoGradMode no_graph(false);
    torch::autograd::variable_list alike;  // of the upstream gradient's dtype: one launch on a GPU
    for (const at::Tensor& gradient : made) {
      if (gradient.defined() && float16 == 0 && gradient.scalar_type() == upstream.scalar_type())
        alike.push_back(gradient);
    }
    const bool together = upstream.is_cuda() && alike.size() > 1, one = is_one(upstream);
    if (together) alike = at::_foreach_mul(alike, upstream);
    size_t next = 0;
    for (size_t k = 0; k < made.size(); ++k) {
      if (!made[k].defined()) continue;
      const at::ScalarType dtype = float16 >> k & 1 ? at::kHalf : made[k].scalar_type();
      const bool done = together && made[k].scalar_type() == upstream.scalar_type();
      grads[k] = done ? alike[next++] : scaled_gradient(made[k], upstream, one, dtype);
    }
  }
  refuse_second_derivative(op, grads);
}

}  // namespace fam_ext
