// Softmax of a tile relative to each row's most likely class, exact where the prediction is confident.
#pragma once

#include <limits>

#include "cpu/tile.h"
#include "flatness.h"

namespace fam_ext {

template <typename T>
using CompensatedSum = CompensatedSumOf<Vec<T>>;

template <typename T>
Vec<T> at_least_zero(const Vec<T>& x) {
  return at::vec::maximum(x, Vec<T>(0));
}

// Per lane: the largest logit, its class y, and with e_s = exp(z_s - z_y), rest = sum_{s != y} e_s.
template <typename T>
struct RowStats {
  Vec<T> max, y;
  Vec<T> py;         // 1 / (1 + rest)
  Vec<T> r;          // rest / (1 + rest) = 1 - p_y without the subtraction
  Vec<T> log_total;  // log sum exp(z) - max = log1p(rest)
};

template <typename T>
void tile_max(const T* z, int64_t ld, int64_t classes, RowStats<T>& stats) {
  stats.max = Vec<T>::loadu(z);
  stats.y = Vec<T>(0);
  for (int64_t s = 1; s < classes; ++s) {
    const Vec<T> x = Vec<T>::loadu(z + s * ld);
    const Vec<T> larger = x > stats.max;
    stats.max = Vec<T>::blendv(stats.max, x, larger);
    stats.y = Vec<T>::blendv(stats.y, Vec<T>(static_cast<T>(s)), larger);
  }
}

// Replaces the logits by p~: p_s for s != y and -r at y, where p_y - 1 would cancel.
template <typename T>
void tile_softmax(T* z, int64_t ld, int64_t classes, RowStats<T>& stats) {
  const Vec<T> zero(0), one(1), lowest(std::numeric_limits<T>::lowest());
  LongSum<T> sum(stats.max - stats.max);  // from zero, or nan for a row that holds no finite maximum
  for (int64_t s = 0; s < classes; ++s) {
    const Vec<T> x = Vec<T>::loadu(z + s * ld);
    const Vec<T> d = x - stats.max;
    const Vec<T> error = Vec<T>::blendv(zero, difference_error(x, stats.max, d), d > lowest);
    Vec<T> e = d.exp();
    e = at::vec::fmadd(e, error, e);
    e = Vec<T>::blendv(e, zero, stats.y == Vec<T>(static_cast<T>(s)));
    sum.add(e);
    e.store(z + s * ld);
  }
  const Vec<T> rest = sum.total();
  stats.py = one / (one + rest);
  stats.r = rest * stats.py;
  stats.log_total = rest.log1p();
  for (int64_t s = 0; s < classes; ++s) {
    const Vec<T> p = Vec<T>::loadu(z + s * ld) * stats.py;
    Vec<T>::blendv(p, zero - stats.r, stats.y == Vec<T>(static_cast<T>(s))).store(z + s * ld);
  }
}

// p from p~: only the entry at y differs.
template <typename T>
Vec<T> probability(const Vec<T>& p_tilde, int64_t s, const RowStats<T>& stats) {
  return Vec<T>::blendv(p_tilde, stats.py, stats.y == Vec<T>(static_cast<T>(s)));
}

// q = D p for one tile and v = 1/2 p^T q. D is (O, O), symmetric with a zero diagonal; q has the leading dimension of p.
template <typename T>
Vec<T> tile_pairwise(const T* p_tilde, int64_t ld, int64_t classes, const RowStats<T>& stats, const T* distances,
                     T* q) {
  constexpr int64_t kBlock = 4;
  LongSum<T> v;
  for (int64_t s0 = 0; s0 < classes; s0 += kBlock) {
    const T* row[kBlock];
    Vec<T> sums[kBlock];
    for (int64_t k = 0; k < kBlock; ++k) {
      row[k] = distances + std::min(s0 + k, classes - 1) * classes;
      sums[k] = Vec<T>(0);
    }
    for (int64_t t = 0; t < classes; ++t) {
      const Vec<T> p = probability(Vec<T>::loadu(p_tilde + t * ld), t, stats);
      for (int64_t k = 0; k < kBlock; ++k) sums[k] = at::vec::fmadd(Vec<T>(row[k][t]), p, sums[k]);
    }
    for (int64_t k = 0; k < std::min(kBlock, classes - s0); ++k) sums[k].store(q + (s0 + k) * ld);
  }
  for (int64_t s = 0; s < classes; ++s) {
    v.add_product(probability(Vec<T>::loadu(p_tilde + s * ld), s, stats), Vec<T>::loadu(q + s * ld));
  }
  return v.total() * Vec<T>(static_cast<T>(0.5));
}

}  // namespace fam_ext
