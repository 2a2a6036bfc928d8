// Passes over activations, each read once: a matrix M (rows, cols) with dense rows, a vector along each of its dimensions.
#include "noise.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <cmath>

#include "dispatch.h"
#include "patch_sqnorm.h"

namespace fam_ext::noise {
namespace {

constexpr const char* kExpected = "fam_ext noise: expected a floating tensor";

using at::Tensor;
using patches::load;
using patches::store;
template <typename T>
using Vec = at::vec::Vectorized<T>;

constexpr int64_t kBlock = 1024;   // columns worked on at once: sums over rows stay in the first-level cache
constexpr int64_t kPiece = 16384;  // elements of a matrix that are read twice: they stay in the second-level cache
constexpr int64_t kGrain = 16384;  // elements that are worth a thread

template <typename T>
T total(const Vec<T>& v) {
  return at::vec::vec_reduce_all<T>([](const Vec<T>& a, const Vec<T>& b) { return a + b; }, v);
}

// f(first, count) for the vectors of n elements: count is a constant but for the last one
template <typename T, typename F>
void for_lanes(int64_t n, const F& f) {
  constexpr int64_t L = Vec<T>::size();
  int64_t b = 0;
  for (; b + L <= n; b += L) f(b, std::integral_constant<int64_t, L>());
  if (b < n) f(b, n - b);
}

// of_rows[a] += sum_b M[a, b] v[b] where `Rows`, of_cols[b] += sum_a u[a] M[a, b] where `Cols`; n <= kBlock columns
template <bool Rows, bool Cols, int R, typename S, typename T>
void sums_of(const S* m, int64_t step, int64_t n, const T* u, const T* v, T* of_rows, T* of_cols) {
  Vec<T> row_sums[R], factors[R];
  for (int r = 0; r < R; ++r) {
    row_sums[r] = Vec<T>(0);
    if constexpr (Cols) factors[r] = Vec<T>(u[r]);
  }
  for_lanes<T>(n, [&](int64_t b, auto count) {
    Vec<T> along, sum;
    if constexpr (Rows) along = load<T, T>(v + b, count);
    if constexpr (Cols) sum = load<T, T>(of_cols + b, count);
    for (int r = 0; r < R; ++r) {
      const Vec<T> x = load<S, T>(m + r * step + b, count);
      if constexpr (Rows) row_sums[r] = at::vec::fmadd(x, along, row_sums[r]);
      if constexpr (Cols) sum = at::vec::fmadd(x, factors[r], sum);
    }
    if constexpr (Cols) store<T, T>(of_cols + b, sum, count);
  });
  if constexpr (Rows) {
    for (int r = 0; r < R; ++r) {
      of_rows[r] += total(row_sums[r]);
    }
  }
}

template <bool Rows, bool Cols, typename S, typename T>
void sums(const S* m, int64_t rows, int64_t cols, int64_t step, const T* u, const T* v, T* of_rows, T* of_cols) {
  constexpr int R = 4;
  for (int64_t b = 0; b < cols; b += kBlock) {
    const int64_t n = std::min(kBlock, cols - b);
    const T* along = Rows ? v + b : nullptr;
    T* under = Cols ? of_cols + b : nullptr;
    const auto at = [](auto* p, int64_t k) { return p == nullptr ? p : p + k; };
    int64_t a = 0;
    for (; a + R <= rows; a += R)
      sums_of<Rows, Cols, R>(m + a * step + b, step, n, at(u, a), along, at(of_rows, a), under);
    for (; a < rows; ++a) sums_of<Rows, Cols, 1>(m + a * step + b, step, n, at(u, a), along, at(of_rows, a), under);
  }
}

// out = M + u v^T
template <typename S, typename T>
void update(const S* m, int64_t rows, int64_t cols, int64_t step, const T* u, const T* v, S* out) {
  for (int64_t a = 0; a < rows; ++a) {
    const Vec<T> factor(u[a]);
    for_lanes<T>(cols, [&](int64_t b, auto count) {
      const Vec<T> x = load<S, T>(m + a * step + b, count);
      store<S, T>(out + a * step + b, at::vec::fmadd(factor, load<T, T>(v + b, count), x), count);
    });
  }
}

template <typename F>  // f(matrix) for all of them
void for_each(const Matrices& m, const F& f) {
  const int64_t size = std::max<int64_t>(1, m.channels * m.positions);
  at::parallel_for(0, m.count(), std::max<int64_t>(1, kGrain / size), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) f(k);
  });
}

