// Autograd of linear_cross_entropy. mean, sum: the gradients were made in the forward pass. none: they need the rows' upstream
// gradients, so backward makes them, by the same operation with these as factors of the rows.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <tuple>

#include "made_gradients.h"

namespace fam_ext {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;

struct Options {
  int64_t ignore_index;
  double label_smoothing;
  int64_t reduction;
  double strength;
  bool curvature_grad;
  int64_t max_bytes;
  bool narrow;
};
constexpr int64_t kNone = 0, kSum = 2;
constexpr size_t kArguments = 12;

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&,
                                                                   const Tensor&, const OptionalTensor&,
                                                                   const OptionalTensor&, int64_t, double, int64_t,
                                                                   double, bool, int64_t, bool, bool, bool, bool);

auto call_forward(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const Tensor& target,
                  const OptionalTensor& class_weight, const OptionalTensor& row_scale, const Options& o,
                  int64_t reduction, std::array<bool, 3> needed) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("fam_ext::linear_cross_entropy_forward", "").typed<Forward>();
  return op.call(input, weight, bias, target, class_weight, row_scale, o.ignore_index, o.label_smoothing, reduction,
                 o.strength, o.curvature_grad, o.max_bytes, o.narrow, needed[0], needed[1], needed[2]);
}

OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

struct LinearCrossEntropy : torch::autograd::Function<LinearCrossEntropy> {
  static variable_list forward(AutogradContext* ctx, const Tensor& input, const Tensor& weight,
                               const OptionalTensor& bias, const Tensor& target, const OptionalTensor& class_weight,
                               int64_t ignore_index, double label_smoothing, int64_t reduction, double strength,
                               bool curvature_grad, int64_t max_bytes, bool narrow) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const Options o{ignore_index, label_smoothing, reduction, strength, curvature_grad, max_bytes, narrow};
    const std::array<bool, 3> needed{input.requires_grad(), weight.requires_grad(), bias && bias->requires_grad()};
    const bool later = reduction == kNone;
    auto [loss, flatness, dphi, dw, db] =
        call_forward(input, weight, bias, target, class_weight, std::nullopt, o, reduction,
                     later ? std::array<bool, 3>{false, false, false} : needed);
    if (later) {
      ctx->save_for_backward({input, weight, bias.value_or(Tensor()), target, class_weight.value_or(Tensor())});
      ctx->saved_data["ignore_index"] = ignore_index;
      ctx->saved_data["label_smoothing"] = label_smoothing;
      ctx->saved_data["strength"] = strength;
      ctx->saved_data["curvature_grad"] = curvature_grad;
      ctx->saved_data["max_bytes"] = max_bytes;
      ctx->saved_data["narrow"] = narrow;
    } else {
      ctx->save_for_backward({needed[0] ? dphi : Tensor(), needed[1] ? dw : Tensor(), needed[2] ? db : Tensor()});
    }
    ctx->saved_data["later"] = later;
    ctx->mark_non_differentiable({flatness});
    ctx->set_materialize_grads(false);
    return {loss, flatness};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    variable_list grads(kArguments);
    if (!upstream[0].defined()) return grads;
    const variable_list saved = ctx->get_saved_variables();
    if (!ctx->saved_data["later"].toBool()) {
      hand_out(saved, upstream[0], 0, "linear_cross_entropy", grads);
      return grads;
    }
    auto& data = ctx->saved_data;
    const Options o{data["ignore_index"].toInt(), data["label_smoothing"].toDouble(), kSum,
                    data["strength"].toDouble(),  data["curvature_grad"].toBool(),    data["max_bytes"].toInt(),
                    data["narrow"].toBool()};
    const std::array<bool, 3> needed{ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                                     saved[2].defined() && ctx->needs_input_grad(2)};
    {
      const at::AutoGradMode no_graph(false);
      auto result = call_forward(saved[0], saved[1], optional(saved[2]), saved[3], optional(saved[4]), upstream[0], o,
                                 kSum, needed);
      if (needed[0]) grads[0] = std::get<2>(result);
      if (needed[1]) grads[1] = std::get<3>(result);
      if (needed[2]) grads[2] = std::get<4>(result);
    }
    refuse_second_derivative("linear_cross_entropy", grads);
    return grads;
  }
};

std::tuple<Tensor, Tensor> values_only(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                                       const Tensor& target, const OptionalTensor& class_weight, int64_t ignore_index,
                                       double label_smoothing, int64_t reduction, double strength, bool curvature_grad,
                                       int64_t max_bytes, bool narrow) {
  const Options o{ignore_index, label_smoothing, reduction, strength, curvature_grad, max_bytes, narrow};
  auto result =
      call_forward(input, weight, bias, target, class_weight, std::nullopt, o, reduction, {false, false, false});
  return {std::get<0>(result), std::get<1>(result)};
}

std::tuple<Tensor, Tensor> differentiable(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                                          const Tensor& target, const OptionalTensor& class_weight,
                                          int64_t ignore_index, double label_smoothing, int64_t reduction,
                                          double strength, bool curvature_grad, int64_t max_bytes, bool narrow) {
  if (!at::GradMode::is_enabled()) {  // inside the function above it always is off
    const at::AutoDispatchBelowADInplaceOrView guard;
    return values_only(input, weight, bias, target, class_weight, ignore_index, label_smoothing, reduction, strength,
                       curvature_grad, max_bytes, narrow);
  }
  const variable_list result =
      LinearCrossEntropy::apply(input, weight, bias, target, class_weight, ignore_index, label_smoothing, reduction,
                                strength, curvature_grad, max_bytes, narrow);
  return {result[0], result[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(fam_ext, Autograd, m) { m.impl("linear_cross_entropy", &differentiable); }
TORCH_LIBRARY_IMPL(fam_ext, CompositeExplicitAutograd, m) { m.impl("linear_cross_entropy", &values_only); }

}  // namespace fam_ext
