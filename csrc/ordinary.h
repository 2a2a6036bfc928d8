// Tensors that a short way from Python may take: what they are is known, and nothing watches the calls.
#pragma once

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <torch/csrc/autograd/python_variable.h>

namespace fam_ext {

// torch.Tensor or nn.Parameter, whose calls no __torch_function__ may see.
inline bool ordinary(PyObject* value) {
  return THPVariable_CheckExact(value) && !at::impl::torch_function_mode_enabled();
}

inline bool ordinary(const at::Tensor& t) {
#ifdef FAM_EXT_CUDA
  if (!t.is_cpu() && !t.is_cuda()) return false;
#else
  if (!t.is_cpu()) return false;
#endif
  return t.layout() == at::kStrided && !at::isTensorSubclassLike(t);
}

}  // namespace fam_ext
