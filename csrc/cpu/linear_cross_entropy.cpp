// Cross-entropy plus curvature of a linear head from its features: rows in chunks, so that no (N, V) matrix is ever held. All products
// go to the vendor's library; in between, the row code of head_cross_entropy works on the chunk's (V, rows) logits in place.
//
// Six products of size rows x I x V per chunk, with p~, U, u as in trace_shifted.h:
//   z = W phi^T;  U = p~^T W;  <w_s, u> = W u^T;  dphi = dz^T W;  dW += [p~ | dz] [-2 g u; phi], two at once.
// The offset m common to all w_s is taken out by algebra: |w_s - m|^2 is formed from differences and <w_s - m, u - m> =
// <w_s, u - m> - <m, u - m>. A centered copy of W would be as large as the gradient; what the products lose to m is no more than z
// has lost to it already, since z = W phi^T is formed in the same precision.
#include <ATen/Dispatch.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/library.h>

#include <tuple>

#include "cpu/class_blocks.h"
#include "cpu/cross_entropy_rows.h"
#include "cpu/trace_shifted.h"

namespace fam_ext {
namespace {

using at::Tensor;
using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

enum Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

struct Arguments {
  Tensor input;   // (N, I)
  Tensor weight;  // (V, I)
  Tensor bias;    // (V) contiguous in the accumulation dtype, or undefined
  CrossEntropyOptions options;
  std::vector<int64_t> kept;  // the rows that are not ignored, in order
  int64_t rows;               // their number
  bool all;                   // nothing is ignored
  int64_t max_bytes;
  bool narrow;  // the gradient of the weight is summed in the weight's dtype
  bool grad_input, grad_weight, grad_bias;
};

template <typename T>
class LinearCrossEntropy {
 public:
  LinearCrossEntropy(const Arguments& a, at::ScalarType acc)
      : a_(a),
        acc_(a.input.options().dtype(acc).memory_format(std::nullopt)),
        classes_(a.weight.size(0)),
        fan_in_(a.weight.size(1)),
        w_(a.weight, acc, a.max_bytes / 8),
        policy_(a.options, a.rows, classes_, nullptr, nullptr),
        grads_(a.grad_input || a.grad_weight || a.grad_bias),
        pull_(a.options.strength != 0),
        products_(grads_ && pull_ && a.options.curvature_grad),
        narrow_(a.narrow && a.weight.scalar_type() != acc),
        step_(rows_per_chunk()),
        block_(classes_, step_, acc_, grads_ ? 2 : 1),
        found_(static_cast<int64_t>(block_.stats.size())),
        right_(at::zeros({2 * padded(step_), fan_in_}, acc_)),
        shift_(at::empty({step_, fan_in_}, acc_)),
        class_weights_(a.grad_weight && pull_ ? classes_ : 0, T(0)),
        bias_sums_(a.grad_bias ? classes_ : 0, T(0)) {
    find_offset();
    if (a.grad_input) {
      // held constant, the Hessian sends nothing to the features; ignored rows get nothing either
      grad_input_ = a.all ? at::empty({a.input.size(0), fan_in_}, a.input.options())
                          : at::zeros({a.input.size(0), fan_in_}, a.input.options());
      direct_input_ = a.all && a.input.scalar_type() == acc;
      if (!direct_input_) input_scratch_ = at::empty({step_, fan_in_}, acc_);
    }
    if (a.grad_weight) grad_weight_ = at::empty({classes_, fan_in_}, narrow_ ? a.weight.options() : acc_);
    if (narrow_ && a.grad_weight) weight_scratch_ = at::empty({w_.step(), fan_in_}, acc_);
  }

  Result run(int64_t reduction, at::IntArrayRef row_shape) {
    for (int64_t first = 0; first < a_.rows; first += step_) chunk(first, std::min(step_, a_.rows - first));
    if (a_.grad_weight) finish_weight();
    Tensor bias_grad = at::empty({0}, acc_);
    if (a_.grad_bias) bias_grad = at::from_blob(bias_sums_.data(), {classes_}, acc_).clone();
    const auto [loss, flatness] = values(reduction, row_shape);
    return {loss, flatness, grad_input_, grad_weight_, bias_grad};
  }

