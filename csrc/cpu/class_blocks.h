// A weight (V, I) of any floating dtype and strides, seen in blocks of classes in the accumulation dtype.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdint>

namespace fam_ext {

// W in the accumulation dtype: as it is where it has it already, else converted a block of classes at a time.
template <typename T>
class ClassBlocks {
 public:
  ClassBlocks(const at::Tensor& weight, at::ScalarType acc, int64_t bytes) : weight_(weight) {
    whole_ = weight.scalar_type() == acc && weight.is_contiguous();
    const int64_t row_bytes = static_cast<int64_t>(sizeof(T)) * std::max<int64_t>(weight.size(1), 1);
    step_ = whole_ ? weight.size(0) : std::min(weight.size(0), std::max<int64_t>(64, bytes / row_bytes));
    if (!whole_) scratch_ = at::empty({step_, weight.size(1)}, weight.options().dtype(acc));
  }

  int64_t step() const { return step_; }

  // f(first class, number of classes, their rows); the rows may be overwritten where W is not whole
  template <typename F>
  void for_each(const F& f) {
    if (whole_) return f(int64_t{0}, step_, weight_);
    for (int64_t first = 0; first < weight_.size(0); first += step_) {
      const int64_t count = std::min(step_, weight_.size(0) - first);
      at::Tensor block = scratch_.narrow(0, 0, count);
      block.copy_(weight_.narrow(0, first, count));
      f(first, count, block);
    }
  }

 private:
  at::Tensor weight_, scratch_;
  bool whole_;
  int64_t step_;
};

}  // namespace fam_ext
