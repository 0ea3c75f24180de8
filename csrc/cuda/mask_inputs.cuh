// Arguments of prototype mask assembly as the CUDA kernels read them.
#pragma once

#include <ATen/OpMathType.h>
#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <limits>
#include <optional>

#include "../geometry.h"
#include "../prototype_masks.h"

namespace d2ext {

// A block covers a tile of the prototype grid, one thread per cell.
constexpr int32_t kTileWidth = 16;
constexpr int32_t kTileHeight = 8;
constexpr int32_t kTileCells = kTileWidth * kTileHeight;

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
__device__ __forceinline__ double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }

// Moved 16 bytes at a time.
template <typename acc_t>
struct alignas(16) Four {
  acc_t values[4];
};

// scalar_t: element type; acc_t: arithmetic type.
template <typename scalar_t, typename acc_t>
struct MaskInputs {
  const scalar_t* prototypes;
  int64_t stride_image;  // strides in elements
  int64_t stride_y;
  int64_t stride_x;
  int64_t stride_channel;
  const scalar_t* coefficients;  // (N, k), contiguous
  const acc_t* boxes;            // (N, 4), contiguous
  const int64_t* batch_index;    // (N,), contiguous, or null: all 0
  int32_t images;
  int32_t height;
  int32_t width;
  int32_t channels;
  int32_t detections;
  acc_t padding;

  // Image of detection n; -1 if its index is out of range, so that nothing is read for it.
  __device__ __forceinline__ int32_t image(int32_t n) const {
    if (batch_index == nullptr) {
      return 0;
    }
    const int64_t index = batch_index[n];
    return index >= 0 && index < images ? static_cast<int32_t>(index) : -1;
  }

  __device__ __forceinline__ const scalar_t* cell(int32_t image, int32_t y, int32_t x) const {
    return prototypes + image * stride_image + y * stride_y + x * stride_x;
  }

  __host__ __device__ __forceinline__ int32_t tiles_x() const {
    return (width + kTileWidth - 1) / kTileWidth;
  }
  // For blocks whose threads have `cells` cells each.
  __host__ __device__ __forceinline__ int32_t tiles_y(int32_t cells) const {
    return (height - 1) / (kTileHeight * cells) + 1;
  }
};

// The tile of a block, and a thread's cells: they lie kTileHeight rows apart. Tiles reach beyond
// the grid.
struct Tile {
  Range xs;
  Range ys;
  int32_t x;
  int32_t first_y;

  template <typename Inputs>
  __device__ __forceinline__ Tile(const Inputs& in, int32_t tile, int32_t thread, int32_t cells) {
    const int32_t left = tile % in.tiles_x() * kTileWidth;
    const int32_t top = tile / in.tiles_x() * kTileHeight * cells;
    xs = {left, left + kTileWidth};
    ys = {top, top + kTileHeight * cells};
    x = left + thread % kTileWidth;
    first_y = top + thread / kTileWidth;
  }

  __device__ __forceinline__ int32_t y(int32_t u) const { return first_y + u * kTileHeight; }

  template <typename Inputs>
  __device__ __forceinline__ bool inside(const Inputs& in, int32_t u) const {
    return x < in.width && y(u) < in.height;
  }
};

// The K prototypes of a cell in registers; channels that do not exist are 0.
// vectors: the cell's channels are adjacent, K in number and aligned to 16 bytes.
template <int K, typename scalar_t, typename acc_t>
__device__ __forceinline__ void load_cell(const MaskInputs<scalar_t, acc_t>& in,
                                          const scalar_t* cell, bool vectors, acc_t (&values)[K]) {
  constexpr int kPerVector = 16 / sizeof(scalar_t);
  if (vectors) {
#pragma unroll
    for (int i = 0; i < K / kPerVector; ++i) {
      const uint4 bits = __ldg(reinterpret_cast<const uint4*>(cell) + i);
      const scalar_t* parts = reinterpret_cast<const scalar_t*>(&bits);
#pragma unroll
      for (int j = 0; j < kPerVector; ++j) {
        values[i * kPerVector + j] = static_cast<acc_t>(parts[j]);
      }
    }
  } else {
#pragma unroll
    for (int c = 0; c < K; ++c) {
      values[c] = c < in.channels ? static_cast<acc_t>(cell[c * in.stride_channel]) : acc_t(0);
    }
  }
}