 private:
  static int64_t padded(int64_t rows) { return (rows + lanes_of<T>() - 1) / lanes_of<T>() * lanes_of<T>(); }

  int64_t rows_per_chunk() const {
    const int64_t row_bytes = static_cast<int64_t>(sizeof(T)) * ((grads_ ? 2 : 1) * classes_ + 6 * fan_in_);
    const int64_t most = std::max<int64_t>(lanes_of<T>(), a_.max_bytes / row_bytes / lanes_of<T>() * lanes_of<T>());
    const int64_t rows = std::max<int64_t>(a_.rows, 1);
    const int64_t chunks = (rows + std::min(most, kShiftedRows) - 1) / std::min(most, kShiftedRows);
    return padded((rows + chunks - 1) / chunks);
  }

  int64_t row_grain() const { return std::max<int64_t>(1, 8192 / std::max<int64_t>(fan_in_, 1)); }

  // m and |w_s - m|^2
  void find_offset() {
    offset_ = at::zeros({fan_in_}, acc_);
    w_.for_each([&](int64_t, int64_t, const Tensor& rows) { offset_.add_(rows.sum(0)); });
    offset_.div_(static_cast<double>(classes_));
    squares_ = at::empty({classes_}, acc_);
    w_.for_each([&](int64_t first, int64_t count, const Tensor& rows) {
      squares_.narrow(0, first, count).copy_(class_squares(rows, offset_));
    });
  }

  void chunk(int64_t first, int64_t rows) {
    block_.first = first;
    block_.rows = rows;
    found_.resize(rows);
    half_ = padded(rows);
    const Tensor phi = features(first, rows);
    logits(phi);
    shifts(rows);
    gradients(phi, rows);
  }

  // The chunk's rows of phi, in the lower half of `right_`; rows without a share in the loss are cleared, whatever they hold.
  Tensor features(int64_t first, int64_t rows) {
    Tensor phi = right_.narrow(0, half_, rows);
    if (a_.all) {
      phi.copy_(a_.input.narrow(0, first, rows));
    } else {
      phi.copy_(at::index_select(a_.input, 0, indices(a_.kept.data() + first, rows)));
    }
    T* data = phi.template mutable_data_ptr<T>();
    at::parallel_for(0, rows, row_grain(), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        T* row = data + n * fan_in_;
        if (policy_.coefficient(first + n) == T(0)) std::fill_n(row, fan_in_, T(0));
        policy_.set_squared_norm(first + n, detail::squared_norm<T, T>(row, 0, 1, fan_in_));
      }
    });
    return phi;
  }

  static Tensor indices(const int64_t* data, int64_t count) {
    return at::from_blob(const_cast<int64_t*>(data), {count}, at::TensorOptions().dtype(at::kLong));
  }

  // z, and p~ in its place
  void logits(const Tensor& phi) {
    Tensor z = block_.view();
    w_.for_each([&](int64_t first, int64_t count, const Tensor& rows) {
      Tensor part = z.narrow(0, first, count);
      at::mm_out(part, rows, phi.t());
    });
    T* data = block_.data();
    const T* bias = a_.bias.defined() ? a_.bias.template const_data_ptr<T>() : nullptr;
    const T* squares = squares_.template const_data_ptr<T>();
    const int64_t ld = block_.ld;
    block_.for_each_tile(8 * classes_, [&](int64_t first, int64_t lanes, int64_t column, RowStats<T>& stats) {
      T* tile = data + column;
      for (int64_t s = 0; s < classes_ && lanes < lanes_of<T>(); ++s)
        std::fill_n(tile + s * ld + lanes, lanes_of<T>() - lanes, T(0));
      for (int64_t s = 0; s < classes_ && bias != nullptr; ++s)
        (Vec<T>::loadu(tile + s * ld) + Vec<T>(bias[s])).store(tile + s * ld);
      policy_softmax(policy_, first, lanes, tile, ld, classes_, stats);
      shifted_begin_tile(tile, ld, classes_, lanes, column, squares, stats, false, found_);
    });
  }

