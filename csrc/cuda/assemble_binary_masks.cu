// CUDA kernels of assemble_binary_masks: probabilities on the prototype grid, which stay in the L2
// cache, then interpolation, threshold and output in one pass.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "probabilities.cuh"

namespace d2ext {
namespace {

using at::Tensor;

constexpr int32_t kThreads = 256;
constexpr int32_t kWarps = kThreads / 32;
// Output rows of a block, and of them those that a warp goes down with the same columns.
constexpr int32_t kBlockRows = 32;
constexpr int32_t kWarpRows = 8;
// Pixels of a lane, one word.
constexpr int32_t kLanePixels = 4;
// Columns of a row that a warp writes. Its first lane writes none: words of global memory begin
// anywhere between a lane's pixels, so each takes some of the lane to its left.
constexpr int32_t kSegment = 31 * kLanePixels;
constexpr uint32_t kVectorBytes = sizeof(uint4);

// A warp writes `length` times the byte that `vector` repeats.
__device__ __forceinline__ void fill_row(uint8_t* target, int32_t length, uint4 vector,
                                         int32_t lane) {
  const uint32_t misaligned = reinterpret_cast<uintptr_t>(target) % kVectorBytes;
  const int32_t head =
      min(length, static_cast<int32_t>((kVectorBytes - misaligned) % kVectorBytes));
  const int32_t vectors = (length - head) / kVectorBytes;
  const int32_t tail = head + vectors * kVectorBytes;
  for (int32_t i = lane; i < vectors; i += 32) {
    __stcs(reinterpret_cast<uint4*>(target + head) + i, vector);
  }
  if (lane < head) {
    target[lane] = static_cast<uint8_t>(vector.x);
  }
  if (tail + lane < length) {
    target[tail + lane] = static_cast<uint8_t>(vector.x);
  }
}

template <typename acc_t>
struct BinaryArguments {
  const acc_t* probabilities;  // (N, h, w), written inside the region of each detection only
  const acc_t* boxes;
  const int64_t* batch_index;
  int32_t images;
  int32_t detections;
  int32_t grid_height;
  int32_t grid_width;
  int32_t height;
  int32_t width;
  int32_t segments;  // of a row
  acc_t threshold;
  acc_t padding;
  bool crop_after;
  uint8_t* out;  // (N, H, W)
};

// A lane's four output columns: the grid cells that each lies between, and their weights.
template <typename acc_t>
struct LaneColumns {
  int32_t low[kLanePixels];  // -1: a cell that counts as 0
  int32_t high[kLanePixels];
  acc_t low_weight[kLanePixels];
  acc_t high_weight[kLanePixels];

  // outside: what pixels beyond `columns` are interpolated to, 0 or NaN.
  __device__ __forceinline__ LaneColumns(int32_t first, Range columns, Range cells, acc_t scale,
                                         int32_t grid_width, acc_t outside) {
#pragma unroll
    for (int32_t i = 0; i < kLanePixels; ++i) {
      const bool inside = columns.contains(first + i);
      const Tap<acc_t> tap = source_tap(first + i, scale, grid_width);
      low[i] = inside && cells.contains(tap.low) ? tap.low : -1;
      high[i] = inside && cells.contains(tap.high) ? tap.high : -1;
      low_weight[i] = inside ? tap.low_weight : outside;
      high_weight[i] = inside ? tap.high_weight : acc_t(0);
    }
  }

