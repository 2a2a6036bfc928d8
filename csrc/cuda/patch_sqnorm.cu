#include "cuda/patch_sqnorm.cuh"

namespace fam_ext::gpu {
namespace {

constexpr int64_t kMostBlocks = int64_t{1} << 20;  // of the kernels that loop over what is left
constexpr int64_t kScaleBlocks = 4096;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
unsigned looping_blocks(int64_t threads) {
  return static_cast<unsigned>(std::min(kMostBlocks, ceil_div(threads, kPatchThreads)));
}

// Whether threads go along the channels of an item, and the threads that share it then.
bool along_channels(const PatchView& view) { return view.channels_dense && !view.position_packs && view.channels > 1; }
int lanes_of(int64_t loads) {
  int lanes = 1;
  while (lanes < kWarp && lanes < loads) lanes *= 2;
  return lanes;
}

template <int V, typename S, typename T>
cudaError_t squares(const PatchView& view, T* sums, cudaStream_t stream) {
  const int64_t items = view.batch * view.groups * view.positions();
  if (along_channels(view)) {
    const int lanes = lanes_of(view.channels / V);
    const unsigned blocks = static_cast<unsigned>(ceil_div(items * lanes, kPatchThreads));
    const auto kernel = squares_by_channel<S, T, V>;
    FAM_LAUNCH(kernel, blocks, kPatchThreads, 0, stream, view, sums, items, lanes);
    return cudaGetLastError();
  }
  int slices = 1;
  while (slices < 8 && slices * 8 <= view.channels) slices *= 2;
  const unsigned blocks = static_cast<unsigned>(ceil_div(items / V, kPatchThreads / slices));
  const auto kernel = squares_by_position<S, T, V>;
  FAM_LAUNCH(kernel, blocks, kPatchThreads, 0, stream, view, sums, items, slices);
  return cudaGetLastError();
}

template <int V, typename S, typename T>
cudaError_t scale(const PatchView& view, const T* factors, cudaStream_t stream) {
  const int64_t items = view.batch * view.groups * view.positions();
  if (along_channels(view)) {
    const int lanes = lanes_of(view.channels / V);
    const unsigned blocks = static_cast<unsigned>(ceil_div(items * lanes, kPatchThreads));
    const auto kernel = scale_by_channel<S, T, V>;
    FAM_LAUNCH(kernel, blocks, kPatchThreads, 0, stream, view, factors, items, lanes);
    return cudaGetLastError();
  }
  // blocks that share the channels: enough to fill a device, as long as a thread has some packs to load together
  const int64_t blocks = ceil_div(items / V, kPatchThreads), wanted = ceil_div(kScaleBlocks, blocks);
  const int64_t shares = std::clamp<int64_t>(view.channels / (2 * kScaleLoads), 1, wanted);
  const auto kernel = scale_by_position<S, T, V>;
  FAM_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(shares)), kPatchThreads, 0, stream, view,
             factors, items);
  return cudaGetLastError();
}

// f(V, S()) for what lies in memory: packs of V numbers of type S.
template <typename T, typename F>
cudaError_t for_packs(const PatchView& view, const F& f) {
  const auto packs = [&](auto s) {
    using S = decltype(s);
    const bool whole = view.position_packs || view.channel_packs;
    return whole ? f(std::integral_constant<int, kPack<S>>{}, s) : f(std::integral_constant<int, 1>{}, s);
  };
  if constexpr (std::is_same_v<T, double>) {
    return packs(double{});
  } else {
    return for_type<T>(view.dtype, packs);
  }
}

}  // namespace

template <typename T>
cudaError_t launch_channel_squares(const PatchView& view, T* sums, cudaStream_t stream) {
  return for_packs<T>(view,
                      [&](auto v, auto s) { return squares<decltype(v)::value, decltype(s)>(view, sums, stream); });
}

template <typename T>
cudaError_t launch_scale_channels(const PatchView& view, const T* factors, cudaStream_t stream) {
  return for_packs<T>(view,
                      [&](auto v, auto s) { return scale<decltype(v)::value, decltype(s)>(view, factors, stream); });
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
  template cudaError_t launch_channel_squares<T>(const PatchView&, T*, cudaStream_t);                             \
  template cudaError_t launch_scale_channels<T>(const PatchView&, const T*, cudaStream_t);                        \
  template cudaError_t launch_window_sums<T>(const T*, T*, int64_t, const WindowAxis&, int64_t, cudaStream_t);    \
  template cudaError_t launch_plane_sums<T>(const T*, T*, int64_t, const WindowAxis&, const WindowAxis&, int64_t, \
                                            bool&, cudaStream_t);
FAM_INSTANTIATE(float)
FAM_INSTANTIATE(double)

}  // namespace fam_ext::gpu
