// sigmoid(prototypes . coefficients) on the prototype grid, inside each detection's box.
#pragma once

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>

#include "mask_inputs.cuh"

namespace d2ext {

// Detections that a block goes through with the same prototypes in registers.
#ifndef D2EXT_DETECTIONS_PER_BLOCK
#define D2EXT_DETECTIONS_PER_BLOCK 16
#endif
constexpr int kDetectionsPerBlock = D2EXT_DETECTIONS_PER_BLOCK;

// A thread keeps the prototypes of one cell in registers (K of them; K = 0: any number, from
// memory) and goes through detections, whose coefficients are in shared memory.
// out: (N, h, w). kFill: cells outside the box become 0; else they are not written, and the cells
// needed are those that an output_height x output_width mask interpolates between.
template <typename scalar_t, typename acc_t, typename out_t, int K, bool kFill>
__global__ void __launch_bounds__(kTileCells)
    probability_kernel(MaskInputs<scalar_t, acc_t> in, bool vectors, int32_t output_height,
                       int32_t output_width, bool crop_after, out_t* __restrict__ out) {
  constexpr int kColumns = K > 0 ? K : 1;
  __shared__ __align__(16) acc_t coefficients[kDetectionsPerBlock * kColumns];
  __shared__ Range region_x[kDetectionsPerBlock];
  __shared__ Range region_y[kDetectionsPerBlock];
  __shared__ int32_t images[kDetectionsPerBlock];

  const Tile tile(in, blockIdx.x, threadIdx.x);
  const int64_t cells = static_cast<int64_t>(in.height) * in.width;
  out_t* target = out + static_cast<int64_t>(tile.y) * in.width + tile.x;
  acc_t values[kColumns];
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
      images[threadIdx.x] = in.image(n);
      region_x[threadIdx.x] = region.cell_x;
      region_y[threadIdx.x] = region.cell_y;
    }
    __syncthreads();

    for (int32_t j = 0; j < count; ++j) {
      const Range xs = region_x[j];
      const Range ys = region_y[j];
      const int32_t image = images[j];
      const int64_t offset = (first + j) * cells;
      if (image < 0 || intersect(xs, tile.xs).empty() || intersect(ys, tile.ys).empty()) {
        if (kFill && tile.inside) {
          target[offset] = static_cast<out_t>(acc_t(0));
        }
        continue;
      }
      if (K > 0 && image != loaded) {
        loaded = image;
        if (tile.inside) {
          load_cell(in, in.cell(image, tile.y, tile.x), vectors, values);
        }
      }
      if (tile.inside && xs.contains(tile.x) && ys.contains(tile.y)) {
        const acc_t logit =
            K > 0 ? dot(values, coefficients + j * kColumns)
                  : dot_any(in, in.cell(image, tile.y, tile.x), static_cast<int32_t>(first) + j);
        target[offset] = static_cast<out_t>(sigmoid(logit));
      } else if (kFill && tile.inside) {
        target[offset] = static_cast<out_t>(acc_t(0));
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
  const dim3 grid(static_cast<uint32_t>(in.tiles_x()) * in.tiles_y(), std::min(chunks, 65535));
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto launch = [&](auto kernel, int64_t channels) {
    kernel<<<grid, kTileCells, 0, stream>>>(in, vectors_of_channels(held.prototypes, channels),
                                            output_height, output_width, crop_after, out);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  };
  // Two registers hold a float64, so that 32 of them would leave too few.
  constexpr bool kRegisters = sizeof(acc_t) == sizeof(float);
  if (kRegisters && in.channels <= 32) {
    launch(probability_kernel < scalar_t, acc_t, out_t, kRegisters ? 32 : 0, kFill >, 32);
  } else {
    launch(probability_kernel<scalar_t, acc_t, out_t, 0, kFill>, 0);
  }
}

}  // namespace d2ext
