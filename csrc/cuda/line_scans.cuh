// Running maxima along lines of a dense map. Every element is read once and written once.
//
// Column scans: lines lie across the memory (inner > 1). A thread holds a pack of adjacent lines,
// kRows elements of each, in registers; threads of a block that continue each other's lines
// exchange their maxima (and sums of gradients) through shared memory. Row scans: lines are
// adjacent in memory (inner = 1). `lanes` threads of a warp hold a line, a pack each, and exchange
// through shuffles. Lines longer than a block or a warp takes at once are gone through in chunks,
// in scan order.
#pragma once

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <cstdint>

#include "../corner_pool.h"
#include "packs.cuh"

namespace d2ext {

constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr int32_t kScanThreads = 256;
// A block of a column scan: adjacent packs (16 of 16 bytes, two whole cache lines), and threads.
constexpr int32_t kColumnPacks = 16;
constexpr int32_t kColumnPacksMost = 128;  // where lines are short
constexpr int32_t kColumnThreads = 512;
constexpr int32_t kColumnRows = 8;
constexpr int32_t kRowLines = 4;

// Where the lines of a thread lie in the memory.
struct LineAddress {
  int64_t first;  // of the element that the scan meets first
  int64_t step;   // to the next one in scan order
};

__device__ __forceinline__ LineAddress line_address(const Lines& lines, int64_t packs,
                                                    int32_t width, int64_t column, bool reverse) {
  // Most maps are small enough for a division in 32 bits, several times faster.
  const int64_t outer =
      packs * lines.outer <= INT32_MAX
          ? static_cast<int64_t>(static_cast<uint32_t>(column) / static_cast<uint32_t>(packs))
          : column / packs;
  const int64_t begin = outer * lines.length * lines.inner + (column - outer * packs) * width;
  return {begin + (reverse ? (lines.length - 1) * lines.inner : 0),
          reverse ? -lines.inner : lines.inner};
}

// Rows of a thread, given how many there are from its first on.
__device__ __forceinline__ int32_t rows_left(int64_t left) {
  return static_cast<int32_t>(max(int64_t{0}, min(int64_t{kColumnRows}, left)));
}

// out = running maximum. Two blocks of the most threads share a multiprocessor, so that one loads
// while the other stores.
template <typename scalar_t, int V>
__global__ void __launch_bounds__(kColumnThreads, 2)
    column_scan_kernel(const scalar_t* __restrict__ x, scalar_t* __restrict__ out, Lines lines,
                       bool reverse) {
  using P = Pack<scalar_t, V>;
  __shared__ P totals[kColumnThreads];
  const int32_t tx = threadIdx.x;
  const int32_t ty = threadIdx.y;
  const int64_t packs = lines.inner / V;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * blockDim.x + tx;
  const bool inside = column < packs * lines.outer;
  const LineAddress at = line_address(lines, packs, V, inside ? column : 0, reverse);
  const int32_t chunk = blockDim.y * kColumnRows;
  P carry;
  carry.fill(lowest<typename P::acc_t>());

  for (int64_t begin = 0; begin < lines.length; begin += chunk) {
    const int64_t row = begin + ty * kColumnRows;
    const int32_t rows = inside ? rows_left(lines.length - row) : 0;
    const int64_t start = at.first + row * at.step;
    P parts[kColumnRows];
    const scalar_t* source = x + start;
#pragma unroll
    for (int r = 0; r < kColumnRows; ++r) {
      parts[r].fill(lowest<typename P::acc_t>());
      if (r < rows) {
        parts[r] = load_pack<scalar_t, V>(source);
      }
      source += at.step;
    }
    P total = parts[0];
#pragma unroll
    for (int r = 1; r < kColumnRows; ++r) {
      total = maximum(total, parts[r]);
    }
    totals[ty * blockDim.x + tx] = total;
    __syncthreads();
    P running = carry;
    for (int32_t j = 0; j < ty; ++j) {
      running = maximum(running, totals[j * blockDim.x + tx]);
    }
    if (begin + chunk < lines.length) {
      carry = running;
      for (int32_t j = ty; j < blockDim.y; ++j) {
        carry = maximum(carry, totals[j * blockDim.x + tx]);
      }
      __syncthreads();
    }
    scalar_t* target = out + start;
#pragma unroll
    for (int r = 0; r < kColumnRows; ++r) {
      running = maximum(running, parts[r]);
      if (r < rows) {
        store_pack(target, running);
      }
      target += at.step;
    }
  }
}

// What comes before each lane: the running maximum over all lanes before it. `own` becomes the
// maximum up to and with each lane.
template <int N, typename acc_t>
__device__ __forceinline__ void scan_lanes(acc_t (&own)[N], acc_t (&before)[N], int32_t lanes,
                                           int32_t lane) {
  // A lane that has none `step` before it gets its own value, which changes nothing.
  for (int32_t step = 1; step < lanes; step *= 2) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      own[n] = maximum(own[n], __shfl_up_sync(kAllLanes, own[n], step, lanes));
    }
  }
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const acc_t other = __shfl_up_sync(kAllLanes, own[n], 1, lanes);
    before[n] = lane == 0 ? lowest<acc_t>() : other;
  }
}

