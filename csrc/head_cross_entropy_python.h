#pragma once

#include <pybind11/pybind11.h>

namespace fam_ext {

// Adds the function `head_cross_entropy` to the module.
void bind_head_cross_entropy(pybind11::module_& m);

}  // namespace fam_ext
