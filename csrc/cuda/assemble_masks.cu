// CUDA kernels of assemble_masks and its gradient.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <tuple>

#include "probabilities.cuh"

namespace d2ext {
namespace {

using at::Tensor;

Tensor assemble_masks_cuda(const Tensor& prototypes, const Tensor& coefficients,
                           const Tensor& boxes, const std::optional<Tensor>& batch_index,
                           double padding) {
  check_mask_inputs("assemble_masks", prototypes, coefficients, boxes, batch_index, padding);
  const c10::cuda::CUDAGuard guard(prototypes.device());
  const HeldInputs held(prototypes, coefficients, boxes, batch_index);
  Tensor masks = at::empty({coefficients.size(0), prototypes.size(-3), prototypes.size(-2)},
                           prototypes.options().memory_format(std::nullopt));
  if (masks.numel() == 0) {
    return masks;
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, prototypes.scalar_type(), "assemble_masks_cuda", [&] {
        // The output grid is the prototype grid, of which only the box matters.
        launch_probabilities<scalar_t, scalar_t, true>(
            held, padding, static_cast<int32_t>(prototypes.size(-3)),
            static_cast<int32_t>(prototypes.size(-2)), false, masks.mutable_data_ptr<scalar_t>());
      });
  return masks;
}

// A thread keeps one cell's K prototypes and their gradients in registers and goes through the
// detections of its image. What the block's cells add to the gradient of the coefficients is summed
// over the tile and written to `partials` (tiles, N, k), zero before; summing these over tiles in a
// second step, without atomics, gives the same bits every time.
// kFits: all channels are among the K in registers; else blockIdx.z chooses K of them, and logits
// are summed from memory. kGroup: detections between two barriers.
template <typename scalar_t, typename acc_t, int K, bool kFits, int kGroup>
__global__ void __launch_bounds__(kTileCells)
    backward_kernel(MaskInputs<scalar_t, acc_t> in, bool vectors, const scalar_t* __restrict__ grad,
                    MaskInputs<scalar_t, acc_t> out, scalar_t* __restrict__ grad_prototypes,
                    bool out_vectors, acc_t* __restrict__ partials) {
  constexpr int kPitch = K + 1;  // odd: threads of a warp fall into different banks
  __shared__ acc_t cells[kTileCells * kPitch];
  __shared__ __align__(16) acc_t grad_logits[kGroup * kTileCells];
  __shared__ __align__(16) acc_t coefficients[kGroup * K];
  __shared__ int32_t members[kTileCells];
  __shared__ Range member_x[kTileCells];
  __shared__ Range member_y[kTileCells];
  __shared__ int32_t warp_counts[kTileCells / 32];

  const Tile tile(in, blockIdx.x, threadIdx.x);
  const int32_t image = blockIdx.y;
  const int32_t window = blockIdx.z * K;
  const int32_t lane = threadIdx.x % 32;
  const int32_t warp = threadIdx.x / 32;
  const int64_t grid_cells = static_cast<int64_t>(in.height) * in.width;
  const scalar_t* cell = in.cell(image, tile.inside ? tile.y : 0, tile.inside ? tile.x : 0);
  const int64_t position = static_cast<int64_t>(tile.y) * in.width + tile.x;

  acc_t values[K];
  acc_t totals[K];
  if (kFits) {
    load_cell(in, cell, vectors, values);
  } else {
#pragma unroll
    for (int c = 0; c < K; ++c) {
      values[c] = window + c < in.channels
                      ? static_cast<acc_t>(cell[(window + c) * in.stride_channel])
                      : acc_t(0);
    }
  }
#pragma unroll
  for (int c = 0; c < K; ++c) {
    totals[c] = 0;
    // Cells beyond the grid have no gradient, but 0 x NaN would still be NaN.
    cells[threadIdx.x * kPitch + c] = tile.inside ? values[c] : acc_t(0);
  }

  for (int32_t first = 0; first < in.detections; first += kTileCells) {
    // The detections of this image whose boxes meet the tile, in order.
    const int32_t candidate = in.detections - first > static_cast<int32_t>(threadIdx.x)
                                  ? first + static_cast<int32_t>(threadIdx.x)
                                  : -1;
    Range xs;
    Range ys;
    bool related = candidate >= 0 && in.image(candidate) == image;
    if (related) {
      const acc_t* box = in.boxes + static_cast<int64_t>(candidate) * 4;
      xs = crop_range(box[0], box[2], in.width, in.padding);
      ys = crop_range(box[1], box[3], in.height, in.padding);
      related = !intersect(xs, tile.xs).empty() && !intersect(ys, tile.ys).empty();
    }
    const uint32_t votes = __ballot_sync(0xffffffffu, related);
    __syncthreads();
    if (lane == 0) {
      warp_counts[warp] = __popc(votes);
    }
    __syncthreads();
    int32_t before = __popc(votes & ((1u << lane) - 1));
    int32_t total = 0;
#pragma unroll
    for (int w = 0; w < kTileCells / 32; ++w) {
      before += w < warp ? warp_counts[w] : 0;
      total += warp_counts[w];
    }
    if (related) {
      members[before] = candidate;
      member_x[before] = xs;
      member_y[before] = ys;
    }
    __syncthreads();

    for (int32_t start = 0; start < total; start += kGroup) {
      const int32_t count = min(kGroup, total - start);
      for (int32_t i = threadIdx.x; i < count * K; i += kTileCells) {
        const int32_t c = window + i % K;
        coefficients[i] =
            c < in.channels
                ? static_cast<acc_t>(
                      in.coefficients[static_cast<int64_t>(members[start + i / K]) * in.channels +
                                      c])
                : acc_t(0);
      }
      // All loads of the group before their first use, so that they wait together.
      acc_t above[kGroup];
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        above[j] = 0;
        if (j < count && tile.inside && member_x[start + j].contains(tile.x) &&
            member_y[start + j].contains(tile.y)) {
          above[j] = static_cast<acc_t>(grad[members[start + j] * grid_cells + position]);
        }
      }
      __syncthreads();
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        acc_t grad_logit = 0;
        if (j < count && tile.inside && member_x[start + j].contains(tile.x) &&
            member_y[start + j].contains(tile.y)) {
          const acc_t* weights = coefficients + j * K;
          const acc_t logit = kFits ? dot(values, weights) : dot_any(in, cell, members[start + j]);
          const acc_t p = sigmoid(logit);
          grad_logit = above[j] * (p * (acc_t(1) - p));
#pragma unroll
          for (int c = 0; c < K; ++c) {
            totals[c] += grad_logit * weights[c];
          }
        }
        grad_logits[j * kTileCells + threadIdx.x] = grad_logit;
      }
      __syncthreads();
      // (count, K) = grad_logits (count, cells) x cells (cells, K)
      constexpr int kSums = kGroup * K / kTileCells;
      constexpr int kStep = kTileCells / K;
      const int32_t channel = threadIdx.x % K;
      const int32_t row = threadIdx.x / K;
      acc_t sums[kSums] = {};
#pragma unroll 8
      for (int32_t i = 0; i < kTileCells; ++i) {
        const acc_t value = cells[i * kPitch + channel];
#pragma unroll
        for (int s = 0; s < kSums; ++s) {
          sums[s] += value * grad_logits[(row + s * kStep) * kTileCells + i];
        }
      }
#pragma unroll
      for (int s = 0; s < kSums; ++s) {
        const int32_t j = row + s * kStep;
        if (j < count && window + channel < in.channels) {
          const int64_t n = static_cast<int64_t>(blockIdx.x) * in.detections + members[start + j];
          partials[n * in.channels + window + channel] = sums[s];
        }
      }
      __syncthreads();
    }
  }

