// What the patch_sqnorm kernels are made of: the geometry of windows over a strided input, sums over channels and along
// rows.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <array>
#include <tuple>
#include <type_traits>

#include "patch_windows.h"

namespace fam_ext::patches {

using at::IntArrayRef;
template <typename T>
using Vec = at::vec::Vectorized<T>;

// ---- Elements of type S as vectors of the accumulation type T; `count` <= Vec<T>::size() ----

template <typename S, typename T>
Vec<T> load(const S* p, int64_t count) {
  if constexpr (std::is_same_v<S, T>) {
    return count == Vec<T>::size() ? Vec<T>::loadu(p) : Vec<T>::loadu(p, count);
  } else {
    Vec<T> v;
    if (count == Vec<T>::size()) {
      at::vec::load_to_float<S>(p, v);
    } else {
      S part[Vec<T>::size()] = {};
      std::copy_n(p, count, part);
      at::vec::load_to_float<S>(part, v);
    }
    return v;
  }
}

template <typename S, typename T>
void store(S* p, const Vec<T>& v, int64_t count) {
  if constexpr (std::is_same_v<S, T>) {
    v.store(p, count);
  } else {
    at::vec::convert_from_float<S>(v, v).store(p, count);
  }
}

template <typename T>
void add(T* target, const T* source, int64_t n) {
  constexpr int64_t L = Vec<T>::size();
  for (int64_t i = 0; i < n; i += L) {
    const int64_t m = std::min(L, n - i);
    store<T, T>(target + i, load<T, T>(target + i, m) + load<T, T>(source + i, m), m);
  }
}

// ---- Geometry: sizes (B, D, H, W), missing axes have size 1; the output is (B, outer groups, D, H, W, inner groups)
// ----

struct Range {
  int64_t begin, end;
  int64_t size() const { return std::max<int64_t>(0, end - begin); }
};

inline int64_t ceil_div(int64_t a, int64_t b) {
  return b == 1 ? a : (a + b - 1) / b;
}  // for a <= 0 some number <= 0, enough below

struct Axis {
  int64_t in = 1, out = 1, kernel = 1, stride = 1, pad = 0, dilation = 1;
  int64_t x_step = 0, dx_step = 0;  // strides of the input and of its gradient

  bool trivial() const { return kernel == 1 && stride == 1 && pad == 0; }
  int64_t halo() const { return (kernel - 1) * dilation; }
  // outputs o in `outputs` whose k-th tap, o * stride - pad + k * dilation, lies in `inputs`
  Range taps(int64_t k, Range inputs, Range outputs) const {
    const int64_t shift = pad - k * dilation;
    return {std::max(outputs.begin, ceil_div(inputs.begin + shift, stride)),
            std::min(outputs.end, ceil_div(inputs.end + shift, stride))};
  }
  int64_t tap(int64_t o, int64_t k) const { return o * stride - pad + k * dilation; }
  // the output whose k-th tap is input i, or -1
  int64_t output(int64_t k, int64_t i, Range outputs) const {
    const Range o = taps(k, {i, i + 1}, outputs);
    return o.begin < o.end ? o.begin : -1;
  }
  bool used(int64_t i, Range outputs) const {
    for (int64_t k = 0; k < kernel; ++k) {
      if (output(k, i, outputs) >= 0) return true;
    }
    return false;
  }
  Range inputs_of(Range o) const {
    return {std::max<int64_t>(0, tap(o.begin, 0)), std::min(in, tap(o.end - 1, kernel - 1) + 1)};
  }
  Range outputs_of(Range i) const {
    return {std::max<int64_t>(0, ceil_div(i.begin + pad - halo(), stride)),
            std::min(out, (i.end - 1 + pad) / stride + 1)};
  }
};

enum class Layout {
  kPositions,
  kChannels,
  kStrided
};  // what is contiguous: neighbouring positions, a group's channels, neither

struct Geometry {
  std::array<Axis, 4> axes;        // B, D, H, W
  int64_t outer, inner, channels;  // groups outside and inside of the positions; channels per group
  int64_t x_channel, dx_channel;
  bool pointwise, rows_join;  // whether consecutive rows of W positions follow each other in memory
  Layout layout = Layout::kStrided;

