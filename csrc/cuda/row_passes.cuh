// A block of threads per row.
#pragma once

#include "cuda/head_rows.cuh"
#include "cuda/row_passes.h"

namespace fam_ext::gpu {

constexpr int kRowThreads = kSumThreads;

// The largest of the block's numbers and the smallest index that has it, in every thread.
template <typename T>
__device__ void block_maximum(T& max, int& index, T* values, int* indices) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const T other = __shfl_xor_sync(kFullWarp, max, step);
    const int at = __shfl_xor_sync(kFullWarp, index, step);
    if (other > max || (other == max && at < index)) max = other, index = at;
  }
  if (threadIdx.x % kWarp == 0) {
    values[threadIdx.x / kWarp] = max;
    indices[threadIdx.x / kWarp] = index;
  }
  __syncthreads();
  max = values[0], index = indices[0];
  for (int k = 1; k < kRowThreads / kWarp; ++k) {
    if (values[k] > max || (values[k] == max && indices[k] < index)) max = values[k], index = indices[k];
  }
}

// S: the logits in memory.
template <typename T, bool kHead, typename S>
__global__ __launch_bounds__(kRowThreads, 6) void softmax_rows_kernel(const __grid_constant__ RowPass<T> pass,
                                                                      const __grid_constant__ Head<T> head) {
  __shared__ T scratch[kWarp];
  __shared__ double wide_scratch[kWarp];
  __shared__ int index_scratch[kWarp];
  const int64_t n = blockIdx.x, row = pass.first + n, start = pass.logits.offset(row), classes = pass.classes;
  const int thread = static_cast<int>(threadIdx.x);
  T scale(1);
  RowTarget<T> target;
  if constexpr (kHead) {
    const TargetSums sums = read_target_sums(head, wide_scratch);
    scale = reduction_scale(head, pass.rows, sums);
    target = row_target(head, row, classes, scale, sums.omega);
  }
  const bool part = !kHead || target.coefficient != T(0);  // else the row may hold anything
  T* p = pass.p + n * classes;
  T max = -kInfinity<T>;
  int y = 0;
  for (int64_t first = thread; first < classes; first += 4 * kRowThreads) {  // four loads under way
    T z[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t s = first + j * kRowThreads;
      z[j] = part && s < classes ? load<T, S>(pass.logits, start + s * pass.logits.width_stride) : T(0);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t s = first + j * kRowThreads;
      if (s >= classes) continue;
      p[s] = z[j];
      if (z[j] > max) max = z[j], y = static_cast<int>(s);
    }
  }
  block_maximum(max, y, scratch, index_scratch);

  T gap(0), total(0), others(0);
  if constexpr (kHead) {
    if (has_soft_shares(head)) {
      const int64_t soft_start = head.soft.data == nullptr ? 0 : head.soft.offset(row);
      LongSum<T> gap_sum;
      CompensatedSumOf<T> total_sum, other_sum;
      for (int64_t s = thread; s < classes; s += kRowThreads) {
        const T f = soft_share(head, soft_start, s, classes, scale, target.coefficient);
        gap_sum.add(f * (max - p[s]));
        total_sum.add(f);
        if (s != y) other_sum.add(f);
      }
      gap = block_sum(gap_sum.total(), scratch);
      total = block_sum(total_sum.total(), scratch);
      others = block_sum(other_sum.total(), scratch);
      if (head.soft.data != nullptr) target.coefficient = total;
    }
    __syncthreads();  // p is read at another thread's class
    if (target.index >= 0) {
      gap += target.hard * (max - p[target.index]);
      if (target.index != y) others += target.hard;
    }
    __syncthreads();
  }

  LongSum<T> sum;
  for (int64_t s = thread; s < classes; s += kRowThreads) {
    const T e = s == y ? T(0) : shifted_exp(p[s], max);
    p[s] = e;
    sum.add(e);
  }
  const T rest = block_sum(sum.total(), scratch) + (max - max);  // nan for a row that holds no finite maximum
  const T py = T(1) / (T(1) + rest), r = rest * py;
  LongSum<T> weighted;
  for (int64_t s = thread; s < classes; s += kRowThreads) {
    T value = s == y ? -r : p[s] * py;
    if (!pass.pairwise) weighted.add(value * pass.squares[s]);
    // in the product with W, -r w_y would round every later term of the sum to its own digits
    if (s == y) value = pass.pairwise ? py : pass.have_shifts ? -r : T(0);
    p[s] = value;
  }
  const T weighted_squares = pass.pairwise ? T(0) : block_sum(weighted.total(), scratch);
  if (thread != 0) return;
  RowFacts<T> facts{};
  facts.max = max, facts.py = py, facts.r = r, facts.log_total = log1p(rest), facts.weighted = weighted_squares;
  facts.gap = gap, facts.others = others, facts.coefficient = target.coefficient, facts.hard = target.hard;
  facts.index = target.index;
  pass.facts[n] = facts;
  pass.likely[n] = y;
}

