// Tr Cov_p(w) and its gradients over rows of logits, in blocks of rows: the part that softmax_trace and head_cross_entropy share.
//
// A Policy says what one operation does with the rows of a tile:
//   begin(first, lanes, z, ld)                    the logits of a tile have been loaded; may overwrite those of ignored rows
//   before_exp(first, lanes, z, ld, stats)        the most likely classes are known, the logits are still there
//   value(first, lanes, v, stats)                 v is known: (lanes) numbers
//   upstream(first, lanes)                        the gradient that reaches v, one lane per row; zero lanes past `lanes`
//   row_cost()                                    operations that value() spends on one row
//   through_curvature()                           whether the gradient of v reaches the logits
//   add_loss_grad(first, lanes, p, ld, stats, dz, dz_ld)   dz += gradient of whatever else the operation computes; p may
//                                                 hold p or p~
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <vector>

#include "cpu/class_weights.h"
#include "cpu/softmax_tile.h"

namespace fam_ext {

// Up to this many classes a tile goes through all steps while it is in cache, and p p^T is summed in registers;
// past it, the products go to the vendor's library, a block of rows at a time.
constexpr int64_t kTileClasses = 32;
constexpr int64_t kBlockEntries = int64_t{1} << 22;  // logits per block
constexpr int64_t kSumTerms = 128;                   // terms of a sum over rows before it is added to the total

template <typename T>
constexpr int64_t lanes_of() {
  return Vec<T>::size();
}

// Tiles per task, from the operations on one row: a task should be worth the few microseconds that a second thread costs.
inline int64_t tile_grain(int64_t row_cost, int64_t lanes) { return std::max<int64_t>(1, 65536 / (row_cost * lanes)); }

// A block of rows, class-major: p~ (O, ld) and what is known of every tile of `lanes` rows.
template <typename T>
struct RowBlock {
  int64_t classes, first = 0, rows = 0, ld;
  at::Tensor p;
  std::vector<RowStats<T>> stats;

  RowBlock(int64_t classes_, int64_t most_rows, const at::TensorOptions& options) : classes(classes_) {
    constexpr int64_t L = lanes_of<T>();
    const int64_t tiles = (most_rows + L - 1) / L;
    ld = (tiles | 1) * L;  // an odd number of cache lines: classes do not fight for one cache set
    p = at::empty({classes, ld}, options);
    stats.resize(tiles);
  }

  T* data() { return p.mutable_data_ptr<T>(); }
  at::Tensor view() { return p.narrow(1, 0, rows); }  // (O, rows)

  template <typename F>
  void for_each_tile(int64_t row_cost, const F& f) {
    constexpr int64_t L = lanes_of<T>();
    at::parallel_for(0, (rows + L - 1) / L, tile_grain(row_cost, L), [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) f(first + k * L, std::min(L, rows - k * L), k * L, stats[k]);
    });
  }
};

inline int64_t block_rows(int64_t rows, int64_t classes) {
  const int64_t most = std::max<int64_t>(256, kBlockEntries / classes / 256 * 256);
  return std::min(rows, most);
}

// p~ of a tile of logits.
template <typename T, typename Policy>
void load_tile_softmax(const Rows<T>& logits, Policy& policy, int64_t first, int64_t lanes, T* tile, int64_t ld,
                       RowStats<T>& stats) {
  const int64_t classes = logits.layout.width;
  logits.load_tile(first, lanes, tile, ld);
  policy.begin(first, lanes, tile, ld);
  tile_max(tile, ld, classes, stats);
  policy.before_exp(first, lanes, tile, ld, stats);
  tile_softmax(tile, ld, classes, stats);
}

// --- pairwise form ------------------------------------------------------------------------------------------------

// From q = D p in `q`: hands v to the policy and turns q into the gradient of the logits.
template <typename T, typename Policy>
Vec<T> pairwise_finish(Policy& policy, int64_t first, int64_t lanes, int64_t classes, const T* p_tilde, int64_t ld,
                       const RowStats<T>& stats, const Vec<T>& v, T* q, int64_t q_ld, const Rows<T>* grad_logits) {
  policy.value(first, lanes, v, stats);
  const Vec<T> g = policy.upstream(first, lanes);
  if (grad_logits != nullptr) {
    const Vec<T> through = policy.through_curvature() ? g : Vec<T>(0);
    for (int64_t s = 0; s < classes; ++s) {
      const Vec<T> p = probability(Vec<T>::loadu(p_tilde + s * ld), s, stats);
      (through * pairwise_logit_grad(p, Vec<T>::loadu(q + s * q_ld), v)).store(q + s * q_ld);
    }
    policy.add_loss_grad(first, lanes, p_tilde, ld, stats, q, q_ld);
    grad_logits->store_tile(first, lanes, q, q_ld);
  }
  return g;
}

// m (per pair s < t, one vector) += g p_s p_t
template <typename T>
void add_outer(const T* p_tilde, int64_t ld, int64_t classes, const RowStats<T>& stats, const Vec<T>& g, T* m) {
  constexpr int64_t L = lanes_of<T>();
  for (int64_t s = 0; s < classes; ++s) {
    const Vec<T> gp = g * probability(Vec<T>::loadu(p_tilde + s * ld), s, stats);
    for (int64_t t = s + 1; t < classes; ++t, m += L) {
      at::vec::fmadd(gp, probability(Vec<T>::loadu(p_tilde + t * ld), t, stats), Vec<T>::loadu(m)).store(m);
    }
  }
}

