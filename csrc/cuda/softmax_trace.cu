// softmax_trace: the kernels without a head, and what both operations need of the weight alone.
#include "cuda/class_sums.cuh"
#include "cuda/row_passes.cuh"
#include "cuda/small_trace.cuh"

namespace fam_ext::gpu {

template <typename T>
cudaError_t launch_small_trace(const SmallTrace<T>& pass, cudaStream_t stream) {
  return for_type<T>(pass.logits.dtype,
                     [&](auto s) { return launch_small<T, false, decltype(s)>(pass, Head<T>{}, stream); });
}

template <typename T>
cudaError_t launch_class_distances(const T* weight, int64_t classes, int64_t fan_in, T* distances,
                                   cudaStream_t stream) {
  if (classes <= kPairClasses) {
    const unsigned blocks = static_cast<unsigned>((classes + kPairsPerBlock - 1) / kPairsPerBlock);
    const auto kernel = pair_distances_kernel<T>;
    FAM_LAUNCH(kernel, dim3(blocks, static_cast<unsigned>(classes)), kPairThreads, 0, stream, weight,
               static_cast<int>(classes), fan_in, distances);
    return cudaGetLastError();
  }
  const unsigned tiles = static_cast<unsigned>((classes + kDistanceTile - 1) / kDistanceTile);
  const auto kernel = class_distances_kernel<T>;
  FAM_LAUNCH(kernel, dim3(tiles, tiles), kDistanceThreads, 0, stream, weight, classes, fan_in, distances);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_column_sums(const RowPass<T>& pass, T* sums, T* t, cudaStream_t stream) {
  constexpr int64_t columns = kRowThreads * kSumColumns;
  const int64_t stretches = (pass.fan_in + columns - 1) / columns;
  const auto kernel = column_sums_kernel<T>;
  FAM_LAUNCH(kernel, dim3(static_cast<unsigned>(pass.classes), static_cast<unsigned>(stretches + 1)), kRowThreads, 0,
             stream, pass, sums, t);
  return cudaGetLastError();
}

#define FAM_INSTANTIATE(T)                                                                                    \
  template cudaError_t launch_small_trace<T>(const SmallTrace<T>&, cudaStream_t);                             \
  template cudaError_t launch_softmax_rows<T, false>(const RowPass<T>&, const Head<T>&, cudaStream_t);        \
  template cudaError_t launch_row_values<T, false>(const RowPass<T>&, const Head<T>&, cudaStream_t);          \
  template cudaError_t launch_row_gradients<T, false>(const RowPass<T>&, const Head<T>&, bool, cudaStream_t); \
  template cudaError_t launch_class_distances<T>(const T*, int64_t, int64_t, T*, cudaStream_t);               \
  template cudaError_t launch_column_sums<T>(const RowPass<T>&, T*, T*, cudaStream_t);
FAM_INSTANTIATE(float)
FAM_INSTANTIATE(double)

}  // namespace fam_ext::gpu
