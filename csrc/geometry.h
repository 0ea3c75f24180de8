// The cells of a detection's box on the prototype grid and on the output grid, and the grid cells
// that an output pixel is interpolated from. Shared by the CPU and the CUDA kernels, so that both
// agree in every cell.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace d2ext {

// Half-open interval of indices; empty if end <= begin.
struct Range {
  int32_t begin = 0;
  int32_t end = 0;

  D2EXT_HOST_DEVICE int32_t size() const { return end > begin ? end - begin : 0; }
  D2EXT_HOST_DEVICE bool empty() const { return end <= begin; }
  D2EXT_HOST_DEVICE bool contains(int32_t i) const { return i >= begin && i < end; }
};

D2EXT_HOST_DEVICE Range intersect(Range a, Range b) {
  return {a.begin > b.begin ? a.begin : b.begin, a.end < b.end ? a.end : b.end};
}

// a * b, rounded: never contracted with a following addition into one multiply-add, which would
// shift a crop limit that lies on a cell, unlike in the plain PyTorch path.
template <typename T>
D2EXT_HOST_DEVICE T rounded_product(T a, T b) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == sizeof(float)) {
    return __fmul_rn(a, b);
  } else {
    return __dmul_rn(a, b);
  }
#else
  volatile T product = a * b;
  return product;
#endif
}

// Cells between two relative sides of a box: the sides times the grid's size, ordered, widened by
// `padding` cells, clamped to [0, size]; cell i is inside iff low <= i < high. With a NaN no cell
// is.
template <typename T>
D2EXT_HOST_DEVICE Range crop_range(T side_a, T side_b, int32_t size, T padding) {
  const T a = rounded_product(side_a, static_cast<T>(size));
  const T b = rounded_product(side_b, static_cast<T>(size));
  T low = (a < b ? a : b) - padding;
  T high = (a < b ? b : a) + padding;
  if (a != a || b != b || low != low || high != high) {  // inf - inf, too
    return {};
  }
  const T limit = static_cast<T>(size);
  low = low < T(0) ? T(0) : (low > limit ? limit : low);
  high = high < T(0) ? T(0) : (high > limit ? limit : high);
  return {static_cast<int32_t>(ceil(low)), static_cast<int32_t>(ceil(high))};
}

// The two cells that an output index lies between, and their weights: the rule of
// torch.nn.functional.interpolate(mode="bilinear", align_corners=False) along one axis.
template <typename T>
struct Tap {
  int32_t low;
  int32_t high;
  T low_weight;
  T high_weight;
};

template <typename T>
D2EXT_HOST_DEVICE Tap<T> source_tap(int32_t output_index, T scale, int32_t cells) {
  T source = scale * (static_cast<T>(output_index) + T(0.5)) - T(0.5);
  source = source < T(0) ? T(0) : source;
  int32_t low = static_cast<int32_t>(source);
  low = low < cells - 1 ? low : cells - 1;
  T high_weight = source - static_cast<T>(low);
  high_weight = high_weight > T(1) ? T(1) : high_weight;
  // A neighbour of weight 0 is not read: it may be NaN.
  const bool between = high_weight > T(0) && low < cells - 1;
  return {low, between ? low + 1 : low, T(1) - high_weight, high_weight};
}

// Output indices that read at least one of `cells`; may be wider by a few at either end.
D2EXT_HOST_DEVICE Range touched_outputs(Range cells, int32_t grid, int32_t output) {
  if (cells.empty()) {
    return {};
  }
  const double ratio = static_cast<double>(output) / static_cast<double>(grid);
  const double low = floor((cells.begin - 0.5) * ratio - 0.5) - 1;
  const double high = ceil((cells.end + 0.5) * ratio - 0.5) + 1;
  // Left of the first cell's centre the source is clamped to cell 0, whose upper neighbour is 1.
  return {cells.begin <= 1 || low < 0 ? 0 : static_cast<int32_t>(low),
          high > output ? output : static_cast<int32_t>(high)};
}

// Cells that the output indices of a range read.
template <typename T>
D2EXT_HOST_DEVICE Range read_cells(Range outputs, int32_t grid, int32_t output) {
  if (outputs.empty()) {
    return {};
  }
  const T scale = static_cast<T>(grid) / static_cast<T>(output);
  return {source_tap(outputs.begin, scale, grid).low,
          source_tap(outputs.end - 1, scale, grid).high + 1};
}

// What one detection computes: probabilities on `cell_x` x `cell_y` of the prototype grid (every
// other cell counts as 0) and output pixels on `out_x` x `out_y` (every other pixel is background).
struct MaskRegion {
  Range cell_x;
  Range cell_y;
  Range out_x;
  Range out_y;

  D2EXT_HOST_DEVICE bool empty() const { return out_x.empty() || out_y.empty(); }
};

// box: 4 values (x1, y1, x2, y2) relative to the image.
template <typename T>
D2EXT_HOST_DEVICE MaskRegion mask_region(const T* box, int32_t grid_height, int32_t grid_width,
                                         int32_t out_height, int32_t out_width, bool crop_after,
                                         T padding) {
  MaskRegion region;
  if (crop_after) {
    region.out_x = crop_range(box[0], box[2], out_width, padding);
    region.out_y = crop_range(box[1], box[3], out_height, padding);
    region.cell_x = read_cells<T>(region.out_x, grid_width, out_width);
    region.cell_y = read_cells<T>(region.out_y, grid_height, out_height);
  } else {
    region.cell_x = crop_range(box[0], box[2], grid_width, padding);
    region.cell_y = crop_range(box[1], box[3], grid_height, padding);
    region.out_x = touched_outputs(region.cell_x, grid_width, out_width);
    region.out_y = touched_outputs(region.cell_y, grid_height, out_height);
  }
  return region;
}

}  // namespace d2ext
