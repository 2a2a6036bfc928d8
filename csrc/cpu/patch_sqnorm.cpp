// patch_sqnorm on the CPU: squares summed over a group's channels, then over the kernel's window along one axis at a
// time. Windows are summed directly: all terms are non-negative, so nothing cancels as differences of running sums
// would.
#include "patch_sqnorm.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <memory>

#include "dispatch.h"

namespace fam_ext {
namespace {

constexpr const char* kExpected = "patch_sqnorm: input must be a floating tensor";

using namespace patches;

constexpr int64_t kBlock = 4096;   // elements of channel sums worked on at once: they stay in the first-level cache
constexpr int64_t kGrain = 32768;  // elements of the input that are worth a thread

// ---- Tiles: boxes of the output (forward) or of the input (backward), one task each. Every output's terms are added
// in the same order whatever the tiles are, so results do not depend on the number of threads. ----

struct Tiling {
  std::array<int64_t, 3> extent, size, count;  // along D, H, W
  int64_t tasks, grain;
  int64_t rows, line, plane;  // elements of scratch: channel sums, one row of windows, one plane of them

  Tiling(const Geometry& g, bool forward) {
    const Axis &h = g.axes[2], &w = g.axes[3];
    for (int a = 0; a < 3; ++a) extent[a] = forward ? g.axes[a + 1].out : g.axes[a + 1].in;
    size = extent;
    const int64_t depth = std::max<int64_t>(1, g.channels * g.inner);
    const int64_t shortest = w.trivial() && g.layout == Layout::kChannels ? 1 : 64;
    const int64_t limit = std::max({shortest, std::min(8192 / g.inner, 4 * kGrain / depth), int64_t(1)});
    size[2] = std::min(extent[2], std::max<int64_t>({1, limit / (forward ? w.stride : 1), 16 * w.halo()}));
    tasks = g.axes[0].in * g.outer * ceil_div(extent[2], size[2]);
    const int64_t work = g.axes[0].in * g.outer * extent[0] * extent[1] * extent[2] * depth;
    const int64_t wanted = at::get_num_threads() == 1 ? 1 : std::min<int64_t>(work / kGrain, 4 * at::get_num_threads());
    for (int a = 0; a < 2; ++a) {
      if (tasks >= wanted) break;
      const int64_t thinnest = std::max<int64_t>(1, 4 * g.axes[a + 1].halo());
      const int64_t pieces = std::clamp<int64_t>(extent[a] / thinnest, 1, ceil_div(wanted, tasks));
      size[a] = ceil_div(extent[a], pieces);
      tasks *= ceil_div(extent[a], size[a]);
    }
    for (int a = 0; a < 3; ++a) count[a] = ceil_div(extent[a], size[a]);
    grain = std::max<int64_t>(1, kGrain * tasks / std::max<int64_t>(1, work));

    const auto other = [forward](const Axis& a,
                                 int64_t n) {  // the longest range on the other side of n outputs or inputs
      return forward ? std::min(a.in, (n - 1) * a.stride + a.halo() + 1)
                     : std::min(a.out, (n + a.halo()) / a.stride + 1);
    };
    const int64_t inputs = forward ? other(w, size[2]) : size[2], outputs = forward ? size[2] : other(w, size[2]);
    rows = g.pointwise ? 0 : std::max(kBlock, inputs * g.inner);
    line = g.pointwise ? 0 : outputs * g.inner;
    plane = g.axes[1].kernel == 1 ? 0 : line * (forward ? size[1] : other(h, size[1]));
  }

