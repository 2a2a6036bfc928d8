// What the kernels rely on, checked where operations are called past the public functions, as torch.ops.fam_ext.* can be.
#pragma once

#include <ATen/core/Tensor.h>

#include <initializer_list>
#include <optional>

namespace fam_ext {

inline bool is_floating(const at::Tensor& t) {
  const at::ScalarType type = t.scalar_type();
  return type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf;
}

// Whether `a` has the shape of `b` without dimension 1, followed by `last` if that is not negative.
inline bool row_shaped(const at::Tensor& a, const at::Tensor& b, int64_t last) {
  const auto sizes = a.sizes(), logits = b.sizes();
  if (a.dim() != b.dim() - 1 + (last >= 0) || sizes[0] != logits[0]) return false;
  for (size_t d = 2; d < logits.size(); ++d) {
    if (sizes[d - 1] != logits[d]) return false;
  }
  return last < 0 || sizes.back() == last;
}

inline bool same_device(const at::Tensor& first, std::initializer_list<const at::Tensor*> others) {
  for (const at::Tensor* t : others) {
    if (t->device() != first.device()) return false;
  }
  return true;
}

inline void check_logits(const char* op, const at::Tensor& logits, const at::Tensor& weight) {
  TORCH_CHECK_TYPE(is_floating(logits) && is_floating(weight), op, ": logits and weight must be floating tensors, got ",
                   logits.scalar_type(), " and ", weight.scalar_type());
  TORCH_CHECK_VALUE(logits.dim() >= 2 && logits.size(1) >= 1 && weight.dim() == 2 && weight.size(0) == logits.size(1) &&
                        same_device(logits, {&weight}),
                    op, ": expected logits (B, O, *positions) and weight (O, I) on one device, got ", logits.sizes(),
                    " on ", logits.device(), " and ", weight.sizes(), " on ", weight.device());
}

// `saved` is what softmax_trace returned beside the values: D (O, O), or U (rows, I), in the accumulation dtype.
inline void check_trace_backward(const at::Tensor& grad, const at::Tensor& logits, const at::Tensor& weight,
                                 const at::Tensor& saved, bool pairwise, at::ScalarType acc) {
  const char* op = "softmax_trace_backward";
  check_logits(op, logits, weight);
  TORCH_CHECK_VALUE(row_shaped(grad, logits, -1) && is_floating(grad), op,
                    ": grad must be floating, a number for each row of logits ", logits.sizes(), ", got ",
                    grad.sizes());
  const int64_t classes = logits.size(1), rows = logits.numel() / classes;
  TORCH_CHECK_VALUE(saved.dim() == 2 && saved.size(0) == (pairwise ? classes : rows) &&
                        saved.size(1) == (pairwise ? classes : weight.size(1)) && saved.is_contiguous() &&
                        saved.scalar_type() == acc && same_device(logits, {&grad, &saved}),
                    op, ": saved must be the second result of softmax_trace for the same arguments, got ",
                    saved.sizes(), " ", saved.scalar_type(), " on ", saved.device());
}

inline void check_head(const at::Tensor& logits, const at::Tensor& features, const at::Tensor& weight,
                       const at::Tensor& target, const std::optional<at::Tensor>& class_weight) {
  const char* op = "head_cross_entropy_forward";
  check_logits(op, logits, weight);
  TORCH_CHECK_VALUE(row_shaped(features, logits, weight.size(1)) && is_floating(features), op,
                    ": features must be floating, (B, *positions, I) for logits ", logits.sizes(), " and weight ",
                    weight.sizes(), ", got ", features.sizes());
  const bool fits = is_floating(target) ? target.sizes() == logits.sizes()
                                        : target.scalar_type() == at::kLong && row_shaped(target, logits, -1);
  TORCH_CHECK_VALUE(fits, op, ": target must be int64, one for each row of logits ", logits.sizes(),
                    ", or floating like the logits, got ", target.sizes(), " ", target.scalar_type());
  TORCH_CHECK_VALUE(!class_weight || (class_weight->dim() == 1 && class_weight->size(0) == logits.size(1) &&
                                      is_floating(*class_weight) && same_device(logits, {&*class_weight})),
                    op, ": class_weight must be floating and (O)");
  TORCH_CHECK_VALUE(same_device(logits, {&features, &target}), op, ": all tensors must be on one device");
}

}  // namespace fam_ext