// outer += inner, inner = 0: the rounding error of a long sum grows with the length of its parts only
template <typename T>
void flush(T* inner, T* outer, int64_t count) {
  for (int64_t k = 0; k < count; ++k) {
    outer[k] += inner[k];
    inner[k] = 0;
  }
}

// The whole pass for few classes. Returns M = sum_i g_i p_i p_i^T with a zero diagonal if wanted.
template <typename T, typename Policy>
at::Tensor pairwise_tiles(const Rows<T>& logits, const at::Tensor& distances, Policy& policy,
                          const Rows<T>* grad_logits, bool grad_weight) {
  constexpr int64_t L = lanes_of<T>();
  const int64_t classes = logits.layout.width, rows = logits.layout.rows;
  const int64_t pairs = classes * (classes - 1) / 2;
  const T* d = distances.const_data_ptr<T>();
  // one share of M per thread, added in order: the same sum for the same number of threads; a share is a sum in two levels
  const int64_t shares = grad_weight ? at::get_num_threads() : 0, entries = pairs * L;
  std::vector<T> m(shares * 2 * entries, T(0));
  const int64_t tiles = (rows + L - 1) / L;
  at::parallel_for(
      0, tiles, tile_grain(classes * (12 + classes) + policy.row_cost(), L), [&](int64_t begin, int64_t end) {
        std::vector<Vec<T>> scratch(2 * classes);
        T* p = reinterpret_cast<T*>(scratch.data());
        T* q = p + classes * L;
        T* m_inner = m.data() + at::get_thread_num() * 2 * entries;
        int64_t terms = 0;
        for (int64_t k = begin; k < end; ++k) {
          const int64_t first = k * L, lanes = std::min(L, rows - first);
          RowStats<T> stats;
          load_tile_softmax(logits, policy, first, lanes, p, L, stats);
          const Vec<T> v = tile_pairwise(p, L, classes, stats, d, q);
          const Vec<T> g = pairwise_finish(policy, first, lanes, classes, p, L, stats, v, q, L, grad_logits);
          if (!grad_weight) continue;
          add_outer(p, L, classes, stats, g, m_inner);
          if (++terms % kSumTerms == 0) flush(m_inner, m_inner + entries, entries);
        }
      });
  if (!grad_weight) return {};
  at::Tensor result = at::empty({classes, classes}, distances.options());
  T* out = result.mutable_data_ptr<T>();
  int64_t pair = 0;
  for (int64_t s = 0; s < classes; ++s) {
    out[s * classes + s] = 0;
    for (int64_t t = s + 1; t < classes; ++t, ++pair) {
      Vec<T> sum(0);
      for (int64_t level = 0; level < 2 * shares; ++level)
        sum = sum + Vec<T>::loadu(m.data() + (level * pairs + pair) * L);
      out[s * classes + t] = out[t * classes + s] = detail::horizontal_sum(sum);
    }
  }
  return result;
}

// The same with D P and P P^T as matrix products over blocks of rows.
template <typename T, typename Policy>
at::Tensor pairwise_blocks(const Rows<T>& logits, const at::Tensor& distances, Policy& policy,
                           const Rows<T>* grad_logits, bool grad_weight) {
  const int64_t classes = logits.layout.width, rows = logits.layout.rows, step = block_rows(rows, classes);
  RowBlock<T> block(classes, step, distances.options());
  at::Tensor q = at::empty_like(block.p), m;
  if (grad_weight) m = at::zeros({classes, classes}, distances.options());
  for (block.first = 0; block.first < rows; block.first += step) {
    block.rows = std::min(step, rows - block.first);
    T *p_data = block.data(), *q_data = q.mutable_data_ptr<T>();
    const int64_t ld = block.ld;
    block.for_each_tile(8 * classes, [&](int64_t first, int64_t lanes, int64_t column, RowStats<T>& stats) {
      T* p = p_data + column;
      load_tile_softmax(logits, policy, first, lanes, p, ld, stats);
      const LaneArray<T> y(stats.y), py(stats.py);
      for (int64_t lane = 0; lane < lanes; ++lane) p[static_cast<int64_t>(y[lane]) * ld + lane] = py[lane];  // p itself
    });
    at::Tensor q_view = q.narrow(1, 0, block.rows), p_view = block.view();
    at::mm_out(q_view, distances, p_view);
    block.for_each_tile(
        4 * classes + policy.row_cost(), [&](int64_t first, int64_t lanes, int64_t column, RowStats<T>& stats) {
          T *p = p_data + column, *q = q_data + column;
          LongSum<T> sum;
          for (int64_t s = 0; s < classes; ++s) sum.add_product(Vec<T>::loadu(p + s * ld), Vec<T>::loadu(q + s * ld));
          const Vec<T> v = sum.total() * Vec<T>(static_cast<T>(0.5));
          const Vec<T> g = pairwise_finish(policy, first, lanes, classes, p, ld, stats, v, q, ld, grad_logits);
          if (grad_weight) {
            for (int64_t s = 0; s < classes; ++s) (g * Vec<T>::loadu(p + s * ld)).store(q + s * ld);
          }
        });
    if (grad_weight) m.addmm_(q_view, p_view.t());
  }
  return m;
}

template <typename T, typename Policy>
at::Tensor pairwise_rows(const Rows<T>& logits, const at::Tensor& distances, Policy& policy, const Rows<T>* grad_logits,
                         bool grad_weight) {
  return logits.layout.width <= kTileClasses ? pairwise_tiles(logits, distances, policy, grad_logits, grad_weight)
                                             : pairwise_blocks(logits, distances, policy, grad_logits, grad_weight);
}

}  // namespace fam_ext
