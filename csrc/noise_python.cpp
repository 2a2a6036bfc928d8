// The short way from Python to the noise's passes, for ordinary tensors on the CPU that nothing watches. Anything else returns None,
// and Python takes the form in plain PyTorch (fam_ext/hessian/noise.py).
#include "noise_python.h"

#include <ATen/ATen.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/utils/pybind.h>

#include "noise_autograd.h"
#include "ordinary.h"

namespace py = pybind11;

namespace fam_ext {
namespace {

using at::Tensor;
using noise::Layout;

bool watched() {
  return c10::impl::TorchDispatchModeTLS::any_modes_set() ||
         c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

// A floating tensor of this device without a tangent; not defined for anything else.
Tensor plain(const py::handle& given) {
  if (!ordinary(given.ptr())) return Tensor();
  const Tensor& t = THPVariable_Unpack(given.ptr());
  const bool fits = t.is_cpu() && ordinary(t) && at::isFloatingType(t.scalar_type()) && t.numel() > 0 && !t.is_neg() &&
                    !t._fw_grad(0).defined();
  return fits ? t : Tensor();
}

at::ScalarType accumulation(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// A vector that needs no gradient, as kernels take it.
Tensor vector_for(const Tensor& x, const Tensor& vector) { return vector.detach().to(accumulation(x)).contiguous(); }

std::optional<Tensor> with_length(const py::handle& features, const Tensor& signs, double scale) {
  const Tensor x = plain(features);
  if (!x.defined() || watched() || !x.is_contiguous() || x.numel() != signs.numel() || signs.requires_grad())
    return std::nullopt;
  const py::gil_scoped_release no_gil;
  if (x.dim() == 2) return noise::with_length(x, vector_for(x, signs).view(x.sizes()), scale);
  return noise::with_length(x.unsqueeze(0), vector_for(x, signs).view({1, -1}), scale).squeeze(0);
}

std::optional<Tensor> rank_one(const py::handle& features, const Tensor& left, const Tensor& right,
                               const std::optional<Tensor>& at, double scale, bool linear) {
  const Tensor x = plain(features);
  if (!x.defined() || watched() || left.requires_grad() || right.requires_grad()) return std::nullopt;
  if (!linear && x.dim() < 3) return std::nullopt;
  const auto m = noise::matrices(x, left.size(0), left.size(1), linear);
  if (!m || m->channels != left.size(2)) return std::nullopt;
  const py::gil_scoped_release no_gil;
  const Tensor weights = at ? vector_for(x, *at) : Tensor();
  return noise::rank_one(x, {*m, linear}, vector_for(x, left) * scale, vector_for(x, right), weights);
}

std::optional<std::pair<Tensor, Tensor>> project(const py::handle& features, const Tensor& vector) {
  const Tensor x = plain(features);
  if (!x.defined() || watched() || x.dim() < 3 || vector.requires_grad()) return std::nullopt;
  const auto m = noise::matrices(x, x.size(0), vector.size(1), false);
  if (!m || m->channels != vector.size(2)) return std::nullopt;
  const py::gil_scoped_release no_gil;
  return noise::project(x, {*m, false}, vector_for(x, vector));
}

std::optional<Tensor> outer(const py::handle& output, const py::handle& weight_, const py::handle& inner_,
                            const Tensor& left, const Tensor& place, double scale, std::vector<int64_t> stride,
                            std::vector<int64_t> before, std::vector<int64_t> dilation, int64_t mode, bool transposed) {
  const Tensor z = plain(output), weight = plain(weight_), inner = plain(inner_);
  if (!z.defined() || !weight.defined() || !inner.defined() || watched() || z.dim() < 3) return std::nullopt;
  if (inner.scalar_type() != accumulation(z) || inner.dim() != z.dim()) return std::nullopt;
  const auto m = noise::matrices(z, z.size(0), inner.size(1), false);
  if (!m || m->groups * m->channels * left.size(2) != weight.numel()) return std::nullopt;
  const noise::Window window{std::move(stride), std::move(before), std::move(dilation), mode, transposed};
  const py::gil_scoped_release no_gil;
  return noise::outer(z, {*m, false}, weight, inner, vector_for(z, left), vector_for(z, place), window, scale);
}

// +1 and -1 by the bits of each number's first kBytes bytes, as fam_ext/hessian/noise_draws.py reads them.
Tensor signs(const Tensor& numbers, const std::vector<int64_t>& shape, const Tensor& like) {
  constexpr int64_t kBytes = 7;  // random 64-bit integers are not negative: the last byte is not even
  const Tensor result = at::empty(shape, like.options().requires_grad(false));
  const Tensor wide = result.scalar_type() == at::kFloat
                          ? result
                          : at::empty(shape, like.options().dtype(at::kFloat).requires_grad(false));
  const int64_t* random = numbers.const_data_ptr<int64_t>();
  float* out = wide.data_ptr<float>();
  const int64_t count = wide.numel();
  for (int64_t i = 0, k = 0; i < count; ++k) {
    const int64_t bits = random[k], n = std::min(count - i, 8 * kBytes);
    for (int64_t j = 0; j < n; ++j) out[i + j] = 1.0f - 2.0f * static_cast<float>(bits >> j & 1);
    i += n;
  }
  if (!wide.is_same(result)) result.copy_(wide);
  return result;
}

}  // namespace

void bind_noise(py::module_& m) {
  m.def("noise_signs", &signs, "Signs of random 64-bit integers, 56 of each");
  m.def("noise_with_length", &with_length, "phi + scale |phi| signs for rows phi, or None");
  m.def("noise_rank_one", &rank_one, "phi + scale left <right, phi> at, or None");
  m.def("noise_project", &project, "(phi, <vector, phi>), or None");
  m.def("noise_outer", &outer, "z + (scale W left) (the window's share of inner), or None");
}

}  // namespace fam_ext
