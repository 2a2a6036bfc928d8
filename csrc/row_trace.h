#pragma once

#include <pybind11/pybind11.h>

namespace fam_ext {

// Adds the function `row_trace` to the module.
void bind_row_trace(pybind11::module_& m);

}  // namespace fam_ext
