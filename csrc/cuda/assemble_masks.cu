// CUDA kernels of assemble_masks and its gradient.
#include <ATen/Dispatch.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sum.h>
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

// A thread keeps one cell's K prototypes and their gradients in registers and goes through those of
// the `share` detections of its block that are of its image. It writes the sums of its cells to
// `cell_sums` (splits, B, h, w, k rounded up to K), and what the tile's cells add to the gradient
// of the coefficients to `coefficient_sums` (tiles, N, k), zero before. Summing these over splits
// and tiles in a second step, without atomics, gives the same bits every time. kFits: all channels
// are among the K in registers; else blocks choose K of them, and logits are summed from memory.
// kGroup: detections between two barriers.
template <typename scalar_t, typename acc_t, int K, bool kFits, int kGroup>
__global__ void __launch_bounds__(kTileCells, sizeof(acc_t) == 4 ? 3 : 1)
    backward_kernel(MaskInputs<scalar_t, acc_t> in, bool vectors, const scalar_t* __restrict__ grad,
                    int32_t splits, int32_t share, acc_t* __restrict__ cell_sums,
                    acc_t* __restrict__ coefficient_sums) {
  constexpr int kPitch = K + 1;  // odd: threads of a warp fall into different banks
  __shared__ acc_t cells[kTileCells * kPitch];
  __shared__ __align__(16) acc_t grad_logits[kGroup * kTileCells];
  __shared__ __align__(16) acc_t coefficients[kGroup * K];
  __shared__ int32_t members[kTileCells];
  __shared__ Range member_x[kTileCells];
  __shared__ Range member_y[kTileCells];
  __shared__ int32_t warp_counts[kTileCells / 32];

  const Tile tile(in, blockIdx.x, threadIdx.x, 1);
  const bool inside = tile.inside(in, 0);
  const int32_t y = tile.first_y;
  const int32_t image = blockIdx.y;
  const int32_t split = blockIdx.z % splits;
  const int32_t window = blockIdx.z / splits * K;
  const int32_t end = min(in.detections, (split + 1) * share);
  const int32_t lane = threadIdx.x % 32;
  const int32_t warp = threadIdx.x / 32;
  const int64_t grid_cells = static_cast<int64_t>(in.height) * in.width;
  const scalar_t* cell = in.cell(image, inside ? y : 0, inside ? tile.x : 0);
  const int64_t position = static_cast<int64_t>(y) * in.width + tile.x;

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
    cells[threadIdx.x * kPitch + c] = inside ? values[c] : acc_t(0);
  }

  for (int32_t first = split * share; first < end; first += kTileCells) {
    // The detections of this image whose boxes meet the tile, in order.
    const int32_t candidate = end - first > static_cast<int32_t>(threadIdx.x)
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
        if (j < count && inside && member_x[start + j].contains(tile.x) &&
            member_y[start + j].contains(y)) {
          above[j] = static_cast<acc_t>(grad[members[start + j] * grid_cells + position]);
        }
      }
      __syncthreads();
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        acc_t grad_logit = 0;
        if (j < count && inside && member_x[start + j].contains(tile.x) &&
            member_y[start + j].contains(y)) {
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
#pragma unroll 4
      for (int32_t i = 0; i < kTileCells; i += 4) {
        acc_t values_there[4];
#pragma unroll
        for (int u = 0; u < 4; ++u) {
          values_there[u] = cells[(i + u) * kPitch + channel];
        }
#pragma unroll
        for (int s = 0; s < kSums; ++s) {
          const Four<acc_t> gradients = *reinterpret_cast<const Four<acc_t>*>(
              grad_logits + (row + s * kStep) * kTileCells + i);
#pragma unroll
          for (int u = 0; u < 4; ++u) {
            sums[s] += values_there[u] * gradients.values[u];
          }
        }
      }
#pragma unroll
      for (int s = 0; s < kSums; ++s) {
        const int32_t j = row + s * kStep;
        if (j < count && window + channel < in.channels) {
          const int64_t n = static_cast<int64_t>(blockIdx.x) * in.detections + members[start + j];
          coefficient_sums[n * in.channels + window + channel] = sums[s];
        }
      }
      __syncthreads();
    }
  }

  if (inside) {
    acc_t* target = cell_sums +
                    ((static_cast<int64_t>(split) * in.images + image) * grid_cells + position) *
                        (gridDim.z / splits * K) +
                    window;
#pragma unroll
    for (int c = 0; c < K; c += 4) {
      reinterpret_cast<Four<acc_t>*>(target)[c / 4] = {totals[c], totals[c + 1], totals[c + 2],
                                                       totals[c + 3]};
    }
  }
}

