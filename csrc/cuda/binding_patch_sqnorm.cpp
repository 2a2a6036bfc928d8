#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <array>

#include "cuda/binding.h"
#include "cuda/patch_sqnorm.h"
#include "patch_windows.h"

namespace fam_ext::gpu {
namespace {

using at::IntArrayRef;

// The window along each of D, H, W, for an output of these sizes.
std::array<WindowAxis, 3> window_axes(const at::Tensor& input, IntArrayRef sizes, IntArrayRef kernel,
                                      IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation) {
  std::array<WindowAxis, 3> axes;
  const int64_t rank = input.dim() - 2;
  for (int64_t a = 0; a < rank; ++a) {
    axes[3 - rank + a] = {input.size(a + 2), sizes[a + 2], kernel[a], stride[a], padding[a], dilation[a], false};
  }
  return axes;
}

PatchView make_patch_view(const at::Tensor& x, const at::Tensor& dx, int64_t groups) {
  PatchView view;
  view.x = const_cast<void*>(x.const_data_ptr());
  view.dx = const_cast<void*>(dx.const_data_ptr());
  view.dtype = dtype_of(x);
  view.batch = x.size(0), view.groups = groups, view.channels = x.size(1) / groups;
  view.batch_step = x.stride(0), view.channel_step = x.stride(1);
  view.dx_batch_step = dx.stride(0), view.dx_channel_step = dx.stride(1);
  view.groups_inside = patch_groups_inside(x, groups);
  const int64_t rank = x.dim() - 2;
  bool dense = true;
  int64_t expected = 1;
  for (int64_t a = rank - 1; a >= 0; --a) {
    view.sizes[3 - rank + a] = x.size(a + 2);
    view.steps[3 - rank + a] = x.stride(a + 2);
    view.dx_steps[3 - rank + a] = dx.stride(a + 2);
    if (x.size(a + 2) != 1) dense = dense && x.stride(a + 2) == expected && dx.stride(a + 2) == expected;
    expected *= x.size(a + 2);
  }
  const auto packs = [&](int64_t elements) { return whole_packs(x, elements); };
  const auto step_packs = [&](int64_t size, int64_t step, int64_t dx_step) {
    return size == 1 || (packs(step) && packs(dx_step));
  };
  const bool start = aligned(x) && aligned(dx) && step_packs(x.size(0), view.batch_step, view.dx_batch_step);
  view.position_packs = start && dense && !(view.groups_inside && groups > 1) && packs(expected) &&
                        step_packs(x.size(1), view.channel_step, view.dx_channel_step);
  view.channels_dense = view.channel_step == 1 && view.dx_channel_step == 1;
  view.channel_packs = start && view.channels_dense && packs(view.channels);
  const auto channels_last = [](const at::Tensor& t) { return t.movedim(1, -1).is_contiguous(); };
  view.items_dense =
      view.channels_dense && (groups == 1 || view.groups_inside) && channels_last(x) && channels_last(dx);
  for (int a = 0; a < 3; ++a) {
    view.channel_packs = view.channel_packs && step_packs(view.sizes[a], view.steps[a], view.dx_steps[a]);
  }
  return view;
}

// All three axes of a dense (outer, D, H, W, inner) array; the last pass writes `out`.
template <typename T>
void sum_windows(const at::Tensor& source, const at::Tensor& out, const std::array<WindowAxis, 3>& axes, int64_t outer,
                 int64_t inner, cudaStream_t stream) {
  const auto& [d, h, w] = axes;
  at::Tensor current = source;
  const auto next = [&](int64_t elements, bool last) { return last ? out : at::empty({elements}, source.options()); };
  const auto pass = [&](int64_t before, const WindowAxis& axis, int64_t after, bool last) {
    if (axis.trivial()) return;
    const at::Tensor target = next(before * axis.to() * after, last);
    check_launch(
        launch_window_sums<T>(current.const_data_ptr<T>(), target.mutable_data_ptr<T>(), before, axis, after, stream));
    current = target;
  };
  bool done = false;
  if (!h.trivial() && !w.trivial()) {
    const at::Tensor target = next(outer * d.from() * h.to() * w.to() * inner, d.trivial());
    check_launch(launch_plane_sums<T>(current.const_data_ptr<T>(), target.mutable_data_ptr<T>(), outer * d.from(), h, w,
                                      inner, done, stream));
    if (done) current = target;
  }
  if (!done) {
    pass(outer * d.from() * h.from(), w, inner, d.trivial() && h.trivial());
    pass(outer * d.from(), h, w.to() * inner, d.trivial());
  }
  pass(outer, d, h.to() * w.to() * inner, true);
}

at::Tensor patch_sqnorm(const at::Tensor& input, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding,
                        IntArrayRef dilation, int64_t groups) {
  const Scope scope(input);
  at::DimVector sizes = patch_sqnorm_sizes(input, kernel, stride, padding, dilation, groups);
  const std::array<WindowAxis, 3> axes = window_axes(input, sizes, kernel, stride, padding, dilation);
  const PatchView view = make_patch_view(input, input, groups);
  if (view.groups_inside) std::rotate(sizes.begin() + 1, sizes.begin() + 2, sizes.end());
  const at::Tensor out = at::empty(sizes, input.options().dtype(patch_sqnorm_type(input)).memory_format(std::nullopt));
  const bool pointwise = std::all_of(axes.begin(), axes.end(), [](const WindowAxis& a) { return a.trivial(); });
  if (input.numel() == 0) {
    out.zero_();  // no channels, and no launch of no blocks
  } else if (out.numel() > 0) {
    AT_DISPATCH_FLOATING_TYPES(out.scalar_type(), "patch_sqnorm", [&] {
      const at::Tensor sums = pointwise ? out : at::empty({view.batch * groups * view.positions()}, out.options());
      if (sums.numel() > 0) {
        check_launch(launch_channel_squares<scalar_t>(view, sums.mutable_data_ptr<scalar_t>(), scope.stream()));
      }
      const int64_t outer = view.groups_inside ? view.batch : view.batch * groups;
      if (!pointwise) {
        sum_windows<scalar_t>(sums, out, axes, outer, view.groups_inside ? groups : 1, scope.stream());
      }
    });
  }
  return view.groups_inside ? out.movedim(-1, 1) : out;
}

at::Tensor patch_sqnorm_backward(const at::Tensor& grad, const at::Tensor& input, IntArrayRef kernel,
                                 IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups) {
  const Scope scope(input);
  const at::DimVector sizes = patch_sqnorm_sizes(input, kernel, stride, padding, dilation, groups);
  check_patch_sqnorm_gradient(grad, input, sizes);
  std::array<WindowAxis, 3> axes = window_axes(input, sizes, kernel, stride, padding, dilation);
  const at::Tensor dx = at::empty_like(input);
  if (dx.numel() == 0) return dx;
  const PatchView view = make_patch_view(input, dx, groups);
  const at::Tensor dense = view.groups_inside ? grad.movedim(1, -1).contiguous() : grad.contiguous();
  const bool pointwise = std::all_of(axes.begin(), axes.end(), [](const WindowAxis& a) { return a.trivial(); });
  for (WindowAxis& axis : axes) {
    axis.transposed = true;
    axis.whole = axis.dilation / axis.stride, axis.rest = axis.dilation % axis.stride;
  }
  AT_DISPATCH_FLOATING_TYPES(dense.scalar_type(), "patch_sqnorm_backward", [&] {
    at::Tensor factors = dense;
    if (!pointwise) {
      factors = at::empty({view.batch * groups * view.positions()}, dense.options());
      const int64_t outer = view.groups_inside ? view.batch : view.batch * groups;
      sum_windows<scalar_t>(dense, factors, axes, outer, view.groups_inside ? groups : 1, scope.stream());
    }
    check_launch(launch_scale_channels<scalar_t>(view, factors.const_data_ptr<scalar_t>(), scope.stream()));
  });
  return dx;
}

}  // namespace

TORCH_LIBRARY_IMPL(FAM_EXT_CUDA_LIBRARY, FAM_EXT_CUDA_KEY, m) {
  m.impl("patch_sqnorm", &patch_sqnorm);
  m.impl("patch_sqnorm_backward", &patch_sqnorm_backward);
}

}  // namespace fam_ext::gpu
