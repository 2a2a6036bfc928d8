#include <ATen/Dispatch.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/empty_native.h>
#include <torch/library.h>

#include <tuple>

#include "cpu/cross_entropy_rows.h"
#include "cpu/trace_shifted.h"
#include "gradient_dtype.h"

namespace fam_ext {
namespace {

using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Without the dispatcher: a number would pay it twice, to allocate and to fill.
template <typename T>
at::Tensor number(double value) {
  at::Tensor result = at::native::empty_cpu({}, c10::CppTypeToScalarType<T>::value);
  *result.mutable_data_ptr<T>() = static_cast<T>(value);
  return result;
}

// (loss, flatness, d loss/d logits, d loss/d features, d loss/d weight): everything in one pass over the rows.
Result head_cross_entropy_forward(const at::Tensor& logits, const at::Tensor& features, const at::Tensor& weight,
                                  const at::Tensor& target, const std::optional<at::Tensor>& class_weight,
                                  int64_t ignore_index, double label_smoothing, bool mean, double strength,
                                  bool curvature_grad, bool pairwise, bool grad_logits, bool grad_features,
                                  bool grad_weight) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto is_double = [](const at::Tensor& t) { return t.scalar_type() == at::kDouble; };
  const at::ScalarType acc = is_double(logits) || is_double(features) || is_double(weight) ? at::kDouble : at::kFloat;
  const at::Tensor w = (weight.scalar_type() == acc ? weight : weight.to(acc)).contiguous();
  const CrossEntropyOptions options{"head_cross_entropy",
                                    target.is_floating_point() ? target : target.contiguous(),
                                    class_weight ? class_weight->to(acc).contiguous() : at::Tensor(),
                                    ignore_index,
                                    label_smoothing,
                                    mean,
                                    strength,
                                    curvature_grad,
                                    at::Tensor()};
  const at::Tensor dz = gradient_of(logits, grad_logits);
  // held constant, the Hessian sends nothing to the features
  at::Tensor dphi = gradient_of(features, grad_features);
  if (!curvature_grad) dphi.zero_();
  at::Tensor loss, flatness, dw;
  AT_DISPATCH_FLOATING_TYPES(acc, "head_cross_entropy", [&] {
    const Rows<scalar_t> rows(logits, 1), phi(features, features.dim() - 1);
    const Rows<scalar_t> dz_rows(dz, grad_logits ? 1 : 0), dphi_rows(dphi, dphi.dim() - 1);
    const Rows<scalar_t>* dz_target = grad_logits ? &dz_rows : nullptr;
    CrossEntropyRows<scalar_t> policy(options, rows.layout.rows, rows.layout.width, &phi,
                                      grad_features && curvature_grad ? &dphi_rows : nullptr);
    at::Tensor result;
    if (pairwise) {
      const at::Tensor distances = class_distances(w);
      at::Tensor m = pairwise_rows(rows, distances, policy, dz_target, grad_weight);
      if (grad_weight) result = laplacian_product(m, w, distances);
    } else {
      result = shifted_blocks(rows, w, at::Tensor(), false, policy, dz_target, grad_weight);
    }
    dw = grad_weight ? result.to(gradient_dtype(weight)) : gradient_of(weight, false);
    const double kappa = policy.flatness();
    loss = number<scalar_t>(policy.loss() + strength * kappa);
    flatness = number<scalar_t>(kappa);
  });
  return {loss, flatness, dz, dphi, dw};
}

}  // namespace

TORCH_LIBRARY_IMPL(fam_ext, CPU, m) { m.impl("head_cross_entropy_forward", &head_cross_entropy_forward); }

}  // namespace fam_ext