  // A grid row interpolated at the four columns. row: its cells; null where all count as 0.
  __device__ __forceinline__ void interpolate(const acc_t* row,
                                              acc_t (&values)[kLanePixels]) const {
#pragma unroll
    for (int32_t i = 0; i < kLanePixels; ++i) {
      const acc_t at_low = row != nullptr && low[i] >= 0 ? row[low[i]] : acc_t(0);
      const acc_t at_high = row != nullptr && high[i] >= 0 ? row[high[i]] : acc_t(0);
      values[i] = low_weight[i] * at_low + high_weight[i] * at_high;
    }
  }
};

// Writes the pixels of `word` that lie in a row of `width` pixels; the word begins at pixel `x`.
__device__ __forceinline__ void write_word(uint8_t* row, int32_t x, int32_t width, uint32_t word) {
  if (x >= 0 && x + kLanePixels <= width) {
    __stcs(reinterpret_cast<uint32_t*>(row + x), word);
  } else {
    for (int32_t i = 0; i < kLanePixels; ++i) {
      if (x + i >= 0 && x + i < width) {
        row[x + i] = static_cast<uint8_t>(word >> (8 * i));
      }
    }
  }
}

// A block makes kBlockRows rows of one mask. A warp goes down kWarpRows of them with four columns
// in each lane, and keeps the two grid rows that it is between, interpolated along the row, in
// registers.
template <typename acc_t>
__global__ void __launch_bounds__(kThreads) binary_kernel(BinaryArguments<acc_t> in) {
  __shared__ Tap<acc_t> taps[kBlockRows];
  __shared__ MaskRegion region;
  const int32_t lane = threadIdx.x % 32;
  const int32_t warp = threadIdx.x / 32;
  const int32_t top = static_cast<int32_t>(blockIdx.x) * kBlockRows;
  const int32_t rows = min(kBlockRows, in.height - top);
  const int32_t items = in.segments * ((rows + kWarpRows - 1) / kWarpRows);
  const acc_t scale_x = static_cast<acc_t>(in.grid_width) / static_cast<acc_t>(in.width);
  const acc_t scale_y = static_cast<acc_t>(in.grid_height) / static_cast<acc_t>(in.height);
  // Cells outside the box count as 0; pixels cropped at the output are never set: no comparison
  // with a NaN is true.
  const bool background = !in.crop_after && acc_t(0) > in.threshold;
  const acc_t outside = in.crop_after ? static_cast<acc_t>(NAN) : acc_t(0);
  const uint32_t background_word = background ? 0x01010101u : 0u;
  const uint4 background_vector =
      make_uint4(background_word, background_word, background_word, background_word);
  if (static_cast<int32_t>(threadIdx.x) < rows) {
    taps[threadIdx.x] =
        source_tap(top + static_cast<int32_t>(threadIdx.x), scale_y, in.grid_height);
  }

  for (int32_t n = blockIdx.y; n < in.detections; n += gridDim.y) {
    uint8_t* target = in.out + (static_cast<int64_t>(n) * in.height + top) * in.width;
    if (warp == 0) {
      MaskRegion own;
      const int64_t image = in.batch_index == nullptr ? 0 : in.batch_index[n];
      if (image >= 0 && image < in.images) {
        own = mask_region(in.boxes + static_cast<int64_t>(n) * 4, in.grid_height, in.grid_width,
                          in.height, in.width, in.crop_after, in.padding);
      }
      if (lane == 0) {
        region = own;
      }
    }
    __syncthreads();
    const Range xs = intersect(region.out_x, {0, in.width});
    const Range ys = intersect(region.out_y, {top, top + rows});
    const Range cell_x = region.cell_x;
    const Range cell_y = region.cell_y;
    __syncthreads();                 // before `region` is written again
    if (xs.empty() || ys.empty()) {  // adjacent rows: one run, shared out to the warps
      const int64_t length = static_cast<int64_t>(rows) * in.width;
      const int64_t share = ((length + kWarps - 1) / kWarps + 15) / 16 * 16;
      const int64_t begin = warp * share;
      if (begin < length) {
        fill_row(target + begin, static_cast<int32_t>(min(share, length - begin)),
                 background_vector, lane);
      }
      continue;
    }

    const acc_t* grid = in.probabilities + static_cast<int64_t>(n) * in.grid_height * in.grid_width;
    for (int32_t item = warp; item < items; item += kWarps) {
      const int32_t left = item % in.segments * kSegment - kLanePixels;
      const int32_t first_row = item / in.segments * kWarpRows;
      const int32_t x = left + kLanePixels * lane;
      const bool touched = !intersect(xs, {left, left + 32 * kLanePixels}).empty();
      const LaneColumns<acc_t> columns(x, xs, cell_x, scale_x, in.grid_width, outside);
      const auto cells_of_row = [&](int32_t y) {
        return cell_y.contains(y) ? grid + static_cast<int64_t>(y) * in.grid_width : nullptr;
      };
      acc_t low[kLanePixels];
      acc_t high[kLanePixels];
      int32_t held_low = -1;  // the grid rows in `low` and `high`
      int32_t held_high = -1;
      const int32_t end_row = min(first_row + kWarpRows, rows);
      for (int32_t y = first_row; y < end_row; ++y) {
        uint32_t bytes = background_word;
        if (touched && ys.contains(top + y)) {
          const Tap<acc_t> tap = taps[y];
          if (tap.low != held_low) {
            if (tap.low == held_high) {
#pragma unroll
              for (int32_t i = 0; i < kLanePixels; ++i) {
                low[i] = high[i];
              }
            } else {
              columns.interpolate(cells_of_row(tap.low), low);
            }
            held_low = tap.low;
          }
          if (tap.high != held_high) {
            columns.interpolate(cells_of_row(tap.high), high);
            held_high = tap.high;
          }
          bytes = 0;
#pragma unroll
          for (int32_t i = 0; i < kLanePixels; ++i) {
            bytes |= tap.low_weight * low[i] + tap.high_weight * high[i] > in.threshold
                         ? 1u << (8 * i)
                         : 0u;
          }
        }
        uint8_t* row = target + static_cast<int64_t>(y) * in.width;
        // The lane's word of global memory begins `shift` pixels into the lane to its left.
        const uint32_t shift = 4 - reinterpret_cast<uintptr_t>(row) % 4;
        const uint32_t before = __shfl_up_sync(0xffffffffu, bytes, 1);
        if (lane > 0) {
          write_word(row, x - kLanePixels + static_cast<int32_t>(shift), in.width,
                     __funnelshift_rc(before, bytes, 8 * shift));
        }
      }
    }
  }
}

template <typename scalar_t>
void launch_binary(const HeldInputs& held, int64_t height, int64_t width, double threshold,
                   bool crop_after, double padding, Tensor& masks) {
  using acc_t = accumulation_t<scalar_t>;
  const auto in = held.view<scalar_t>(padding);
  const Tensor probabilities =
      at::empty({in.detections, in.height, in.width}, held.boxes.options());
  launch_probabilities<scalar_t, acc_t, false>(held, padding, static_cast<int32_t>(height),
                                               static_cast<int32_t>(width), crop_after,
                                               probabilities.template mutable_data_ptr<acc_t>());

  BinaryArguments<acc_t> arguments;
  arguments.probabilities = probabilities.template const_data_ptr<acc_t>();
  arguments.boxes = in.boxes;
  arguments.batch_index = in.batch_index;
  arguments.images = in.images;
  arguments.detections = in.detections;
  arguments.grid_height = in.height;
  arguments.grid_width = in.width;
  arguments.height = static_cast<int32_t>(height);
  arguments.width = static_cast<int32_t>(width);
  // The last column that a word may begin at needs a lane of its own, whatever the rows' alignment.
  arguments.segments = static_cast<int32_t>((width + 5) / kSegment + 1);
  arguments.threshold = static_cast<acc_t>(threshold);
  arguments.padding = in.padding;
  arguments.crop_after = crop_after;
  arguments.out = static_cast<uint8_t*>(masks.mutable_data_ptr());
  // What a block fills and counts in 32 bits.
  D2EXT_CHECK_VALUE(width < std::numeric_limits<int32_t>::max() / kBlockRows,
                    "assemble_binary_masks: masks of ", height, " x ", width,
                    " pixels are too wide for a GPU");
  const int64_t blocks_of_mask = (height - 1) / kBlockRows + 1;
  const dim3 blocks(static_cast<uint32_t>(blocks_of_mask),
                    static_cast<uint32_t>(std::min(in.detections, 65535)));
  binary_kernel<acc_t><<<blocks, kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(arguments);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor assemble_binary_masks_cuda(const Tensor& prototypes, const Tensor& coefficients,
                                  const Tensor& boxes, const std::optional<Tensor>& batch_index,
                                  int64_t height, int64_t width, double threshold, bool crop_after,
                                  double padding) {
  check_mask_inputs("assemble_binary_masks", prototypes, coefficients, boxes, batch_index, padding);
  check_output_size("assemble_binary_masks", height, width);
  const c10::cuda::CUDAGuard guard(prototypes.device());
  const HeldInputs held(prototypes, coefficients, boxes, batch_index);
  Tensor masks = at::empty({coefficients.size(0), height, width},
                           prototypes.options().dtype(at::kBool).memory_format(std::nullopt));
  if (masks.numel() == 0) {
    return masks;
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, prototypes.scalar_type(), "assemble_binary_masks_cuda",
      [&] { launch_binary<scalar_t>(held, height, width, threshold, crop_after, padding, masks); });
  return masks;
}

}  // namespace

TORCH_LIBRARY_IMPL(d2ext, CUDA, m) { m.impl("assemble_binary_masks", assemble_binary_masks_cuda); }

}  // namespace d2ext
