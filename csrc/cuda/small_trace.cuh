// Few classes: a tile of rows passes through all steps in shared memory; class distances, rows, the sum over blocks and the weight's
// gradient are phases of one kernel. The fewer the classes, the more each block does itself, in place of a phase.
#pragma once

#include <algorithm>

#include "cuda/small_tile.cuh"

namespace fam_ext::gpu {

constexpr int kSmallPairs = kSmallClasses * (kSmallClasses - 1) / 2;
constexpr int kPairsPerThread = (kSmallPairs + kSmallThreads - 1) / kSmallThreads;

// Distances of all pairs s <= t, a warp each; with a head also the sums of the targets' class weights.
template <typename T, bool kHead>
__device__ void small_prepare(const SmallTrace<T>& pass, const Head<T>& head, double* scratch) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warps = kSmallThreads / kWarp, classes = pass.classes;
  const int pairs = classes * (classes + 1) / 2;
#pragma unroll 1
  for (int k = static_cast<int>(blockIdx.x) * warps + static_cast<int>(threadIdx.x) / kWarp; k < pairs;
       k += static_cast<int>(gridDim.x) * warps) {
    const ClassPair at(k, classes, true);
    const T sum =
        squared_difference(pass.weight + at.s * pass.fan_in, pass.weight + at.t * pass.fan_in, pass.fan_in, lane);
    if (lane == 0) pass.distances[at.s * classes + at.t] = pass.distances[at.t * classes + at.s] = sum;
  }
  if constexpr (kHead) {
    if (static_cast<int>(blockIdx.x) < head.shares) {
      write_target_sums(head, pass.rows, classes, static_cast<int>(blockIdx.x), scratch);
    }
  }
}

template <typename T>
__device__ void stage_columns(const SmallTrace<T>& pass, const Tile<T>& tile, int64_t first, int columns) {
  const int ld = Tile<T>::leading(pass.staged);
#pragma unroll 1
  for (int s = 0; s < pass.classes; ++s) {
    const T* row = pass.weight + s * pass.fan_in + first;
    for (int c = static_cast<int>(threadIdx.x); c < columns; c += kSmallThreads)
      copy_async(tile.stage + s * ld + c, row + c);
  }
}

// The distances, by every block for itself, in shared memory: a thread, or several that share the columns, per pair s <= t. The first
// columns have been staged.
template <typename T>
__device__ void inside_distances(const SmallTrace<T>& pass, const Tile<T>& tile) {
  const int classes = pass.classes, thread = static_cast<int>(threadIdx.x), ld = Tile<T>::leading(pass.staged);
  const int pairs = classes * (classes + 1) / 2, slices = kSmallThreads / pairs, slice = thread / pairs;
  const ClassPair at(thread % pairs, classes, true);
  const T *a = tile.stage + at.s * ld, *b = tile.stage + at.t * ld;
  T sums[4] = {};
  for (int64_t first = 0; first < pass.fan_in; first += pass.staged) {
    const int columns = static_cast<int>(pass.fan_in - first < pass.staged ? pass.fan_in - first : pass.staged);
    if (first > 0) {
      __syncthreads();  // the columns before have been used
      stage_columns(pass, tile, first, columns);
    }
    wait_for_copies();
    __syncthreads();
    for (int c = slice; slice < slices && c < columns; c += 4 * slices) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int at_column = c + j * slices;
        const T d = at_column < columns ? a[at_column] - b[at_column] : T(0);
        sums[j] += d * d;
      }
    }
  }
  T sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  __syncthreads();
  if (slice < slices) tile.stage[thread] = sum;
  __syncthreads();
  if (slice != 0) return;
  for (int k = 1; k < slices; ++k) sum += tile.stage[thread + k * pairs];
  tile.distances[at.s * classes + at.t] = tile.distances[at.t * classes + at.s] = sum;
  if (pass.distances != nullptr && blockIdx.x == 0) {
    pass.distances[at.s * classes + at.t] = pass.distances[at.t * classes + at.s] = sum;
  }
}

// What the rows need first: distances in shared memory, and with a head the targets' sums.
template <typename T, bool kHead>
__device__ TargetSums rows_prepared(const SmallTrace<T>& pass, const Head<T>& head, const Tile<T>& tile,
                                    double* scratch) {
  const int classes = pass.classes, thread = static_cast<int>(threadIdx.x);
  TargetSums sums;
  if (pass.staged > 0) stage_columns(pass, tile, 0, pass.staged);
  if constexpr (kHead) {
    if (pass.prepare_inside) {
      sums = {valid_share(head, pass.rows, classes, 0, 1, scratch), omega_sum(head, classes, scratch)};
      if (blockIdx.x == 0 && thread == 0) {  // for the totals
        head.denominators[0] = sums.valid;
        head.denominators[kPartials] = sums.omega;
      }
    } else {
      sums = read_target_sums(head, scratch);
    }
  }
  if (pass.staged > 0) {
    inside_distances(pass, tile);
  } else {
#pragma unroll 4
    for (int k = thread; k < classes * classes; k += kSmallThreads) tile.distances[k] = pass.distances[k];
  }
  return sums;
}

