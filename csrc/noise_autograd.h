// The noise's passes (csrc/cpu/noise.h) with derivatives of any order: where a backward pass builds a graph, plain operations of
// torch take the place of the kernels. Vectors are of the accumulation type and need no gradient.
#pragma once

#include "cpu/noise.h"

namespace fam_ext::noise {

// How an activation is laid out, and whether it is that of a linear layer.
struct Layout {
  Matrices matrices;
  bool linear;
};

// x + left <right, x> at; left, right (n, groups, channels), at (samples, positions) or not defined
at::Tensor rank_one(const at::Tensor& x, const Layout& layout, const at::Tensor& left, const at::Tensor& right,
                    const at::Tensor& at);
// x + scale |x| signs for rows (N, I)
at::Tensor with_length(const at::Tensor& x, const at::Tensor& signs, double scale);
// x again and <vector, x>, (samples, groups, *spatial): their gradients come back together, and are added in one pass
std::pair<at::Tensor, at::Tensor> project(const at::Tensor& x, const Layout& layout, const at::Tensor& vector);
// z + (scale W a) (what the window sees of inner), inner (samples, groups, *spatial), left a (n, groups, I), place as `shift` has
// it; weight has groups * channels * I numbers in canonical order
at::Tensor outer(const at::Tensor& z, const Layout& layout, const at::Tensor& weight, const at::Tensor& inner,
                 const at::Tensor& left, const at::Tensor& place, const Window& window, double scale);

}  // namespace fam_ext::noise
