// What the trace of the weights' covariance needs of W alone. W is (O, I), contiguous, in the accumulation dtype.
#pragma once

#include <ATen/core/Tensor.h>

namespace fam_ext {

// D_st = |w_s - w_t|^2, (O, O), from differences: no digits are lost to a common offset or to nearly equal rows.
at::Tensor class_distances(const at::Tensor& weight);

// 2 (diag(M 1) - M) W, the gradient of 1/2 sum_st M_st D_st with respect to W. M (O, O) is symmetric; its diagonal is ignored,
// and it is overwritten.
at::Tensor laplacian_product(at::Tensor& m, const at::Tensor& weight, const at::Tensor& distances);

// |w_s|^2, (O); with `offset` (I) |w_s - offset|^2 from differences.
at::Tensor class_squares(const at::Tensor& weight, const at::Tensor& offset = {});

// W less its mean row where a common offset carries a fair part of the squared norms, else W itself; `squares` follows. The
// trace does not change, but |w_s|^2 - 2 <w_s, u> + |u|^2 would subtract large numbers.
at::Tensor center_if_offset(const at::Tensor& weight, at::Tensor& squares);

}  // namespace fam_ext