// The row of a (n, groups, size) tensor that belongs to matrix k, sample i's being i % n.
template <typename T>
const T* row_of(const Tensor& t, const Matrices& m, int64_t k) {
  return t.const_data_ptr<T>() + (k / m.groups % t.size(0) * m.groups + k % m.groups) * t.size(2);
}

template <bool Channels, bool Positions>  // over which sums are taken
void all_sums(const Tensor& x, const Matrices& m, const Tensor& by_channel, const Tensor& by_position,
              const Tensor& of_channel, const Tensor& of_position) {
  dispatch(x, kExpected, [&](auto s, auto t) {
    using S = decltype(s);
    using T = decltype(t);
    const S* data = x.const_data_ptr<S>();
    for_each(m, [&](int64_t k) {
      const S* matrix = data + m.offset(k);
      const T* channel = Channels ? row_of<T>(by_channel, m, k) : nullptr;
      const T* position = Positions ? by_position.const_data_ptr<T>() + k * m.positions : nullptr;
      T* to_channel = Positions ? of_channel.data_ptr<T>() + k * m.channels : nullptr;
      T* to_position = Channels ? of_position.data_ptr<T>() + k * m.positions : nullptr;
      if (m.inside) {
        sums<Channels, Positions>(matrix, m.rows(), m.cols(), m.step(), position, channel, to_position, to_channel);
      } else {
        sums<Positions, Channels>(matrix, m.rows(), m.cols(), m.step(), channel, position, to_channel, to_position);
      }
    });
  });
}