  if (!tile.inside) {
    return;
  }
  scalar_t* target = grad_prototypes + (out.cell(image, tile.y, tile.x) - out.prototypes) +
                     window * out.stride_channel;
  if (out_vectors) {
    constexpr int kPerVector = 16 / sizeof(scalar_t);
#pragma unroll
    for (int i = 0; i < K / kPerVector; ++i) {
      __align__(16) scalar_t parts[kPerVector];
#pragma unroll
      for (int j = 0; j < kPerVector; ++j) {
        parts[j] = static_cast<scalar_t>(totals[i * kPerVector + j]);
      }
      reinterpret_cast<uint4*>(target)[i] = *reinterpret_cast<const uint4*>(parts);
    }
  } else {
#pragma unroll
    for (int c = 0; c < K; ++c) {
      if (window + c < in.channels) {
        target[c * out.stride_channel] = static_cast<scalar_t>(totals[c]);
      }
    }
  }
}

template <typename scalar_t>
void launch_backward(const HeldInputs& held, const Tensor& grad, Tensor& grad_prototypes,
                     Tensor& partials, double padding) {
  using acc_t = at::opmath_type<scalar_t>;
  const auto in = held.view<scalar_t>(padding);
  HeldInputs held_out = held;
  held_out.prototypes = grad_prototypes;
  const auto out = held_out.view<scalar_t>(padding);
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto launch = [&](auto kernel, int32_t channels) {
    const dim3 grid(static_cast<uint32_t>(in.tiles_x()) * in.tiles_y(), in.images,
                    (in.channels + channels - 1) / channels);
    kernel<<<grid, kTileCells, 0, stream>>>(
        in, vectors_of_channels(held.prototypes, channels), grad.const_data_ptr<scalar_t>(), out,
        grad_prototypes.mutable_data_ptr<scalar_t>(),
        vectors_of_channels(grad_prototypes, channels), partials.mutable_data_ptr<acc_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  };
  if constexpr (sizeof(acc_t) == sizeof(float)) {
    if (in.channels <= 32) {
      launch(backward_kernel<scalar_t, acc_t, 32, true, 16>, 32);
    } else {
      launch(backward_kernel<scalar_t, acc_t, 32, false, 16>, 32);
    }
  } else {
    launch(backward_kernel<scalar_t, acc_t, 32, false, 8>, 32);
  }
}

std::tuple<Tensor, Tensor> assemble_masks_backward_cuda(
    const Tensor& grad, const Tensor& prototypes, const Tensor& coefficients, const Tensor& boxes,
    const std::optional<Tensor>& batch_index, double padding) {
  check_mask_inputs("assemble_masks_backward", prototypes, coefficients, boxes, batch_index,
                    padding);
  check_mask_gradient(grad, prototypes, coefficients);
  const c10::cuda::CUDAGuard guard(prototypes.device());
  Tensor grad_prototypes = at::empty_like(prototypes);
  if (coefficients.size(0) == 0) {
    return {grad_prototypes.zero_(), at::zeros_like(coefficients)};
  }
  const HeldInputs held(prototypes, coefficients, boxes, batch_index);
  const Tensor dense_grad = grad.contiguous();
  Tensor batched = prototypes.dim() == 3 ? grad_prototypes.unsqueeze(0) : grad_prototypes;
  const int64_t tiles = ((prototypes.size(-3) + kTileHeight - 1) / kTileHeight) *
                        ((prototypes.size(-2) + kTileWidth - 1) / kTileWidth);
  Tensor partials =
      at::zeros({tiles, coefficients.size(0), coefficients.size(1)}, held.boxes.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, prototypes.scalar_type(), "assemble_masks_backward_cuda",
      [&] { launch_backward<scalar_t>(held, dense_grad, batched, partials, padding); });
  return {grad_prototypes, at::empty_like(coefficients).copy_(partials.sum(0))};
}

}  // namespace

TORCH_LIBRARY_IMPL(d2ext, CUDA, m) {
  m.impl("assemble_masks", assemble_masks_cuda);
  m.impl("assemble_masks_backward", assemble_masks_backward_cuda);
}

}  // namespace d2ext
