// A label for every row of probabilities p, drawn from q_y ~ p_y |e_y - p|^2 = p_y (1 - 2 p_y + |p|^2), and sqrt(p_y / q_y).
#include "label_draw.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <torch/csrc/utils/pybind.h>

#include <cmath>
#include <vector>

namespace fam_ext {
namespace {

using at::Tensor;

constexpr int64_t kSegment = 1024;  // probabilities of a partial sum
constexpr double kVanishes = 1e-30;

template <typename T>
T largest(const T* p, int64_t n) {
  using Vec = at::vec::Vectorized<T>;
  return at::vec::reduce_all<T>([](const Vec& a, const Vec& b) { return at::vec::maximum(a, b); }, p, n);
}

// Sums over probabilities that follow each other; the most likely one stands alone.
struct Segment {
  int64_t begin, end;
  double sum = 0, squares = 0;
};

template <typename T>
class Row {
 public:
  Row(const T* p, int64_t classes, std::vector<Segment>& segments) : p_(p), segments_(segments) {
    find_top(classes);
    segments_.clear();
    split(0, top_);
    segments_.push_back({top_, top_ + 1});
    split(top_ + 1, classes);
    for (Segment& s : segments_) {
      if (s.begin == top_) continue;
      sum(s);
      rest_ += s.sum;
      squares_ += s.squares;
    }
    const double likely = p_[top_];
    norm_ = squares_ + likely * likely;
    for (const Segment& s : segments_) total_ += weight(s);
  }

  // the first label at which the sum of weights exceeds this share of the total
  int64_t label(double share) const {
    if (!(total_ > kVanishes)) return top_;
    const double wanted = share * total_;
    double before = 0;
    const Segment* chosen = &segments_.front();
    for (const Segment& s : segments_) {
      const double w = weight(s);
      if (w > 0) chosen = &s;
      if (before + w > wanted) break;
      before += w;
    }
    if (chosen->begin == top_) return top_;
    int64_t last = chosen->begin;
    for (int64_t k = chosen->begin; k < chosen->end; ++k) {
      const double w = p_[k] * distance(k);
      if (w > 0) last = k;
      before += w;
      if (before > wanted) break;
    }
    return last;
  }

  double stretch(int64_t label) const {
    return total_ <= kVanishes ? 1 : std::sqrt(total_ / distance(label));  // NaN where the row holds NaN
  }

 private:
  void find_top(int64_t classes) {
    T most = p_[0];
    int64_t at = 0;
    for (int64_t begin = 0; begin < classes; begin += kSegment) {
      const T here = largest(p_ + begin, std::min(kSegment, classes - begin));
      if (here > most) most = here, at = begin;
    }
    while (at + 1 < classes && p_[at] < most) ++at;
    top_ = at;
  }

  void split(int64_t begin, int64_t end) {
    for (; begin < end; begin += kSegment) segments_.push_back({begin, std::min(begin + kSegment, end)});
  }

  void sum(Segment& s) const {
    using Vec = at::vec::Vectorized<T>;
    const T* p = p_ + s.begin;
    const int64_t n = s.end - s.begin;
    const auto add = [](const Vec& a, const Vec& b) { return a + b; };
    s.sum = at::vec::reduce_all<T>(add, p, n);
    s.squares = at::vec::map_reduce_all<T>([](const Vec& x) { return x * x; }, add, p, n);
  }

  // |e_y - p|^2, without 1 - p of the most likely
  double distance(int64_t y) const { return y == top_ ? rest_ * rest_ + squares_ : 1 + norm_ - 2 * double(p_[y]); }

  // sum of p_y |e_y - p|^2
  double weight(const Segment& s) const {
    return s.begin == top_ ? p_[top_] * distance(top_) : (1 + norm_) * s.sum - 2 * s.squares;
  }

  const T* p_;
  std::vector<Segment>& segments_;
  int64_t top_ = 0;
  double rest_ = 0, squares_ = 0, norm_ = 0, total_ = 0;
};

std::pair<Tensor, Tensor> draw_labels(const Tensor& p, const Tensor& shares) {
  TORCH_CHECK(p.dim() == 2 && p.is_cpu() && p.is_contiguous() && p.size(1) > 0, "draw_labels: expected p (N, O)");
  TORCH_CHECK(shares.is_cpu() && shares.is_contiguous() && shares.numel() == p.size(0) && shares.dtype() == p.dtype(),
              "draw_labels: expected a share for every row, of the dtype of p");
  const Tensor labels = at::empty({p.size(0), 1}, p.options().dtype(at::kLong).requires_grad(false));
  const Tensor stretch = at::empty({p.size(0), 1}, p.options().requires_grad(false));
  const int64_t classes = p.size(1), grain = std::max<int64_t>(1, 32768 / classes);
  const pybind11::gil_scoped_release no_gil;
  AT_DISPATCH_FLOATING_TYPES(p.scalar_type(), "draw_labels", [&] {
    const auto* rows = p.const_data_ptr<scalar_t>();
    const auto* share = shares.const_data_ptr<scalar_t>();
    auto* label = labels.mutable_data_ptr<int64_t>();
    auto* length = stretch.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, p.size(0), grain, [&](int64_t begin, int64_t end) {
      std::vector<Segment> segments;
      for (int64_t i = begin; i < end; ++i) {
        const Row<scalar_t> row(rows + i * classes, classes, segments);
        label[i] = row.label(share[i]);
        length[i] = static_cast<scalar_t>(row.stretch(label[i]));
      }
    });
  });
  return {labels, stretch};
}

}  // namespace

void bind_label_draw(pybind11::module_& m) {
  m.def("draw_labels", &draw_labels, "Labels (N, 1) of rows of probabilities, and sqrt(p_y / q_y)");
}

}  // namespace fam_ext
