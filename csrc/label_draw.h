#pragma once

#include <pybind11/pybind11.h>

namespace fam_ext {

// Adds the functions `drawn_factors` and `differentiable_factors` to the module.
void bind_label_draw(pybind11::module_& m);

}  // namespace fam_ext
