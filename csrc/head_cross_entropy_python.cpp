// The short way from Python to head_cross_entropy. torch.ops matches eleven arguments with a schema, and the public function checks
// each of them in Python: at small sizes both cost as much as the operation. Here an ordinary call is recognized in C++ and goes
// straight to the dispatcher. Anything else returns None, and Python takes the long way, which names what is wrong.
#include "head_cross_entropy_python.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/utils/pybind.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "ordinary.h"
#include "shape_checks.h"

namespace py = pybind11;

namespace fam_ext {
namespace {

using at::Tensor;
using Values = std::tuple<Tensor, Tensor>;
using Op = Values(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, int64_t,
                  double, bool, double, bool, bool);

bool fits(const Tensor& logits, const Tensor& features, const Tensor& weight, const Tensor& target,
          const std::optional<Tensor>& class_weight) {
  for (const Tensor* t : {&logits, &features, &weight}) {
    if (!ordinary(*t) || !is_floating(*t)) return false;
  }
  for (const Tensor* t : {&features, &weight, &target}) {
    if (t->device() != logits.device()) return false;
  }
  if (class_weight && class_weight->device() != logits.device()) return false;
  if (logits.dim() < 2 || weight.dim() != 2 || logits.size(1) == 0 || weight.size(0) != logits.size(1)) return false;
  if (!row_shaped(features, logits, weight.size(1)) || !ordinary(target) || target.requires_grad()) return false;
  if (is_floating(target) ? target.sizes() != logits.sizes()
                          : target.scalar_type() != at::kLong || !row_shaped(target, logits, -1)) {
    return false;
  }
  return !class_weight || (ordinary(*class_weight) && is_floating(*class_weight) && !class_weight->requires_grad() &&
                           class_weight->dim() == 1 && class_weight->size(0) == logits.size(1));
}

std::optional<Values> call(const py::handle& logits_, const py::handle& features_, const py::handle& weight_,
                           const py::handle& target_, const py::handle& class_weight_, int64_t ignore_index,
                           double label_smoothing, bool mean, double strength, bool curvature_grad, bool pairwise) {
  for (const py::handle& argument : {logits_, features_, weight_, target_}) {
    if (!ordinary(argument.ptr())) return std::nullopt;
  }
  std::optional<Tensor> class_weight;
  if (!class_weight_.is_none()) {
    if (!ordinary(class_weight_.ptr())) return std::nullopt;
    class_weight = THPVariable_Unpack(class_weight_.ptr());
  }
  const Tensor logits = THPVariable_Unpack(logits_.ptr()), features = THPVariable_Unpack(features_.ptr()),
               weight = THPVariable_Unpack(weight_.ptr()), target = THPVariable_Unpack(target_.ptr());
  if ((ignore_index >= 0 && is_floating(target)) || !(label_smoothing >= 0 && label_smoothing <= 1) ||
      !std::isfinite(strength) ||
      c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
      !fits(logits, features, weight, target, class_weight)) {
    return std::nullopt;
  }
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("fam_ext::head_cross_entropy", "").typed<Op>();
  const py::gil_scoped_release no_gil;
  return op.call(logits, features, weight, target, class_weight, ignore_index, label_smoothing, mean, strength,
                 curvature_grad, pairwise);
}

}  // namespace

void bind_head_cross_entropy(py::module_& m) {
  m.def(
      "head_cross_entropy", &call,
      "torch.ops.fam_ext.head_cross_entropy for ordinary tensors that fit, on a device that has kernels, None for anything else.");
}

}  // namespace fam_ext
