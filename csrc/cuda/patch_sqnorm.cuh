// Squares summed over the channels, then over windows, one axis at a time and every window directly: all terms are non-negative, and
// differences of running sums would cancel. Every sum has one thread and one order, so results repeat.
#pragma once

#include <algorithm>

#include "cuda/device.cuh"
#include "cuda/patch_sqnorm.h"

namespace fam_ext::gpu {

constexpr int kPatchThreads = 256;
constexpr int kPlaneBytes = 32 << 10;  // shared memory of a plane's tile
constexpr int kPlaneRows = 16;         // most outputs along the first axis of a tile

// Where an item lies.
struct PatchItem {
  int64_t batch, group, position;
  __device__ __forceinline__ PatchItem(const PatchView& view, int64_t positions, int64_t item) {
    const int64_t inner = view.groups_inside ? view.groups : positions,
                  middle = view.groups_inside ? positions : view.groups;
    const int64_t outer = item / inner, rest = item - outer * inner;  // a remainder by % would be another division
    batch = outer / middle;
    const int64_t between = outer - batch * middle;
    group = view.groups_inside ? rest : between, position = view.groups_inside ? between : rest;
  }
};

__device__ __forceinline__ int64_t position_offset(const int64_t* sizes, const int64_t* steps, int64_t position) {
  const int64_t row = position / sizes[2], d = row / sizes[1];
  return (position - row * sizes[2]) * steps[2] + (row - d * sizes[1]) * steps[1] + d * steps[0];
}

// Where the channels of an item begin that lie side by side.
__device__ __forceinline__ int64_t channels_offset(const PatchView& view, int64_t item, int64_t batch_step,
                                                   const int64_t* steps) {
  if (view.items_dense) return item * view.channels;  // without a division
  const PatchItem at(view, view.sizes[0] * view.sizes[1] * view.sizes[2], item);
  return at.batch * batch_step + at.group * view.channels + position_offset(view.sizes, steps, at.position);
}

// A thread, or `slices` threads that share the channels, per item of V neighbouring positions.
template <typename S, typename T, int V>
__global__ __launch_bounds__(kPatchThreads,
                             V == 8 ? 5 : 6) void squares_by_position(const __grid_constant__ PatchView view, T* sums,
                                                                      int64_t items, int slices) {
  __shared__ T shares[V][kPatchThreads];
  const int per_block = kPatchThreads / slices, thread = static_cast<int>(threadIdx.x), slice = thread / per_block;
  const int64_t positions = view.sizes[0] * view.sizes[1] * view.sizes[2];
  const int64_t item = (static_cast<int64_t>(blockIdx.x) * per_block + thread % per_block) * V;
  T total[V] = {};
  if (item < items) {
    const PatchItem at(view, positions, item);
    const S* x = static_cast<const S*>(view.x) + at.batch * view.batch_step +
                 at.group * view.channels * view.channel_step + position_offset(view.sizes, view.steps, at.position);
#pragma unroll 4
    for (int64_t c = slice; c < view.channels; c += slices) {
      const Pack<S, V> pack = *reinterpret_cast<const Pack<S, V>*>(x + c * view.channel_step);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const T value = from_storage<T>(pack.values[j]);
        total[j] += value * value;
      }
    }
  }
  if (slices > 1) {
#pragma unroll
    for (int j = 0; j < V; ++j) shares[j][thread] = total[j];
    __syncthreads();
    if (slice != 0) return;
    for (int k = 1; k < slices; ++k) {
#pragma unroll
      for (int j = 0; j < V; ++j) total[j] += shares[j][thread + k * per_block];
    }
  }
  if (item >= items) return;
#pragma unroll
  for (int j = 0; j < V; ++j) sums[item + j] = total[j];
}

