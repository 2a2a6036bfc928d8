#pragma once

#include <pybind11/pybind11.h>

namespace fam_ext {

// Adds the functions `noise_*` to the module.
void bind_noise(pybind11::module_& m);

}  // namespace fam_ext
