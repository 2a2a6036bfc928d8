// gram_trace on the CPU: products by at::bmm over chunks of samples, so that patches, Gram matrices and copies in the accumulation
// type stay under a byte bound. Both forms turn on one tensor that the backward pass needs as well, and it alone is kept:
// Gamma = s phi^T (direct), or s <phi, phi> (Gram form).
#include <ATen/TensorOperators.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "gram_windows.h"

namespace fam_ext {
namespace {

using at::IntArrayRef;
using at::Tensor;
using gram::Windows;
using WithoutAutocast = c10::impl::ExcludeDispatchKeyGuard;
using OptionalTensor = std::optional<Tensor>;

enum class Form { kDirect, kShifts, kPatches };

// Shapes: x (B, g, C, *in), s (K, B, g, O, *out), G (g, O, O). Everything below is in columns: positions last.
struct Problem {
  int64_t factors, samples, groups, channels, neurons, fan_in;
  Form form;
  Windows windows;
  at::ScalarType type;

  Problem(const Tensor& x, const Tensor& s, const OptionalTensor& gram, IntArrayRef kernel, IntArrayRef stride,
          IntArrayRef padding, IntArrayRef dilation, std::string_view name)
      : factors(s.size(0)),
        samples(x.size(0)),
        groups(x.size(1)),
        channels(x.size(2)),
        neurons(s.size(3)),
        form(parse(name)),
        windows(checked(x, s, kernel), s.sizes().slice(4), kernel, stride, padding, dilation),
        type(at::kFloat) {
    const size_t rank = kernel.size();
    TORCH_CHECK_VALUE(s.size(1) == samples && s.size(2) == groups && stride.size() == rank && padding.size() == rank &&
                          dilation.size() == rank,
                      "gram_trace: input ", x.sizes(), " and factors ", s.sizes(), " do not belong together");
    if (gram) {
      TORCH_CHECK_VALUE(gram->sizes() == IntArrayRef({groups, neurons, neurons}), "gram_trace: gram must have shape ",
                        IntArrayRef({groups, neurons, neurons}), ", got ", gram->sizes());
    }
    if (x.scalar_type() == at::kDouble || s.scalar_type() == at::kDouble ||
        (gram && gram->scalar_type() == at::kDouble)) {
      type = at::kDouble;
    }
    fan_in = channels * windows.volume;
  }

  static Form parse(std::string_view name) {
    if (name == "direct") return Form::kDirect;
    if (name == "gram_patches") return Form::kPatches;
    TORCH_CHECK_VALUE(name == "gram_shifts",
                      "gram_trace: form must be 'direct', 'gram_shifts' or 'gram_patches', got '", name, "'");
    return Form::kShifts;
  }

  static IntArrayRef checked(const Tensor& x, const Tensor& s, IntArrayRef kernel) {
    const int64_t rank = static_cast<int64_t>(kernel.size());
    TORCH_CHECK_VALUE(x.dim() == 3 + rank && s.dim() == 4 + rank,
                      "gram_trace: input (B, g, C, *in) and factors (K, B, g, O, *out) must have ", rank,
                      " spatial axes, got ", x.sizes(), " and ", s.sizes());
    return x.sizes().slice(3);
  }

  std::vector<int64_t> saved_sizes() const {
    return {factors, samples, groups, neurons, form == Form::kDirect ? fan_in : windows.outputs};
  }