  // U in `shift_`, u - m in the upper half of `right_`, v and the norms of every row
  void shifts(int64_t rows) {
    Tensor shift = shift_.narrow(0, 0, rows);
    const Tensor p = block_.view();
    w_.for_each([&](int64_t first, int64_t count, const Tensor& block) {
      const Tensor part = p.narrow(0, first, count).t();
      if (first == 0)
        at::mm_out(shift, part, block);
      else
        shift.addmm_(part, block);
    });
    const Tensor best = at::index_select(a_.weight, 0, indices(found_.y.data(), rows)).to(acc_.dtype()).sub_(offset_);
    const T *best_data = best.template const_data_ptr<T>(), *m = offset_.template const_data_ptr<T>();
    T *u = shift.template mutable_data_ptr<T>(), *means = right_.template mutable_data_ptr<T>(),
      *p_data = block_.data();
    at::parallel_for(0, rows, row_grain(), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        T *row = u + n * fan_in_, *mean = means + n * fan_in_;
        for (int64_t i = 0; i < fan_in_; ++i) row[i] -= found_.r[n] * m[i];
        ShiftedRow<T>& values = found_.values[n];
        values = shifted_row(row, best_data + n * fan_in_, found_.r[n], found_.weighted[n], fan_in_, row, mean);
        double along_offset = 0;
        for (int64_t i = 0; i < fan_in_; ++i) along_offset += static_cast<double>(m[i]) * mean[i];
        values.squared_mean += static_cast<T>(2 * along_offset);
        p_data[found_.y[n] * block_.ld + n] = -found_.r[n];
      }
    });
    std::fill_n(means + rows * fan_in_, (half_ - rows) * fan_in_, T(0));
  }

  void gradients(const Tensor& phi, int64_t rows) {
    const int64_t ld = block_.ld;
    const T *p_data = block_.data(), *squares = squares_.template const_data_ptr<T>();
    T* dz_data = grads_ ? block_.data() + half_ : nullptr;
    Tensor dz = grads_ ? block_.p.narrow(1, half_, rows) : Tensor();
    Tensor means = right_.narrow(0, 0, rows);
    if (products_) {
      w_.for_each([&](int64_t first, int64_t count, const Tensor& block) {
        Tensor part = dz.narrow(0, first, count);
        at::mm_out(part, block, means.t());
      });
    }
    block_.for_each_tile(4 * classes_, [&](int64_t first, int64_t lanes, int64_t column, RowStats<T>& stats) {
      shifted_grad_tile(policy_, first, lanes, column, p_data + column, ld, classes_, squares, stats, products_, found_,
                        grads_ ? dz_data + column : nullptr);
    });
    if (a_.grad_input) input_gradient(phi, dz, rows);
    if (a_.grad_bias) add_class_sums(dz_data, ld, rows, std::vector<T>(), bias_sums_);
    if (a_.grad_weight) weight_gradient(rows);
  }

  // dphi = dz W + 2 strength c v phi
  void input_gradient(const Tensor& phi, const Tensor& dz, int64_t rows) {
    const int64_t first = block_.first;
    Tensor out = direct_input_ ? grad_input_.narrow(0, first, rows) : input_scratch_.narrow(0, 0, rows);
    const T* from = phi.template const_data_ptr<T>();
    T* to = out.template mutable_data_ptr<T>();
    const T strength = a_.options.curvature_grad ? static_cast<T>(a_.options.strength) : T(0);
    at::parallel_for(0, rows, row_grain(), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const T c = policy_.coefficient(first + n), factor = c == T(0) ? T(0) : 2 * strength * c * found_.values[n].v;
        for (int64_t i = n * fan_in_; i < (n + 1) * fan_in_; ++i) to[i] = factor * from[i];
      }
    });
    w_.for_each([&](int64_t k, int64_t count, const Tensor& block) { out.addmm_(dz.narrow(0, k, count).t(), block); });
    if (direct_input_) return;
    if (a_.all) {
      grad_input_.narrow(0, first, rows).copy_(out);
    } else {
      grad_input_.index_copy_(0, indices(a_.kept.data() + first, rows), out.to(grad_input_.scalar_type()));
    }
  }

  // dW += dz^T phi - 2 (g p~)^T (u - m), and -2 g_n U_n at y_n; what is left, 2 diag(sum_n g_n p~_n) (W - m), comes at the end
  void weight_gradient(int64_t rows) {
    std::vector<T> factor(found_.g);
    for (T& g : factor) g *= T(-2);
    T* right = right_.template mutable_data_ptr<T>();
    const T* u = shift_.template const_data_ptr<T>();
    if (pull_) {
      scale_rows(right, factor, fan_in_);
      add_class_sums(block_.data(), block_.ld, rows, found_.g, class_weights_);
    }
    const int64_t begin = pull_ ? 0 : half_, terms = half_ + rows - begin;
    const Tensor a = block_.p.narrow(1, begin, terms), b = right_.narrow(0, begin, terms);
    const bool start = block_.first == 0;
    if (!narrow_) {
      if (start)
        at::mm_out(grad_weight_, a, b);
      else
        grad_weight_.addmm_(a, b);
      if (pull_) scatter_rows(u, found_.y, factor, fan_in_, grad_weight_.template mutable_data_ptr<T>());
      return;
    }
    for (int64_t k = 0; k < classes_; k += w_.step()) {
      const int64_t count = std::min(w_.step(), classes_ - k);
      Tensor share = weight_scratch_.narrow(0, 0, count), target = grad_weight_.narrow(0, k, count);
      at::mm_out(share, a.narrow(0, k, count), b);
      if (pull_) scatter_rows(u, found_.y, factor, fan_in_, share.template mutable_data_ptr<T>(), k, count);
      if (start)
        target.copy_(share);
      else
        target.add_(share);
    }
  }

  void finish_weight() {
    if (a_.rows == 0) grad_weight_.zero_();
    if (pull_) {
      const T* m = offset_.template const_data_ptr<T>();
      w_.for_each([&](int64_t first, int64_t count, const Tensor& block) {
        Tensor target = narrow_ ? block : grad_weight_.narrow(0, first, count);
        const T* w = block.template const_data_ptr<T>();
        T* out = target.template mutable_data_ptr<T>();
        at::parallel_for(0, count, row_grain(), [&](int64_t begin, int64_t end) {
          for (int64_t s = begin; s < end; ++s) {
            const T twice = 2 * class_weights_[first + s];
            for (int64_t i = 0; i < fan_in_; ++i) {
              const T share = twice * (w[s * fan_in_ + i] - m[i]);
              out[s * fan_in_ + i] = narrow_ ? share : out[s * fan_in_ + i] + share;
            }
          }
        });
        if (narrow_) grad_weight_.narrow(0, first, count).add_(block);
      });
    }
    if (grad_weight_.scalar_type() != a_.weight.scalar_type()) grad_weight_ = grad_weight_.to(a_.weight.scalar_type());
  }

  std::tuple<Tensor, Tensor> values(int64_t reduction, at::IntArrayRef row_shape) const {
    if (reduction != kNone) {
      const double kappa = policy_.flatness();
      return {at::scalar_tensor(policy_.loss() + a_.options.strength * kappa, acc_), at::scalar_tensor(kappa, acc_)};
    }
    Tensor loss = at::zeros(row_shape, acc_), flatness = at::zeros(row_shape, acc_);
    T *losses = loss.template mutable_data_ptr<T>(), *kappas = flatness.template mutable_data_ptr<T>();
    for (int64_t n = 0; n < a_.rows; ++n) {
      const int64_t row = a_.all ? n : a_.kept[n];
      losses[row] = policy_.row_loss(n);
      kappas[row] = policy_.row_flatness(n);
    }
    return {loss, flatness};
  }

  const Arguments& a_;
  at::TensorOptions acc_;
  int64_t classes_, fan_in_;
  ClassBlocks<T> w_;
  CrossEntropyRows<T> policy_;
  bool grads_, pull_, products_;  // any gradient; through the curvature at all; through its Hessian
  bool narrow_, direct_input_ = false;
  int64_t step_, half_ = 0;  // rows per chunk; where the second halves of block_ and right_ begin
  RowBlock<T> block_;        // (V, [p~ | dz])
  ShiftedBlock<T> found_;
  Tensor right_, shift_, offset_, squares_, input_scratch_, weight_scratch_;
  std::vector<T> class_weights_, bias_sums_;  // sums over rows of g p~ and of dz
  Tensor grad_input_, grad_weight_;
};

