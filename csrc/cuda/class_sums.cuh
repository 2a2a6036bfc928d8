// Sums that belong to classes: their distances, and the shares of rows in the gradient of the weight.
#pragma once

#include "cuda/row_passes.cuh"

namespace fam_ext::gpu {

// 64 x 64 pairs per block, 4 x 4 per thread, from the upper triangle of such blocks.
constexpr int kDistanceTile = 64, kDistanceDepth = 16, kDistanceThreads = 256;

template <typename T>
__global__ __launch_bounds__(kDistanceThreads, 2) void class_distances_kernel(const T* weight, int64_t classes,
                                                                              int64_t fan_in, T* distances) {
  __shared__ T rows[2][kDistanceDepth][kDistanceTile + 1];
  if (blockIdx.x < blockIdx.y) return;
  const int64_t origin[2] = {static_cast<int64_t>(blockIdx.y) * kDistanceTile,
                             static_cast<int64_t>(blockIdx.x) * kDistanceTile};
  const int thread = static_cast<int>(threadIdx.x), a = thread / 16, b = thread % 16;
  T sums[4][4] = {};
  for (int64_t i0 = 0; i0 < fan_in; i0 += kDistanceDepth) {
    __syncthreads();
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      for (int k = thread; k < kDistanceTile * kDistanceDepth; k += kDistanceThreads) {
        const int depth = k % kDistanceDepth, c = k / kDistanceDepth;
        const int64_t s = origin[side] + c, i = i0 + depth;
        rows[side][depth][c] = s < classes && i < fan_in ? weight[s * fan_in + i] : T(0);
      }
    }
    __syncthreads();
#pragma unroll
    for (int depth = 0; depth < kDistanceDepth; ++depth) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const T d = rows[0][depth][a + 16 * j] - rows[1][depth][b + 16 * k];
          sums[j][k] += d * d;
        }
      }
    }
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int64_t s = origin[0] + a + 16 * j, t = origin[1] + b + 16 * k;
      if (s >= classes || t >= classes) continue;
      distances[s * classes + t] = sums[j][k];
      if (blockIdx.x != blockIdx.y) distances[t * classes + s] = sums[j][k];
    }
  }
}

// A block per class and stretch of columns; the first stretch also takes the class's sum.
template <typename T>
__global__ __launch_bounds__(kRowThreads, 6) void column_sums_kernel(const __grid_constant__ RowPass<T> pass, T* sums,
                                                                     T* t) {
  const int64_t s = blockIdx.x, i = static_cast<int64_t>(blockIdx.y) * kRowThreads + threadIdx.x;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  LongSum<T> sum;
  for (int64_t base = 0; base < pass.n; base += kWarp) {
    const bool mine = base + lane < pass.n && pass.facts[base + lane].y == s;
    unsigned rows = __ballot_sync(kFullWarp, mine);
    for (; rows != 0; rows &= rows - 1) {
      const int64_t n = base + __ffs(static_cast<int>(rows)) - 1;
      if (i < pass.fan_in) sum.add(pass.facts[n].upstream * pass.shift[n * pass.fan_in + i]);
    }
  }
  if (i < pass.fan_in) t[s * pass.fan_in + i] += sum.total();
  if (blockIdx.y != 0) return;
  __shared__ T scratch[kWarp];
  CompensatedSumOf<T> column;
  for (int64_t n = threadIdx.x; n < pass.n; n += kRowThreads) {
    column.add(pass.facts[n].upstream * pass.p[n * pass.classes + s]);
  }
  const T total = block_sum(column.total(), scratch);
  if (threadIdx.x == 0) sums[s] += total;
}

}  // namespace fam_ext::gpu
