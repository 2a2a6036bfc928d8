#include "noise_autograd.h"

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>

namespace fam_ext::noise {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;
using Numbers = std::vector<int64_t>;  // what a node keeps of a Layout, and of a Window after it

Numbers numbers_of(const Layout& l) {
  const Matrices& m = l.matrices;
  return {m.samples, m.groups, m.channels, m.positions, m.inside, l.linear};
}

Layout layout_of(const Numbers& n) { return {{n[0], n[1], n[2], n[3], n[4] != 0}, n[5] != 0}; }

Numbers numbers_of(const Layout& l, const Window& w) {
  Numbers n = numbers_of(l);
  n.push_back(w.mode);
  n.push_back(w.transposed);
  for (const auto* of_axes : {&w.stride, &w.before, &w.dilation}) n.insert(n.end(), of_axes->begin(), of_axes->end());
  return n;
}

Window window_of(const Numbers& n) {
  const size_t rank = (n.size() - 8) / 3;
  const auto axes = [&](size_t k) { return Numbers(n.begin() + 8 + k * rank, n.begin() + 8 + (k + 1) * rank); };
  return {axes(0), axes(1), axes(2), n[6], n[7] != 0};
}

Numbers kept(AutogradContext* ctx) { return ctx->saved_data["numbers"].toIntVector(); }

// Where to write the sum of a gradient and something: into the gradient where nothing else holds it, the rule by which torch sums
// gradients in place.
Tensor target_for(const Tensor& grad, const Tensor& laid) {
  const bool ours = laid.is_same(grad) && grad.use_count() <= 2 && grad.storage().use_count() == 1;
  return ours ? grad : at::empty_like(laid);
}

Tensor rows_of(const Tensor& x, const Layout& l) {  // (samples, groups, channels, positions)
  const Matrices& m = l.matrices;
  if (l.linear) return x.reshape({m.samples, m.positions, m.channels}).transpose(1, 2).unsqueeze(1);
  return x.reshape({m.samples, m.groups, m.channels, m.positions});
}

Tensor for_samples(const Tensor& rows, int64_t samples) {  // row i % n for every sample i
  if (rows.size(0) == samples) return rows;
  return rows.index_select(0, at::arange(samples, at::kLong).remainder(rows.size(0)));
}

at::DimVector with_spatial(const Tensor& x, const Matrices& m) {  // (samples, groups, *spatial of x)
  at::DimVector shape{m.samples, m.groups};
  shape.append(x.sizes().begin() + 2, x.sizes().end());
  return shape;
}

Tensor rank_one_pass(const Tensor& x, const Layout& l, const Tensor& left, const Tensor& right, const Tensor& at,
                     bool may_write) {
  const Tensor laid = laid_out(x, l.matrices, l.linear);
  const Tensor out = may_write ? target_for(x, laid) : at::empty_like(laid);
  add_rank_one(laid, l.matrices, left, right, at, out);
  return out;
}

std::optional<Tensor> given(const Tensor& t) { return t.defined() ? std::optional<Tensor>(t) : std::nullopt; }

struct RankOne : Function<RankOne> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& left, const Tensor& right,
                        const std::optional<Tensor>& at, const Numbers& numbers) {
    const Tensor weights = at.value_or(Tensor());
    ctx->save_for_backward({left, right, weights});
    ctx->saved_data["numbers"] = numbers;
    return rank_one_pass(x, layout_of(numbers), left, right, weights, false);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Numbers numbers = kept(ctx);
    const Tensor dx = at::GradMode::is_enabled()
                          ? RankOne::apply(grads[0], saved[1], saved[0], given(saved[2]), numbers)
                          : rank_one_pass(grads[0], layout_of(numbers), saved[1], saved[0], saved[2], true);
    return {dx, Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

struct WithLength : Function<WithLength> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& signs, double scale) {
    const Tensor length = at::empty({x.size(0)}, signs.options()), out = at::empty_like(x);
    add_length(x, signs, scale, length, out);
    ctx->save_for_backward({x, signs, length});
    ctx->saved_data["scale"] = scale;
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &grad = grads[0], &x = saved[0], &signs = saved[1], &length = saved[2];
    const double scale = ctx->saved_data["scale"].toDouble();
    if (at::GradMode::is_enabled()) {
      const Tensor wide = x.to(signs.scalar_type());
      const Tensor norm = at::linalg_vector_norm(wide, 2, at::IntArrayRef{1}, true);
      const Tensor inner = (grad.to(signs.scalar_type()) * signs).sum(1, true);
      const Tensor factor = at::where(norm == 0, at::zeros_like(norm), scale * inner / norm);
      return {grad + (factor * wide).to(x.scalar_type()), Tensor(), Tensor()};
    }
    const Tensor laid = grad.contiguous();
    Tensor out = target_for(grad, laid);
    add_length_backward(laid, x, signs, scale, length, out);
    return {out, Tensor(), Tensor()};
  }
};