Result linear_cross_entropy_forward(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                                    const Tensor& target, const std::optional<Tensor>& class_weight,
                                    const std::optional<Tensor>& row_scale, int64_t ignore_index,
                                    double label_smoothing, int64_t reduction, double strength, bool curvature_grad,
                                    int64_t max_bytes, bool narrow, bool grad_input, bool grad_weight, bool grad_bias) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const at::AutoGradMode no_graph(false);
  const auto is_double = [](const Tensor& t) { return t.scalar_type() == at::kDouble; };
  const bool wide = is_double(input) || is_double(weight) || (bias && is_double(*bias));
  const at::ScalarType acc = wide ? at::kDouble : at::kFloat;
  const auto vector = [&](const std::optional<Tensor>& t) { return t ? t->to(acc).contiguous() : Tensor(); };
  Tensor labels = target.reshape({-1}).contiguous(), scale = vector(row_scale);
  if (scale.defined()) scale = scale.reshape({-1});

  Arguments a;
  a.input = input.reshape({labels.size(0), weight.size(1)});
  a.weight = weight;
  a.bias = vector(bias);
  a.max_bytes = max_bytes;
  a.narrow = narrow;
  a.grad_input = grad_input;
  a.grad_weight = grad_weight;
  a.grad_bias = grad_bias;
  const int64_t* index = labels.const_data_ptr<int64_t>();
  for (int64_t n = 0; n < labels.size(0); ++n) {
    if (index[n] != ignore_index) a.kept.push_back(n);
  }
  a.rows = static_cast<int64_t>(a.kept.size());
  a.all = a.rows == labels.size(0);
  if (!a.all) {
    const Tensor kept = at::from_blob(a.kept.data(), {a.rows}, at::TensorOptions().dtype(at::kLong));
    labels = labels.index_select(0, kept);
    if (scale.defined()) scale = scale.index_select(0, kept);
  }
  a.options = {"linear_cross_entropy", labels,   vector(class_weight), ignore_index, label_smoothing,
               reduction == kMean,     strength, curvature_grad,       scale};
  Result result;
  AT_DISPATCH_FLOATING_TYPES(acc, "linear_cross_entropy",
                             [&] { result = LinearCrossEntropy<scalar_t>(a, acc).run(reduction, target.sizes()); });
  auto& [loss, flatness, dphi, dw, db] = result;
  dphi = grad_input ? dphi.view(input.sizes()) : at::empty({0}, input.options().memory_format(std::nullopt));
  if (!grad_weight) dw = at::empty({0}, weight.options().memory_format(std::nullopt));
  if (bias) db = db.to(bias->scalar_type());
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(fam_ext, CPU, m) { m.impl("linear_cross_entropy_forward", &linear_cross_entropy_forward); }

}  // namespace fam_ext
