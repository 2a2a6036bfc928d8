// A tensor seen as rows, as plain numbers that a kernel takes by value. For the kernels and for the binding.
#pragma once

#include <cstdint>

#include "flatness.h"

namespace fam_ext::gpu {

enum class DType : int { kFloat, kDouble, kBFloat16, kHalf };

constexpr int kRowDims = 6;  // most row dimensions that cannot be merged; the binding copies what has more

// `width` entries per row, `width_stride` elements apart; rows numbered in row-major order over `sizes`.
struct RowView {
  void* data = nullptr;  // null: not wanted, or not given
  DType dtype = DType::kFloat;
  int dims = 1;
  bool packed = false;  // every row is made of whole 16-byte packs: stride 1, starts and width multiples of a pack
  int64_t rows = 0, width = 0, width_stride = 1;
  int64_t sizes[kRowDims] = {1}, strides[kRowDims] = {0};

  FAM_HOST_DEVICE int64_t offset(int64_t row) const {
    int64_t result = 0;
#ifdef __CUDACC__
#pragma unroll 1  // the division, which rows in one dimension do not need, stands in the code once
#endif
    for (int d = dims - 1; d > 0; --d) {
      const int64_t outer = row / sizes[d];
      result += (row - outer * sizes[d]) * strides[d];
      row = outer;
    }
    return result + row * strides[0];
  }
};

}  // namespace fam_ext::gpu
