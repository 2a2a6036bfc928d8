// Noise of method="noise" on the CPU: sums and rank-one updates of activations, one pass over each. fam_ext/hessian/noise.py has
// the formulas, csrc/noise_autograd.cpp the derivatives. Vectors are of the accumulation type: float64 for float64, else float32.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <vector>

namespace fam_ext::noise {

// An activation as samples * groups matrices, whose rows are dense. Its other dimension has the other kind of vector:
// with `inside` (channels last, rows of a linear layer) columns are a group's channels and rows positions, else the reverse.
struct Matrices {
  int64_t samples, groups, channels, positions;  // channels of one group
  bool inside;

  int64_t count() const { return samples * groups; }
  int64_t rows() const { return inside ? positions : channels; }
  int64_t cols() const { return inside ? channels : positions; }
  int64_t step() const { return inside ? channels * groups : positions; }  // from row to row
  int64_t offset(int64_t matrix) const {
    return matrix / groups * groups * channels * positions +
           matrix % groups * (inside ? channels : channels * positions);
  }
};

// Of (B, C, *spatial), or with `linear` of `samples` blocks of rows (*rows, I); none where the memory is laid out otherwise.
std::optional<Matrices> matrices(const at::Tensor& tensor, int64_t samples, int64_t groups, bool linear);
// The tensor itself, or a copy that is laid out like that.
at::Tensor laid_out(const at::Tensor& tensor, const Matrices& like, bool linear);

// by_channel: (n, groups, channels), sample i has row i % n; by_position: (samples, groups, positions).
// Sums over channels, (samples, groups, positions), and over positions, (samples, groups, channels): of one, or both at once.
at::Tensor over_channels(const at::Tensor& x, const Matrices& m, const at::Tensor& by_channel);
std::pair<at::Tensor, at::Tensor> over_both(const at::Tensor& x, const Matrices& m, const at::Tensor& by_channel,
                                            const at::Tensor& by_position);
// out = x + by_channel by_position^T; out may be x
void add_outer(const at::Tensor& x, const Matrices& m, const at::Tensor& by_channel, const at::Tensor& by_position,
               const at::Tensor& out);
// out = x + left <right, x> at, at (samples, positions) or not defined
void add_rank_one(const at::Tensor& x, const Matrices& m, const at::Tensor& left, const at::Tensor& right,
                  const at::Tensor& at, const at::Tensor& out);

// x (N, I), signs (N, I) in the accumulation type: out = x + scale |x| signs, and |x|, (N)
void add_length(const at::Tensor& x, const at::Tensor& signs, double scale, const at::Tensor& length,
                const at::Tensor& out);
// out = grad + scale <grad, signs> x / |x|; out may be grad
void add_length_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& signs, double scale,
                         const at::Tensor& length, const at::Tensor& out);

// Where the places of a convolution's kernel lie.
struct Window {
  std::vector<int64_t> stride, before, dilation;  // before: padding in front
  int64_t mode = 0;                               // zeros, reflect, replicate, circular
  bool transposed = false;
};

// out[o] += sum_k place[k] inner[what the k-th place of the kernel sees from o]; inner (S, G, *in), place (n, G, 1, *kernel),
// sample i has row i % n, out (S, G, *out). With `adjoint` inner += ... of out.
void shift(const at::Tensor& inner, const at::Tensor& place, const Window& window, const at::Tensor& out, bool adjoint);

}  // namespace fam_ext::noise
