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

// Output rows of a block: 4 times larger than the grid, 16 of them lie between 6 grid rows.
#ifndef D2EXT_BLOCK_ROWS
#define D2EXT_BLOCK_ROWS 16
#endif
constexpr int32_t kBlockRows = D2EXT_BLOCK_ROWS;
// Words of four pixels that a warp writes: its last lane only lends its pixels to the one before.
constexpr int32_t kWarpWords = 31;
constexpr int32_t kMostWarps = 8;
constexpr int32_t kBlockColumns = kMostWarps * kWarpWords * 4;
// Shared memory for the interpolated grid rows, at most.
constexpr int64_t kLineBytes = 32 * 1024;
// What a block gets without being asked for, less than 48 KiB by what the kernel declares itself.
constexpr size_t kUnaskedBytes = 40 * 1024;
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
  int32_t block_columns;
  int32_t blocks_x;
  int32_t pitch;     // elements between two lines in shared memory, a multiple of 4
  bool shared_rows;  // adjacent output rows share grid rows: the output is higher than the grid
  acc_t threshold;
  acc_t padding;
  bool crop_after;
  uint8_t* out;  // (N, H, W)
};

// Grid rows that a block interpolates, at most.
inline int32_t slots_of(bool shared_rows, double scale) {
  return shared_rows ? static_cast<int32_t>(kBlockRows * scale) + 3 : 2 * kBlockRows;
}

// An output row of a block: the lines in shared memory that it lies between, and its place there.
template <typename acc_t>
struct RowTap {
  int32_t low;
  int32_t high;
  acc_t high_weight;
};

// A block writes kBlockRows x block_columns pixels of one mask. It interpolates the grid rows that
// these lie between along the row, once each, in shared memory. A thread then goes down four
// columns, with what lies above and below them in registers.
template <typename acc_t>
__global__ void __launch_bounds__(kMostWarps * 32) binary_kernel(BinaryArguments<acc_t> in) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  acc_t* lines = reinterpret_cast<acc_t*>(shared_bytes);  // (slots, pitch): threshold - value
  __shared__ RowTap<acc_t> taps[kBlockRows];
  __shared__ MaskRegion region;
  const int32_t lane = threadIdx.x % 32;
  const int32_t warp = threadIdx.x / 32;
  const int32_t threads = blockDim.x;
  const int32_t top = static_cast<int32_t>(blockIdx.x) / in.blocks_x * kBlockRows;
  const int32_t left = static_cast<int32_t>(blockIdx.x) % in.blocks_x * in.block_columns;
  const int32_t rows = min(kBlockRows, in.height - top);
  const int32_t columns = min(in.block_columns, in.width - left);
  const acc_t scale_x = static_cast<acc_t>(in.grid_width) / static_cast<acc_t>(in.width);
  const acc_t scale_y = static_cast<acc_t>(in.grid_height) / static_cast<acc_t>(in.height);
  // Cells outside the box count as 0; pixels cropped at the output are never set: no comparison
  // with a NaN is true.
  const bool background = !in.crop_after && acc_t(0) > in.threshold;
  const acc_t outside = in.crop_after ? static_cast<acc_t>(NAN) : in.threshold;
  const uint32_t background_word = background ? 0x01010101u : 0u;
  const int32_t first = source_tap(top, scale_y, in.grid_height).low;
  for (int32_t y = threadIdx.x; y < rows; y += threads) {
    const Tap<acc_t> tap = source_tap(top + y, scale_y, in.grid_height);
    taps[y] = in.shared_rows ? RowTap<acc_t>{tap.low - first, tap.high - first, tap.high_weight}
                             : RowTap<acc_t>{2 * y, 2 * y + 1, tap.high_weight};
  }

  for (int32_t n = blockIdx.y; n < in.detections; n += gridDim.y) {
    uint8_t* target = in.out + (static_cast<int64_t>(n) * in.height + top) * in.width + left;
    if (threadIdx.x == 0) {
      MaskRegion own;
      const int64_t image = in.batch_index == nullptr ? 0 : in.batch_index[n];
      if (image >= 0 && image < in.images) {
        own = mask_region(in.boxes + static_cast<int64_t>(n) * 4, in.grid_height, in.grid_width,
                          in.height, in.width, in.crop_after, in.padding);
      }
      region = own;
    }
    __syncthreads();
    const Range xs = intersect(region.out_x, {left, left + columns});
    const Range ys = intersect(region.out_y, {top, top + rows});
    const Range cell_x = region.cell_x;
    const Range cell_y = region.cell_y;
    if (xs.empty() || ys.empty()) {
      // Whole rows: one run, shared out to the warps in whole vectors.
      const bool run = columns == in.width;
      const int32_t length = run ? rows * columns : columns;
      const int32_t share = run ? ((length + threads / 32 - 1) / (threads / 32) + 15) / 16 * 16 : 1;
      const uint4 vector =
          make_uint4(background_word, background_word, background_word, background_word);
      if (run && warp * share < length) {
        fill_row(target + warp * share, min(share, length - warp * share), vector, lane);
      }
      for (int32_t y = warp; !run && y < rows; y += threads / 32) {
        fill_row(target + static_cast<int64_t>(y) * in.width, columns, vector, lane);
      }
      __syncthreads();  // before `region` is written again
      continue;
    }

    // Line s holds grid row first + s or, where output rows do not share, a row's two neighbours.
    const acc_t* grid = in.probabilities + static_cast<int64_t>(n) * in.grid_height * in.grid_width;
    const int32_t slots = in.shared_rows ? taps[rows - 1].high + 1 : 2 * rows;
    for (int32_t i = threadIdx.x; i < in.pitch; i += threads) {
      const int32_t x = left + i;
      const bool within = xs.contains(x);
      const Tap<acc_t> tap = source_tap(within ? x : left, scale_x, in.grid_width);
      const bool low_inside = cell_x.contains(tap.low);
      const bool high_inside = cell_x.contains(tap.high);
#pragma unroll 8
      for (int32_t slot = 0; slot < slots; ++slot) {
        int32_t y = first + slot;
        if (!in.shared_rows) {
          const Tap<acc_t> row = source_tap(top + slot / 2, scale_y, in.grid_height);
          y = slot % 2 == 0 ? row.low : row.high;
        }
        const bool inside = within && cell_y.contains(y);
        const acc_t* cells = grid + y * in.grid_width;
        const acc_t low = inside && low_inside ? cells[tap.low] : acc_t(0);
        const acc_t high = inside && high_inside ? cells[tap.high] : acc_t(0);
        const acc_t value = low + tap.high_weight * (high - low);
        lines[slot * in.pitch + i] = within ? in.threshold - value : outside;
      }
    }
    __syncthreads();

    const int32_t x = 4 * (warp * kWarpWords + lane);  // the thread's first pixel
    const int32_t column = min(x, in.pitch - 4);
    acc_t above[4];
    acc_t step[4];
    int32_t held_low = -1;
    int32_t held_high = -1;
    for (int32_t y = 0; y < rows; ++y) {
      uint8_t* row_target = target + static_cast<int64_t>(y) * in.width;
      const RowTap<acc_t> row = taps[y];
      // Where the upper line has weight 0 the tap names the lower one twice.
      if (row.low != held_low || row.high != held_high) {
        held_low = row.low;
        held_high = row.high;
        const acc_t* from = lines + column;
        const auto low = *reinterpret_cast<const Four<acc_t>*>(from + held_low * in.pitch);
        const auto high = *reinterpret_cast<const Four<acc_t>*>(from + held_high * in.pitch);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          above[i] = low.values[i];
          step[i] = high.values[i] - low.values[i];
        }
      }
      uint32_t bytes = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        bytes |= above[i] + row.high_weight * step[i] < acc_t(0) ? 1u << (8 * i) : 0u;
      }
      bytes = ys.contains(top + y) ? bytes : background_word;
      // Whole words of memory begin `skip` pixels later; their last bytes come from the next lane.
      const uint32_t skip =
          (0u - static_cast<uint32_t>(reinterpret_cast<uintptr_t>(row_target))) % 4;
      const uint32_t next = __shfl_down_sync(0xffffffffu, bytes, 1);
      const uint32_t word = __funnelshift_r(bytes, next, 8 * skip);
      const int32_t begin = x + static_cast<int32_t>(skip);
      if (lane < kWarpWords) {
        if (begin + 4 <= columns) {
          __stcs(reinterpret_cast<uint32_t*>(row_target + begin), word);
        } else {
          for (int32_t i = 0; begin + i < columns; ++i) {
            row_target[begin + i] = static_cast<uint8_t>(word >> (8 * i));
          }
        }
        if (x == 0) {
          for (int32_t i = 0; i < min(static_cast<int32_t>(skip), columns); ++i) {
            row_target[i] = static_cast<uint8_t>(bytes >> (8 * i));
          }
        }
      }
    }
    __syncthreads();
  }
}

