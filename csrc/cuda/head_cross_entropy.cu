// head_cross_entropy: the kernels with a head.
#include "cuda/row_passes.cuh"
#include "cuda/small_trace.cuh"

namespace fam_ext::gpu {

template <typename T>
cudaError_t launch_small_head(const SmallTrace<T>& pass, const Head<T>& head, cudaStream_t stream) {
  if (head.features.dtype != pass.logits.dtype) return launch_small<T, true, Any>(pass, head, stream);
  return for_type<T>(pass.logits.dtype, [&](auto s) { return launch_small<T, true, decltype(s)>(pass, head, stream); });
}

template <typename T>
cudaError_t launch_head_prepare(const Head<T>& head, int64_t rows, int64_t classes, cudaStream_t stream) {
  const auto kernel = head_prepare_kernel<T>;
  FAM_LAUNCH(kernel, static_cast<unsigned>(head.shares), kRowThreads, 0, stream, head, rows, classes);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_head_totals(const Head<T>& head, const RowPass<T>& pass, cudaStream_t stream) {
  const auto kernel = head_totals_kernel<T>;
  FAM_LAUNCH(kernel, 1u, kRowThreads, 0, stream, head, pass);
  return cudaGetLastError();
}

#define FAM_INSTANTIATE(T)                                                                                   \
  template cudaError_t launch_small_head<T>(const SmallTrace<T>&, const Head<T>&, cudaStream_t);             \
  template cudaError_t launch_softmax_rows<T, true>(const RowPass<T>&, const Head<T>&, cudaStream_t);        \
  template cudaError_t launch_row_values<T, true>(const RowPass<T>&, const Head<T>&, cudaStream_t);          \
  template cudaError_t launch_row_gradients<T, true>(const RowPass<T>&, const Head<T>&, bool, cudaStream_t); \
  template cudaError_t launch_head_prepare<T>(const Head<T>&, int64_t, int64_t, cudaStream_t);               \
  template cudaError_t launch_head_totals<T>(const Head<T>&, const RowPass<T>&, cudaStream_t);
FAM_INSTANTIATE(float)
FAM_INSTANTIATE(double)

}  // namespace fam_ext::gpu
