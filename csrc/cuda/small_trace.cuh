// Few classes: a tile of rows passes through all steps in shared memory; class distances, rows, the sum over blocks and the weight's
// gradient are phases of one kernel.
#pragma once

#include <algorithm>

#include "cuda/small_tile.cuh"

namespace fam_ext::gpu {

constexpr int kSmallPairs = kSmallClasses * (kSmallClasses - 1) / 2;
constexpr int kPairsPerThread = (kSmallPairs + kSmallThreads - 1) / kSmallThreads;

// Distances of all pairs s <= t, a warp each; with a head also the sum of the targets' class weights.
template <typename T, bool kHead>
__device__ void small_prepare(const SmallTrace<T>& pass, const Head<T>& head, double* scratch) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warps = kSmallThreads / kWarp, classes = pass.classes;
  const int pairs = classes * (classes + 1) / 2;
  for (int64_t k = static_cast<int64_t>(blockIdx.x) * warps + threadIdx.x / kWarp; k < pairs;
       k += static_cast<int64_t>(gridDim.x) * warps) {
    int s = 0, t = static_cast<int>(k);
    while (t >= classes - s) t -= classes - s++;
    t += s;
    const T *a = pass.weight + s * pass.fan_in, *b = pass.weight + t * pass.fan_in;
    T sums[4] = {};
    for (int64_t i = lane; i < pass.fan_in; i += 4 * kWarp) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (i + j * kWarp >= pass.fan_in) continue;
        const T d = a[i + j * kWarp] - b[i + j * kWarp];
        sums[j] += d * d;
      }
    }
    const T sum = warp_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    if (lane == 0) pass.distances[s * classes + t] = pass.distances[t * classes + s] = sum;
  }
  if constexpr (kHead) {
    if (static_cast<int>(blockIdx.x) < head.shares) {
      denominator_share(head, pass.rows, classes, static_cast<int>(blockIdx.x), scratch);
    }
  }
}

// All tiles of one share of the rows.
template <typename T, bool kHead>
__device__ void small_rows(const SmallTrace<T>& pass, const Head<T>& head, const Tile<T>& tile, double* scratch) {
  const int classes = pass.classes, thread = static_cast<int>(threadIdx.x), share = static_cast<int>(blockIdx.x);
  if (share >= pass.shares) return;  // the whole block
  const int pairs = classes * (classes - 1) / 2;
  for (int k = thread; k < classes * classes; k += kSmallThreads) tile.distances[k] = pass.distances[k];
  T scale(1);
  if constexpr (kHead) scale = reduction_scale(head, pass.rows, denominator(head, scratch));
  // this thread's pairs k * kSmallThreads + thread; s in the upper half of the number
  T sums[kPairsPerThread] = {};
  int pair_classes[kPairsPerThread];
#pragma unroll
  for (int j = 0; j < kPairsPerThread; ++j) {
    int s = 0, t = j * kSmallThreads + thread;
    if (t >= pairs) {
      pair_classes[j] = -1;
      continue;
    }
    while (t >= classes - 1 - s) t -= classes - 1 - s++;
    pair_classes[j] = (s << 16) | (s + 1 + t);
  }
  double loss = 0, curvature = 0;
  for (int64_t first = static_cast<int64_t>(share) * pass.tile_rows; first < pass.rows;
       first += static_cast<int64_t>(pass.shares) * pass.tile_rows) {
    const int rows = static_cast<int>(first + pass.tile_rows < pass.rows ? pass.tile_rows : pass.rows - first);
    __syncthreads();  // the tile before has been used
    load_tile<T, kHead>(pass, head, scale, first, rows, tile);
    tile_maximum<T, kHead>(pass, head, scale, first, rows, tile);
    tile_trace(pass, rows, tile);
    for (int k = thread; k < rows; k += kSmallThreads) {  // the rows that tile_trace gave to this thread, too
      if constexpr (kHead) {
        const RowValue<T> value =
            row_value(head, tile.targets[k].coefficient, tile.gap[k], tile.log_total[k], tile.squares[k], tile.v[k]);
        loss += static_cast<double>(value.loss);
        curvature += static_cast<double>(value.curvature);
        tile.g[k] = value.upstream;
        tile.factor[k] = value.feature_factor;
      } else {
        tile.g[k] = pass.upstream == nullptr ? T(0) : pass.upstream[first + k];
        if (pass.values != nullptr) pass.values[first + k] = tile.v[k];
      }
    }
    __syncthreads();
    tile_gradients<T, kHead>(pass, head, scale, first, rows, tile);
    if (pass.partial_pairs == nullptr) continue;
#pragma unroll
    for (int j = 0; j < kPairsPerThread; ++j) {
      if (pair_classes[j] < 0) continue;
      const T *ps = tile.p + (pair_classes[j] >> 16) * tile.ld, *pt = tile.p + (pair_classes[j] & 0xffff) * tile.ld;
      T sum(0);

#pragma unroll 4
      for (int k = 0; k < rows; ++k) sum += tile.g[k] * ps[k] * pt[k];
      sums[j] += sum;
    }
  }
  if (pass.partial_pairs != nullptr) {
#pragma unroll
    for (int j = 0; j < kPairsPerThread; ++j) {
      if (pair_classes[j] >= 0)
        pass.partial_pairs[static_cast<int64_t>(share) * pairs + j * kSmallThreads + thread] = sums[j];
    }
  }
  if constexpr (kHead) {
    loss = block_sum(loss, scratch);
    curvature = block_sum(curvature, scratch);
    if (thread == 0) {
      pass.partial_sums[share] = loss;
      pass.partial_sums[pass.shares + share] = curvature;
    }
  }
}

