// Few classes: a tile of rows passes through all steps in shared memory, class-major as on the CPU; class distances, rows, the sum over
// blocks and the weight's gradient are phases of one kernel.
#pragma once

#include <algorithm>

#include "cuda/head_rows.cuh"
#include "cuda/small_trace.h"

namespace fam_ext::gpu {

constexpr int kSmallThreads = 128;
constexpr int kSmallPairs = kSmallClasses * (kSmallClasses - 1) / 2;
constexpr int kPairsPerThread = (kSmallPairs + kSmallThreads - 1) / kSmallThreads;

// A tile of rows in shared memory. ld is odd, so that neighbouring classes lie in different banks.
template <typename T>
struct Tile {
  T *p, *q, *distances;  // (O, ld): logits, then e, then p; q = D p; (O, O)
  T *v, *r, *log_total, *py, *max, *g, *squares, *gap, *others, *factor;
  RowTarget<T>* targets;
  int* y;
  int ld;

  __host__ __device__ static int leading(int rows) { return rows | 1; }
  __host__ __device__ static int64_t bytes(int classes, int rows) {
    const int64_t numbers = 2 * classes * leading(rows) + classes * classes + 10 * rows;
    return (numbers + 1) / 2 * 2 * static_cast<int64_t>(sizeof(T)) + rows * static_cast<int64_t>(sizeof(RowTarget<T>)) +
           rows * static_cast<int64_t>(sizeof(int));
  }
  __device__ __forceinline__ Tile(unsigned char* memory, int classes, int rows) : ld(leading(rows)) {
    T* next = reinterpret_cast<T*>(memory);
    p = next, q = p + classes * ld, distances = q + classes * ld;
    v = distances + classes * classes, r = v + rows, log_total = r + rows, py = log_total + rows, max = py + rows,
    g = max + rows;
    squares = g + rows, gap = squares + rows, others = gap + rows, factor = others + rows;
    const int64_t numbers = 2 * classes * ld + classes * classes + 10 * rows;
    targets = reinterpret_cast<RowTarget<T>*>(next + (numbers + 1) / 2 * 2);
    y = reinterpret_cast<int*>(targets + rows);
  }
};

// k-th (row, class) of a tile; neighbouring k are neighbours in memory
struct TileItem {
  int row, s;
  __device__ __forceinline__ TileItem(int k, int rows, int classes, bool rows_fastest)
      : row(rows_fastest ? k % rows : k / classes), s(rows_fastest ? k / rows : k % classes) {}
};

__device__ __forceinline__ bool rows_are_neighbours(const RowView& view) { return view.strides[view.dims - 1] == 1; }

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

// Targets of a tile's rows and their logits, zeros where a row takes no part.
template <typename T, bool kHead>
__device__ void load_tile(const SmallTrace<T>& pass, const Head<T>& head, T scale, int64_t first, int rows,
                          const Tile<T>& tile) {
  const int classes = pass.classes;
  if constexpr (kHead) {
    for (int k = static_cast<int>(threadIdx.x); k < rows; k += kSmallThreads) {
      tile.targets[k] = row_target(head, first + k, classes, scale);
    }
    __syncthreads();
  }
  const bool rows_fastest = rows_are_neighbours(pass.logits);
  for (int k = static_cast<int>(threadIdx.x); k < rows * classes; k += kSmallThreads) {
    const TileItem at(k, rows, classes, rows_fastest);
    T z(0);
    if (!kHead || tile.targets[at.row].coefficient != T(0)) {
      z = load<T>(pass.logits, pass.logits.offset(first + at.row) + at.s * pass.logits.width_stride);
    }
    tile.p[at.s * tile.ld + at.row] = z;
  }
  if constexpr (kHead) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    for (int k = static_cast<int>(threadIdx.x) / kWarp; k < rows; k += kSmallThreads / kWarp) {
      if (tile.targets[k].coefficient == T(0)) continue;  // the same for the whole warp
      const T squares = warp_sum(squares_share<T>(head.features, first + k, lane, kWarp));
      if (lane == 0) tile.squares[k] = squares;
    }
  }
  __syncthreads();
}

