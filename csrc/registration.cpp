// The schema of every compiled operation, on one screen, and the Python module with the facts of the build.
// Kernels register themselves: csrc/cpu/<op>.cpp for CPU, csrc/cuda/binding_<op>.cpp for CUDA where that is compiled.
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include "head_cross_entropy_python.h"
#include "label_draw.h"
#include "noise_python.h"
#include "row_trace.h"
#include "smooth_activation.h"

TORCH_LIBRARY(fam_ext, m) {
  m.def("softmax_trace(Tensor logits, Tensor weight, bool pairwise) -> (Tensor, Tensor)");
  m.def(
      "softmax_trace_backward(Tensor grad, Tensor logits, Tensor weight, Tensor saved, bool pairwise, bool grad_logits, "
      "bool grad_weight) -> (Tensor, Tensor)");
  m.def(
      "patch_sqnorm(Tensor input, int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups) -> Tensor");
  m.def(
      "patch_sqnorm_backward(Tensor grad, Tensor input, int[] kernel_size, int[] stride, int[] padding, int[] dilation, "
      "int groups) -> Tensor");
  m.def(
      "head_cross_entropy(Tensor logits, Tensor features, Tensor weight, Tensor target, Tensor? class_weight, "
      "int ignore_index, float label_smoothing, bool mean, float strength, bool curvature_grad, bool pairwise) "
      "-> (Tensor, Tensor)");
  m.def(
      "head_cross_entropy_forward(Tensor logits, Tensor features, Tensor weight, Tensor target, Tensor? class_weight, "
      "int ignore_index, float label_smoothing, bool mean, float strength, bool curvature_grad, bool pairwise, "
      "bool grad_logits, bool grad_features, bool grad_weight) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // linear_cross_entropy itself is defined in fam_ext/ops/_linear_cross_entropy_op.py; these are its row kernels
  m.def(
      "linear_cross_entropy_softmax_rows(Tensor(a!) z, Tensor? bias, Tensor squares, Tensor? omega, Tensor target, "
      "bool smooth, Tensor(b!) best, Tensor(c!) stats) -> ()");
  m.def(
      "linear_cross_entropy_mean_rows(Tensor(a!) shift, Tensor weight, Tensor offset, Tensor features, Tensor squares, "
      "Tensor best, Tensor stats, Tensor curvature_factor, Tensor(b!)? means, Tensor(c!)? scaled, Tensor(d!) row_sums) -> ()");
  m.def(
      "linear_cross_entropy_grad_logits(Tensor e, Tensor? dots, Tensor(a!) dz, int first, int count, Tensor squares, "
      "Tensor? omega, bool smooth, Tensor target, Tensor best, Tensor factors, Tensor(b!)? class_sums, "
      "Tensor(c!)? bias_sums) -> ()");
  m.def("linear_cross_entropy_add_rows(Tensor source, Tensor classes, Tensor(a!) out, int first) -> ()");
}

#define FAM_EXT_STRING_(x) #x
#define FAM_EXT_STRING(x) FAM_EXT_STRING_(x)

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Importing this module registers torch.ops.fam_ext.*";
  m.def(
      "facts",
      [] {
        py::dict facts;
        facts["torch"] = FAM_EXT_TORCH_VERSION;
        facts["python"] = PY_VERSION;
        facts["compiler"] = __VERSION__;
        facts["simd"] = FAM_EXT_STRING(CPU_CAPABILITY);
        facts["cuda"] = py::none();
        facts["arch_list"] = py::list();
#ifdef FAM_EXT_CUDA
        facts["cuda"] = FAM_EXT_CUDA;
        facts["arch_list"] = py::str(FAM_EXT_CUDA_ARCHITECTURES).attr("split")(";");
#endif
        return facts;
      },
      "What this library was compiled with: torch, python, compiler, simd, cuda (or None), arch_list.");
  fam_ext::bind_head_cross_entropy(m);
  fam_ext::bind_label_draw(m);
  fam_ext::bind_noise(m);
  fam_ext::bind_row_trace(m);
  fam_ext::bind_smooth_activation(m);
}