  int64_t row_size() const { return axes[3].out * inner; }
  int64_t plane_size() const { return axes[2].out * row_size(); }
  int64_t volume_size() const { return axes[1].out * plane_size(); }
};

inline Geometry make_geometry(const at::Tensor& x, const at::Tensor& dx, IntArrayRef out, IntArrayRef kernel,
                              IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups) {
  Geometry g;
  const bool inside = patch_groups_inside(x, groups);
  g.outer = inside ? 1 : groups;
  g.inner = inside ? groups : 1;
  g.channels = x.size(1) / groups;
  g.x_channel = x.stride(1);
  g.dx_channel = dx.stride(1);
  const int64_t rank = x.dim() - 2;
  g.axes[0] = {x.size(0), x.size(0), 1, 1, 0, 1, x.stride(0), dx.stride(0)};
  for (int64_t a = 0; a < rank; ++a) {
    g.axes[4 - rank + a] = {x.size(a + 2), out[a + 2],  kernel[a],       stride[a],
                            padding[a],    dilation[a], x.stride(a + 2), dx.stride(a + 2)};
  }
  Axis& w = g.axes[3];
  for (int a = 2; a >= (g.outer == 1 ? 0 : 1); --a) {  // fold outer axes into W while nothing is summed along either
    Axis& outer = g.axes[a];
    const bool dense = outer.x_step == w.in * w.x_step && outer.dx_step == w.in * w.dx_step;
    if (!w.trivial() || !outer.trivial() || !(dense || w.in == 1 || outer.in == 1)) break;
    if (w.in == 1) std::tie(w.x_step, w.dx_step) = std::tie(outer.x_step, outer.dx_step);
    w.in = w.out = w.in * outer.in;
    outer = Axis{};
  }
  g.pointwise = g.axes[1].trivial() && g.axes[2].trivial() && w.trivial();
  g.rows_join = g.axes[2].x_step == w.in * w.x_step && g.axes[2].dx_step == w.in * w.dx_step;
  const bool channels_dense = g.x_channel == 1 && g.dx_channel == 1;
  const int64_t unit = g.inner > 1 && g.channels == 1 && channels_dense ? g.inner : (g.inner == 1 ? 1 : 0);
  const bool positions_dense = unit && w.x_step == unit && w.dx_step == unit;
  if (channels_dense && g.channels > 1 && (!positions_dense || w.in == 1)) {
    g.layout = Layout::kChannels;
  } else if (positions_dense) {
    g.layout = Layout::kPositions;
  }
  return g;
}

// ---- Sums of squares over a group's channels ----

template <typename S, typename T, int J>  // sums[i] (+)= sum of J channels' squares
void add_squares(const S* x, int64_t channel, bool first, int64_t n, T* sums) {
  constexpr int64_t L = Vec<T>::size();
  for (int64_t i = 0; i < n; i += L) {
    const int64_t m = std::min(L, n - i);
    Vec<T> sum = first ? Vec<T>(0) : load<T, T>(sums + i, m);
    for (int j = 0; j < J; ++j) {
      const Vec<T> v = load<S, T>(x + j * channel + i, m);
      sum = at::vec::fmadd(v, v, sum);
    }
    store<T, T>(sums + i, sum, m);
  }
}

template <typename S, typename T>
T squared_norm(const S* x, int64_t n) {
  constexpr int64_t L = Vec<T>::size();
  Vec<T> sums[4] = {Vec<T>(0), Vec<T>(0), Vec<T>(0), Vec<T>(0)};
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L) {
    for (int64_t j = 0; j < 4; ++j) {
      const Vec<T> v = load<S, T>(x + i + j * L, L);
      sums[j] = at::vec::fmadd(v, v, sums[j]);
    }
  }
  for (; i < n; i += L) {
    const Vec<T> v = load<S, T>(x + i, std::min(L, n - i));
    sums[0] = at::vec::fmadd(v, v, sums[0]);
  }
  const Vec<T> total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  return at::vec::vec_reduce_all<T>([](const Vec<T>& a, const Vec<T>& b) { return a + b; }, total);
}