// Blocks that a multiprocessor holds: one alone would wait most of the time, so the detections are
// split where the grid gives less.
constexpr int64_t kBlocksEach = 3;
// Channels of a thread.
constexpr int kChannels = 32;

std::tuple<Tensor, Tensor> assemble_masks_backward_cuda(
    const Tensor& grad, const Tensor& prototypes, const Tensor& coefficients, const Tensor& boxes,
    const std::optional<Tensor>& batch_index, double padding) {
  check_mask_inputs("assemble_masks_backward", prototypes, coefficients, boxes, batch_index,
                    padding);
  check_mask_gradient(grad, prototypes, coefficients);
  const c10::cuda::CUDAGuard guard(prototypes.device());
  const int64_t detections = coefficients.size(0);
  if (detections == 0) {
    return {at::zeros_like(prototypes), at::zeros_like(coefficients)};
  }
  const HeldInputs held(prototypes, coefficients, boxes, batch_index);
  const Tensor dense_grad = grad.contiguous();
  const auto sizes = held.prototypes.sizes();  // B, h, w, k
  const int64_t tiles = ((sizes[1] - 1) / kTileHeight + 1) * ((sizes[2] - 1) / kTileWidth + 1);
  const int64_t processors = at::cuda::getCurrentDeviceProperties()->multiProcessorCount;
  // Two halves at most, so that their sum is one addition.
  const bool halves = detections > 16 && 2 * tiles * sizes[0] <= kBlocksEach * processors;
  const int64_t share = halves ? ((detections - 1) / 32 + 1) * 16 : detections;
  const int64_t splits = (detections - 1) / share + 1;
  const int64_t windows = (sizes[3] - 1) / kChannels + 1;
  const auto options = held.boxes.options();
  const Tensor cell_sums =
      at::empty({splits, sizes[0], sizes[1], sizes[2], windows * kChannels}, options);
  const Tensor coefficient_sums = at::zeros({tiles, detections, sizes[3]}, options);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, prototypes.scalar_type(), "assemble_masks_backward_cuda", [&] {
        using acc_t = at::opmath_type<scalar_t>;
        // Two registers hold a float64: fewer detections at a time, and no prototypes.
        constexpr bool kSingle = sizeof(acc_t) == sizeof(float);
        constexpr int kGroup = kSingle ? 16 : 8;
        const auto in = held.view<scalar_t>(padding);
        const dim3 grid(static_cast<uint32_t>(tiles), static_cast<uint32_t>(sizes[0]),
                        static_cast<uint32_t>(windows * splits));
        auto* kernel = backward_kernel<scalar_t, acc_t, kChannels, false, kGroup>;
        if (kSingle && windows == 1) {
          kernel = backward_kernel<scalar_t, acc_t, kChannels, kSingle, kGroup>;
        }
        kernel<<<grid, kTileCells, 0, c10::cuda::getCurrentCUDAStream()>>>(
            in, vectors_of_channels(held.prototypes, kChannels),
            dense_grad.const_data_ptr<scalar_t>(), static_cast<int32_t>(splits),
            static_cast<int32_t>(share), cell_sums.mutable_data_ptr<acc_t>(),
            coefficient_sums.mutable_data_ptr<acc_t>());
        C10_CUDA_KERNEL_LAUNCH_CHECK();
      });
  Tensor grad_prototypes = at::empty_like(prototypes);
  const Tensor sums = cell_sums.narrow(4, 0, sizes[3]);
  Tensor batched = prototypes.dim() == 3 ? grad_prototypes.unsqueeze(0) : grad_prototypes;
  splits == 1 ? batched.copy_(sums[0]) : at::add_out(batched, sums[0], sums[1]);
  return {grad_prototypes, at::empty_like(coefficients).copy_(coefficient_sums.sum(0))};
}

}  // namespace

TORCH_LIBRARY_IMPL(d2ext, CUDA, m) {
  m.impl("assemble_masks", assemble_masks_cuda);
  m.impl("assemble_masks_backward", assemble_masks_backward_cuda);
}

}  // namespace d2ext