// `lanes` threads of a warp per item, V neighbouring channels each.
template <typename S, typename T, int V>
__global__ __launch_bounds__(kPatchThreads) void squares_by_channel(const __grid_constant__ PatchView view, T* sums,
                                                                    int64_t items, int lanes) {
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t item = static_cast<int64_t>(blockIdx.x) * (kPatchThreads / lanes) + thread / lanes;
  const int lane = thread % lanes;
  T total[V] = {};
  if (item < items) {
    const S* x = static_cast<const S*>(view.x) + channels_offset(view, item, view.batch_step, view.steps);
#pragma unroll 4
    for (int64_t c = lane; c < view.channels / V; c += lanes) {
      const Pack<S, V> pack = reinterpret_cast<const Pack<S, V>*>(x)[c];
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const T value = from_storage<T>(pack.values[j]);
        total[j] += value * value;
      }
    }
  }
  T sum(0);
#pragma unroll
  for (int j = 0; j < V; ++j) sum += total[j];
  for (int step = lanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kFullWarp, sum, step);
  if (lane == 0 && item < items) sums[item] = sum;
}

// 2 factor x of V numbers.
template <typename S, typename T, int V>
__device__ __forceinline__ Pack<S, V> scaled_pack(const Pack<S, V>& pack, const T* factors, int step) {
  Pack<S, V> result;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const T factor = factors[j * step];
    to_storage((factor + factor) * from_storage<T>(pack.values[j]), &result.values[j]);
  }
  return result;
}

constexpr int kScaleLoads = 4;  // packs that a thread has under way

// A thread per item of V neighbouring positions, whose factors stay in registers; gridDim.y blocks share the channels.
template <typename S, typename T, int V>
__global__ __launch_bounds__(kPatchThreads) void scale_by_position(const __grid_constant__ PatchView view,
                                                                   const T* factors, int64_t items) {
  const int64_t item = (static_cast<int64_t>(blockIdx.x) * kPatchThreads + threadIdx.x) * V;
  if (item >= items) return;
  const PatchItem at(view, view.sizes[0] * view.sizes[1] * view.sizes[2], item);
  const int64_t channel = at.group * view.channels;
  const S* x = static_cast<const S*>(view.x) + at.batch * view.batch_step + channel * view.channel_step +
               position_offset(view.sizes, view.steps, at.position);
  S* dx = static_cast<S*>(view.dx) + at.batch * view.dx_batch_step + channel * view.dx_channel_step +
          position_offset(view.sizes, view.dx_steps, at.position);
  T factor[V];
#pragma unroll
  for (int j = 0; j < V; ++j) factor[j] = factors[item + j];
  const int64_t step = gridDim.y;
  for (int64_t first = blockIdx.y; first < view.channels; first += kScaleLoads * step) {
    Pack<S, V> packs[kScaleLoads];
#pragma unroll
    for (int k = 0; k < kScaleLoads; ++k) {
      const int64_t c = first + k * step;
      if (c < view.channels) packs[k] = *reinterpret_cast<const Pack<S, V>*>(x + c * view.channel_step);
    }
#pragma unroll
    for (int k = 0; k < kScaleLoads; ++k) {
      const int64_t c = first + k * step;
      if (c < view.channels) store_pack(dx + c * view.dx_channel_step, scaled_pack(packs[k], factor, 1));
    }
  }
}

// `lanes` threads of a warp per item, V neighbouring channels each.
template <typename S, typename T, int V>
__global__ __launch_bounds__(kPatchThreads) void scale_by_channel(const __grid_constant__ PatchView view,
                                                                  const T* factors, int64_t items, int lanes) {
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t item = static_cast<int64_t>(blockIdx.x) * (kPatchThreads / lanes) + thread / lanes;
  if (item >= items) return;
  const S* x = static_cast<const S*>(view.x) + channels_offset(view, item, view.batch_step, view.steps);
  S* dx = static_cast<S*>(view.dx) + channels_offset(view, item, view.dx_batch_step, view.dx_steps);
  const T factor = factors[item];
  const int64_t packs = view.channels / V;
  for (int64_t first = thread % lanes; first < packs; first += kScaleLoads * lanes) {
    Pack<S, V> pack[kScaleLoads];
#pragma unroll
    for (int k = 0; k < kScaleLoads; ++k) {
      if (first + k * lanes < packs) pack[k] = reinterpret_cast<const Pack<S, V>*>(x)[first + k * lanes];
    }
#pragma unroll
    for (int k = 0; k < kScaleLoads; ++k) {
      if (first + k * lanes < packs) store_pack(dx + (first + k * lanes) * V, scaled_pack(pack[k], &factor, 0));
    }
  }
}

