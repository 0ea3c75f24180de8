// Gradient of running maxima along lines of a dense map, from the map itself: the maxima are
// recomputed, so that forward saves only its input. No atomics: the same bits every time.
//
// In scan order a run begins with each element that takes over; the sum of the run's gradients goes
// to it, 0 to the others.
#pragma once

#include "line_scans.cuh"

namespace d2ext {

constexpr int32_t kRowLinesBackward = 2;
// Elements of a thread's pack in a column scan: sums are in float32, so that eight of 16 bits would
// not fit the registers.
template <typename scalar_t>
constexpr int kGradientPack = kFullPack<scalar_t> < 4 ? kFullPack<scalar_t> : 4;

// grad_x of a column scan. A thread sums its rows from the last to the first, beginning with what
// the threads after it have up to their first take-over. kChunks: lines have more than one chunk;
// the last run of a chunk may go on in the next, so that its sum is written again.
template <typename scalar_t, int V, bool kChunks>
__global__ void __launch_bounds__(kColumnThreads)
    column_scan_backward_kernel(const scalar_t* __restrict__ x, const scalar_t* __restrict__ grad,
                                scalar_t* grad_x, Lines lines, bool reverse) {
  using P = Pack<scalar_t, V>;
  using acc_t = typename P::acc_t;
  constexpr int kRows = kColumnRows;
  __shared__ P totals[kColumnThreads];
  __shared__ __align__(16)
      acc_t heads[kColumnThreads * V];  // gradients before a thread's first take-over
  __shared__ uint32_t seen_bits[kColumnThreads];
  __shared__ acc_t last_sums[kChunks ? kColumnPacksMost * V : 1];
  __shared__ int64_t last_rows[kChunks ? kColumnPacksMost * V : 1];
  const int32_t tx = threadIdx.x;
  const int32_t ty = threadIdx.y;
  const int32_t self = ty * blockDim.x + tx;
  const int64_t packs = lines.inner / V;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * blockDim.x + tx;
  const bool inside = column < packs * lines.outer;
  const LineAddress at = line_address(lines, packs, V, inside ? column : 0, reverse);
  const int32_t chunk = blockDim.y * kRows;
  P carry;
  carry.fill(lowest<acc_t>());
  acc_t pending_sum[V];  // of the run that the chunk before left open; thread row 0 keeps it
  int64_t pending_row[V];

  for (int64_t begin = 0; begin < lines.length; begin += chunk) {
    const int64_t row = begin + ty * kRows;
    const int32_t rows = inside ? rows_left(lines.length - row) : 0;
    const int64_t start = at.first + row * at.step;
    P parts[kRows];
    P grads[kRows];
    int64_t place = start;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      parts[r].fill(lowest<acc_t>());
      grads[r].fill(acc_t(0));
      if (r < rows) {
        parts[r] = load_pack<scalar_t, V>(x + place);
        grads[r] = load_pack<scalar_t, V>(grad + place);
      }
      place += at.step;
    }
    P total = parts[0];
#pragma unroll
    for (int r = 1; r < kRows; ++r) {
      total = maximum(total, parts[r]);
    }
    totals[self] = total;
    __syncthreads();
    P before = carry;
    for (int32_t j = 0; j < ty; ++j) {
      before = maximum(before, totals[j * blockDim.x + tx]);
    }
    if (kChunks) {
      carry = before;
      for (int32_t j = ty; j < blockDim.y; ++j) {
        carry = maximum(carry, totals[j * blockDim.x + tx]);
      }
    }

    uint32_t taken[kRows];  // bit k: element k of the row takes over
    uint32_t seen = 0;
    acc_t running[V];
    acc_t sums[V];
#pragma unroll
    for (int k = 0; k < V; ++k) {
      running[k] = before[k];
      sums[k] = 0;
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      taken[r] = 0;
#pragma unroll
      for (int k = 0; k < V; ++k) {
        // -inf, which stands for "nothing yet", is not greater than itself: the first element of a
        // line takes over whatever it is.
        if (takes_over(parts[r][k], running[k]) || (r == 0 && row == 0)) {
          taken[r] |= 1u << k;
        }
        running[k] = maximum(running[k], parts[r][k]);
      }
      seen |= taken[r];
#pragma unroll
      for (int k = 0; k < V; ++k) {
        sums[k] += (seen >> k & 1u) ? acc_t(0) : grads[r][k];
      }
    }
#pragma unroll
    for (int k = 0; k < V; ++k) {
      heads[self * V + k] = sums[k];
      sums[k] = 0;
    }
    seen_bits[self] = seen;
    __syncthreads();

    uint32_t closed = 0;  // bit k: a thread after this one has a take-over
    for (int32_t j = ty + 1; j < blockDim.y; ++j) {
      const int32_t other = j * blockDim.x + tx;
#pragma unroll
      for (int k = 0; k < V; ++k) {
        sums[k] += (closed >> k & 1u) ? acc_t(0) : heads[other * V + k];
      }
      closed |= seen_bits[other];
    }
    uint32_t open = seen & ~closed;  // bit k: the chunk's last run begins in this thread
#pragma unroll
    for (int r = kRows - 1; r >= 0; --r) {
      P result;
      result.fill(0);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const bool holds = taken[r] >> k & 1u;
        sums[k] += grads[r][k];
        result.set(k, holds ? sums[k] : acc_t(0));
        if (kChunks && holds && (open >> k & 1u)) {
          last_sums[tx * V + k] = sums[k];
          last_rows[tx * V + k] = row + r;
          open &= ~(1u << k);
        }
        sums[k] = holds ? acc_t(0) : sums[k];
      }
      place -= at.step;
      if (r < rows) {
        store_pack(grad_x + place, result);
      }
    }
    if (kChunks) {
      __syncthreads();
      if (ty == 0 && inside) {
        const uint32_t any = seen | closed;
#pragma unroll
        for (int k = 0; k < V; ++k) {
          if (begin > 0) {
            // `sums` now holds the gradients before the chunk's first take-over.
            pending_sum[k] += sums[k];
            grad_x[at.first + pending_row[k] * at.step + k] = static_cast<scalar_t>(pending_sum[k]);
          }
          if (any >> k & 1u) {
            pending_sum[k] = last_sums[tx * V + k];
            pending_row[k] = last_rows[tx * V + k];
          }
        }
      }
      __syncthreads();
    }
  }
}

