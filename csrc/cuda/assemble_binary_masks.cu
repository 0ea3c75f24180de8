// CUDA kernels of assemble_binary_masks: probabilities on the prototype grid, which stay in the L2
// cache, then interpolation, threshold and output in one pass.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "probabilities.cuh"

namespace d2ext {
namespace {

using at::Tensor;

constexpr int32_t kThreads = 256;
// Output rows of a block; also bounded by kBlockBytes.
#ifndef D2EXT_BLOCK_ROWS
#define D2EXT_BLOCK_ROWS 16
#endif
constexpr int32_t kBlockRows = D2EXT_BLOCK_ROWS;
// Output rows that a thread walks down in its column: they share grid rows, interpolated once.
#ifndef D2EXT_THREAD_ROWS
#define D2EXT_THREAD_ROWS 8
#endif
constexpr int32_t kThreadRows = D2EXT_THREAD_ROWS;
// Blocks that a multiprocessor should hold at a time; bounds the registers of a thread.
#ifndef D2EXT_MIN_BLOCKS
#define D2EXT_MIN_BLOCKS 4
#endif
constexpr int32_t kBlockBytes = 32768;
constexpr uint32_t kVectorBytes = sizeof(uint4);

// Writes `length` bytes at `target`, 16 at a time where aligned; source(i) gives the 16 bytes from
// byte i on, and byte(i) one.
template <typename Vector, typename Byte>
__device__ __forceinline__ void write_bytes(uint8_t* target, int32_t length, Vector vector,
                                            Byte byte) {
  const uint32_t misaligned = reinterpret_cast<uintptr_t>(target) % kVectorBytes;
  const int32_t head =
      min(length, static_cast<int32_t>((kVectorBytes - misaligned) % kVectorBytes));
  const int32_t vectors = (length - head) / kVectorBytes;
  const int32_t tail = head + vectors * kVectorBytes;
  for (int32_t i = threadIdx.x; i < vectors; i += kThreads) {
    __stcs(reinterpret_cast<uint4*>(target + head) + i, vector(head + i * kVectorBytes));
  }
  if (static_cast<int32_t>(threadIdx.x) < head) {
    target[threadIdx.x] = byte(threadIdx.x);
  }
  if (tail + static_cast<int32_t>(threadIdx.x) < length) {
    target[tail + threadIdx.x] = byte(tail + threadIdx.x);
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
  int32_t block_rows;
  int32_t block_columns;  // the width, or less if block_rows is 1: a block's bytes are adjacent
  acc_t threshold;
  acc_t padding;
  bool crop_after;
  uint8_t* out;  // (N, H, W)
};

// A block writes block_rows x block_columns pixels of one mask. It builds them in shared memory,
// each thread walking down columns, and copies them out 16 bytes at a time.
template <typename acc_t>
__global__ void __launch_bounds__(kThreads, D2EXT_MIN_BLOCKS)
    binary_kernel(BinaryArguments<acc_t> in) {
  extern __shared__ __align__(16) uint8_t pixels[];
  __shared__ Tap<acc_t> taps[kBlockRows];
  const int32_t blocks_x = (in.width + in.block_columns - 1) / in.block_columns;
  const int32_t blocks_y = (in.height + in.block_rows - 1) / in.block_rows;
  const int64_t blocks_of_mask = static_cast<int64_t>(blocks_x) * blocks_y;
  const int64_t blocks = blocks_of_mask * in.detections;
  const acc_t scale_x = static_cast<acc_t>(in.grid_width) / static_cast<acc_t>(in.width);
  const acc_t scale_y = static_cast<acc_t>(in.grid_height) / static_cast<acc_t>(in.height);
  // Cells outside the box count as 0; pixels cropped at the output are never set.
  const uint8_t background = !in.crop_after && acc_t(0) > in.threshold;
  const uint32_t word = background * 0x01010101u;
  const uint4 background_vector = make_uint4(word, word, word, word);

  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int32_t n = static_cast<int32_t>(block / blocks_of_mask);
    const int32_t within = static_cast<int32_t>(block % blocks_of_mask);
    const int32_t top = within / blocks_x * in.block_rows;
    const int32_t left = within % blocks_x * in.block_columns;
    const int32_t rows = min(in.block_rows, in.height - top);
    const int32_t columns = min(in.block_columns, in.width - left);
    const int32_t length = rows * columns;
    uint8_t* target = in.out + (static_cast<int64_t>(n) * in.height + top) * in.width + left;

    MaskRegion region;
    const int64_t image = in.batch_index == nullptr ? 0 : in.batch_index[n];
    if (image >= 0 && image < in.images) {
      region = mask_region(in.boxes + static_cast<int64_t>(n) * 4, in.grid_height, in.grid_width,
                           in.height, in.width, in.crop_after, in.padding);
    }
    const Range xs = intersect(region.out_x, {left, left + columns});
    const Range ys = intersect(region.out_y, {top, top + rows});
    if (xs.empty() || ys.empty()) {
      write_bytes(
          target, length, [&](int32_t) { return background_vector; },
          [&](int32_t) { return background; });
      continue;
    }

    // Pixel i of the block is pixels[shift + i], so that shared and global memory are aligned
    // alike.
    const int32_t shift = reinterpret_cast<uintptr_t>(target) % kVectorBytes;
    if (xs.size() < columns || ys.size() < rows) {
      for (int32_t i = threadIdx.x; i * static_cast<int32_t>(kVectorBytes) < shift + length;
           i += kThreads) {
        reinterpret_cast<uint4*>(pixels)[i] = background_vector;
      }
    }
    if (static_cast<int32_t>(threadIdx.x) < rows) {
      taps[threadIdx.x] =
          source_tap(top + static_cast<int32_t>(threadIdx.x), scale_y, in.grid_height);
    }
    __syncthreads();

    const acc_t* grid = in.probabilities + static_cast<int64_t>(n) * in.grid_height * in.grid_width;
    const int32_t strips = (xs.size() + 31) / 32;
    const int32_t groups = (ys.size() + kThreadRows - 1) / kThreadRows;
    for (int32_t item = threadIdx.x / 32; item < strips * groups; item += kThreads / 32) {
      const int32_t group = item / strips;
      const int32_t x = xs.begin + (item - group * strips) * 32 + threadIdx.x % 32;
      if (x >= xs.end) {
        continue;
      }
      const Tap<acc_t> tap = source_tap(x, scale_x, in.grid_width);
      const bool low_inside = region.cell_x.contains(tap.low);
      const bool high_inside = region.cell_x.contains(tap.high);
      const auto interpolate_row = [&](int32_t y) {
        if (!region.cell_y.contains(y)) {
          return acc_t(0);
        }
        const acc_t* row = grid + static_cast<int64_t>(y) * in.grid_width;
        const acc_t low = low_inside ? row[tap.low] : acc_t(0);
        const acc_t high = high_inside ? row[tap.high] : acc_t(0);
        return tap.low_weight * low + tap.high_weight * high;
      };
      int32_t held_low = -1;
      int32_t held_high = -1;
      acc_t low = 0;
      acc_t high = 0;
      const int32_t first = ys.begin + group * kThreadRows;
      uint8_t* pixel = pixels + shift + (first - top) * columns + (x - left);
#pragma unroll
      for (int32_t i = 0; i < kThreadRows; ++i) {
        if (first + i < ys.end) {
          const Tap<acc_t> row = taps[first + i - top];
          if (row.low != held_low) {
            low = row.low == held_high ? high : interpolate_row(row.low);
            held_low = row.low;
          }
          if (row.high != held_high) {
            high = interpolate_row(row.high);
            held_high = row.high;
          }
          *pixel = row.low_weight * low + row.high_weight * high > in.threshold;
          pixel += columns;
        }
      }
    }
    __syncthreads();

    write_bytes(
        target, length,
        [&](int32_t i) { return *reinterpret_cast<const uint4*>(pixels + shift + i); },
        [&](int32_t i) { return pixels[shift + i]; });
    __syncthreads();
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
  arguments.block_columns = static_cast<int32_t>(std::min<int64_t>(width, kBlockBytes));
  arguments.block_rows = std::min(kBlockRows, kBlockBytes / arguments.block_columns);
  arguments.threshold = static_cast<acc_t>(threshold);
  arguments.padding = in.padding;
  arguments.crop_after = crop_after;
  arguments.out = static_cast<uint8_t*>(masks.mutable_data_ptr());
  const int64_t blocks_of_mask =
      ((width - 1) / arguments.block_columns + 1) * ((height - 1) / arguments.block_rows + 1);
  const int64_t blocks = std::min<int64_t>(blocks_of_mask * in.detections, 1 << 30);
  // Room for the pixels at any alignment, in whole vectors.
  const size_t shared = arguments.block_rows * arguments.block_columns + 2 * kVectorBytes;
  binary_kernel<acc_t>
      <<<static_cast<uint32_t>(blocks), kThreads, shared, c10::cuda::getCurrentCUDAStream()>>>(
          arguments);
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
