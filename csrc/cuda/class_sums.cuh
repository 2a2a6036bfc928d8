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

// A warp for a class s and kPairs others t >= s, where tiles of pairs would be fewer than the device has processors.
constexpr int64_t kPairClasses = 256;
constexpr int kPairs = 4, kPairThreads = 128, kPairsPerBlock = kPairs * kPairThreads / kWarp;

template <typename T>
__global__ __launch_bounds__(kPairThreads) void pair_distances_kernel(const T* weight, int classes, int64_t fan_in,
                                                                      T* distances) {
  const int s = static_cast<int>(blockIdx.y), lane = static_cast<int>(threadIdx.x) % kWarp;
  const int first = s + static_cast<int>(blockIdx.x) * kPairsPerBlock + static_cast<int>(threadIdx.x) / kWarp * kPairs;
  if (first >= classes) return;  // the whole warp
  const T* a = weight + s * fan_in;
  const T* others[kPairs];
#pragma unroll
  for (int j = 0; j < kPairs; ++j) others[j] = weight + (first + j < classes ? first + j : s) * fan_in;
  T sums[kPairs] = {};
#pragma unroll 4
  for (int64_t i = lane; i < fan_in; i += kWarp) {
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const T d = a[i] - others[j][i];
      sums[j] += d * d;
    }
  }
#pragma unroll
  for (int j = 0; j < kPairs; ++j) {
    const T sum = warp_sum(sums[j]);
    const int t = first + j;
    if (lane == 0 && t < classes) distances[s * classes + t] = distances[t * classes + s] = sum;
  }
}

// sums_s += sum_n g_n p~_ns for 8 neighbouring classes, which lie in the same 32 bytes of a row: 16 threads each.
constexpr int kSumClasses = 8;

template <typename T>
__device__ void add_column_sums(const RowPass<T>& pass, T* sums) {
  __shared__ T shares[kRowThreads];
  const int thread = static_cast<int>(threadIdx.x), rows = kRowThreads / kSumClasses;
  const int64_t s = static_cast<int64_t>(blockIdx.x) * kSumClasses + thread % kSumClasses;
  CompensatedSumOf<T> sum;
  if (s < pass.classes) {
#pragma unroll 4
    for (int64_t n = thread / kSumClasses; n < pass.n; n += rows)
      sum.add(pass.factors[n] * pass.p[n * pass.classes + s]);
  }
  shares[thread] = sum.total();
  __syncthreads();
  if (thread >= kSumClasses || s >= pass.classes) return;
  T total(0);
  for (int k = 0; k < rows; ++k) total += shares[thread + k * kSumClasses];
  sums[s] += total;
}

// A block per class and stretch of columns, several per thread; the blocks behind the last stretch take the sums of p~.
constexpr int kSumColumns = 4;

template <typename T>
__global__ __launch_bounds__(kRowThreads, 6) void column_sums_kernel(const __grid_constant__ RowPass<T> pass, T* sums,
                                                                     T* t) {
  if (blockIdx.y == gridDim.y - 1) {
    if (static_cast<int64_t>(blockIdx.x) * kSumClasses < pass.classes) add_column_sums(pass, sums);
    return;
  }
  const int64_t s = blockIdx.x, first = static_cast<int64_t>(blockIdx.y) * kRowThreads * kSumColumns + threadIdx.x;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  LongSum<T> total[kSumColumns];
  for (int64_t base = 0; base < pass.n; base += kWarp) {
    const bool mine = base + lane < pass.n && pass.likely[base + lane] == s;
    unsigned rows = __ballot_sync(kFullWarp, mine);
    for (; rows != 0; rows &= rows - 1) {
      const int64_t n = base + __ffs(static_cast<int>(rows)) - 1;
      const T g = pass.factors[n];
#pragma unroll
      for (int j = 0; j < kSumColumns; ++j) {
        const int64_t i = first + j * kRowThreads;
        if (i < pass.fan_in) total[j].add(g * pass.shift[n * pass.fan_in + i]);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kSumColumns; ++j) {
    const int64_t i = first + j * kRowThreads;
    if (i < pass.fan_in) t[s * pass.fan_in + i] += total[j].total();
  }
}

}  // namespace fam_ext::gpu