  Range range(int axis, int64_t index) const {
    return {index * size[axis], std::min(extent[axis], (index + 1) * size[axis])};
  }
};

template <typename T>
struct Scratch {
  std::unique_ptr<T[]> rows, line, plane;
  explicit Scratch(const Tiling& t) : rows(new T[t.rows]), line(new T[t.line]), plane(new T[t.plane]) {}
};

struct Tile {
  Range d, h, w;
};

// How many whole rows of the input, `width` of W's positions each, are taken at once.
int64_t rows_at_once(const Geometry& g, int64_t width) {
  return g.rows_join && width == g.axes[3].in ? std::max<int64_t>(1, kBlock / (width * g.inner)) : 1;
}

template <typename S, typename T>  // x, out: at the batch entry and outer group
void forward_tile(const Geometry& g, const S* x, T* out, const Tile& tile, Scratch<T>& scratch) {
  const auto& [b, d, h, w] = g.axes;
  const Range inputs = w.inputs_of(tile.w), ys = h.inputs_of(tile.h), zs = d.inputs_of(tile.d);
  const int64_t line_size = tile.w.size() * g.inner, width = inputs.size() * g.inner;
  const auto target = [&, &g = g](int64_t od, int64_t oh) {
    return out + od * g.plane_size() + oh * g.row_size() + tile.w.begin * g.inner;
  };
  if (!g.pointwise) {
    for (int64_t od = tile.d.begin; od < tile.d.end; ++od) {
      for (int64_t oh = tile.h.begin; oh < tile.h.end; ++oh) std::fill_n(target(od, oh), line_size, T(0));
    }
  }
  if (inputs.size() == 0) return;
  const int64_t block = rows_at_once(g, inputs.size());
  for (int64_t z = zs.begin; z < zs.end; ++z) {
    if (!d.used(z, tile.d)) continue;
    T* plane = d.kernel > 1 ? scratch.plane.get() : target(d.output(0, z, tile.d), tile.h.begin);
    const int64_t plane_step = d.kernel > 1 ? line_size : g.row_size();
    if (d.kernel > 1) std::fill_n(plane, tile.h.size() * line_size, T(0));
    for (int64_t y = ys.begin; y < ys.end;) {
      if (!h.used(y, tile.h)) {
        ++y;
        continue;
      }
      int64_t end = y + 1;
      while (end < ys.end && end - y < block && h.used(end, tile.h)) ++end;
      T* sums = g.pointwise ? plane + (y - tile.h.begin) * plane_step : scratch.rows.get();
      channel_squares(g, x + z * d.x_step + y * h.x_step + inputs.begin * w.x_step, (end - y) * inputs.size(), sums);
      for (; y < end && !g.pointwise; ++y, sums += width) {
        const T* line = sums;
        if (!w.trivial()) {
          std::fill_n(scratch.line.get(), line_size, T(0));
          window<true, T>(g, sums, inputs, scratch.line.get(), tile.w);
          line = scratch.line.get();
        }
        for (int64_t k = h.next(0); k < h.kernel; k = h.next(k + 1)) {
          const int64_t oh = h.output(k, y, tile.h);
          if (oh >= 0) add(plane + (oh - tile.h.begin) * plane_step, line, line_size);
        }
      }
      y = end;
    }
    for (int64_t k = d.next(0); k < d.kernel && d.kernel > 1; k = d.next(k + 1)) {
      const int64_t od = d.output(k, z, tile.d);
      for (int64_t oh = tile.h.begin; oh < tile.h.end && od >= 0; ++oh) {
        add(target(od, oh), plane + (oh - tile.h.begin) * line_size, line_size);
      }
    }
  }
}

template <typename S, typename T>  // x, dx, grad: at the batch entry and outer group
void backward_tile(const Geometry& g, const S* x, const T* grad, S* dx, const Tile& tile, Scratch<T>& scratch) {
  const auto& [b, d, h, w] = g.axes;
  const Range outputs = w.outputs_of(tile.w), hs = h.outputs_of(tile.h), ds{0, d.out};
  const int64_t line_size = outputs.size() * g.inner, width = tile.w.size() * g.inner;
  const auto source = [&, &g = g](int64_t od, int64_t oh) {
    return grad + od * g.plane_size() + oh * g.row_size() + outputs.begin * g.inner;
  };
  const int64_t block = rows_at_once(g, tile.w.size());
  for (int64_t z = tile.d.begin; z < tile.d.end; ++z) {
    const int64_t only = d.kernel > 1 ? -1 : d.output(0, z, ds);
    const T* plane = only < 0 ? nullptr : source(only, hs.begin);  // sums of grad over the outputs that see plane z
    int64_t plane_step = g.row_size();
    if (d.kernel > 1) {
      std::fill_n(scratch.plane.get(), hs.size() * line_size, T(0));
      for (int64_t k = d.next(0); k < d.kernel; k = d.next(k + 1)) {
        const int64_t od = d.output(k, z, ds);
        for (int64_t oh = hs.begin; oh < hs.end && od >= 0; ++oh) {
          add(scratch.plane.get() + (oh - hs.begin) * line_size, source(od, oh), line_size);
        }
      }
      plane = scratch.plane.get();
      plane_step = line_size;
    }
    for (int64_t y = tile.h.begin, end; y < tile.h.end; y = end) {
      end = std::min(tile.h.end, y + block);
      const int64_t x_row = z * d.x_step + y * h.x_step + tile.w.begin * w.x_step;
      const int64_t dx_row = z * d.dx_step + y * h.dx_step + tile.w.begin * w.dx_step;
      const T* sums = scratch.rows.get();
      if (g.pointwise) sums = plane + (y - hs.begin) * plane_step;
      for (int64_t i = y; i < end && !g.pointwise; ++i) {
        T* row = scratch.rows.get() + (i - y) * width;
        std::fill_n(row, width, T(0));
        if (plane == nullptr || line_size == 0) continue;
        T* line = w.trivial() ? row : scratch.line.get();
        if (line != row) std::fill_n(line, line_size, T(0));
        for (int64_t k = h.next(0); k < h.kernel; k = h.next(k + 1)) {
          const int64_t oh = h.output(k, i, hs);
          if (oh >= 0) add(line, plane + (oh - hs.begin) * plane_step, line_size);
        }
        if (line != row) window<false, T>(g, row, tile.w, line, outputs);
      }
      scale_channels(g, x + x_row, sums, (end - y) * tile.w.size(), dx + dx_row);
    }
  }
}

template <typename T, typename F>  // f(batch entry, outer group, tile, scratch) for every tile
void for_each_tile(const Geometry& g, bool forward, const F& f) {
  const Tiling tiling(g, forward);
  at::parallel_for(0, tiling.tasks, tiling.grain, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch(tiling);
    for (int64_t task = begin; task < end; ++task) {
      int64_t rest = task;
      const auto next = [&rest](int64_t n) { return std::exchange(rest, rest / n) % n; };
      Tile tile;
      tile.w = tiling.range(2, next(tiling.count[2]));
      tile.h = tiling.range(1, next(tiling.count[1]));
      tile.d = tiling.range(0, next(tiling.count[0]));
      const int64_t group = next(g.outer);
      f(rest, group, tile, scratch);
    }
  });
}

at::Tensor patch_sqnorm(const at::Tensor& input, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding,
                        IntArrayRef dilation, int64_t groups) {
  at::DimVector sizes = patch_sqnorm_sizes(input, kernel, stride, padding, dilation, groups);
  const Geometry g = make_geometry(input, input, sizes, kernel, stride, padding, dilation, groups);
  const bool inside = patch_groups_inside(input, groups);
  if (inside) std::rotate(sizes.begin() + 1, sizes.begin() + 2, sizes.end());
  const at::Tensor out = at::empty(sizes, input.options().dtype(patch_sqnorm_type(input)));
  if (out.numel() > 0) {
    dispatch(input, kExpected, [&](auto s, auto t) {
      using S = decltype(s);
      using T = decltype(t);
      for_each_tile<T>(g, true, [&](int64_t b, int64_t group, const Tile& tile, Scratch<T>& scratch) {
        const S* x = input.const_data_ptr<S>() + b * g.axes[0].x_step + group * g.channels * g.x_channel;
        forward_tile<S, T>(g, x, out.data_ptr<T>() + (b * g.outer + group) * g.volume_size(), tile, scratch);
      });
    });
  }
  return inside ? out.movedim(-1, 1) : out;
}

at::Tensor patch_sqnorm_backward(const at::Tensor& grad, const at::Tensor& input, IntArrayRef kernel,
                                 IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups) {
  const at::DimVector sizes = patch_sqnorm_sizes(input, kernel, stride, padding, dilation, groups);
  check_patch_sqnorm_gradient(grad, input, sizes);
  const at::Tensor dx = at::empty_like(input);
  if (dx.numel() == 0) return dx;
  const Geometry g = make_geometry(input, dx, sizes, kernel, stride, padding, dilation, groups);
  const at::Tensor dense = patch_groups_inside(input, groups) ? grad.movedim(1, -1).contiguous() : grad.contiguous();
  dispatch(input, kExpected, [&](auto s, auto t) {
    using S = decltype(s);
    using T = decltype(t);
    for_each_tile<T>(g, false, [&](int64_t b, int64_t group, const Tile& tile, Scratch<T>& scratch) {
      const Axis& batch = g.axes[0];
      const int64_t first = group * g.channels;
      backward_tile<S, T>(g, input.const_data_ptr<S>() + b * batch.x_step + first * g.x_channel,
                          dense.const_data_ptr<T>() + (b * g.outer + group) * g.volume_size(),
                          dx.data_ptr<S>() + b * batch.dx_step + first * g.dx_channel, tile, scratch);
    });
  });
  return dx;
}

}  // namespace

TORCH_LIBRARY_IMPL(fam_ext, CPU, m) {
  m.impl("patch_sqnorm", patch_sqnorm);
  m.impl("patch_sqnorm_backward", patch_sqnorm_backward);
}

}  // namespace fam_ext