// grad_x of a row scan.
template <typename scalar_t, int V, bool kReverse>
__global__ void __launch_bounds__(kScanThreads)
    row_scan_backward_kernel(const scalar_t* __restrict__ x, const scalar_t* __restrict__ grad,
                             scalar_t* grad_x, int64_t count, int64_t length, int32_t lanes) {
  using P = Pack<scalar_t, V>;
  using acc_t = typename P::acc_t;
  constexpr int kLines = kRowLinesBackward;
  const int32_t lane = threadIdx.x % lanes;
  const int32_t first_lane = threadIdx.x % 32 - lane;
  const uint32_t group_bits = lanes == 32 ? kAllLanes : (1u << lanes) - 1;
  const int64_t group = (static_cast<int64_t>(blockIdx.x) * kScanThreads + threadIdx.x) / lanes;
  const int64_t line = group * kLines;
  const int64_t packs = length / V;
  acc_t carry[kLines];
  acc_t pending_sum[kLines];  // of the run that the chunk before left open
  int64_t pending_place[kLines];
#pragma unroll
  for (int u = 0; u < kLines; ++u) {
    carry[u] = lowest<acc_t>();
    pending_sum[u] = 0;
    pending_place[u] = 0;
  }

  for (int64_t begin = 0; begin < packs; begin += lanes) {
    const int64_t index = begin + lane;
    const int64_t offset = (kReverse ? packs - 1 - index : index) * V;
    const bool chunks = packs > lanes;
    P parts[kLines];
    P grads[kLines];
    acc_t totals[kLines];
    acc_t before[kLines];
#pragma unroll
    for (int u = 0; u < kLines; ++u) {
      if (line + u < count && index < packs) {
        parts[u] = load_pack<scalar_t, V>(x + (line + u) * length + offset);
        grads[u] = load_pack<scalar_t, V>(grad + (line + u) * length + offset);
      } else {
        parts[u].fill(lowest<acc_t>());
        grads[u].fill(acc_t(0));
      }
    }
#pragma unroll
    for (int u = 0; u < kLines; ++u) {
      totals[u] = parts[u][0];
#pragma unroll
      for (int k = 1; k < V; ++k) {
        totals[u] = maximum(totals[u], parts[u][k]);
      }
    }
    scan_lanes(totals, before, lanes, lane);

#pragma unroll
    for (int u = 0; u < kLines; ++u) {
      acc_t running = maximum(carry[u], before[u]);
      if (chunks) {
        carry[u] = maximum(carry[u], __shfl_sync(kAllLanes, totals[u], lanes - 1, lanes));
      }
      uint32_t taken = 0;  // bit k: element k of the pack, in scan order, takes over
      acc_t head = 0;      // gradients before the first of them
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const int place = kReverse ? V - 1 - k : k;
        const acc_t value = parts[u][place];
        if (takes_over(value, running) || (index == 0 && k == 0)) {
          taken |= 1u << k;
        }
        running = maximum(running, value);
        head += taken ? acc_t(0) : grads[u][place];
      }
      // Bit j: a run begins in lane j of the group.
      const uint32_t begins = __ballot_sync(kAllLanes, taken != 0) >> first_lane & group_bits;
      // Gradients from this lane on up to the first take-over.
      for (int32_t step = 1; step < lanes; step *= 2) {
        const acc_t other = __shfl_down_sync(kAllLanes, head, step, lanes);
        const bool unbroken = (begins >> lane & ((1u << step) - 1)) == 0;
        head += unbroken && lane + step < lanes ? other : acc_t(0);
      }
      const acc_t after = __shfl_down_sync(kAllLanes, head, 1, lanes);
      acc_t total = lane + 1 < lanes ? after : acc_t(0);
      acc_t last_sum = 0;  // of the lane's last run
      P result;
      result.fill(0);
#pragma unroll
      for (int k = V - 1; k >= 0; --k) {
        const int place = kReverse ? V - 1 - k : k;
        const bool holds = taken >> k & 1u;
        total += grads[u][place];
        result.set(place, holds ? total : acc_t(0));
        last_sum = holds && (taken >> k) == 1u ? total : last_sum;
        total = holds ? acc_t(0) : total;
      }
      scalar_t* target = grad_x + (line + u) * length;
      if (line + u < count && index < packs) {
        store_pack(target + offset, result);
      }
      if (chunks) {
        // Lane 0 has the gradients before the chunk's first take-over.
        pending_sum[u] += __shfl_sync(kAllLanes, head, 0, lanes);
        __syncwarp();
        if (begin > 0 && lane == 0 && line + u < count) {
          target[pending_place[u]] = static_cast<scalar_t>(pending_sum[u]);
        }
        const int64_t element = index * V + 31 - __clz(taken | 1u);
        const int64_t own_place = kReverse ? length - 1 - element : element;
        const int32_t last_lane = begins == 0 ? 0 : 31 - __clz(begins);
        const acc_t sum_there = __shfl_sync(kAllLanes, last_sum, last_lane, lanes);
        const int64_t place_there = __shfl_sync(kAllLanes, own_place, last_lane, lanes);
        pending_sum[u] = begins == 0 ? pending_sum[u] : sum_there;
        pending_place[u] = begins == 0 ? pending_place[u] : place_there;
      }
    }
  }
}