// Sums over the shares: M = sum_i g_i p_i p_i^T with a zero diagonal, loss and kappa.
template <typename T, bool kHead>
__device__ void small_reduce(const SmallTrace<T>& pass, const Head<T>& head, double* scratch) {
  const int classes = pass.classes, pairs = classes * (classes - 1) / 2;
  if (pass.partial_pairs != nullptr) {
    for (int64_t k = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; k < classes * classes;
         k += static_cast<int64_t>(gridDim.x) * blockDim.x) {
      const int a = static_cast<int>(k) / classes, b = static_cast<int>(k) % classes;
      LongSum<T> sum;
      if (a != b) {
        const int s = a < b ? a : b, t = a < b ? b : a;
        const T* part = pass.partial_pairs + s * (classes - 1) - s * (s - 1) / 2 + (t - s - 1);

#pragma unroll 4
        for (int share = 0; share < pass.shares; ++share) sum.add(part[static_cast<int64_t>(share) * pairs]);
      }
      pass.pairs[k] = sum.total();
    }
  }
  if constexpr (kHead) {
    if (blockIdx.x != 0) return;
    double loss = 0, curvature = 0;
    for (int k = static_cast<int>(threadIdx.x); k < pass.shares; k += kSmallThreads) {
      loss += pass.partial_sums[k];
      curvature += pass.partial_sums[pass.shares + k];
    }
    loss = block_sum(loss, scratch);
    curvature = block_sum(curvature, scratch);
    const double valid = denominator(head, scratch);
    if (threadIdx.x == 0) write_totals(head, loss, curvature, valid);
  }
}

// dW = 2 (diag(M 1) - M) W from differences, an entry per thread.
template <typename T>
__device__ void small_weight(const SmallTrace<T>& pass) {
  const int64_t entries = pass.classes * pass.fan_in;
  for (int64_t k = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; k < entries;
       k += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t s = k / pass.fan_in, i = k % pass.fan_in;
    const T w = pass.weight[k];
    T sum(0);

#pragma unroll 4
    for (int t = 0; t < pass.classes; ++t) {
      sum += pass.pairs[s * pass.classes + t] * (w - pass.weight[t * pass.fan_in + i]);
    }
    pass.grad_weight[k] = sum + sum;
  }
}

// Phases `first` to `last`; more than one only where all blocks run at once.
template <typename T, bool kHead>
__global__ __launch_bounds__(kSmallThreads, 3) void small_trace_kernel(const __grid_constant__ SmallTrace<T> pass,
                                                                       const __grid_constant__ Head<T> head, int first,
                                                                       int last) {
  FAM_DYNAMIC_SHARED(memory);
  double* scratch = reinterpret_cast<double*>(memory);
  const Tile<T> tile(memory + kWarp * sizeof(double), pass.classes, pass.tile_rows);
  for (int phase = first; phase <= last; ++phase) {
    if (phase != first) grid_barrier();
    if (phase == kPrepare) small_prepare<T, kHead>(pass, head, scratch);
    if (phase == kRows) small_rows<T, kHead>(pass, head, tile, scratch);
    if (phase == kReduce) small_reduce<T, kHead>(pass, head, scratch);
    if (phase == kWeight) small_weight(pass);
  }
}

// Blocks of one phase on its own.
template <typename T, bool kHead>
int64_t small_blocks(const SmallTrace<T>& pass, int phase) {
  const int64_t classes = pass.classes, warps = kSmallThreads / kWarp;
  if (phase == kPrepare)
    return std::max<int64_t>((classes * (classes + 1) / 2 + warps - 1) / warps, kHead ? pass.shares : 1);
  if (phase == kRows) return pass.shares;
  if (phase == kReduce) return (classes * classes + kSmallThreads - 1) / kSmallThreads;
  return std::clamp<int64_t>((classes * pass.fan_in + kSmallThreads - 1) / kSmallThreads, 1, 65536);
}

// Most blocks of the one launch: more would wait longer at its barriers than further launches cost.
constexpr int64_t kFusedBlocks = 64;

template <typename T, bool kHead>
cudaError_t launch_small(const SmallTrace<T>& pass, const Head<T>& head, int first, int last, cudaStream_t stream) {
  const auto kernel = small_trace_kernel<T, kHead>;
  const int64_t shared = kWarp * static_cast<int64_t>(sizeof(double)) + Tile<T>::bytes(pass.classes, pass.tile_rows);
  int64_t most = 1, least = 1;
  for (int phase = first; phase <= last; ++phase) {
    most = std::max(most, small_blocks<T, kHead>(pass, phase));
    if (phase <= kRows) least = std::max<int64_t>(least, phase == kRows || kHead ? pass.shares : 1);
  }
  bool fused = false;
  const int64_t blocks = std::clamp(most, least, std::max(least, kFusedBlocks / 2));
  if (first != last && blocks <= kFusedBlocks) {
    int device = 0, cooperative = 0, processors = 0, resident = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess) {
      error =
          cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kSmallThreads, static_cast<size_t>(shared));
    }
    if (error != cudaSuccess) return error;
    fused = cooperative != 0 && blocks <= static_cast<int64_t>(processors) * resident;
  }
  if (fused) {
    return FAM_LAUNCH_COOPERATIVE(kernel, static_cast<unsigned>(blocks), kSmallThreads, shared, stream, pass, head,
                                  first, last);
  }
  for (int phase = first; phase <= last; ++phase) {
    const int64_t grid = small_blocks<T, kHead>(pass, phase);
    FAM_LAUNCH(kernel, static_cast<unsigned>(grid), kSmallThreads, shared, stream, pass, head, phase, phase);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace fam_ext::gpu