// S: the features in memory.
template <typename T, bool kHead, typename S>
__global__ __launch_bounds__(kRowThreads, 6) void row_values_kernel(const __grid_constant__ RowPass<T> pass,
                                                                    const __grid_constant__ Head<T> head) {
  __shared__ T scratch[kWarp];
  const int64_t n = blockIdx.x, row = pass.first + n;
  const int thread = static_cast<int>(threadIdx.x);
  RowFacts<T>& facts = pass.facts[n];
  const int y = pass.likely[n];
  const T r = facts.r, coefficient = facts.coefficient;
  T v(0), squared_shift(0), squared_mean(0);
  if (pass.pairwise) {
    const T *p = pass.p + n * pass.classes, *q = pass.q + n * pass.classes;
    LongSum<T> sum;
    for (int64_t s = thread; s < pass.classes; s += kRowThreads) sum.add(p[s] * q[s]);
    v = block_sum(sum.total(), scratch) * T(0.5);
  } else {
    T* shift = pass.shift + n * pass.fan_in;
    T* mean = pass.mean == nullptr ? nullptr : pass.mean + n * pass.fan_in;
    const T* wy = pass.weight + y * pass.fan_in;
    LongSum<T> dot, squared, squared_u;
    for (int64_t i = thread; i < pass.fan_in; i += kRowThreads) {
      const T b = wy[i], a = pass.have_shifts ? shift[i] : shift[i] - r * b, u = a + b;
      dot.add(a * b);
      squared.add(a * a);
      squared_u.add(u * u);
      if (!pass.have_shifts) shift[i] = a;
      if (mean != nullptr) mean[i] = u;
    }
    squared_shift = block_sum(squared.total(), scratch);
    squared_mean = block_sum(squared_u.total(), scratch);
    v = at_least_zero(shifted_trace(facts.weighted, block_sum(dot.total(), scratch), squared_shift));
    if (thread == 0) pass.p[n * pass.classes + y] = -r;
  }
  T upstream(0);
  if constexpr (kHead) {
    const T squares =
        coefficient == T(0) ? T(0) : block_sum(squares_share<T, S>(head.features, row, thread, kRowThreads), scratch);
    const RowValue<T> value = row_value(head, coefficient, facts.gap, facts.log_total, squares, v);
    if (head.grad_features.data != nullptr) {
      scale_row<S>(head.features, head.grad_features, row, value.feature_factor, thread, kRowThreads);
    }
    upstream = value.upstream;
    if (thread == 0) {
      pass.row_loss[row] = value.loss;
      pass.row_curvature[row] = value.curvature;
    }
  } else {
    if (pass.upstream != nullptr) upstream = pass.upstream[row];
    if (thread == 0 && pass.values != nullptr) pass.values[row] = v;
  }
  if (thread != 0) return;
  facts.v = v, facts.squared_shift = squared_shift, facts.squared_mean = squared_mean;
  pass.factors[n] = upstream;
}