template <typename T>
__global__ __launch_bounds__(kPatchThreads) void window_sums_kernel(const T* source, T* target, int64_t outer,
                                                                    const __grid_constant__ WindowAxis axis,
                                                                    int64_t inner) {
  const int64_t entries = outer * axis.to() * inner, step = static_cast<int64_t>(gridDim.x) * kPatchThreads;
  for (int64_t k = static_cast<int64_t>(blockIdx.x) * kPatchThreads + threadIdx.x; k < entries; k += step) {
    const int64_t i = k / inner % axis.to(), first = k / inner / axis.to() * axis.from() * inner + k % inner;
    T sum(0);
    Taps taps(axis, i);
    for (int64_t j = 0; j < axis.kernel; ++j, taps.advance()) {
      const int64_t at = taps.source();
      if (at >= 0) sum += source[first + at * inner];
    }
    target[k] = sum;
  }
}

// The entries along the first axis that a tile of outputs [begin, end) reads.
struct TileRange {
  int64_t begin, end;
};
FAM_HOST_DEVICE TileRange plane_sources(const WindowAxis& a, int64_t begin, int64_t end) {
  int64_t low, high;
  if (!a.transposed) {
    low = begin * a.stride - a.padding;
    high = (end - 1) * a.stride - a.padding + (a.kernel - 1) * a.dilation + 1;
  } else {
    const int64_t least = begin + a.padding - (a.kernel - 1) * a.dilation;
    low = least <= 0 ? 0 : (least + a.stride - 1) / a.stride;
    high = (end - 1 + a.padding) / a.stride + 1;
  }
  if (low < 0) low = 0;
  if (high > a.from()) high = a.from();
  return {low, high < low ? low : high};
}

// A tile of `rows` outputs along a and `columns` (b, inner) pairs per block; `held` sources along a fit in shared memory.
template <typename T>
__global__ __launch_bounds__(kPatchThreads) void plane_sums_kernel(const T* source, T* target,
                                                                   const __grid_constant__ WindowAxis a,
                                                                   const __grid_constant__ WindowAxis b, int64_t inner,
                                                                   int rows, int columns) {
  FAM_DYNAMIC_SHARED(memory);
  T* lines = reinterpret_cast<T*>(memory);  // (sources, columns): sums along b
  const int64_t line = b.to() * inner, row_tiles = (a.to() + rows - 1) / rows,
                column_tiles = (line + columns - 1) / columns;
  const int64_t tile = blockIdx.x, first = tile % column_tiles * columns;
  const int64_t begin = tile / column_tiles % row_tiles * rows, outer = tile / column_tiles / row_tiles;
  const int64_t end = begin + rows < a.to() ? begin + rows : a.to();
  const int width = static_cast<int>(line - first < columns ? line - first : columns);
  const TileRange sources = plane_sources(a, begin, end);
  const T* plane = source + outer * a.from() * b.from() * inner;
  const int count = static_cast<int>(sources.end - sources.begin) * width;
  for (int k = static_cast<int>(threadIdx.x); k < count; k += kPatchThreads) {
    const int64_t column = first + k % width, i = column / inner, j = column % inner;
    const T* row = plane + (sources.begin + k / width) * b.from() * inner + j;
    T sum(0);
    Taps taps(b, i);
    for (int64_t m = 0; m < b.kernel; ++m, taps.advance()) {
      const int64_t at = taps.source();
      if (at >= 0) sum += row[at * inner];
    }
    lines[k] = sum;
  }
  __syncthreads();
  const int outputs = static_cast<int>(end - begin) * width;
  for (int k = static_cast<int>(threadIdx.x); k < outputs; k += kPatchThreads) {
    const int64_t i = begin + k / width;
    T sum(0);
    Taps taps(a, i);
    for (int64_t m = 0; m < a.kernel; ++m, taps.advance()) {
      const int64_t at = taps.source();
      if (at >= 0) sum += lines[static_cast<int>(at - sources.begin) * width + k % width];
    }
    target[(outer * a.to() + i) * line + first + k % width] = sum;
  }
}

}  // namespace fam_ext::gpu