  // Samples in a chunk: what each holds at a time, forward and backward alike.
  int64_t chunk(int64_t max_bytes) const {
    const int64_t n = windows.positions, q = windows.outputs, rows = factors * neurons;
    int64_t numbers = channels * n + 3 * rows * q;
    if (form != Form::kShifts) numbers += 2 * fan_in * q;
    if (form == Form::kDirect) numbers += 3 * rows * fan_in;
    if (form != Form::kDirect) numbers += 2 * (q * q + (windows.pointwise ? 0 : n * n));
    const int64_t bytes = std::max<int64_t>(1, groups * numbers * (type == at::kDouble ? 8 : 4));
    return std::clamp<int64_t>(max_bytes / bytes, 1, std::max<int64_t>(1, samples));
  }
};

// f(first sample, number of samples, x (b, g, C, *in), s (K, b, g, O, Q)) for every chunk, in the accumulation type.
template <typename F>
void for_each_chunk(const Problem& p, const Tensor& x, const Tensor& s, int64_t max_bytes, const F& f) {
  const int64_t size = p.chunk(max_bytes);
  for (int64_t first = 0; first < p.samples; first += size) {
    const int64_t count = std::min(size, p.samples - first);
    f(first, count, x.narrow(0, first, count).to(p.type), s.narrow(1, first, count).to(p.type).flatten(4));
  }
}

// (K, b, g, n, m) -> (b * g, K * n, m): all factors of a sample in one product.
Tensor together(const Tensor& t) { return t.permute({1, 2, 0, 3, 4}).reshape({-1, t.size(0) * t.size(3), t.size(4)}); }

// (b * g, K * n, m) -> (K, b, g, n, m), a view
Tensor apart(const Tensor& t, int64_t factors, int64_t groups) {
  return t.unflatten(1, {factors, t.size(1) / factors}).unflatten(0, {-1, groups}).permute({2, 0, 1, 3, 4});
}

// a b, laid out as `like` is: a transposed product costs nothing, a transposed copy does.
Tensor product_like(const Tensor& a, const Tensor& b, const Tensor& like) {
  const int64_t last = like.dim() - 1;
  if (like.stride(last) == 1 || like.stride(last - 1) != 1) return at::bmm(a, b);
  return at::bmm(b.transpose(1, 2), a.transpose(1, 2)).transpose(1, 2);
}

// G t for t (K, b, g, O, m): one product over all rows where they lie so, else one for each sample.
Tensor times_gram(const OptionalTensor& gram, const Tensor& t) {
  if (!gram) return t;
  const Tensor rows = t.transpose(-1, -2);
  if (gram->size(0) == 1 && rows.is_contiguous()) {
    return at::mm(rows.reshape({-1, t.size(3)}), (*gram)[0]).view(rows.sizes()).transpose(-1, -2);  // G is symmetric
  }
  const Tensor each = gram->expand({t.size(0), t.size(1), -1, -1, -1}).reshape({-1, t.size(3), t.size(3)});
  return at::bmm(each, t.reshape({-1, t.size(3), t.size(4)})).view(t.sizes());
}

OptionalTensor in_type(const OptionalTensor& t, at::ScalarType type) {
  return t ? OptionalTensor(t->to(type)) : std::nullopt;
}

std::tuple<Tensor, Tensor> gram_trace(const Tensor& x, const Tensor& s, const OptionalTensor& gram, IntArrayRef kernel,
                                      IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                      std::string_view form, int64_t max_bytes, bool keep) {
  const WithoutAutocast guard(c10::DispatchKey::AutocastCPU);  // products in the accumulation type
  const Problem p(x, s, gram, kernel, stride, padding, dilation, form);
  const auto options = x.options().dtype(p.type);
  const OptionalTensor g = in_type(gram, p.type);
  const Tensor values = at::zeros({p.factors, p.samples}, options);
  const Tensor saved = keep ? at::empty(p.saved_sizes(), options) : at::empty({0}, options);
  if (s.numel() == 0 || x.numel() == 0) {
    saved.zero_();
    return {values, saved};
  }
  for_each_chunk(p, x, s, max_bytes, [&](int64_t first, int64_t count, const Tensor& phi, const Tensor& factors) {
    Tensor product, other;
    if (p.form == Form::kDirect) {
      const Tensor patches = p.windows.patches(phi).flatten(0, 1);
      product = apart(at::bmm(together(factors), patches.transpose(1, 2)), p.factors, p.groups);  // Gamma
      other = times_gram(g, product);
    } else {
      const Tensor patches = p.form == Form::kPatches ? p.windows.patches(phi).flatten(0, 1) : Tensor();
      const Tensor pairs = patches.defined() ? at::bmm(patches.transpose(1, 2), patches) : p.windows.pairs(phi);
      product = apart(product_like(together(factors), pairs, factors), p.factors, p.groups);
      other = times_gram(g, factors);
    }
    values.narrow(1, first, count).copy_((product * other).sum({2, 3, 4}));
    if (keep) saved.narrow(1, first, count).copy_(product);
  });
  return {values, saved};
}

std::tuple<Tensor, Tensor, Tensor> gram_trace_backward(const Tensor& grad, const Tensor& x, const Tensor& s,
                                                       const OptionalTensor& gram, const Tensor& saved,
                                                       IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding,
                                                       IntArrayRef dilation, std::string_view form, int64_t max_bytes,
                                                       bool grad_input, bool grad_factors, bool grad_gram) {
  const WithoutAutocast guard(c10::DispatchKey::AutocastCPU);  // products in the accumulation type
  const Problem p(x, s, gram, kernel, stride, padding, dilation, form);
  TORCH_CHECK_VALUE(saved.sizes() == IntArrayRef(p.saved_sizes()), "gram_trace_backward: saved must have shape ",
                    IntArrayRef(p.saved_sizes()), ", got ", saved.sizes());
  const Tensor dx = grad_input ? at::zeros_like(x) : at::empty({0}, x.options());
  const Tensor ds = grad_factors ? at::zeros_like(s) : at::empty({0}, s.options());
  const auto options = x.options().dtype(p.type);
  const Tensor dg = at::zeros(grad_gram ? IntArrayRef({p.groups, p.neurons, p.neurons}) : IntArrayRef({0}), options);
  const at::ScalarType gram_type = gram ? gram->scalar_type() : p.type;
  if (s.numel() == 0 || x.numel() == 0) return {dx, ds, dg.to(gram_type)};
  const OptionalTensor g = in_type(gram, p.type);
  for_each_chunk(p, x, s, max_bytes, [&](int64_t first, int64_t count, const Tensor& phi, const Tensor& factors) {
    const Tensor upstream = grad.narrow(1, first, count).to(p.type).view({p.factors, count, 1, 1, 1});
    const Tensor product = saved.narrow(1, first, count);
    const auto set_factors = [&](const Tensor& d) {
      const Tensor part = ds.narrow(1, first, count);
      part.copy_(apart(d, p.factors, p.groups).reshape(part.sizes()));
    };
    const auto add_columns = [&](const Tensor& columns) {  // (b * g, I, Q)
      const Tensor part = dx.narrow(0, first, count);
      if (p.windows.pointwise) {
        part.copy_(columns.reshape(part.sizes()));
        return;
      }
      const Tensor sums = part.scalar_type() == p.type ? part : at::zeros(part.sizes(), options);
      p.windows.add_patches(columns.view({count, p.groups, p.fan_in, -1}), sums);
      if (!sums.is_same(part)) part.copy_(sums);
    };
    if (p.form == Form::kDirect) {
      const Tensor patches = p.windows.patches(phi).flatten(0, 1);
      const Tensor d_gamma = together(times_gram(g, product) * (2 * upstream));  // (b g, K O, I)
      if (grad_factors) set_factors(product_like(d_gamma, patches, factors));
      if (grad_input) add_columns(product_like(d_gamma.transpose(1, 2), together(factors), patches));
    } else {
      if (grad_factors) set_factors(together(times_gram(g, product) * (2 * upstream)));
      if (grad_input) {
        const Tensor pairs = at::bmm(together(times_gram(g, factors) * upstream).transpose(1, 2), together(factors));
        if (p.form == Form::kShifts) {
          const Tensor part = dx.narrow(0, first, count);
          part.copy_(p.windows.pairs_backward(pairs, phi).view(part.sizes()));
        } else {
          add_columns(at::bmm(p.windows.patches(phi).flatten(0, 1), pairs).mul_(2));
        }
      }
    }
    if (grad_gram) {  // sum of g Gamma Gamma^T, which is g s <phi, phi> s^T
      const Tensor right = p.form == Form::kDirect ? product : factors;
      const auto by_group = [&](const Tensor& t) {
        return t.permute({2, 3, 0, 1, 4}).reshape({p.groups, p.neurons, -1});
      };
      dg.add_(at::bmm(by_group(product * upstream), by_group(right).transpose(1, 2)));
    }
  });
  return {dx, ds, dg.to(gram_type)};
}

}  // namespace

TORCH_LIBRARY_IMPL(fam_ext, CPU, m) {
  m.impl("gram_trace", gram_trace);
  m.impl("gram_trace_backward", gram_trace_backward);
}

}  // namespace fam_ext
