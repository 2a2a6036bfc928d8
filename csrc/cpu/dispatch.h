#pragma once

#include <ATen/core/Tensor.h>

namespace fam_ext {

template <typename F>  // f(S(), T()) for the tensor's dtype S and its accumulation dtype T
void dispatch(const at::Tensor& input, const char* expected, const F& f) {
  switch (input.scalar_type()) {
    case at::kFloat:
      return f(float(), float());
    case at::kDouble:
      return f(double(), double());
    case at::kBFloat16:
      return f(c10::BFloat16(), float());
    case at::kHalf:
      return f(c10::Half(), float());
    default:
      TORCH_CHECK_TYPE(false, expected, ", got ", input.scalar_type());
  }
}

}  // namespace fam_ext
