// What patch_sqnorm checks of its arguments, on every device, and the shape and layout of its output.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>

namespace fam_ext {

// The largest kernel size, stride, padding and dilation; fam_ext/ops/_conv_args.py has the same number. The product of two, added
// to a tensor's size, fits in 64 bits.
constexpr int64_t kWindowLimit = int64_t(1) << 24;

inline at::ScalarType patch_sqnorm_type(const at::Tensor& input) {
  return input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// (B, groups, *out)
inline at::DimVector patch_sqnorm_sizes(const at::Tensor& input, at::IntArrayRef kernel, at::IntArrayRef stride,
                                        at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  const int64_t rank = input.dim() - 2;
  TORCH_CHECK_TYPE(at::isFloatingType(input.scalar_type()), "patch_sqnorm: input must be a floating tensor, got ",
                   input.scalar_type());
  TORCH_CHECK_VALUE(rank >= 0 && rank <= 3, "patch_sqnorm: input must have 0 to 3 spatial axes, got ", input.sizes());
  struct Argument {
    const char* name;
    at::IntArrayRef values;
    int64_t least;
  };
  for (const Argument& argument : std::array<Argument, 4>{
           {{"kernel_size", kernel, 1}, {"stride", stride, 1}, {"padding", padding, 0}, {"dilation", dilation, 1}}}) {
    bool good = static_cast<int64_t>(argument.values.size()) == rank;
    for (const int64_t value : argument.values) good = good && value >= argument.least && value <= kWindowLimit;
    TORCH_CHECK_VALUE(good, "patch_sqnorm: ", argument.name, " must be ", rank, " integers from ", argument.least,
                      " to ", kWindowLimit, ", got ", argument.values);
  }
  TORCH_CHECK_VALUE(groups > 0 && input.size(1) % groups == 0, "patch_sqnorm: groups must divide ", input.size(1),
                    " channels, got ", groups);
  at::DimVector sizes{input.size(0), groups};
  for (int64_t a = 0; a < rank; ++a) {
    const int64_t room = input.size(a + 2) + 2 * padding[a] - dilation[a] * (kernel[a] - 1) - 1;
    TORCH_CHECK_VALUE(room >= 0, "patch_sqnorm: kernel_size must fit in the padded input, got ", kernel);
    sizes.push_back(room / stride[a] + 1);
  }
  return sizes;
}

inline void check_patch_sqnorm_gradient(const at::Tensor& grad, const at::Tensor& input, at::IntArrayRef sizes) {
  TORCH_CHECK_VALUE(grad.sizes() == sizes && grad.scalar_type() == patch_sqnorm_type(input),
                    "patch_sqnorm_backward: grad must have shape ", sizes, " and dtype ", patch_sqnorm_type(input),
                    ", got ", grad.sizes(), " ", grad.scalar_type());
  TORCH_CHECK_VALUE(grad.device() == input.device(), "patch_sqnorm_backward: grad must be on the device of input, ",
                    input.device(), ", got ", grad.device());
}

// (B, C, *spatial) with the channels as the fastest dense dimension: then so is the output's group dimension.
inline bool patch_groups_inside(const at::Tensor& input, int64_t groups) {
  return input.dim() == 2 || (groups > 1 && input.movedim(1, -1).is_contiguous() && !input.is_contiguous());
}

}  // namespace fam_ext
