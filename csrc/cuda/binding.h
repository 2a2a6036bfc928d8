// What the bindings of the CUDA kernels share: tensors as views, the current stream. Compiled against a torch with CUDA only; the
// kernels themselves include nothing of torch.
#pragma once

#include <ATen/Context.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <mutex>

#include "cuda/view.h"

#ifndef FAM_EXT_CUDA_KEY  // the tests register the kernels for CPU tensors, over their host shim
#define FAM_EXT_CUDA_KEY CUDA
#define FAM_EXT_CUDA_LIBRARY fam_ext
#endif

namespace fam_ext::gpu {

// While one is alive, torch's products of float32 are products of float32. NoTF32Guard tells cuBLAS so; cuBLASLt does not ask it
// (ATen/cuda/CUDABlas.cpp), so where that is preferred cuBLAS takes the products until the last one is gone, other threads' too.
class FullPrecision {
 public:
  FullPrecision() {
#ifndef USE_ROCM
    const std::lock_guard<std::mutex> lock(mutex());
    at::Context& context = at::globalContext();
    held_ = count() > 0 || context.blasPreferredBackend() == at::BlasBackend::Cublaslt;
    if (held_ && count()++ == 0) context.setBlasPreferredBackend(at::BlasBackend::Cublas);
#endif
  }
  ~FullPrecision() {
    if (!held_) return;
    const std::lock_guard<std::mutex> lock(mutex());
    if (--count() == 0) at::globalContext().setBlasPreferredBackend(at::BlasBackend::Cublaslt);
  }
  FullPrecision(const FullPrecision&) = delete;
  FullPrecision& operator=(const FullPrecision&) = delete;

 private:
  static std::mutex& mutex() {
    static std::mutex one;
    return one;
  }
  static int& count() {
    static int alive = 0;
    return alive;
  }

  at::NoTF32Guard no_tf32_;
  bool held_ = false;
};

// Everything an operation runs under: no autocast inside, the tensors' device, products in full precision.
struct Scope {
  explicit Scope(const at::Tensor& tensor) : device(tensor.device()) {}
  cudaStream_t stream() const { return c10::cuda::getCurrentCUDAStream(); }

  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
  c10::cuda::CUDAGuard device;
  FullPrecision full_precision;
};

inline void check_launch(cudaError_t error) {
  C10_CUDA_CHECK(error);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

inline DType dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return DType::kFloat;
    case at::kDouble:
      return DType::kDouble;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kHalf;
    default:
      TORCH_CHECK_TYPE(false, "fam_ext: expected a floating tensor, got ", tensor.scalar_type());
  }
}

// Whether `stride` and the like are whole 16-byte packs.
inline bool whole_packs(const at::Tensor& tensor, int64_t elements) {
  return elements * tensor.element_size() % 16 == 0;
}
inline bool aligned(const at::Tensor& tensor) { return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0; }

// Rows of a tensor whose dimension `width_dim` holds a row's entries; false where its row dimensions are too many to keep apart.
inline bool make_view(const at::Tensor& tensor, int64_t width_dim, RowView& view) {
  view = RowView{};
  view.data = const_cast<void*>(tensor.const_data_ptr());
  view.dtype = dtype_of(tensor);
  view.width = tensor.size(width_dim);
  view.width_stride = tensor.stride(width_dim);
  view.rows = 1;
  view.dims = 0;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (d == width_dim) continue;
    const int64_t size = tensor.size(d), stride = tensor.stride(d);
    view.rows *= size;
    if (size == 1) continue;
    if (view.dims > 0 && view.strides[view.dims - 1] == size * stride) {
      view.sizes[view.dims - 1] *= size;
      view.strides[view.dims - 1] = stride;
      continue;
    }
    if (view.dims == kRowDims) return false;
    view.sizes[view.dims] = size;
    view.strides[view.dims++] = stride;
  }
  if (view.dims == 0) view.sizes[view.dims] = 1, view.strides[view.dims++] = 0;
  view.packed = view.width_stride == 1 && aligned(tensor) && whole_packs(tensor, view.width);
  for (int d = 0; d < view.dims; ++d) view.packed = view.packed && whole_packs(tensor, view.strides[d]);
  return true;
}

// An input as rows; `keep` holds a copy where there are more dimensions with strides of their own than a view has.
inline RowView input_view(const at::Tensor& tensor, int64_t width_dim, at::Tensor& keep) {
  RowView view;
  keep = tensor;
  if (!make_view(tensor, width_dim, view)) {
    keep = tensor.contiguous();
    make_view(keep, width_dim, view);
  }
  return view;
}

// An output as rows, by way of a contiguous tensor in the same case.
class OutputView {
 public:
  OutputView(const at::Tensor& tensor, int64_t width_dim, bool wanted) : tensor_(tensor), written_(tensor) {
    if (!wanted || make_view(tensor, width_dim, view)) return;
    written_ = at::empty_like(tensor, at::MemoryFormat::Contiguous);
    make_view(written_, width_dim, view);
  }
  void finish() {
    if (!written_.is_same(tensor_)) tensor_.copy_(written_);
  }
  RowView view;

 private:
  at::Tensor tensor_, written_;
};

inline at::Tensor empty_if(const at::Tensor& like, bool wanted) {
  return wanted ? at::empty_like(like) : at::empty({0}, like.options().memory_format(std::nullopt));
}

}  // namespace fam_ext::gpu
