// The dtype of gradients that are made before the factor is known that they will be multiplied by.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

namespace fam_ext {

// A gradient made in the forward pass does not hold the loss scale yet. float16's range is too small for it: such a gradient stays in
// float32 until backward has multiplied it by the upstream gradient, and is rounded then, once.
inline at::ScalarType gradient_dtype(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kHalf ? at::kFloat : tensor.scalar_type();
}

// A gradient of `tensor`, not filled, or an empty tensor where it is not wanted.
inline at::Tensor gradient_of(const at::Tensor& tensor, bool wanted) {
  const auto options = tensor.options().dtype(gradient_dtype(tensor));
  return wanted ? at::empty_like(tensor, options) : at::empty({0}, options.memory_format(std::nullopt));
}

}  // namespace fam_ext