template <typename scalar_t>
void launch_binary(const HeldInputs& held, int64_t height, int64_t width, double threshold,
                   bool crop_after, double padding, Tensor& masks) {
  using acc_t = at::opmath_type<scalar_t>;
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
  arguments.shared_rows = height > in.height;
  // The columns are shared out evenly.
  const double scale = static_cast<double>(in.height) / static_cast<double>(height);
  const int64_t slots = slots_of(arguments.shared_rows, scale);
  const int64_t room = kLineBytes / (slots * static_cast<int64_t>(sizeof(acc_t)));
  const int64_t most = std::min<int64_t>(kBlockColumns, room / 16 * 16);
  const int64_t even = (width - 1) / ((width - 1) / most + 1) + 1;
  arguments.block_columns =
      static_cast<int32_t>(even == width ? width : std::min(most, (even + 15) / 16 * 16));
  arguments.blocks_x = static_cast<int32_t>((width - 1) / arguments.block_columns + 1);
  arguments.pitch = (arguments.block_columns + 3) / 4 * 4;
  const int32_t words = arguments.pitch / 4;
  const int32_t threads = (words + kWarpWords - 1) / kWarpWords * 32;
  arguments.threshold = static_cast<acc_t>(threshold);
  arguments.padding = in.padding;
  arguments.crop_after = crop_after;
  arguments.out = static_cast<uint8_t*>(masks.mutable_data_ptr());
  const int64_t blocks_of_mask = arguments.blocks_x * ((height - 1) / kBlockRows + 1);
  D2EXT_CHECK_VALUE(blocks_of_mask <= std::numeric_limits<int32_t>::max(),
                    "assemble_binary_masks: masks of ", height, " x ", width,
                    " pixels are too large for a GPU");
  const dim3 blocks(static_cast<uint32_t>(blocks_of_mask),
                    static_cast<uint32_t>(std::min(in.detections, 65535)));
  const size_t shared = static_cast<size_t>(slots) * arguments.pitch * sizeof(acc_t);
  if (shared > kUnaskedBytes) {
    C10_CUDA_CHECK(cudaFuncSetAttribute(binary_kernel<acc_t>,
                                        cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(shared)));
  }
  binary_kernel<acc_t><<<blocks, threads, shared, c10::cuda::getCurrentCUDAStream()>>>(arguments);
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