// S: the gradient of the logits in memory.
template <typename T, bool kHead, typename S>
__global__ __launch_bounds__(kRowThreads, 6) void row_gradients_kernel(const __grid_constant__ RowPass<T> pass,
                                                                       const __grid_constant__ Head<T> head,
                                                                       bool grad_weight) {
  __shared__ double wide_scratch[kWarp];
  const int64_t n = blockIdx.x, row = pass.first + n, classes = pass.classes;
  const int thread = static_cast<int>(threadIdx.x);
  const RowFacts<T>& facts = pass.facts[n];
  const T g = pass.factors[n], v = facts.v;
  const int y = pass.likely[n];
  T scale(1);
  int64_t soft_start = 0;
  RowTarget<T> target;
  bool soft = false;
  if constexpr (kHead) {
    soft = has_soft_shares(head);
    if (soft) scale = reduction_scale(head, pass.rows, read_target_sums(head, wide_scratch));
    if (head.soft.data != nullptr) soft_start = head.soft.offset(row);
    target.index = facts.index, target.hard = facts.hard, target.coefficient = facts.coefficient;
  }
  const int64_t start = pass.grad_logits.data == nullptr ? 0 : pass.grad_logits.offset(row);
  const T* p = pass.p + n * classes;
  T* q = pass.q == nullptr ? nullptr : pass.q + n * classes;
  for (int64_t s = thread; s < classes; s += kRowThreads) {
    const T probability = s == y ? facts.py : p[s];
    if (pass.grad_logits.data != nullptr) {
      T dz(0);
      if (pass.products && pass.pairwise) {
        dz = g * pairwise_logit_grad(probability, q[s], v);
      } else if (pass.products) {
        const T distance =
            s == y ? facts.squared_shift : at_least_zero(squared_distance(pass.squares[s], q[s], facts.squared_mean));
        dz = g * probability * (distance - v);
      }
      if constexpr (kHead) {
        const T f = soft ? soft_share(head, soft_start, s, classes, scale, target.coefficient) : T(0);
        dz += loss_gradient(target, s, y, probability, facts.r, facts.others, f);
      }
      store<S>(pass.grad_logits, start + s * pass.grad_logits.width_stride, dz);
    }
    if (grad_weight && pass.pairwise) q[s] = g * probability;
  }
  if (!grad_weight || pass.pairwise) return;
  T* mean = pass.mean + n * pass.fan_in;
  for (int64_t i = thread; i < pass.fan_in; i += kRowThreads) mean[i] *= g;
}

template <typename T>
__global__ __launch_bounds__(kRowThreads, 6) void head_prepare_kernel(const __grid_constant__ Head<T> head,
                                                                      int64_t rows, int64_t classes) {
  __shared__ double scratch[kWarp];
  write_target_sums(head, rows, classes, static_cast<int>(blockIdx.x), scratch);
}

template <typename T>
__global__ __launch_bounds__(kRowThreads, 6) void head_totals_kernel(const __grid_constant__ Head<T> head,
                                                                     const __grid_constant__ RowPass<T> pass) {
  __shared__ double scratch[kWarp];
  double loss = 0, curvature = 0;
  for (int64_t n = threadIdx.x; n < pass.rows; n += kRowThreads) {
    loss += static_cast<double>(pass.row_loss[n]);
    curvature += static_cast<double>(pass.row_curvature[n]);
  }
  loss = block_sum(loss, scratch);
  curvature = block_sum(curvature, scratch);
  const TargetSums sums = read_target_sums(head, scratch);
  if (threadIdx.x == 0) write_totals(head, loss, curvature, sums.valid);
}

// ---- Launches ----

template <typename T, bool kHead>
cudaError_t launch_softmax_rows(const RowPass<T>& pass, const Head<T>& head, cudaStream_t stream) {
  return for_type<T>(pass.logits.dtype, [&](auto s) {
    const auto kernel = softmax_rows_kernel<T, kHead, decltype(s)>;
    FAM_LAUNCH(kernel, static_cast<unsigned>(pass.n), kRowThreads, 0, stream, pass, head);
    return cudaGetLastError();
  });
}

template <typename T, bool kHead>
cudaError_t launch_row_values(const RowPass<T>& pass, const Head<T>& head, cudaStream_t stream) {
  const auto launch = [&](auto s) {
    const auto kernel = row_values_kernel<T, kHead, decltype(s)>;
    FAM_LAUNCH(kernel, static_cast<unsigned>(pass.n), kRowThreads, 0, stream, pass, head);
    return cudaGetLastError();
  };
  if constexpr (kHead) return for_type<T>(head.features.dtype, launch);
  return launch(T{});
}

template <typename T, bool kHead>
cudaError_t launch_row_gradients(const RowPass<T>& pass, const Head<T>& head, bool grad_weight, cudaStream_t stream) {
  const auto launch = [&](auto s) {
    const auto kernel = row_gradients_kernel<T, kHead, decltype(s)>;
    FAM_LAUNCH(kernel, static_cast<unsigned>(pass.n), kRowThreads, 0, stream, pass, head, grad_weight);
    return cudaGetLastError();
  };
  // gradients made in the forward pass are float or double
  if constexpr (kHead && std::is_same_v<T, float>)
    return launch(float{});
  else
    return for_type<T>(pass.grad_logits.dtype, launch);
}

}  // namespace fam_ext::gpu