struct Project : Function<Project> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& vector, const Numbers& numbers) {
    ctx->save_for_backward({vector});
    ctx->saved_data["numbers"] = numbers;
    ctx->saved_data["shape"] = x.sizes();
    ctx->saved_data["dtype"] = static_cast<int64_t>(x.scalar_type());
    ctx->set_materialize_grads(false);
    const Matrices m = layout_of(numbers).matrices;
    return {x, at::_unsafe_view(over_channels(x, m, vector), with_spatial(x, m))};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Tensor &of_x = grads[0], &of_inner = grads[1];
    if (!of_inner.defined()) return {of_x, Tensor(), Tensor()};
    const Tensor vector = ctx->get_saved_variables()[0];
    const Layout l = layout_of(kept(ctx));
    if (!of_x.defined() || at::GradMode::is_enabled()) {
      const Tensor rows = for_samples(vector, l.matrices.samples).unsqueeze(3) * of_inner.flatten(2).unsqueeze(2);
      const Tensor part = rows.reshape(ctx->saved_data["shape"].toIntVector());
      const Tensor cast = part.to(static_cast<at::ScalarType>(ctx->saved_data["dtype"].toInt()));
      return {of_x.defined() ? of_x + cast : cast, Tensor(), Tensor()};
    }
    const Tensor laid = laid_out(of_x, l.matrices, l.linear), out = target_for(of_x, laid);
    add_outer(laid, l.matrices, vector, of_inner.contiguous(), out);
    return {out, Tensor(), Tensor()};
  }
};

// The window's sums, linear in `values`; the adjoint goes from outputs to inputs.
struct Shift : Function<Shift> {
  static Tensor pass(const Tensor& values, const Tensor& place, const Window& window, at::IntArrayRef shape,
                     bool adjoint) {
    const Tensor result = at::zeros(shape, values.options()), given = values.contiguous();
    adjoint ? shift(result, place, window, given, true) : shift(given, place, window, result, false);
    return result;
  }

