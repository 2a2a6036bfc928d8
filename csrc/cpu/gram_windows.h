// Patches of a convolution without a copy of all of them: copies and sums over the kernel's offsets, for a chunk of samples, and
// the Gram matrix of patches as sums over shifts of the Gram matrix of positions. Zeros outside the input are never stored.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <vector>

namespace fam_ext {
namespace gram {

using at::IntArrayRef;
using at::Tensor;

inline int64_t product(IntArrayRef sizes) {
  int64_t n = 1;
  for (const int64_t size : sizes) n *= size;
  return n;
}

struct Axis {
  int64_t in, out, kernel, stride, padding, dilation;

  bool trivial() const { return kernel == 1 && stride == 1 && padding == 0 && in == out; }
  // The outputs [first, last) that see the input at offset j of the kernel, and where the first of them does.
  struct Run {
    int64_t first, last, start;
  };
  Run run(int64_t j) const {
    const int64_t shift = j * dilation - padding;  // output q sees input q * stride + shift
    const int64_t first = shift >= 0 ? 0 : (-shift + stride - 1) / stride;
    const int64_t room = in - 1 - shift;
    const int64_t last = room < 0 ? 0 : std::min(out, room / stride + 1);
    return {first, std::max(first, last), first * stride + shift};
  }
};

struct Windows {
  std::vector<Axis> axes;
  int64_t positions = 1, outputs = 1, volume = 1;  // N, Q, kernel volume
  bool pointwise = true;

  Windows(IntArrayRef in, IntArrayRef out, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding,
          IntArrayRef dilation) {
    for (size_t a = 0; a < in.size(); ++a) {
      axes.push_back({in[a], out[a], kernel[a], stride[a], padding[a], dilation[a]});
      positions *= in[a];
      outputs *= out[a];
      volume *= kernel[a];
      pointwise = pointwise && axes.back().trivial();
    }
  }

  // f(offset, its number, outputs' view of `columns`, inputs' view of `x`) for every offset that some output sees inside the input;
  // columns (b, g, C, volume, *out), x (b, g, C, *in)
  template <typename F>
  void for_each_offset(const Tensor& columns, const Tensor& x, const F& f) const {
    for (int64_t number = 0; number < volume; ++number) {
      int64_t rest = number;
      Tensor to = columns.select(3, number), from = x;
      bool seen = true;
      for (int64_t a = static_cast<int64_t>(axes.size()) - 1; a >= 0 && seen; --a) {
        const Axis& axis = axes[a];
        const Axis::Run run = axis.run(rest % axis.kernel);
        rest /= axis.kernel;
        seen = run.first < run.last;
        if (!seen) break;
        to = to.slice(3 + a, run.first, run.last);
        from = from.slice(3 + a, run.start, run.start + (run.last - run.first - 1) * axis.stride + 1, axis.stride);
      }
      if (seen) f(to, from);
    }
  }

  Tensor empty_columns(const Tensor& x) const {
    std::vector<int64_t> sizes{x.size(0), x.size(1), x.size(2), volume};
    for (const Axis& axis : axes) sizes.push_back(axis.out);
    return at::zeros(sizes, x.options());
  }

  // (b, g, C, *in) -> (b, g, C * volume, Q)
  Tensor patches(const Tensor& x) const {
    if (pointwise) return x.flatten(3);
    const Tensor columns = empty_columns(x);
    for_each_offset(columns, x, [](const Tensor& to, const Tensor& from) { to.copy_(from); });
    return columns.flatten(4).flatten(2, 3);
  }

  // The transpose of patches: (b, g, C * volume, Q) added into dx (b, g, C, *in).
  void add_patches(const Tensor& columns, const Tensor& dx) const {
    std::vector<int64_t> sizes{dx.size(0), dx.size(1), dx.size(2), volume};
    for (const Axis& axis : axes) sizes.push_back(axis.out);
    for_each_offset(columns.reshape(sizes), dx, [](const Tensor& from, const Tensor& to) { to.add_(from); });
  }

  // Sums over the kernel's offsets, one axis at a time, of (n, *in, *in) at both positions -> (n, *out, *out); or the transpose.
  Tensor shifts(Tensor pairs, bool transpose) const {
    const int64_t rank = static_cast<int64_t>(axes.size());
    for (int64_t a = 0; a < rank; ++a) {
      const Axis& axis = axes[a];
      if (axis.trivial()) continue;
      std::vector<int64_t> sizes = pairs.sizes().vec();
      sizes[1 + a] = sizes[1 + rank + a] = transpose ? axis.in : axis.out;
      const Tensor sums = at::zeros(sizes, pairs.options());
      const Tensor &at_outputs = transpose ? pairs : sums, &at_inputs = transpose ? sums : pairs;
      for (int64_t j = 0; j < axis.kernel; ++j) {
        const Axis::Run run = axis.run(j);
        if (run.first >= run.last) continue;
        const int64_t end = run.start + (run.last - run.first - 1) * axis.stride + 1;
        Tensor outputs = at_outputs, inputs = at_inputs;
        for (const int64_t dim : {1 + a, 1 + rank + a}) {
          outputs = outputs.slice(dim, run.first, run.last);
          inputs = inputs.slice(dim, run.start, end, axis.stride);
        }
        if (transpose) {
          inputs.add_(outputs);
        } else {
          outputs.add_(inputs);
        }
      }
      pairs = sums;
    }
    return pairs;
  }

  // <phi_q, phi_q'> of x (b, g, C, *in), as (b * g, Q, Q).
  Tensor pairs(const Tensor& x) const {
    const Tensor flat = x.flatten(3).flatten(0, 1);
    const Tensor own = at::bmm(flat.transpose(1, 2), flat);
    return pointwise ? own
                     : shifts(own.reshape(sizes_of_pairs(own.size(0), true)), false).reshape({-1, outputs, outputs});
  }

  // dx where `grad` (b * g, Q, Q), symmetric, is the gradient of pairs(x): as (b * g, C, N).
  Tensor pairs_backward(const Tensor& grad, const Tensor& x) const {
    const Tensor flat = x.flatten(3).flatten(0, 1);
    const Tensor at_inputs =
        pointwise ? grad
                  : shifts(grad.reshape(sizes_of_pairs(grad.size(0), false)), true).reshape({-1, positions, positions});
    return at::bmm(flat, at_inputs).mul_(2);
  }

 private:
  std::vector<int64_t> sizes_of_pairs(int64_t count, bool in) const {
    std::vector<int64_t> sizes{count};
    for (int side = 0; side < 2; ++side) {
      for (const Axis& axis : axes) sizes.push_back(in ? axis.in : axis.out);
    }
    return sizes;
  }
};

}  // namespace gram
}  // namespace fam_ext
