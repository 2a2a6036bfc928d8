// Factors sqrt(c p_y / q_y) (e_y - p) of softmax's curvature, with a label for every row of probabilities p, drawn from
// q_y ~ p_y |e_y - p|^2 = p_y (1 - 2 p_y + |p|^2).
#include "label_draw.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/row_grain.h"
#include "made_gradients.h"

namespace fam_ext {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

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

  // 1 - p_y, of positive numbers
  double others(int64_t y) const { return y == top_ ? rest_ : 1 - double(p_[y]); }

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

template <typename T>
void softmax(const T* z, T* p, int64_t n) {
  using Vec = at::vec::Vectorized<T>;
  const Vec most(largest(z, n));
  double sum = 0;
  for (int64_t begin = 0; begin < n; begin += kSegment) {
    const int64_t size = std::min(kSegment, n - begin);
    at::vec::map<T>([&](const Vec& x) { return (x - most).exp(); }, p + begin, z + begin, size);
    sum += at::vec::reduce_all<T>([](const Vec& a, const Vec& b) { return a + b; }, p + begin, size);
  }
  const Vec inverse(static_cast<T>(1 / sum));
  at::vec::map<T>([&](const Vec& x) { return x * inverse; }, p, p, n);
}

template <typename T>
T dot(const T* a, const T* b, int64_t n) {
  using Vec = at::vec::Vectorized<T>;
  return at::vec::map2_reduce_all<T>([](const Vec& x, const Vec& y) { return x * y; },
                                     [](const Vec& x, const Vec& y) { return x + y; }, a, b, n);
}

void check_rows(const char* name, const Tensor& rows) {
  TORCH_CHECK(rows.dim() == 2 && rows.is_cpu() && rows.is_contiguous() && rows.size(1) > 0, name,
              ": expected rows (N, O)");
}

void check_numbers(const char* name, const Tensor& rows, const Tensor& numbers) {
  TORCH_CHECK(
      numbers.is_cpu() && numbers.is_contiguous() && numbers.numel() == rows.size(0) && numbers.dtype() == rows.dtype(),
      name, ": expected a number for every row, of its dtype");
}

// (u, p, y, scale) of logits z (N, O): p = softmax(z), u = scale (e_y - p) with scale = sign sqrt(c p_y / q_y), or sign sqrt(c)
// where the labels are given. A row with c = 0 is not read and has zeros.
std::tuple<Tensor, Tensor, Tensor, Tensor> drawn_factors(const Tensor& z, const Tensor& c, const Tensor& shares,
                                                         const Tensor& signs, const std::optional<Tensor>& given) {
  constexpr const char* name = "drawn_factors";
  check_rows(name, z);
  for (const Tensor& numbers : {c, shares, signs}) check_numbers(name, z, numbers);
  TORCH_CHECK(!given || (given->is_cpu() && given->is_contiguous() && given->numel() == z.size(0) &&
                         given->dtype() == at::kLong),
              name, ": expected a label for every row");
  const auto options = z.options().requires_grad(false);
  const Tensor u = at::empty(z.sizes(), options), p = at::empty(z.sizes(), options);
  const Tensor labels = at::empty({z.size(0)}, options.dtype(at::kLong)), scales = at::empty({z.size(0)}, options);
  const int64_t classes = z.size(1);
  AT_DISPATCH_FLOATING_TYPES(z.scalar_type(), name, [&] {
    using Vec = at::vec::Vectorized<scalar_t>;
    const auto *logits = z.const_data_ptr<scalar_t>(), *coefficient = c.const_data_ptr<scalar_t>();
    const auto *share = shares.const_data_ptr<scalar_t>(), *sign = signs.const_data_ptr<scalar_t>();
    auto *of_u = u.mutable_data_ptr<scalar_t>(), *of_p = p.mutable_data_ptr<scalar_t>();
    auto* label = labels.mutable_data_ptr<int64_t>();
    const int64_t* own_label = given ? given->const_data_ptr<int64_t>() : nullptr;
    auto* scale = scales.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, z.size(0), row_grain(classes), [&](int64_t begin, int64_t end) {
      std::vector<Segment> segments;
      for (int64_t i = begin; i < end; ++i) {
        scalar_t *own_u = of_u + i * classes, *own_p = of_p + i * classes;
        if (coefficient[i] == 0) {
          std::fill_n(own_u, classes, scalar_t(0));
          std::fill_n(own_p, classes, scalar_t(0));
          label[i] = 0, scale[i] = 0;
          continue;
        }
        softmax(logits + i * classes, own_p, classes);
        const Row<scalar_t> row(own_p, classes, segments);
        const int64_t y = label[i] = own_label ? own_label[i] : row.label(share[i]);
        TORCH_CHECK_INDEX(y >= 0 && y < classes, name, ": label ", y, " is out of range for ", classes, " classes");
        const double stretch = own_label ? 1 : row.stretch(y);
        scale[i] = static_cast<scalar_t>(sign[i] * std::sqrt(double(coefficient[i])) * stretch);
        const Vec minus(-scale[i]);
        at::vec::map<scalar_t>([&](const Vec& x) { return x * minus; }, own_u, own_p, classes);
        own_u[y] = static_cast<scalar_t>(scale[i] * row.others(y));
      }
    });
  });
  return {u, p, labels, scales};
}