// All tiles of one share of the rows.
template <typename T, bool kHead, typename S>
__device__ void small_rows(const SmallTrace<T>& pass, const Head<T>& head, const Tile<T>& tile, double* scratch) {
  const int classes = pass.classes, thread = static_cast<int>(threadIdx.x), share = static_cast<int>(blockIdx.x);
  if (share >= pass.shares) return;  // the whole block
  const int pairs = classes * (classes - 1) / 2;
  const TargetSums target_sums = rows_prepared<T, kHead>(pass, head, tile, scratch);
  T scale(1);
  if constexpr (kHead) scale = reduction_scale(head, pass.rows, target_sums);
  // this thread's pairs k * kSmallThreads + thread; s in the upper half of the number
  T sums[kPairsPerThread] = {};
  int pair_classes[kPairsPerThread];
#pragma unroll
  for (int j = 0; j < kPairsPerThread; ++j) {
    const int k = j * kSmallThreads + thread;
    pair_classes[j] = -1;
    if (k >= pairs) continue;
    const ClassPair at(k, classes, false);
    pair_classes[j] = (at.s << 16) | at.t;
  }
  double loss = 0, curvature = 0;
  for (int64_t first = static_cast<int64_t>(share) * pass.tile_rows; first < pass.rows;
       first += static_cast<int64_t>(pass.shares) * pass.tile_rows) {
    const int rows = static_cast<int>(first + pass.tile_rows < pass.rows ? pass.tile_rows : pass.rows - first);
    __syncthreads();  // the tile before has been used
    load_tile<T, kHead, S>(pass, head, scale, target_sums.omega, first, rows, tile);
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
    tile_gradients<T, kHead, S>(pass, head, scale, first, rows, tile);
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

// The sum over the shares of g p_s p_t, for the k-th of all pairs s < t.
template <typename T>
__device__ __forceinline__ T pair_total(const SmallTrace<T>& pass, int64_t k) {
  const int64_t pairs = pass.classes * (pass.classes - 1) / 2;
  const T* part = pass.partial_pairs + k;
  LongSum<T> sum;
  for (int share = 0; share < pass.shares; share += 8) {  // several loads under way
    T values[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) values[j] = share + j < pass.shares ? part[(share + j) * pairs] : T(0);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum.add(values[j]);
  }
  return sum.total();
}

// Loss and kappa, by one block.
template <typename T>
__device__ void small_totals(const SmallTrace<T>& pass, const Head<T>& head, double* scratch) {
  double loss = 0, curvature = 0;
#pragma unroll 1
  for (int k = static_cast<int>(threadIdx.x); k < pass.shares; k += kSmallThreads) {
    loss += pass.partial_sums[k];
    curvature += pass.partial_sums[pass.shares + k];
  }
  loss = block_sum(loss, scratch);
  curvature = block_sum(curvature, scratch);
  const TargetSums sums = read_target_sums(head, scratch);
  if (threadIdx.x == 0) write_totals(head, loss, curvature, sums.valid);
}

// Sums over the shares: M = sum_i g_i p_i p_i^T with a zero diagonal, loss and kappa.
template <typename T, bool kHead>
__device__ void small_reduce(const SmallTrace<T>& pass, const Head<T>& head, double* scratch) {
  const int classes = pass.classes, pairs = classes * (classes - 1) / 2;
  if (pass.partial_pairs != nullptr) {
#pragma unroll 1
    for (int k = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); k < pairs;
         k += static_cast<int>(gridDim.x * blockDim.x)) {
      pass.pairs[k] = pair_total(pass, k);
    }
  }
  if constexpr (kHead) {
    if (blockIdx.x == 0) small_totals(pass, head, scratch);
  }
}

// dW = 2 (diag(M 1) - M) W from differences, an entry per thread. M comes to shared memory first, in place of the distances.
template <typename T, bool kHead>
__device__ void small_weight(const SmallTrace<T>& pass, const Head<T>& head, const Tile<T>& tile, double* scratch) {
  const int classes = pass.classes, pairs = classes * (classes - 1) / 2;
  T* m = tile.distances;
#pragma unroll 1
  for (int k = static_cast<int>(threadIdx.x); k < classes; k += kSmallThreads) m[k * classes + k] = T(0);
#pragma unroll 1
  for (int k = static_cast<int>(threadIdx.x); k < pairs; k += kSmallThreads) {
    const ClassPair at(k, classes, false);
    m[at.s * classes + at.t] = m[at.t * classes + at.s] = pass.reduce_inside ? pair_total(pass, k) : pass.pairs[k];
  }
  __syncthreads();
  const int64_t entries = classes * pass.fan_in;
  for (int64_t k = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; k < entries;
       k += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t s = k / pass.fan_in, i = k % pass.fan_in;
    const T w = pass.weight[k];
    T sum(0);

#pragma unroll 8
    for (int t = 0; t < classes; ++t) sum += m[s * classes + t] * (w - pass.weight[t * pass.fan_in + i]);
    pass.grad_weight[k] = sum + sum;
  }
  if constexpr (kHead) {
    if (pass.reduce_inside && blockIdx.x == 0) small_totals(pass, head, scratch);
  }
}

// `phases`: more than one only where all blocks run at once.
template <typename T, bool kHead, typename S>
__global__ __launch_bounds__(kSmallThreads, 3) void small_trace_kernel(const __grid_constant__ SmallTrace<T> pass,
                                                                       const __grid_constant__ Head<T> head,
                                                                       unsigned phases) {
  FAM_DYNAMIC_SHARED(memory);
  double* scratch = reinterpret_cast<double*>(memory);
  const Tile<T> tile(memory + kWarp * sizeof(double), pass.classes, pass.tile_rows);
  for (unsigned phase = kPrepare; phase <= phases; phase *= 2) {
    if ((phases & phase) == 0) continue;
    if (phases % phase != 0) grid_barrier();  // one came before
    if (phase == kPrepare) small_prepare<T, kHead>(pass, head, scratch);
    if (phase == kRows) small_rows<T, kHead, S>(pass, head, tile, scratch);
    if (phase == kReduce) small_reduce<T, kHead>(pass, head, scratch);
    if (phase == kWeight) small_weight<T, kHead>(pass, head, tile, scratch);
  }
}

// The phases that are left beside what every block does itself.
template <typename T, bool kHead>
unsigned small_phases(const SmallTrace<T>& pass) {
  const bool weight = pass.partial_pairs != nullptr;
  unsigned phases = kRows;
  if (!pass.prepare_inside && (kHead || !pass.have_distances)) phases |= kPrepare;
  if (weight ? !pass.reduce_inside : kHead) phases |= kReduce;
  return weight ? phases | kWeight : phases;
}

// Blocks of one phase on its own.
template <typename T, bool kHead>
int64_t small_blocks(const SmallTrace<T>& pass, const Head<T>& head, unsigned phase) {
  const int64_t classes = pass.classes, warps = kSmallThreads / kWarp;
  if (phase == kPrepare)
    return std::max<int64_t>((classes * (classes + 1) / 2 + warps - 1) / warps, kHead ? head.shares : 1);
  if (phase == kRows) return pass.shares;
  if (phase == kReduce) return (classes * (classes - 1) / 2 + kSmallThreads) / kSmallThreads;
  return std::clamp<int64_t>((classes * pass.fan_in + kSmallThreads - 1) / kSmallThreads, 1, 65536);
}

// Most blocks of the one launch: more would wait longer at its barriers than further launches cost.
constexpr int64_t kFusedBlocks = 64;

template <typename T, bool kHead, typename S>
cudaError_t launch_small(const SmallTrace<T>& pass, const Head<T>& head, cudaStream_t stream) {
  const auto kernel = small_trace_kernel<T, kHead, S>;
  const unsigned phases = small_phases<T, kHead>(pass);
  const int64_t shared =
      kWarp * static_cast<int64_t>(sizeof(double)) + Tile<T>::bytes(pass.classes, pass.tile_rows, pass.staged);
  int64_t most = 1, least = 1;
  for (unsigned phase = kPrepare; phase <= kWeight; phase *= 2) {
    if ((phases & phase) == 0) continue;
    most = std::max(most, small_blocks<T, kHead>(pass, head, phase));
    if (phase <= kRows) least = std::max<int64_t>(least, phase == kRows ? pass.shares : kHead ? head.shares : 1);
  }
  bool fused = false;
  const int64_t blocks = std::clamp(most, least, std::max(least, kFusedBlocks / 2));
  if (phases != kRows && blocks <= kFusedBlocks) {
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
                                  phases);
  }
  for (unsigned phase = kPrepare; phase <= kWeight; phase *= 2) {
    if ((phases & phase) == 0) continue;
    const int64_t grid = small_blocks<T, kHead>(pass, head, phase);
    FAM_LAUNCH(kernel, static_cast<unsigned>(grid), kSmallThreads, shared, stream, pass, head, phase);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace fam_ext::gpu
