// sigmoid(prototypes . coefficients) on the prototype grid, inside each detection's box.
#pragma once

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>

#include "mask_inputs.cuh"

namespace d2ext {

// Detections that a block goes through with the same prototypes in registers.
constexpr int kDetectionsPerBlock = 16;

// A thread keeps the prototypes of kCells cells in registers (K of each; K = 0: any number, from
// memory) and goes through detections, whose coefficients are in shared memory: each that is read
// from there serves all its cells.
// out: (N, h, w). kFill: cells outside the box become 0; else they are not written, and the cells
// needed are those that an output_height x output_width mask interpolates between.
template <typename scalar_t, typename acc_t, typename out_t, int K, int kCells, bool kFill>
__global__ void __launch_bounds__(kTileCells)
    probability_kernel(MaskInputs<scalar_t, acc_t> in, bool vectors, int32_t output_height,
                       int32_t output_width, bool crop_after, out_t* __restrict__ out) {
  constexpr int kColumns = K > 0 ? K : 1;
  __shared__ __align__(16) acc_t coefficients[kDetectionsPerBlock * kColumns];
  __shared__ Range region_x[kDetectionsPerBlock];
  __shared__ Range region_y[kDetectionsPerBlock];
  __shared__ int32_t images[kDetectionsPerBlock];

  const Tile tile(in, blockIdx.x, threadIdx.x, kCells);
  const int64_t cells = static_cast<int64_t>(in.height) * in.width;
  acc_t values[kCells][kColumns];
  int32_t loaded = -1;

  for (int64_t first = static_cast<int64_t>(blockIdx.y) * kDetectionsPerBlock;
       first < in.detections; first += static_cast<int64_t>(gridDim.y) * kDetectionsPerBlock) {
    const int32_t count =
        static_cast<int32_t>(min(static_cast<int64_t>(kDetectionsPerBlock), in.detections - first));
    __syncthreads();
    if (K > 0) {
      for (int32_t i = threadIdx.x; i < count * kColumns; i += kTileCells) {
        const int32_t c = i % kColumns;
        coefficients[i] =
            c < in.channels
                ? static_cast<acc_t>(in.coefficients[(first + i / kColumns) * in.channels + c])
                : acc_t(0);
      }
    }
    if (threadIdx.x < count) {
      const int32_t n = static_cast<int32_t>(first) + threadIdx.x;
      const MaskRegion region =
          mask_region(in.boxes + static_cast<int64_t>(n) * 4, in.height, in.width, output_height,
                      output_width, crop_after, in.padding);
      const int32_t image = in.image(n);
      images[threadIdx.x] = image;
      region_x[threadIdx.x] = image < 0 ? Range() : region.cell_x;
      region_y[threadIdx.x] = region.cell_y;
    }
    __syncthreads();

    for (int32_t j = 0; j < count; ++j) {
      const Range xs = region_x[j];
      const Range ys = region_y[j];
      const bool meets = !intersect(xs, tile.xs).empty() && !intersect(ys, tile.ys).empty();
      if (!meets && !kFill) {
        continue;
      }
      acc_t logits[kCells] = {};
      if (K > 0 && meets) {
        if (images[j] != loaded) {
          loaded = images[j];
#pragma unroll
          for (int u = 0; u < kCells; ++u) {
            if (tile.inside(in, u)) {
              load_cell(in, in.cell(loaded, tile.y(u), tile.x), vectors, values[u]);
            }
          }
        }
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const acc_t weight = coefficients[j * kColumns + c];
#pragma unroll
          for (int u = 0; u < kCells; ++u) {
            logits[u] += values[u][c] * weight;
          }
        }
      }
#pragma unroll
      for (int u = 0; u < kCells; ++u) {
        if (!tile.inside(in, u)) {
          continue;
        }
        out_t* target =
            out + (first + j) * cells + static_cast<int64_t>(tile.y(u)) * in.width + tile.x;
        if (meets && xs.contains(tile.x) && ys.contains(tile.y(u))) {
          const int32_t n = static_cast<int32_t>(first) + j;
          const acc_t logit =
              K > 0 ? logits[u] : dot_any(in, in.cell(images[j], tile.y(u), tile.x), n);
          *target = static_cast<out_t>(sigmoid(logit));
        } else if (kFill) {
          *target = static_cast<out_t>(acc_t(0));
        }
      }
    }
  }
}

template <typename scalar_t, typename out_t, bool kFill>
void launch_probabilities(const HeldInputs& held, double padding, int32_t output_height,
                          int32_t output_width, bool crop_after, out_t* out) {
  using acc_t = at::opmath_type<scalar_t>;
  const auto in = held.view<scalar_t>(padding);
  const int32_t chunks = (in.detections - 1) / kDetectionsPerBlock + 1;
  const auto launch = [&](auto kernel, int32_t cells) {
    const dim3 grid(static_cast<uint32_t>(in.tiles_x()) * in.tiles_y(cells),
                    std::min(chunks, 65535));
    kernel<<<grid, kTileCells, 0, c10::cuda::getCurrentCUDAStream()>>>(
        in, vectors_of_channels(held.prototypes, 32), output_height, output_width, crop_after, out);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  };
  // Two registers hold a float64, so that 32 of them would leave too few.
  constexpr int K = sizeof(acc_t) == sizeof(float) ? 32 : 0;
  if (K > 0 && in.channels <= K) {
    launch(probability_kernel<scalar_t, acc_t, out_t, K, 2, kFill>, 2);
  } else {
    launch(probability_kernel<scalar_t, acc_t, out_t, 0, 1, kFill>, 1);
  }
}

}  // namespace d2ext