template <typename S, typename T>  // sums: (n, inner)
void channel_squares(const Geometry& g, const S* x, int64_t n, T* sums) {
  const int64_t step = g.axes[3].x_step, channel = g.x_channel;
  if (g.channels == 0) std::fill_n(sums, n * g.inner, T(0));
  if (g.layout == Layout::kPositions) {
    for (int64_t c = 0; c < g.channels; c += 4) {
      const S* start = x + c * channel;
      switch (std::min<int64_t>(4, g.channels - c)) {
        case 1:
          add_squares<S, T, 1>(start, channel, c == 0, n * g.inner, sums);
          break;
        case 2:
          add_squares<S, T, 2>(start, channel, c == 0, n * g.inner, sums);
          break;
        case 3:
          add_squares<S, T, 3>(start, channel, c == 0, n * g.inner, sums);
          break;
        default:
          add_squares<S, T, 4>(start, channel, c == 0, n * g.inner, sums);
      }
    }
    return;
  }
  for (int64_t group = 0; group < g.inner; ++group) {
    const S* start = x + group * g.channels * channel;
    if (g.layout == Layout::kChannels) {
      for (int64_t i = 0; i < n; ++i) sums[i * g.inner + group] = squared_norm<S, T>(start + i * step, g.channels);
      continue;
    }
    for (int64_t c = 0; c < g.channels; ++c) {
      for (int64_t i = 0; i < n; ++i) {
        const T v = static_cast<T>(start[c * channel + i * step]);
        sums[i * g.inner + group] = (c ? sums[i * g.inner + group] : T(0)) + v * v;
      }
    }
  }
}

template <typename S, typename T>  // dx = 2 t x; t: (n, inner)
void scale_channels(const Geometry& g, const S* x, const T* t, int64_t n, S* dx) {
  constexpr int64_t L = Vec<T>::size();
  const Axis& w = g.axes[3];
  const auto scale = [](const S* from, const Vec<T>& v, S* to, int64_t m) {
    store<S, T>(to, (v + v) * load<S, T>(from, m), m);
  };
  if (g.layout == Layout::kPositions) {
    for (int64_t c = 0; c < g.channels; ++c) {
      for (int64_t i = 0; i < n * g.inner; i += L) {
        const int64_t m = std::min(L, n * g.inner - i);
        scale(x + c * g.x_channel + i, load<T, T>(t + i, m), dx + c * g.dx_channel + i, m);
      }
    }
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t group = 0; group < g.inner; ++group) {
      const S* from = x + i * w.x_step + group * g.channels * g.x_channel;
      S* to = dx + i * w.dx_step + group * g.channels * g.dx_channel;
      const T factor = t[i * g.inner + group];
      if (g.layout == Layout::kChannels) {
        for (int64_t c = 0; c < g.channels; c += L)
          scale(from + c, Vec<T>(factor), to + c, std::min(L, g.channels - c));
      } else {
        for (int64_t c = 0; c < g.channels; ++c) {
          to[c * g.dx_channel] = static_cast<S>((factor + factor) * static_cast<T>(from[c * g.x_channel]));
        }
      }
    }
  }
}

// ---- Window sums along W ----

// gather: line[o] += row[tap], the forward pass; otherwise row[tap] += line[o], its transpose. Each starts at its range.
template <bool gather, typename T>
void window(const Geometry& g, std::conditional_t<gather, const T, T>* row, Range inputs,
            std::conditional_t<gather, T, const T>* line, Range outputs) {
  const Axis& w = g.axes[3];
  for (int64_t k = 0; k < w.kernel; ++k) {
    const Range o = w.taps(k, inputs, outputs);
    if (o.size() == 0) continue;
    auto* r = row + (w.tap(o.begin, k) - inputs.begin) * g.inner;
    auto* l = line + (o.begin - outputs.begin) * g.inner;
    if (w.stride == 1) {
      if constexpr (gather) {
        add(l, r, o.size() * g.inner);
      } else {
        add(r, l, o.size() * g.inner);
      }
      continue;
    }
    for (int64_t i = 0; i < o.size(); ++i) {
      for (int64_t j = 0; j < g.inner; ++j) {
        if constexpr (gather) {
          l[i * g.inner + j] += r[i * w.stride * g.inner + j];
        } else {
          r[i * w.stride * g.inner + j] += l[i * g.inner + j];
        }
      }
    }
  }
}

}  // namespace fam_ext::patches
