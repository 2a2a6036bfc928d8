#pragma once

#include <pybind11/pybind11.h>

namespace fam_ext {

// Adds the function `smooth_activation` to the module.
void bind_smooth_activation(pybind11::module_& m);

}  // namespace fam_ext
