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
    if (view.groups_inside) {
      group = item % view.groups;
      item /= view.groups;
      position = item % positions;
      batch = item / positions;
    } else {
      position = item % positions;
      item /= positions;
      group = item % view.groups;
      batch = item / view.groups;
    }
  }
};

__device__ __forceinline__ int64_t position_offset(const int64_t* sizes, const int64_t* steps, int64_t position) {
  const int64_t w = position % sizes[2], row = position / sizes[2];
  return w * steps[2] + row % sizes[1] * steps[1] + row / sizes[1] * steps[0];
}

// A thread, or `slices` threads that share the channels, per item of V neighbouring positions.
template <typename S, typename T, int V>
__global__ __launch_bounds__(kPatchThreads) void squares_by_position(const __grid_constant__ PatchView view, T* sums,
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
  const int64_t positions = view.sizes[0] * view.sizes[1] * view.sizes[2];
  const int64_t item = (static_cast<int64_t>(blockIdx.x) * kPatchThreads + threadIdx.x) / lanes;
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  T total[V] = {};
  if (item < items) {
    const PatchItem at(view, positions, item);
    const S* x = static_cast<const S*>(view.x) + at.batch * view.batch_step + at.group * view.channels +
                 position_offset(view.sizes, view.steps, at.position);
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

// One pack of V numbers per thread: V positions of one channel, or with `along_channels` V channels of one position.
template <typename S, typename T, int V>
__global__ __launch_bounds__(kPatchThreads) void scale_packs(const __grid_constant__ PatchView view, const T* factors,
                                                             int64_t packs, bool along_channels) {
  const int64_t positions = view.sizes[0] * view.sizes[1] * view.sizes[2], all = view.groups * view.channels;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kPatchThreads;
  for (int64_t k = static_cast<int64_t>(blockIdx.x) * kPatchThreads + threadIdx.x; k < packs; k += step) {
    int64_t batch, channel, position;
    if (along_channels) {
      channel = k % (all / V) * V;
      position = k / (all / V) % positions;
      batch = k / (all / V) / positions;
    } else {
      position = k % (positions / V) * V;
      channel = k / (positions / V) % all;
      batch = k / (positions / V) / all;
    }
    const int64_t group = channel / view.channels;
    const int64_t item = view.groups_inside ? (batch * positions + position) * view.groups + group
                                            : (batch * view.groups + group) * positions + position;
    const Pack<S, V> pack = *reinterpret_cast<const Pack<S, V>*>(static_cast<const S*>(view.x) +
                                                                 batch * view.batch_step + channel * view.channel_step +
                                                                 position_offset(view.sizes, view.steps, position));
    T factor[V];
#pragma unroll
    for (int j = 0; j < V; ++j) factor[j] = factors[along_channels ? item : item + j];
    Pack<S, V> result;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      to_storage((factor[j] + factor[j]) * from_storage<T>(pack.values[j]), &result.values[j]);
    }
    store_pack(static_cast<S*>(view.dx) + batch * view.dx_batch_step + channel * view.dx_channel_step +
                   position_offset(view.sizes, view.dx_steps, position),
               result);
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
    for (int64_t j = 0; j < axis.kernel; ++j) {
      const int64_t at = axis.tap(i, j);
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
    for (int64_t m = 0; m < b.kernel; ++m) {
      const int64_t at = b.tap(i, m);
      if (at >= 0) sum += row[at * inner];
    }
    lines[k] = sum;
  }
  __syncthreads();
  const int outputs = static_cast<int>(end - begin) * width;
  for (int k = static_cast<int>(threadIdx.x); k < outputs; k += kPatchThreads) {
    const int64_t i = begin + k / width;
    T sum(0);
    for (int64_t m = 0; m < a.kernel; ++m) {
      const int64_t at = a.tap(i, m);
      if (at >= 0) sum += lines[static_cast<int>(at - sources.begin) * width + k % width];
    }
    target[(outer * a.to() + i) * line + first + k % width] = sum;
  }
}

}  // namespace fam_ext::gpu