template <int K, typename acc_t>
__device__ __forceinline__ acc_t dot(const acc_t (&values)[K], const acc_t* coefficients) {
  acc_t sums[4] = {};  // that do not wait for each other
#pragma unroll
  for (int c = 0; c < K; ++c) {
    sums[c % 4] += values[c] * coefficients[c];
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// The same for any number of channels, read from global memory.
template <typename scalar_t, typename acc_t>
__device__ acc_t dot_any(const MaskInputs<scalar_t, acc_t>& in, const scalar_t* cell, int32_t n) {
  const scalar_t* coefficients = in.coefficients + static_cast<int64_t>(n) * in.channels;
  acc_t sum = 0;
  for (int32_t c = 0; c < in.channels; ++c) {
    sum += static_cast<acc_t>(cell[c * in.stride_channel]) * static_cast<acc_t>(coefficients[c]);
  }
  return sum;
}

// Copies that the kernels read, which must outlive the launch's enqueueing.
struct HeldInputs {
  at::Tensor prototypes;  // (B, h, w, k), any strides
  at::Tensor coefficients;
  at::Tensor boxes;
  at::Tensor batch_index;  // may be undefined

  HeldInputs(const at::Tensor& prototypes_in, const at::Tensor& coefficients_in,
             const at::Tensor& boxes_in, const std::optional<at::Tensor>& batch_index_in)
      : prototypes(prototypes_in.dim() == 3 ? prototypes_in.unsqueeze(0) : prototypes_in),
        coefficients(coefficients_in.contiguous()),
        boxes(boxes_in.to(at::toOpMathType(prototypes_in.scalar_type())).contiguous()) {
    if (batch_index_in.has_value()) {
      batch_index = batch_index_in->contiguous();
    }
    D2EXT_CHECK_VALUE(
        coefficients.size(0) < std::numeric_limits<int32_t>::max() && prototypes.size(0) <= 65535,
        "mask assembly on a GPU: at most 2^31 - 2 detections and 65535 images, got ",
        coefficients.size(0), " and ", prototypes.size(0));
  }

  template <typename scalar_t>
  MaskInputs<scalar_t, at::opmath_type<scalar_t>> view(double padding) const {
    using acc_t = at::opmath_type<scalar_t>;
    MaskInputs<scalar_t, acc_t> in;
    in.prototypes = prototypes.const_data_ptr<scalar_t>();
    in.stride_image = prototypes.stride(0);
    in.stride_y = prototypes.stride(1);
    in.stride_x = prototypes.stride(2);
    in.stride_channel = prototypes.stride(3);
    in.coefficients = coefficients.const_data_ptr<scalar_t>();
    in.boxes = boxes.const_data_ptr<acc_t>();
    in.batch_index = batch_index.defined() ? batch_index.const_data_ptr<int64_t>() : nullptr;
    in.images = static_cast<int32_t>(prototypes.size(0));
    in.height = static_cast<int32_t>(prototypes.size(1));
    in.width = static_cast<int32_t>(prototypes.size(2));
    in.channels = static_cast<int32_t>(prototypes.size(3));
    in.detections = static_cast<int32_t>(coefficients.size(0));
    in.padding = static_cast<acc_t>(padding);
    return in;
  }
};

// Whether a cell's channels, K in number, can be moved 16 bytes at a time.
inline bool vectors_of_channels(const at::Tensor& cells, int64_t channels) {
  const int64_t bytes = cells.element_size();
  bool aligned = cells.size(3) == channels && cells.stride(3) == 1 &&
                 reinterpret_cast<uintptr_t>(cells.const_data_ptr()) % 16 == 0;
  for (int axis = 0; axis < 3; ++axis) {
    aligned = aligned && cells.stride(axis) * bytes % 16 == 0;
  }
  return aligned;
}

}  // namespace d2ext