// The most likely class of every row, and what the loss needs of the logits; one thread per row.
template <typename T, bool kHead>
__device__ void tile_maximum(const SmallTrace<T>& pass, const Head<T>& head, T scale, int64_t first, int rows,
                             const Tile<T>& tile) {
  for (int k = static_cast<int>(threadIdx.x); k < rows; k += kSmallThreads) {
    const T* z = tile.p + k;
    T max = z[0];
    int y = 0;

#pragma unroll 4
    for (int s = 1; s < pass.classes; ++s) {
      const T x = z[s * tile.ld];
      if (x > max) max = x, y = s;
    }
    tile.max[k] = max;
    tile.y[k] = y;
    if constexpr (kHead) {
      RowTarget<T>& target = tile.targets[k];
      LongSum<T> gap;
      CompensatedSumOf<T> total, others;
      if (has_soft_shares(head)) {
        const int64_t start = head.soft.data == nullptr ? 0 : head.soft.offset(first + k);

#pragma unroll 4
        for (int s = 0; s < pass.classes; ++s) {
          const T f = soft_share(head, start, s, pass.classes, scale, target.coefficient);
          gap.add(f * (max - z[s * tile.ld]));
          total.add(f);
          if (s != y) others.add(f);
        }
        if (head.soft.data != nullptr) target.coefficient = total.total();
      }
      T row_gap = gap.total(), row_others = others.total();
      if (target.index >= 0) {
        row_gap += target.hard * (max - z[target.index * tile.ld]);
        if (target.index != y) row_others += target.hard;
      }
      tile.gap[k] = row_gap;
      tile.others[k] = row_others;
    }
  }
  __syncthreads();
}

// p in place of the logits (p_y itself at y), q = D p, and v; the statistics of the rows.
template <typename T>
__device__ void tile_trace(const SmallTrace<T>& pass, int rows, const Tile<T>& tile) {
  const int classes = pass.classes, thread = static_cast<int>(threadIdx.x);
  for (int k = thread; k < rows * classes; k += kSmallThreads) {
    const TileItem at(k, rows, classes, true);
    T* p = tile.p + at.s * tile.ld + at.row;
    *p = at.s == tile.y[at.row] ? T(0) : shifted_exp(*p, tile.max[at.row]);
  }
  __syncthreads();
  for (int k = thread; k < rows; k += kSmallThreads) {
    const T max = tile.max[k];
    LongSum<T> sum(max - max);  // from zero, or nan for a row that holds no finite maximum

#pragma unroll 4
    for (int s = 0; s < classes; ++s) sum.add(tile.p[s * tile.ld + k]);
    const T rest = sum.total(), py = T(1) / (T(1) + rest);
    tile.py[k] = py;
    tile.r[k] = rest * py;
    tile.log_total[k] = log1p(rest);
  }
  __syncthreads();
  for (int k = thread; k < rows * classes; k += kSmallThreads) {
    const TileItem at(k, rows, classes, true);
    T* p = tile.p + at.s * tile.ld + at.row;
    *p = at.s == tile.y[at.row] ? tile.py[at.row] : *p * tile.py[at.row];
  }
  __syncthreads();
  for (int k = thread; k < rows * classes; k += kSmallThreads) {
    const TileItem at(k, rows, classes, true);
    T q(0);

#pragma unroll 4
    for (int t = 0; t < classes; ++t) q += tile.distances[at.s * classes + t] * tile.p[t * tile.ld + at.row];
    tile.q[at.s * tile.ld + at.row] = q;
  }
  __syncthreads();
  for (int k = thread; k < rows; k += kSmallThreads) {
    LongSum<T> sum;

#pragma unroll 4
    for (int s = 0; s < classes; ++s) sum.add(tile.p[s * tile.ld + k] * tile.q[s * tile.ld + k]);
    tile.v[k] = sum.total() * T(0.5);
  }
}

template <typename T, bool kHead>
__device__ void tile_gradients(const SmallTrace<T>& pass, const Head<T>& head, T scale, int64_t first, int rows,
                               const Tile<T>& tile) {
  const int classes = pass.classes, thread = static_cast<int>(threadIdx.x);
  if (pass.grad_logits.data != nullptr) {
    const bool rows_fastest = rows_are_neighbours(pass.grad_logits);
    for (int k = thread; k < rows * classes; k += kSmallThreads) {
      const TileItem at(k, rows, classes, rows_fastest);
      const T p = tile.p[at.s * tile.ld + at.row], q = tile.q[at.s * tile.ld + at.row];
      const T through = !kHead || head.curvature_grad ? tile.g[at.row] : T(0);
      T dz = through * pairwise_logit_grad(p, q, tile.v[at.row]);
      if constexpr (kHead) {
        T soft(0);
        if (has_soft_shares(head)) {
          const int64_t start = head.soft.data == nullptr ? 0 : head.soft.offset(first + at.row);
          soft = soft_share(head, start, at.s, classes, scale, tile.targets[at.row].coefficient);
        }
        dz += loss_gradient(tile.targets[at.row], at.s, tile.y[at.row], p, tile.r[at.row], tile.others[at.row], soft);
      }
      store(pass.grad_logits, pass.grad_logits.offset(first + at.row) + at.s * pass.grad_logits.width_stride, dz);
    }
  }
  if constexpr (kHead) {
    if (head.grad_features.data != nullptr) {
      for (int k = thread / kWarp; k < rows; k += kSmallThreads / kWarp) {
        scale_row(head.features, head.grad_features, first + k, tile.factor[k], thread % kWarp, kWarp);
      }
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
