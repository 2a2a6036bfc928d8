// Derivatives of f'(x) grad for GELU and SiLU, by grad and by x, in one pass: fam_ext/derivatives/twice_smooth.py has them in
// plain PyTorch.
#include "smooth_activation.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/csrc/utils/pybind.h>

#include <cmath>
#include <optional>
#include <string>
#include <utility>

namespace fam_ext {
namespace {

using at::Tensor;

constexpr int64_t kGrain = 8192;

// f' and f'' of each activation
template <typename T>
struct Gelu {
  using Vec = at::vec::Vectorized<T>;
  static std::pair<Vec, Vec> of(const Vec& x) {
    const Vec half(T(0.5)), one(T(1)),
        density = (x * x * Vec(T(-0.5))).exp() * Vec(static_cast<T>(M_2_SQRTPI * M_SQRT1_2 / 2));
    const Vec below = half * (one + (x * Vec(static_cast<T>(M_SQRT1_2))).erf());
    return {below + x * density, density * (Vec(T(2)) - x * x)};
  }
};

// sigmoid(x) and 1 - sigmoid(x), without cancellation
template <typename Vec>
std::pair<Vec, Vec> sigmoids(const Vec& x) {
  const Vec one(1), small = x.abs().neg().exp(), more = one / (one + small), less = small * more;
  const Vec positive = x >= Vec(0);
  return {Vec::blendv(less, more, positive), Vec::blendv(more, less, positive)};
}

template <typename T>
struct GeluTanh {
  using Vec = at::vec::Vectorized<T>;
  static std::pair<Vec, Vec> of(const Vec& x) {
    constexpr double a = 0.044715, c = M_2_SQRTPI * M_SQRT1_2;  // sqrt(2 / pi)
    const Vec half(T(0.5)), square = x * x;
    // (1 + tanh k) / 2 = sigmoid(2 k)
    const auto [below, above] =
        sigmoids(x * Vec(static_cast<T>(2 * c)) * (Vec(T(1)) + square * Vec(static_cast<T>(a))));
    const Vec slope = Vec(static_cast<T>(c)) + square * Vec(static_cast<T>(3 * a * c)),
              fall = Vec(T(4)) * below * above;
    const Vec inner = x * Vec(static_cast<T>(6 * a * c)) - Vec(T(2)) * (below - above) * slope * slope;
    return {below + half * x * fall * slope, fall * (slope + half * x * inner)};
  }
};

template <typename T>
struct Silu {
  using Vec = at::vec::Vectorized<T>;
  static std::pair<Vec, Vec> of(const Vec& x) {
    const auto [s, rest] = sigmoids(x);
    return {s * (Vec(T(1)) + x * rest), s * rest * (Vec(T(2)) + x * (rest - s))};
  }
};

template <typename T, template <typename> class Activation>
void pass(const T* upstream, const T* grad, const T* x, T* of_grad, T* of_x, int64_t count) {
  using Vec = at::vec::Vectorized<T>;
  at::parallel_for(0, count, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += Vec::size()) {
      const int64_t n = std::min<int64_t>(Vec::size(), end - i);
      const Vec u = Vec::loadu(upstream + i, n);
      const auto [slope, bend] = Activation<T>::of(Vec::loadu(x + i, n));
      if (of_grad != nullptr) (u * slope).store(of_grad + i, n);
      if (of_x != nullptr) (u * Vec::loadu(grad + i, n) * bend).store(of_x + i, n);
    }
  });
}

// (f'(x) upstream, f''(x) grad upstream), either only where it is wanted; nothing for tensors that do not lie alike.
std::optional<std::pair<Tensor, Tensor>> smooth_activation(const std::string& kind, const Tensor& upstream,
                                                           const Tensor& grad, const Tensor& x, bool want_grad,
                                                           bool want_x) {
  for (const Tensor* t : {&upstream, &grad, &x}) {
    const bool alike = t->is_cpu() && t->dtype() == x.dtype() && t->sizes() == x.sizes() && t->strides() == x.strides();
    if (!alike || !t->is_non_overlapping_and_dense() || t->is_neg()) return std::nullopt;
  }
  if (x.scalar_type() != at::kFloat && x.scalar_type() != at::kDouble) return std::nullopt;
  const auto made = [&](bool wanted) { return wanted ? at::empty_like(x.detach()) : Tensor(); };
  const Tensor of_grad = made(want_grad), of_x = made(want_x);
  const pybind11::gil_scoped_release no_gil;
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "smooth_activation", [&] {
    const auto run = [&](auto* function) {
      function(upstream.const_data_ptr<scalar_t>(), grad.const_data_ptr<scalar_t>(), x.const_data_ptr<scalar_t>(),
               want_grad ? of_grad.mutable_data_ptr<scalar_t>() : nullptr,
               want_x ? of_x.mutable_data_ptr<scalar_t>() : nullptr, x.numel());
    };
    if (kind == "gelu")
      run(&pass<scalar_t, Gelu>);
    else if (kind == "gelu_tanh")
      run(&pass<scalar_t, GeluTanh>);
    else
      run(&pass<scalar_t, Silu>);
  });
  return std::make_pair(of_grad, of_x);
}

}  // namespace

void bind_smooth_activation(pybind11::module_& m) {
  m.def("smooth_activation", &smooth_activation, "Derivatives of the gradient of GELU or SiLU by its two factors");
}

}  // namespace fam_ext