// The gradient by z of drawn_factors' u; for drawn labels with sqrt(p_y / p_y) in it, of which the denominator is a constant.
Tensor by_logits(const Tensor& grad, const Tensor& u, const Tensor& p, const Tensor& labels, const Tensor& scales,
                 bool drawn) {
  constexpr const char* name = "drawn_factors";
  for (const Tensor& rows : {grad, u, p}) check_rows(name, rows);
  TORCH_CHECK(grad.sizes() == u.sizes() && grad.dtype() == u.dtype(), name, ": expected a gradient like u");
  check_numbers(name, u, scales);
  const Tensor dz = at::empty(u.sizes(), u.options().requires_grad(false));
  const int64_t classes = u.size(1);
  AT_DISPATCH_FLOATING_TYPES(u.scalar_type(), name, [&] {
    using Vec = at::vec::Vectorized<scalar_t>;
    const auto *of_grad = grad.const_data_ptr<scalar_t>(), *of_u = u.const_data_ptr<scalar_t>();
    const auto *of_p = p.const_data_ptr<scalar_t>(), *scale = scales.const_data_ptr<scalar_t>();
    const auto* label = labels.const_data_ptr<int64_t>();
    auto* of_dz = dz.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, u.size(0), row_grain(classes), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t at = i * classes, y = label[i];
        scalar_t* own = of_dz + at;
        if (scale[i] == 0) {
          std::fill_n(own, classes, scalar_t(0));
          continue;
        }
        const scalar_t along = drawn ? dot(of_grad + at, of_u + at, classes) / 2 : scalar_t(0);  // by log p_y
        const scalar_t mean = dot(of_grad + at, of_p + at, classes);
        const Vec s(scale[i]), rest(scale[i] * mean - along);
        at::vec::map2<scalar_t>([&](const Vec& g, const Vec& q) { return q * (rest - s * g); }, own, of_grad + at,
                                of_p + at, classes);
        const scalar_t others = of_u[at + y] / scale[i];  // 1 - p_y
        own[y] = along * others + scale[i] * of_p[at + y] * (mean - of_grad[at + y]);
      }
    });
  });
  return dz;
}

// u of drawn_factors, differentiable once by z.
struct DrawnFactors : torch::autograd::Function<DrawnFactors> {
  static Tensor forward(AutogradContext* ctx, const Tensor& z, const Tensor& c, const Tensor& shares,
                        const Tensor& signs, const std::optional<Tensor>& given) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const auto [u, p, labels, scales] = drawn_factors(z, c, shares, signs, given);
    ctx->save_for_backward({u, p, labels, scales});
    ctx->saved_data["drawn"] = !given.has_value();
    return u;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    const variable_list saved = ctx->get_saved_variables();
    variable_list grads(5);
    {
      const at::AutoGradMode no_graph(false);
      grads[0] = by_logits(upstream[0].contiguous(), saved[0], saved[1], saved[2], saved[3],
                           ctx->saved_data["drawn"].toBool());
    }
    refuse_second_derivative("a factor of cross-entropy's Hessian can be differentiated once only", grads);
    return grads;
  }
};

Tensor differentiable(const Tensor& z, const Tensor& c, const Tensor& shares, const Tensor& signs,
                      const std::optional<Tensor>& labels) {
  return DrawnFactors::apply(z, c, shares, signs, labels);
}

}  // namespace

void bind_label_draw(pybind11::module_& m) {
  const pybind11::call_guard<pybind11::gil_scoped_release> no_gil;
  m.def("drawn_factors", &drawn_factors, no_gil, "Factors u (N, O) of rows of logits, p, the labels y and scales (N,)");
  m.def("differentiable_factors", &differentiable, no_gil, "u alone, differentiable once by the logits");
}

}  // namespace fam_ext
