// softmax_trace: the kernels without a head, and what both operations need of the weight alone.
#include "cuda/class_sums.cuh"
#include "cuda/row_passes.cuh"
#include "cuda/small_trace.cuh"

namespace fam_ext::gpu {

template <typename T>
cudaError_t launch_small_trace(const SmallTrace<T>& pass, SmallPhase first, SmallPhase last, cudaStream_t stream) {
  return launch_small<T, false>(pass, Head<T>{}, first, last, stream);
}

template <typename T>
cudaError_t launch_class_distances(const T* weight, int64_t classes, int64_t fan_in, T* distances,
                                   cudaStream_t stream) {
  const unsigned tiles = static_cast<unsigned>((classes + kDistanceTile - 1) / kDistanceTile);
  const auto kernel = class_distances_kernel<T>;
  FAM_LAUNCH(kernel, dim3(tiles, tiles), kDistanceThreads, 0, stream, weight, classes, fan_in, distances);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_column_sums(const RowPass<T>& pass, T* sums, T* t, cudaStream_t stream) {
  const int64_t stretches = std::max<int64_t>(1, (pass.fan_in + kRowThreads - 1) / kRowThreads);
  const auto kernel = column_sums_kernel<T>;
  FAM_LAUNCH(kernel, dim3(static_cast<unsigned>(pass.classes), static_cast<unsigned>(stretches)), kRowThreads, 0,
             stream, pass, sums, t);
  return cudaGetLastError();
}

#define FAM_INSTANTIATE(T)                                                                                    \
  template cudaError_t launch_small_trace<T>(const SmallTrace<T>&, SmallPhase, SmallPhase, cudaStream_t);     \
  template cudaError_t launch_softmax_rows<T, false>(const RowPass<T>&, const Head<T>&, cudaStream_t);        \
  template cudaError_t launch_row_values<T, false>(const RowPass<T>&, const Head<T>&, cudaStream_t);          \
  template cudaError_t launch_row_gradients<T, false>(const RowPass<T>&, const Head<T>&, bool, cudaStream_t); \
  template cudaError_t launch_class_distances<T>(const T*, int64_t, int64_t, T*, cudaStream_t);               \
  template cudaError_t launch_column_sums<T>(const RowPass<T>&, T*, T*, cudaStream_t);
FAM_INSTANTIATE(float)
FAM_INSTANTIATE(double)

}  // namespace fam_ext::gpu