// out = running maximum.
template <typename scalar_t, int V, bool kReverse>
__global__ void __launch_bounds__(kScanThreads)
    row_scan_kernel(const scalar_t* __restrict__ x, scalar_t* __restrict__ out, int64_t count,
                    int64_t length, int32_t lanes) {
  using P = Pack<scalar_t, V>;
  using acc_t = typename P::acc_t;
  const int32_t lane = threadIdx.x % lanes;
  const int64_t group = (static_cast<int64_t>(blockIdx.x) * kScanThreads + threadIdx.x) / lanes;
  const int64_t line = group * kRowLines;
  const int64_t packs = length / V;
  acc_t carry[kRowLines];
#pragma unroll
  for (int u = 0; u < kRowLines; ++u) {
    carry[u] = lowest<acc_t>();
  }

  for (int64_t begin = 0; begin < packs; begin += lanes) {
    const int64_t index = begin + lane;
    const int64_t offset = (kReverse ? packs - 1 - index : index) * V;
    P parts[kRowLines];
    acc_t totals[kRowLines];
    acc_t before[kRowLines];
#pragma unroll
    for (int u = 0; u < kRowLines; ++u) {
      if (line + u < count && index < packs) {
        parts[u] = load_pack<scalar_t, V>(x + (line + u) * length + offset);
      } else {
        parts[u].fill(lowest<acc_t>());
      }
    }
#pragma unroll
    for (int u = 0; u < kRowLines; ++u) {
      totals[u] = parts[u][0];
#pragma unroll
      for (int k = 1; k < V; ++k) {
        totals[u] = maximum(totals[u], parts[u][k]);
      }
    }
    scan_lanes(totals, before, lanes, lane);
#pragma unroll
    for (int u = 0; u < kRowLines; ++u) {
      acc_t running = maximum(carry[u], before[u]);
      if (begin + lanes < packs) {
        carry[u] = maximum(carry[u], __shfl_sync(kAllLanes, totals[u], lanes - 1, lanes));
      }
      P result;
      result.fill(0);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const int place = kReverse ? V - 1 - k : k;
        running = maximum(running, parts[u][place]);
        result.set(place, running);
      }
      if (line + u < count && index < packs) {
        store_pack(out + (line + u) * length + offset, result);
      }
    }
  }
}

// ---------------------------------------------------------------- launches

inline uint32_t blocks_for(int64_t count, int64_t share) {
  const int64_t blocks = (count + share - 1) / share;
  D2EXT_CHECK_VALUE(blocks <= INT32_MAX, "corner pooling: a map of ", count,
                    " packs or lines is too large for a GPU");
  return static_cast<uint32_t>(blocks);
}

struct ColumnLaunch {
  dim3 blocks;
  dim3 threads;
  bool chunks;

  ColumnLaunch(const Lines& lines, int32_t width) {
    const int64_t wanted = (lines.length + kColumnRows - 1) / kColumnRows;
    const int32_t ty =
        static_cast<int32_t>(std::min<int64_t>(wanted, kColumnThreads / kColumnPacks));
    int32_t tx = kColumnPacks;
    while (tx * ty * 2 <= kScanThreads && tx < kColumnPacksMost) {
      tx *= 2;
    }
    threads = dim3(tx, ty);
    blocks = dim3(blocks_for(lines.outer * (lines.inner / width), tx));
    chunks = wanted > ty;
  }
};

// Threads to a line: of 8, 16 and 32 the number that leaves the fewest without a pack.
inline int32_t lanes_for(int64_t packs) {
  int32_t best = 32;
  for (const int32_t lanes : {16, 8}) {
    const auto covered = [&](int32_t n) { return (packs + n - 1) / n * n; };
    best = covered(lanes) < covered(best) ? lanes : best;
  }
  return best;
}

// x and out: dense, of one layout.
template <typename scalar_t>
void launch_scan(const scalar_t* x, scalar_t* out, const Lines& lines, bool reverse) {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  constexpr int kFull = kFullPack<scalar_t>;
  if (lines.inner > 1) {
    const auto launch = [&](auto kernel, int32_t width) {
      const ColumnLaunch config(lines, width);
      kernel<<<config.blocks, config.threads, 0, stream>>>(x, out, lines, reverse);
    };
    if (full_packs<scalar_t>(lines.inner, x, out)) {
      launch(column_scan_kernel<scalar_t, kFull>, kFull);
    } else {
      launch(column_scan_kernel<scalar_t, 1>, 1);
    }
  } else {
    const auto launch = [&](auto kernel, int32_t width) {
      const int32_t lanes = lanes_for(lines.length / width);
      const uint32_t blocks = blocks_for(lines.outer, kScanThreads / lanes * kRowLines);
      kernel<<<blocks, kScanThreads, 0, stream>>>(x, out, lines.outer, lines.length, lanes);
    };
    if (full_packs<scalar_t>(lines.length, x, out)) {
      launch(reverse ? row_scan_kernel<scalar_t, kFull, true>
                     : row_scan_kernel<scalar_t, kFull, false>,
             kFull);
    } else {
      launch(reverse ? row_scan_kernel<scalar_t, 1, true> : row_scan_kernel<scalar_t, 1, false>, 1);
    }
  }
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace d2ext
