#pragma once

#include <algorithm>
#include <cstdint>

namespace fam_ext {

// Rows of `width` numbers that are worth a thread, where a number costs little.
inline int64_t row_grain(int64_t width) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(width, 1)); }

}  // namespace fam_ext