template <typename scalar_t>
void launch_scan_backward(const scalar_t* x, const scalar_t* grad, scalar_t* grad_x,
                          const Lines& lines, bool reverse) {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  constexpr int kFull = kFullPack<scalar_t>;
  if (lines.inner > 1) {
    constexpr int kPack = kGradientPack<scalar_t>;
    const auto launch = [&](auto kernel, auto chunked_kernel, int32_t width) {
      const ColumnLaunch config(lines, width);
      (config.chunks ? chunked_kernel : kernel)<<<config.blocks, config.threads, 0, stream>>>(
          x, grad, grad_x, lines, reverse);
    };
    if (full_packs<scalar_t>(lines.inner, x, grad, grad_x)) {
      launch(column_scan_backward_kernel<scalar_t, kPack, false>,
             column_scan_backward_kernel<scalar_t, kPack, true>, kPack);
    } else {
      launch(column_scan_backward_kernel<scalar_t, 1, false>,
             column_scan_backward_kernel<scalar_t, 1, true>, 1);
    }
  } else {
    const auto launch = [&](auto kernel, int32_t width) {
      const int32_t lanes = lanes_for(lines.length / width);
      const uint32_t blocks = blocks_for(lines.outer, kScanThreads / lanes * kRowLinesBackward);
      kernel<<<blocks, kScanThreads, 0, stream>>>(x, grad, grad_x, lines.outer, lines.length,
                                                  lanes);
    };
    if (full_packs<scalar_t>(lines.length, x, grad, grad_x)) {
      launch(reverse ? row_scan_backward_kernel<scalar_t, kFull, true>
                     : row_scan_backward_kernel<scalar_t, kFull, false>,
             kFull);
    } else {
      launch(reverse ? row_scan_backward_kernel<scalar_t, 1, true>
                     : row_scan_backward_kernel<scalar_t, 1, false>,
             1);
    }
  }
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace d2ext