  static Tensor forward(AutogradContext* ctx, const Tensor& values, const Tensor& place, const Numbers& numbers,
                        at::IntArrayRef shape, bool adjoint) {
    ctx->save_for_backward({place});
    ctx->saved_data["numbers"] = numbers;
    ctx->saved_data["shape"] = values.sizes();
    ctx->saved_data["adjoint"] = adjoint;
    return pass(values, place, window_of(numbers), shape, adjoint);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Tensor result = Shift::apply(grads[0], ctx->get_saved_variables()[0], kept(ctx),
                                       ctx->saved_data["shape"].toIntVector(), !ctx->saved_data["adjoint"].toBool());
    return {result, Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

// Products keep their dtype.
struct NoAutocast {
  const c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

// scale W a, (n, groups, channels), in the accumulation type
Tensor weight_product(const Tensor& weight, const Tensor& left, double scale, int64_t channels) {
  const NoAutocast guard;
  const Tensor canonical = weight.reshape({left.size(1), channels, left.size(2)});
  const Tensor product = at::matmul(left.to(weight.scalar_type()).transpose(0, 1), canonical.transpose(1, 2));
  return product.transpose(0, 1).to(left.scalar_type()) * scale;
}

struct Outer : Function<Outer> {
  static Tensor forward(AutogradContext* ctx, const Tensor& z, const Tensor& weight, const Tensor& inner,
                        const Tensor& left, const Tensor& place, const Numbers& numbers, double scale) {
    const Layout l = layout_of(numbers);
    const Tensor by_channel = weight_product(weight, left, scale, l.matrices.channels).contiguous();
    const Tensor seen = Shift::pass(inner, place, window_of(numbers), with_spatial(z, l.matrices), false);
    const Tensor out = at::empty_like(z);
    add_outer(z, l.matrices, by_channel, seen, out);
    ctx->save_for_backward({weight, inner, left, place, by_channel, seen});
    ctx->saved_data["numbers"] = numbers;
    ctx->saved_data["scale"] = scale;
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &grad = grads[0], &weight = saved[0], &inner = saved[1], &left = saved[2], &place = saved[3];
    const Numbers numbers = kept(ctx);
    const Layout l = layout_of(numbers);
    const Matrices& m = l.matrices;
    const double scale = ctx->saved_data["scale"].toDouble();
    const int64_t n = left.size(0);
    Tensor of_inner, of_channel;
    if (at::GradMode::is_enabled()) {
      const Tensor by_channel = for_samples(weight_product(weight, left, scale, m.channels), m.samples);
      const Tensor seen = Shift::apply(inner, place, numbers, with_spatial(grad, m), false);
      const Tensor rows = rows_of(grad, l).to(left.scalar_type());
      of_inner = Shift::apply((rows * by_channel.unsqueeze(3)).sum(2).reshape(seen.sizes()), place, numbers,
                              inner.sizes(), true);
      of_channel = (rows * seen.flatten(2).unsqueeze(2)).sum(3);
    } else {
      Tensor of_seen;
      std::tie(of_seen, of_channel) = over_both(laid_out(grad, m, false), m, saved[4], saved[5].flatten(2));
      of_inner = Shift::pass(of_seen.reshape(saved[5].sizes()), place, window_of(numbers), inner.sizes(), true);
    }
    Tensor of_weight;
    if (ctx->needs_input_grad(1)) {
      const NoAutocast guard;
      if (n < m.samples) {  // samples that share a row
        const Tensor padded = at::constant_pad_nd(of_channel, {0, 0, 0, 0, 0, (n - m.samples % n) % n});
        of_channel = padded.reshape({-1, n, m.groups, m.channels}).sum(0);
      }
      const Tensor dtype_of_weight = (of_channel * scale).to(weight.scalar_type());
      of_weight = at::matmul(dtype_of_weight.permute({1, 2, 0}), left.to(weight.scalar_type()).transpose(0, 1))
                      .reshape(weight.sizes());
    }
    return {grad, of_weight, of_inner, Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

}  // namespace

Tensor rank_one(const Tensor& x, const Layout& layout, const Tensor& left, const Tensor& right, const Tensor& at) {
  return RankOne::apply(x, left, right, given(at), numbers_of(layout));
}

Tensor with_length(const Tensor& x, const Tensor& signs, double scale) { return WithLength::apply(x, signs, scale); }

std::pair<Tensor, Tensor> project(const Tensor& x, const Layout& layout, const Tensor& vector) {
  const variable_list both = Project::apply(x, vector, numbers_of(layout));
  return {both[0], both[1]};
}

Tensor outer(const Tensor& z, const Layout& layout, const Tensor& weight, const Tensor& inner, const Tensor& left,
             const Tensor& place, const Window& window, double scale) {
  return Outer::apply(z, weight, inner, left, place, numbers_of(layout, window), scale);
}

}  // namespace fam_ext::noise
