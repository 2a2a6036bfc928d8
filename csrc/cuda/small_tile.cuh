// A tile of rows in shared memory, class-major as on the CPU, and the steps it passes through. All threads of a block take every step.
#pragma once

#include "cuda/head_rows.cuh"
#include "cuda/small_trace.h"

namespace fam_ext::gpu {

constexpr int kSmallThreads = kSumThreads;

// A tile of rows in shared memory. ld is odd, so that neighbouring classes lie in different banks.
template <typename T>
struct Tile {
  T *distances, *p, *q;  // (O, O); (O, ld): logits, then e, then p; q = D p
  T *v, *r, *log_total, *py, *max, *g, *squares, *gap, *others, *factor;
  RowTarget<T>* targets;
  int* y;
  T* stage;  // columns of the weight, before the first tile, where p begins
  int ld;

  __host__ __device__ static int leading(int columns) { return columns | 1; }
  __host__ __device__ static int64_t numbers(int classes, int rows) {
    return classes * classes + 2 * classes * leading(rows) + 10 * rows;
  }
  __host__ __device__ static int64_t bytes(int classes, int rows, int staged) {
    const int64_t number = static_cast<int64_t>(sizeof(T)),
                  per_row = static_cast<int64_t>(sizeof(RowTarget<T>) + sizeof(int));
    const int64_t tile = (numbers(classes, rows) + 1) / 2 * 2 * number + rows * per_row;
    const int64_t columns = classes * leading(staged), sums = kSmallThreads;  // what passes through `stage`
    const int64_t staging = staged == 0 ? 0 : (classes * classes + (columns < sums ? sums : columns)) * number;
    return tile < staging ? staging : tile;
  }
  __device__ __forceinline__ Tile(unsigned char* memory, int classes, int rows) : ld(leading(rows)) {
    distances = reinterpret_cast<T*>(memory);
    p = distances + classes * classes, q = p + classes * ld, stage = p;
    v = q + classes * ld, r = v + rows, log_total = r + rows, py = log_total + rows, max = py + rows, g = max + rows;
    squares = g + rows, gap = squares + rows, others = gap + rows, factor = others + rows;
    targets = reinterpret_cast<RowTarget<T>*>(distances + (numbers(classes, rows) + 1) / 2 * 2);
    y = reinterpret_cast<int*>(targets + rows);
  }
};

// k-th (row, class) of a tile; neighbouring k are neighbours in memory
struct TileItem {
  int row, s;
  __device__ __forceinline__ TileItem(int k, int rows, int classes, bool rows_fastest) {
    const int inner = rows_fastest ? rows : classes, outer = k / inner, rest = k - outer * inner;
    row = rows_fastest ? rest : outer, s = rows_fastest ? outer : rest;
  }
};

__device__ __forceinline__ bool rows_are_neighbours(const RowView& view) { return view.strides[view.dims - 1] == 1; }

// Targets of a tile's rows and their logits, zeros where a row does not count.
template <typename T, bool kHead, typename S>
__device__ void load_tile(const SmallTrace<T>& pass, const Head<T>& head, T scale, double omega_total, int64_t first,
                          int rows, const Tile<T>& tile) {
  const int classes = pass.classes;
  if constexpr (kHead) {
    for (int k = static_cast<int>(threadIdx.x); k < rows; k += kSmallThreads) {
      tile.targets[k] = row_target(head, first + k, classes, scale, omega_total);
    }
    __syncthreads();
  }
  const bool rows_fastest = rows_are_neighbours(pass.logits);
  for (int k = static_cast<int>(threadIdx.x); k < rows * classes; k += kSmallThreads) {
    const TileItem at(k, rows, classes, rows_fastest);
    T z(0);
    if (!kHead || tile.targets[at.row].coefficient != T(0)) {
      z = load<T, S>(pass.logits, pass.logits.offset(first + at.row) + at.s * pass.logits.width_stride);
    }
    tile.p[at.s * tile.ld + at.row] = z;
  }
  if constexpr (kHead) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    for (int k = static_cast<int>(threadIdx.x) / kWarp; k < rows; k += kSmallThreads / kWarp) {
      if (tile.targets[k].coefficient == T(0)) continue;  // the same for the whole warp
      const T squares = warp_sum(squares_share<T, S>(head.features, first + k, lane, kWarp));
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

template <typename T, bool kHead, typename S>
__device__ void tile_gradients(const SmallTrace<T>& pass, const Head<T>& head, T scale, int64_t first, int rows,
                               const Tile<T>& tile) {
  using G = std::conditional_t<kHead, typename GradientOf<S>::type, S>;
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
      store<G>(pass.grad_logits, pass.grad_logits.offset(first + at.row) + at.s * pass.grad_logits.width_stride, dz);
    }
  }
  if constexpr (kHead) {
    if (head.grad_features.data != nullptr) {
      for (int k = thread / kWarp; k < rows; k += kSmallThreads / kWarp) {
        scale_row<S>(head.features, head.grad_features, first + k, tile.factor[k], thread % kWarp, kWarp);
      }
    }
  }
}

}  // namespace fam_ext::gpu
