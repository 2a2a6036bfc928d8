// Few classes in the pairwise form: arguments of the one pass that softmax_trace and head_cross_entropy share.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/head.h"
#include "cuda/view.h"

namespace fam_ext::gpu {

constexpr int kSmallClasses = 32;

// The phases, in order. Between two of them every block must have finished.
enum SmallPhase : unsigned { kPrepare = 1, kRows = 2, kReduce = 4, kWeight = 8 };

template <typename T>
struct SmallTrace {
  RowView logits, grad_logits;  // (rows, O)
  const T* weight = nullptr;    // (O, I) contiguous
  int classes = 0;
  int64_t fan_in = 0, rows = 0;
  T* distances = nullptr;       // (O, O): |w_s - w_t|^2
  bool have_distances = false;  // they are given, else made
  T* values = nullptr;          // (rows): v, written if not null
  const T* upstream = nullptr;  // (rows): gradient that reaches v, without a head
  T* partial_pairs = nullptr;   // (shares, O (O - 1) / 2): sums of g p_s p_t; null: the weight's gradient is not wanted
  T* pairs = nullptr;           // (O (O - 1) / 2): their total
  T* grad_weight = nullptr;     // (O, I)
  double* partial_sums = nullptr;  // (2, shares): loss and kappa
  int shares = 1;                  // blocks that take rows; head.shares is the same
  int tile_rows = 1;               // rows that a block takes at once
  // Every block makes the distances and the targets' sums itself, and later the sums over all shares: no phase of their own, nor the
  // barrier behind it. `staged`: columns of the weight in shared memory at once, for the distances.
  bool prepare_inside = false, reduce_inside = false;
  int staged = 0;
};

constexpr int kInsideClasses = 15;  // a thread for every pair of classes, each with itself among them
constexpr int64_t kInsideDistances = int64_t{1} << 15;  // most differences that every block takes itself
constexpr int64_t kInsideRows = 4096;                   // most targets that every block reads
constexpr int kInsideShares = 64;                       // most shares that every block adds up
constexpr int64_t kStagedBytes = 24 << 10;

// Rows per tile, the shares that tiles are dealt to, and what every block does itself, from the sizes alone: the order of every sum is
// the same on every device.
template <typename T>
void choose_tiles(SmallTrace<T>& pass) {
  constexpr int64_t most = sizeof(T) == 4 ? 128 : 64;  // two matrices of 32 classes and the distances stay below 48 KiB
  const int64_t tile = pass.rows <= 512 ? 8 : pass.rows <= 4096 ? 32 : most;
  const int64_t tiles = (pass.rows + tile - 1) / tile, pairs = pass.classes * (pass.classes + 1) / 2;
  pass.tile_rows = static_cast<int>(tile);
  pass.shares = static_cast<int>(tiles < 1 ? 1 : tiles < kPartials ? tiles : kPartials);
  const bool few = pass.classes <= kInsideClasses;
  pass.prepare_inside = few && pass.fan_in > 0 && pass.rows <= kInsideRows && pairs * pass.fan_in <= kInsideDistances;
  pass.reduce_inside = few && pass.shares <= kInsideShares;
  if (!pass.prepare_inside || pass.have_distances) return;
  const int64_t columns = kStagedBytes / static_cast<int64_t>(sizeof(T)) / pass.classes - 1;
  pass.staged = static_cast<int>(columns < pass.fan_in ? columns : pass.fan_in);
}

// Runs the phases on `stream`: in one launch with barriers between the phases where the device holds all blocks at once and rows are
// few, else in one launch each. The results are the same to the last bit. Returns the first error.
template <typename T>
cudaError_t launch_small_trace(const SmallTrace<T>& pass, cudaStream_t stream);
template <typename T>
cudaError_t launch_small_head(const SmallTrace<T>& pass, const Head<T>& head, cudaStream_t stream);

}  // namespace fam_ext::gpu
