// CUDA kernels of assemble_masks and its gradient.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>
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
// detections of its image among the `share` of its block. Both sums are written as parts, which a
// second step adds without atomics, so that the bits are the same every time: those of the
// prototypes to grad_cells (splits, B, h, w, k), those of the coefficients, over the tile, to
// partials (tiles, N, k), zero before.
// kFits: all channels are among the K in registers; else the block has K of them, and logits are
// summed from memory. kGroup: detections between two barriers.
template <typename scalar_t, typename acc_t, int K, bool kFits, int kGroup>
__global__ void __launch_bounds__(kTileCells)
    backward_kernel(MaskInputs<scalar_t, acc_t> in, bool vectors, const scalar_t* __restrict__ grad,
                    int32_t share, acc_t* __restrict__ grad_cells, acc_t* __restrict__ partials) {
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
  const int32_t windows = (in.channels + K - 1) / K;
  const int32_t window = static_cast<int32_t>(blockIdx.z) % windows * K;
  const int32_t split = static_cast<int32_t>(blockIdx.z) / windows;
  const int32_t end = min(in.detections, (split + 1) * share);
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

  for (int32_t first = split * share; first < end; first += kTileCells) {
    // The detections of this image whose boxes meet the tile, in order.
    const int32_t own = static_cast<int32_t>(threadIdx.x);
    const int32_t candidate = end - first > own ? first + own : -1;
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
  acc_t* target =
      grad_cells + window +
      ((static_cast<int64_t>(split) * in.images + image) * grid_cells + position) * in.channels;
#pragma unroll
  for (int c = 0; c < K; c += 4) {
    if (in.channels % 4 == 0 && window + c < in.channels) {
      *reinterpret_cast<Four<acc_t>*>(target + c) = {totals[c], totals[c + 1], totals[c + 2],
                                                     totals[c + 3]};
    } else {
#pragma unroll
      for (int i = c; i < c + 4; ++i) {
        if (window + i < in.channels) {
          target[i] = totals[i];
        }
      }
    }
  }
}

// Blocks that keep a GPU busy: few images have few tiles, so that their detections are shared out.
constexpr int32_t kWantedBlocks = 640;

template <typename scalar_t>
void launch_backward(const HeldInputs& held, const Tensor& grad, double padding, Tensor& grad_cells,
                     Tensor& partials) {
  using acc_t = at::opmath_type<scalar_t>;
  constexpr int32_t kChannels = 32;
  const auto in = held.view<scalar_t>(padding);
  const int32_t tiles = in.tiles_x() * in.tiles_y();
  const int32_t wanted = std::clamp(kWantedBlocks / tiles / in.images, 1, 8);
  const int32_t share = (in.detections + wanted - 1) / wanted;
  const int32_t splits = (in.detections + share - 1) / share;
  grad_cells =
      at::empty({splits, in.images, in.height, in.width, in.channels}, held.boxes.options());
  partials = at::zeros({tiles, in.detections, in.channels}, held.boxes.options());
  const dim3 grid(tiles, in.images, (in.channels + kChannels - 1) / kChannels * splits);
  const auto launch = [&](auto kernel) {
    kernel<<<grid, kTileCells, 0, c10::cuda::getCurrentCUDAStream()>>>(
        in, vectors_of_channels(held.prototypes, kChannels), grad.const_data_ptr<scalar_t>(), share,
        grad_cells.mutable_data_ptr<acc_t>(), partials.mutable_data_ptr<acc_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  };
  if constexpr (sizeof(acc_t) == sizeof(double)) {
    launch(backward_kernel<scalar_t, acc_t, kChannels, false, 8>);
  } else if (in.channels <= kChannels) {
    launch(backward_kernel<scalar_t, acc_t, kChannels, true, 16>);
  } else {
    launch(backward_kernel<scalar_t, acc_t, kChannels, false, 16>);
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
  Tensor grad_cells;
  Tensor partials;
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, prototypes.scalar_type(), "assemble_masks_backward_cuda",
      [&] { launch_backward<scalar_t>(held, dense_grad, padding, grad_cells, partials); });
  grad_prototypes.copy_(grad_cells.sum(0).view(prototypes.sizes()));
  return {grad_prototypes, at::empty_like(coefficients).copy_(partials.sum(0))};
}

}  // namespace

TORCH_LIBRARY_IMPL(d2ext, CUDA, m) {
  m.impl("assemble_masks", assemble_masks_cuda);
  m.impl("assemble_masks_backward", assemble_masks_backward_cuda);
}

}  // namespace d2ext
