// Squared norms of patches on the device: arguments and launches.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/view.h"

namespace fam_ext::gpu {

// A (B, groups x channels, D, H, W) tensor, missing axes of size 1, with `groups` groups. Items are the (batch entry, group, position)
// triples, or (batch entry, position, group) with groups inside: the order of the dense arrays of sums beside it.
struct PatchView {
  void *x = nullptr, *dx = nullptr;
  DType dtype = DType::kFloat;
  int64_t batch = 0, groups = 1, channels = 0;  // channels of one group
  int64_t sizes[3] = {1, 1, 1};
  int64_t batch_step = 0, channel_step = 0, steps[3] = {0, 0, 0};  // strides of x
  int64_t dx_batch_step = 0, dx_channel_step = 0, dx_steps[3] = {0, 0, 0};
  bool groups_inside = false;
  // which neighbours in memory make whole, aligned 16-byte packs, in x and in dx: positions, or the channels of a group
  bool position_packs = false, channel_packs = false;
  bool channels_dense = false;  // the channels of a group lie side by side
  bool items_dense = false;     // and the items one after another

  int64_t positions() const { return sizes[0] * sizes[1] * sizes[2]; }
};

// A sum over windows along one axis of a dense (outer, from, inner) array into (outer, to, inner): entry o of the output has the taps
// o * stride - padding + k * dilation. Its transpose takes an array over the outputs back to one over the inputs.
struct WindowAxis {
  int64_t inputs = 1, outputs = 1, kernel = 1, stride = 1, padding = 0, dilation = 1;
  bool transposed = false;
  int64_t whole = 0, rest = 0;  // dilation / stride and its remainder

  FAM_HOST_DEVICE int64_t from() const { return transposed ? outputs : inputs; }
  FAM_HOST_DEVICE int64_t to() const { return transposed ? inputs : outputs; }
  FAM_HOST_DEVICE bool trivial() const { return kernel == 1 && stride == 1 && padding == 0; }
};

// The entries of the source that the taps of one entry read, one tap after the other, with one division at most for all of them.
class Taps {
 public:
  FAM_HOST_DEVICE Taps(const WindowAxis& axis, int64_t entry) : axis_(axis) {
    if (!axis.transposed) {
      at_ = entry * axis.stride - axis.padding;
    } else {
      const int64_t shifted = entry + axis.padding;
      at_ = axis.stride == 1 ? shifted : shifted / axis.stride;
      rest_ = shifted - at_ * axis.stride;
    }
  }
  // -1 where the tap reads nothing
  FAM_HOST_DEVICE int64_t source() const { return rest_ == 0 && at_ >= 0 && at_ < axis_.from() ? at_ : -1; }
  FAM_HOST_DEVICE void advance() {
    if (!axis_.transposed) {
      at_ += axis_.dilation;
      return;
    }
    at_ -= axis_.whole;
    rest_ -= axis_.rest;
    if (rest_ < 0) rest_ += axis_.stride, --at_;
  }

 private:
  const WindowAxis& axis_;
  int64_t at_, rest_ = 0;  // of a transposed axis the entry is at_ where rest_ is 0
};

// Sums of squares over the channels of a group: x is read once. `sums` is dense over the items.
template <typename T>
cudaError_t launch_channel_squares(const PatchView& view, T* sums, cudaStream_t stream);
// dx = 2 factor x, `factors` dense over the items.
template <typename T>
cudaError_t launch_scale_channels(const PatchView& view, const T* factors, cudaStream_t stream);
// One axis, one number per thread.
template <typename T>
cudaError_t launch_window_sums(const T* source, T* target, int64_t outer, const WindowAxis& axis, int64_t inner,
                               cudaStream_t stream);
// Two neighbouring axes of a dense (outer, a, b, inner) array in one pass, sums along b kept in shared memory; false in `fits`, and
// nothing done, where a tile does not fit there.
template <typename T>
cudaError_t launch_plane_sums(const T* source, T* target, int64_t outer, const WindowAxis& a, const WindowAxis& b,
                              int64_t inner, bool& fits, cudaStream_t stream);

}  // namespace fam_ext::gpu
