// |phi_i|^2 |t_i|^2 of every row, differentiable once: the Fisher form of kappa of a layer with one row per sample, where t_i = W^T s_i
// (fam_ext/hessian/gauss_newton.py). One pass each way.
#include "row_trace.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <optional>

#include "cpu/row_grain.h"
#include "made_gradients.h"
#include "ordinary.h"

namespace py = pybind11;

namespace fam_ext {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr int64_t kSegment = 4096;  // numbers of a partial sum

template <typename T>
double squares(const T* x, int64_t n) {
  using Vec = at::vec::Vectorized<T>;
  double sum = 0;
  for (int64_t begin = 0; begin < n; begin += kSegment) {
    sum +=
        at::vec::map_reduce_all<T>([](const Vec& a) { return a * a; }, [](const Vec& a, const Vec& b) { return a + b; },
                                   x + begin, std::min(kSegment, n - begin));
  }
  return sum;
}

// out_i = factor_i x_i
void scaled_rows(const Tensor& x, const Tensor& grad, const Tensor& others, const Tensor& out) {
  const int64_t width = x.size(1);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "row_trace_backward", [&] {
    using Vec = at::vec::Vectorized<scalar_t>;
    const auto *of_x = x.const_data_ptr<scalar_t>(), *g = grad.const_data_ptr<scalar_t>();
    const auto* square = others.const_data_ptr<scalar_t>();
    auto* of_out = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, x.size(0), row_grain(width), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Vec factor(2 * g[i] * square[i]);
        at::vec::map<scalar_t>([&](const Vec& v) { return v * factor; }, of_out + i * width, of_x + i * width, width);
      }
    });
  });
}

struct RowTrace : torch::autograd::Function<RowTrace> {
  static Tensor forward(AutogradContext* ctx, const Tensor& phi, const Tensor& t) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const auto options = phi.options().requires_grad(false);
    const Tensor value = at::empty({phi.size(0)}, options), of_phi = at::empty({phi.size(0)}, options),
                 of_t = at::empty({phi.size(0)}, options);
    const int64_t widths[2] = {phi.size(1), t.size(1)};
    AT_DISPATCH_FLOATING_TYPES(phi.scalar_type(), "row_trace", [&] {
      const auto *a = phi.const_data_ptr<scalar_t>(), *b = t.const_data_ptr<scalar_t>();
      auto *sum_a = of_phi.mutable_data_ptr<scalar_t>(), *sum_b = of_t.mutable_data_ptr<scalar_t>();
      auto* product = value.mutable_data_ptr<scalar_t>();
      at::parallel_for(0, phi.size(0), row_grain(widths[0] + widths[1]), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          sum_a[i] = static_cast<scalar_t>(squares(a + i * widths[0], widths[0]));
          sum_b[i] = static_cast<scalar_t>(squares(b + i * widths[1], widths[1]));
          product[i] = sum_a[i] * sum_b[i];
        }
      });
    });
    ctx->save_for_backward({phi, t, of_phi, of_t});
    return value;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    const variable_list saved = ctx->get_saved_variables();
    variable_list grads(2);
    {
      const at::AutoGradMode no_graph(false);
      const Tensor grad = upstream[0].contiguous();
      for (int k = 0; k < 2; ++k) {
        if (!ctx->needs_input_grad(k)) continue;
        grads[k] = at::empty(saved[k].sizes(), saved[k].options().requires_grad(false));
        scaled_rows(saved[k], grad, saved[3 - k], grads[k]);
      }
    }
    refuse_second_derivative("the Fisher form of kappa can be differentiated once only", grads);
    return grads;
  }
};

// None where the tensors are no ordinary rows that lie alike.
std::optional<Tensor> row_trace(const py::handle& phi_, const py::handle& t_) {
  if (!ordinary(phi_.ptr()) || !ordinary(t_.ptr())) return std::nullopt;
  const Tensor phi = THPVariable_Unpack(phi_.ptr()), t = THPVariable_Unpack(t_.ptr());
  for (const Tensor* x : {&phi, &t}) {
    const bool fits = ordinary(*x) && x->is_cpu() && x->dim() == 2 && x->is_contiguous() && !x->is_neg() &&
                      x->size(0) == phi.size(0) && x->dtype() == phi.dtype();
    if (!fits || (x->scalar_type() != at::kFloat && x->scalar_type() != at::kDouble)) return std::nullopt;
  }
  const py::gil_scoped_release no_gil;
  return RowTrace::apply(phi, t);
}

}  // namespace

void bind_row_trace(py::module_& m) { m.def("row_trace", &row_trace, "|phi|^2 |t|^2 of rows (N, I) and (N, J), (N,)"); }

}  // namespace fam_ext