at::TensorOptions accumulation(const Tensor& x) {
  return x.options().dtype(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

}  // namespace

std::optional<Matrices> matrices(const Tensor& tensor, int64_t samples, int64_t groups, bool linear) {
  if (linear) {
    if (!tensor.is_contiguous() || samples < 1) return std::nullopt;
    const int64_t width = tensor.size(-1), rows = tensor.numel() / std::max<int64_t>(1, width);
    return Matrices{samples, 1, width, rows / samples, true};
  }
  int64_t positions = 1;
  for (int64_t d = 2; d < tensor.dim(); ++d) positions *= tensor.size(d);
  const Matrices outside{tensor.size(0), groups, tensor.size(1) / groups, positions, false};
  if (tensor.is_contiguous()) return outside;
  if (!tensor.movedim(1, -1).is_contiguous()) return std::nullopt;
  Matrices inside = outside;
  inside.inside = true;
  return inside;
}

Tensor laid_out(const Tensor& tensor, const Matrices& like, bool linear) {
  if (linear || !like.inside) return tensor.contiguous();
  return tensor.movedim(1, -1).contiguous().movedim(-1, 1);
}

Tensor over_channels(const Tensor& x, const Matrices& m, const Tensor& by_channel) {
  const Tensor result = at::zeros({m.samples, m.groups, m.positions}, accumulation(x));
  all_sums<true, false>(x, m, by_channel, Tensor(), Tensor(), result);
  return result;
}

std::pair<Tensor, Tensor> over_both(const Tensor& x, const Matrices& m, const Tensor& by_channel,
                                    const Tensor& by_position) {
  const Tensor of_position = at::zeros({m.samples, m.groups, m.positions}, accumulation(x));
  const Tensor of_channel = at::zeros({m.samples, m.groups, m.channels}, accumulation(x));
  all_sums<true, true>(x, m, by_channel, by_position, of_channel, of_position);
  return {of_position, of_channel};
}

void add_outer(const Tensor& x, const Matrices& m, const Tensor& by_channel, const Tensor& by_position,
               const Tensor& out) {
  dispatch(x, kExpected, [&](auto s, auto t) {
    using S = decltype(s);
    using T = decltype(t);
    for_each(m, [&](int64_t k) {
      const T* channel = row_of<T>(by_channel, m, k);
      const T* position = by_position.const_data_ptr<T>() + k * m.positions;
      update(x.const_data_ptr<S>() + m.offset(k), m.rows(), m.cols(), m.step(), m.inside ? position : channel,
             m.inside ? channel : position, out.data_ptr<S>() + m.offset(k));
    });
  });
}

void add_rank_one(const Tensor& x, const Matrices& m, const Tensor& left, const Tensor& right, const Tensor& at,
                  const Tensor& out) {
  dispatch(x, kExpected, [&](auto s, auto t) {
    using S = decltype(s);
    using T = decltype(t);
    const int64_t piece = m.inside ? std::max<int64_t>(1, kPiece / std::max<int64_t>(1, m.channels)) : kBlock;
    for_each(m, [&](int64_t k) {
      std::vector<T> inner(piece);
      const T *l = row_of<T>(left, m, k), *r = row_of<T>(right, m, k);
      for (int64_t first = 0; first < m.positions; first += piece) {
        const int64_t n = std::min(piece, m.positions - first);
        const int64_t offset = m.offset(k) + first * (m.inside ? m.step() : 1);
        const S* source = x.const_data_ptr<S>() + offset;
        S* target = out.data_ptr<S>() + offset;
        std::fill_n(inner.data(), n, T(0));
        if (m.inside) {
          sums<true, false, S, T>(source, n, m.cols(), m.step(), nullptr, r, inner.data(), nullptr);
        } else {
          sums<false, true, S, T>(source, m.rows(), n, m.step(), r, nullptr, nullptr, inner.data());
        }
        if (at.defined()) {
          const T* weights = at.const_data_ptr<T>() + k / m.groups * m.positions + first;
          for (int64_t i = 0; i < n; ++i) inner[i] *= weights[i];
        }
        if (m.inside) {
          update(source, n, m.cols(), m.step(), inner.data(), l, target);
        } else {
          update(source, m.rows(), n, m.step(), l, inner.data(), target);
        }
      }
    });
  });
}

void add_length(const Tensor& x, const Tensor& signs, double scale, const Tensor& length, const Tensor& out) {
  const Matrices m{x.size(0), 1, x.size(1), 1, true};
  dispatch(x, kExpected, [&](auto s, auto t) {
    using S = decltype(s);
    using T = decltype(t);
    for_each(m, [&](int64_t k) {
      const S* row = x.const_data_ptr<S>() + k * m.channels;
      Vec<T> squares(0);
      for_lanes<T>(m.channels, [&](int64_t b, auto count) {
        const Vec<T> v = load<S, T>(row + b, count);
        squares = at::vec::fmadd(v, v, squares);
      });
      const T norm = std::sqrt(total(squares));
      length.data_ptr<T>()[k] = norm;
      const T factor = norm * static_cast<T>(scale);
      update(row, 1, m.channels, m.channels, &factor, signs.const_data_ptr<T>() + k * m.channels,
             out.data_ptr<S>() + k * m.channels);
    });
  });
}

void add_length_backward(const Tensor& grad, const Tensor& x, const Tensor& signs, double scale, const Tensor& length,
                         const Tensor& out) {
  const Matrices m{x.size(0), 1, x.size(1), 1, true};
  dispatch(x, kExpected, [&](auto s, auto t) {
    using S = decltype(s);
    using T = decltype(t);
    for_each(m, [&](int64_t k) {
      const int64_t begin = k * m.channels;
      const S* g = grad.const_data_ptr<S>() + begin;
      T inner = 0;
      sums<true, false, S, T>(g, 1, m.channels, m.channels, nullptr, signs.const_data_ptr<T>() + begin, &inner,
                              nullptr);
      const T norm = length.const_data_ptr<T>()[k];
      const Vec<T> factor(norm == 0 ? T(0) : inner * static_cast<T>(scale) / norm);
      const S* row = x.const_data_ptr<S>() + begin;
      S* target = out.data_ptr<S>() + begin;
      for_lanes<T>(m.channels, [&](int64_t b, auto count) {
        store<S, T>(target + b, at::vec::fmadd(load<S, T>(row + b, count), factor, load<S, T>(g + b, count)), count);
      });
    });
  });
}

namespace {

// What the k-th place sees from output o along one axis, -1 for a zero of the padding.
int64_t seen(const Window& w, size_t axis, int64_t k, int64_t o, int64_t in) {
  const int64_t reach = k * w.dilation[axis];
  if (w.transposed) {
    const int64_t at = o + w.before[axis] - reach;
    return at >= 0 && at % w.stride[axis] == 0 && at / w.stride[axis] < in ? at / w.stride[axis] : -1;
  }
  const int64_t at = o * w.stride[axis] - w.before[axis] + reach;
  if ((at >= 0 && at < in) || w.mode == 0) return at >= 0 && at < in ? at : -1;
  if (w.mode == 1) return at < 0 ? -at : 2 * (in - 1) - at;
  if (w.mode == 2) return at < 0 ? 0 : in - 1;
  return (at + in) % in;
}

}  // namespace

void shift(const Tensor& inner, const Tensor& place, const Window& w, const Tensor& out, bool adjoint) {
  const size_t rank = w.stride.size();
  std::array<std::vector<int64_t>, 3> sees;  // (kernel, out) of each axis
  std::array<int64_t, 3> in{1, 1, 1}, size{1, 1, 1}, kernel{1, 1, 1};
  for (size_t a = 0; a < 3; ++a) {
    if (a < 3 - rank) {
      sees[a] = {0};
      continue;
    }
    const size_t axis = a - (3 - rank);
    in[a] = inner.size(2 + axis);
    size[a] = out.size(2 + axis);
    kernel[a] = place.size(3 + axis);
    for (int64_t k = 0; k < kernel[a]; ++k) {
      for (int64_t o = 0; o < size[a]; ++o) sees[a].push_back(seen(w, axis, k, o, in[a]));
    }
  }
  const int64_t groups = inner.size(1), places = kernel[0] * kernel[1] * kernel[2];
  const int64_t inputs = in[0] * in[1] * in[2], outputs = size[0] * size[1] * size[2];
  dispatch(inner, kExpected, [&](auto, auto t) {
    using T = decltype(t);
    at::parallel_for(
        0, inner.size(0) * groups, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, outputs)),
        [&](int64_t begin, int64_t end) {
          for (int64_t sg = begin; sg < end; ++sg) {
            const T* chosen = place.const_data_ptr<T>() + (sg / groups % place.size(0) * groups + sg % groups) * places;
            T* source = inner.data_ptr<T>() + sg * inputs;
            T* target = out.data_ptr<T>() + sg * outputs;
            for (int64_t k = 0; k < places; ++k) {
              if (chosen[k] == 0) continue;
              const int64_t *d = &sees[0][k / (kernel[1] * kernel[2]) * size[0]],
                            *h = &sees[1][k / kernel[2] % kernel[1] * size[1]], *c = &sees[2][k % kernel[2] * size[2]];
              for (int64_t o = 0; o < size[0] * size[1]; ++o) {
                if (d[o / size[1]] < 0 || h[o % size[1]] < 0) continue;
                T* line = source + (d[o / size[1]] * in[1] + h[o % size[1]]) * in[2];
                T* row = target + o * size[2];
                for (int64_t i = 0; i < size[2]; ++i) {
                  if (c[i] < 0) continue;
                  if (adjoint) {
                    line[c[i]] += chosen[k] * row[i];
                  } else {
                    row[i] += chosen[k] * line[c[i]];
                  }
                }
              }
            }
          }
        });
  });
}

}  // namespace fam_ext::noise
