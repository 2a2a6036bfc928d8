#include "cuda/patch_sqnorm.cuh"

namespace fam_ext::gpu {
namespace {

constexpr int64_t kMostBlocks = int64_t{1} << 20;  // of the kernels that loop over what is left

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
unsigned looping_blocks(int64_t threads) {
  return static_cast<unsigned>(std::min(kMostBlocks, ceil_div(threads, kPatchThreads)));
}

template <typename S, typename T>
cudaError_t squares(const PatchView& view, T* sums, cudaStream_t stream) {
  constexpr int V = kPack<S>;
  const int64_t items = view.batch * view.groups * view.positions();
  if (view.channels_dense && !view.position_packs && view.channels > 1) {
    const int64_t loads = view.channel_packs ? view.channels / V : view.channels;
    int lanes = 1;
    while (lanes < kWarp && lanes < loads) lanes *= 2;
    const unsigned blocks = static_cast<unsigned>(ceil_div(items * lanes, kPatchThreads));
    if (view.channel_packs) {
      const auto kernel = squares_by_channel<S, T, V>;
      FAM_LAUNCH(kernel, blocks, kPatchThreads, 0, stream, view, sums, items, lanes);
    } else {
      const auto kernel = squares_by_channel<S, T, 1>;
      FAM_LAUNCH(kernel, blocks, kPatchThreads, 0, stream, view, sums, items, lanes);
    }
    return cudaGetLastError();
  }
  int slices = 1;
  while (slices < 8 && slices * 8 <= view.channels) slices *= 2;
  const int64_t loads = view.position_packs ? items / V : items;
  const unsigned blocks = static_cast<unsigned>(ceil_div(loads, kPatchThreads / slices));
  if (view.position_packs) {
    const auto kernel = squares_by_position<S, T, V>;
    FAM_LAUNCH(kernel, blocks, kPatchThreads, 0, stream, view, sums, items, slices);
  } else {
    const auto kernel = squares_by_position<S, T, 1>;
    FAM_LAUNCH(kernel, blocks, kPatchThreads, 0, stream, view, sums, items, slices);
  }
  return cudaGetLastError();
}

template <typename S, typename T>
cudaError_t scale(const PatchView& view, const T* factors, cudaStream_t stream) {
  constexpr int V = kPack<S>;
  const int64_t entries = view.batch * view.groups * view.channels * view.positions();
  const bool along_channels = view.channels_dense && !view.position_packs;
  if (view.position_packs || view.channel_packs) {
    const auto kernel = scale_packs<S, T, V>;
    FAM_LAUNCH(kernel, looping_blocks(entries / V), kPatchThreads, 0, stream, view, factors, entries / V,
               along_channels);
  } else {
    const auto kernel = scale_packs<S, T, 1>;
    FAM_LAUNCH(kernel, looping_blocks(entries), kPatchThreads, 0, stream, view, factors, entries, along_channels);
  }
  return cudaGetLastError();
}

}  // namespace

template <>
cudaError_t launch_channel_squares<float>(const PatchView& view, float* sums, cudaStream_t stream) {
  if (view.dtype == DType::kBFloat16) return squares<BFloat16>(view, sums, stream);
  if (view.dtype == DType::kHalf) return squares<Half>(view, sums, stream);
  return squares<float>(view, sums, stream);
}
template <>
cudaError_t launch_channel_squares<double>(const PatchView& view, double* sums, cudaStream_t stream) {
  return squares<double>(view, sums, stream);
}
template <>
cudaError_t launch_scale_channels<float>(const PatchView& view, const float* factors, cudaStream_t stream) {
  if (view.dtype == DType::kBFloat16) return scale<BFloat16>(view, factors, stream);
  if (view.dtype == DType::kHalf) return scale<Half>(view, factors, stream);
  return scale<float>(view, factors, stream);
}
template <>
cudaError_t launch_scale_channels<double>(const PatchView& view, const double* factors, cudaStream_t stream) {
  return scale<double>(view, factors, stream);
}

template <typename T>
cudaError_t launch_window_sums(const T* source, T* target, int64_t outer, const WindowAxis& axis, int64_t inner,
                               cudaStream_t stream) {
  const auto kernel = window_sums_kernel<T>;
  FAM_LAUNCH(kernel, looping_blocks(outer * axis.to() * inner), kPatchThreads, 0, stream, source, target, outer, axis,
             inner);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_plane_sums(const T* source, T* target, int64_t outer, const WindowAxis& a, const WindowAxis& b,
                              int64_t inner, bool& fits, cudaStream_t stream) {
  const int64_t line = b.to() * inner, columns = std::min<int64_t>(line, 64);
  int64_t rows = std::min<int64_t>(a.to(), kPlaneRows);
  const auto held = [&a](int64_t outputs) {  // most sources of so many neighbouring outputs
    const int64_t reach = (a.kernel - 1) * a.dilation;
    return std::min(a.from(),
                    a.transposed ? (outputs - 1 + reach) / a.stride + 2 : (outputs - 1) * a.stride + reach + 1);
  };
  const auto bytes = [&](int64_t outputs) { return held(outputs) * columns * static_cast<int64_t>(sizeof(T)); };
  while (rows > 1 && bytes(rows) > kPlaneBytes) rows /= 2;
  const int64_t tiles = outer * ceil_div(a.to(), rows) * ceil_div(line, columns);
  fits = bytes(rows) <= kPlaneBytes && tiles < (int64_t{1} << 31);
  if (!fits) return cudaSuccess;
  const auto kernel = plane_sums_kernel<T>;
  FAM_LAUNCH(kernel, static_cast<unsigned>(tiles), kPatchThreads, static_cast<size_t>(bytes(rows)), stream, source,
             target, a, b, inner, static_cast<int>(rows), static_cast<int>(columns));
  return cudaGetLastError();
}

#define FAM_INSTANTIATE(T)                                                                                        \
  template cudaError_t launch_window_sums<T>(const T*, T*, int64_t, const WindowAxis&, int64_t, cudaStream_t);    \
  template cudaError_t launch_plane_sums<T>(const T*, T*, int64_t, const WindowAxis&, const WindowAxis&, int64_t, \
                                            bool&, cudaStream_t);
FAM_INSTANTIATE(float)
FAM_INSTANTIATE(double)

}  // namespace fam_ext::gpu
