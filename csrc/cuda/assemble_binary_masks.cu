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
// Output rows of a block: 4 times larger than the grid, they lie between 10 grid rows.
constexpr int32_t kBlockRows = 32;
// Output columns of a block, at most.
constexpr int32_t kBlockColumns = 640;
// Pixels that a warp finishes at a time, one word of 4 for each lane.
constexpr int32_t kSegment = 128;
// Shared memory for the interpolated grid rows, at most: room for one segment of any of them.
constexpr int64_t kLineBytes = 2 * kBlockRows * kSegment * sizeof(double);
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

// Four pixels from 16-byte aligned lines, as the bytes of a word.
__device__ __forceinline__ uint32_t four_pixels(const float* low, const float* high,
                                                const Tap<float>& row, float threshold) {
  const float4 a = *reinterpret_cast<const float4*>(low);
  const float4 b = *reinterpret_cast<const float4*>(high);
  uint32_t bytes = row.low_weight * a.x + row.high_weight * b.x > threshold ? 0x1u : 0u;
  bytes |= row.low_weight * a.y + row.high_weight * b.y > threshold ? 0x100u : 0u;
  bytes |= row.low_weight * a.z + row.high_weight * b.z > threshold ? 0x10000u : 0u;
  bytes |= row.low_weight * a.w + row.high_weight * b.w > threshold ? 0x1000000u : 0u;
  return bytes;
}

__device__ __forceinline__ uint32_t four_pixels(const double* low, const double* high,
                                                const Tap<double>& row, double threshold) {
  uint32_t bytes = 0;
#pragma unroll
  for (int32_t i = 0; i < 4; ++i) {
    bytes |= row.low_weight * low[i] + row.high_weight * high[i] > threshold ? 1u << (8 * i) : 0u;
  }
  return bytes;
}

// A block writes kBlockRows x block_columns pixels of one mask. It interpolates the grid rows that
// these lie between along the row, once each, in shared memory; from two such lines a thread then
// makes four pixels at a time.
template <typename acc_t>
__global__ void __launch_bounds__(kThreads) binary_kernel(BinaryArguments<acc_t> in) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  acc_t* lines = reinterpret_cast<acc_t*>(shared_bytes);  // (slots, pitch)
  __shared__ Tap<acc_t> taps[kBlockRows];
  __shared__ MaskRegion region;
  const int32_t lane = threadIdx.x % 32;
  const int32_t warp = threadIdx.x / 32;
  const int32_t top = static_cast<int32_t>(blockIdx.x) / in.blocks_x * kBlockRows;
  const int32_t left = static_cast<int32_t>(blockIdx.x) % in.blocks_x * in.block_columns;
  const int32_t rows = min(kBlockRows, in.height - top);
  const int32_t columns = min(in.block_columns, in.width - left);
  const acc_t scale_x = static_cast<acc_t>(in.grid_width) / static_cast<acc_t>(in.width);
  const acc_t scale_y = static_cast<acc_t>(in.grid_height) / static_cast<acc_t>(in.height);
  // Cells outside the box count as 0; pixels cropped at the output are never set: no comparison
  // with a NaN is true.
  const bool background = !in.crop_after && acc_t(0) > in.threshold;
  const acc_t outside = in.crop_after ? static_cast<acc_t>(NAN) : acc_t(0);
  const uint32_t word = background ? 0x01010101u : 0u;
  const uint4 background_vector = make_uint4(word, word, word, word);
  if (static_cast<int32_t>(threadIdx.x) < rows) {
    taps[threadIdx.x] =
        source_tap(top + static_cast<int32_t>(threadIdx.x), scale_y, in.grid_height);
  }

  for (int32_t n = blockIdx.y; n < in.detections; n += gridDim.y) {
    uint8_t* target = in.out + (static_cast<int64_t>(n) * in.height + top) * in.width + left;
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
    const Range xs = intersect(region.out_x, {left, left + columns});
    const Range ys = intersect(region.out_y, {top, top + rows});
    if (xs.empty() || ys.empty()) {
      if (columns == in.width) {  // adjacent rows: one run, shared out to the warps
        const int32_t length = rows * columns;
        const int32_t share = ((length + kWarps - 1) / kWarps + 15) / 16 * 16;
        const int32_t begin = warp * share;
        if (begin < length) {
          fill_row(target + begin, min(share, length - begin), background_vector, lane);
        }
      } else {
        for (int32_t y = warp; y < rows; y += kWarps) {
          fill_row(target + static_cast<int64_t>(y) * in.width, columns, background_vector, lane);
        }
      }
      __syncthreads();  // before `region` is written again
      continue;
    }

    // Line s holds grid row first + s or, where output rows do not share, a row's two neighbours.
    const acc_t* grid = in.probabilities + static_cast<int64_t>(n) * in.grid_height * in.grid_width;
    const Range cell_x = region.cell_x;
    const Range cell_y = region.cell_y;
    const int32_t first = taps[ys.begin - top].low;
    const int32_t slots = in.shared_rows ? taps[ys.end - 1 - top].high - first + 1 : 2 * ys.size();
    for (int32_t i = threadIdx.x; i < in.pitch; i += kThreads) {
      const int32_t x = left + i;
      if (!xs.contains(x)) {
        for (int32_t slot = 0; slot < slots; ++slot) {
          lines[slot * in.pitch + i] = outside;
        }
        continue;
      }
      const Tap<acc_t> tap = source_tap(x, scale_x, in.grid_width);
      const bool low_inside = cell_x.contains(tap.low);
      const bool high_inside = cell_x.contains(tap.high);
      const acc_t* low_cells = grid + tap.low;
      const acc_t* high_cells = grid + tap.high;
#pragma unroll 4
      for (int32_t slot = 0; slot < slots; ++slot) {
        int32_t y = first + slot;
        if (!in.shared_rows) {
          const Tap<acc_t>& row = taps[ys.begin - top + slot / 2];
          y = slot % 2 == 0 ? row.low : row.high;
        }
        const bool inside = cell_y.contains(y);
        const int32_t offset = y * in.grid_width;
        const acc_t low = inside && low_inside ? low_cells[offset] : acc_t(0);
        const acc_t high = inside && high_inside ? high_cells[offset] : acc_t(0);
        lines[slot * in.pitch + i] = tap.low_weight * low + tap.high_weight * high;
      }
    }
    __syncthreads();

    for (int32_t y = warp; y < rows; y += kWarps) {
      uint8_t* row_target = target + static_cast<int64_t>(y) * in.width;
      if (!ys.contains(top + y)) {
        fill_row(row_target, columns, background_vector, lane);
        continue;
      }
      const Tap<acc_t> row = taps[y];
      const int32_t slot = 2 * (top + y - ys.begin);
      const acc_t* low = lines + (in.shared_rows ? row.low - first : slot) * in.pitch;
      const acc_t* high = lines + (in.shared_rows ? row.high - first : slot + 1) * in.pitch;
      // A lane makes pixels x to x + 3. Words of global memory begin `shift` pixels before: their
      // first bytes come from the lane to the left.
      const uint32_t shift = (4 - reinterpret_cast<uintptr_t>(row_target) % 4) % 4;
      uint32_t carried = 0;  // the last lane's pixels of the step before
      for (int32_t begin = 0; begin < columns; begin += kSegment) {
        const int32_t x = begin + 4 * lane;
        // `pitch` reaches to the end of the last word, so this reads what was written.
        const uint32_t bytes = x < columns ? four_pixels(low + x, high + x, row, in.threshold) : 0u;
        if (shift == 0) {
          if (x + 4 <= columns) {
            __stcs(reinterpret_cast<uint32_t*>(row_target + x), bytes);
          }
        } else {
          uint32_t before = __shfl_up_sync(0xffffffffu, bytes, 1);
          before = lane == 0 ? carried : before;
          carried = __shfl_sync(0xffffffffu, bytes, 31);
          // The word that begins at pixel x - 4 + shift.
          const int32_t word_x = x - 4 + static_cast<int32_t>(shift);
          if (word_x >= 0 && word_x + 4 <= columns) {
            __stcs(reinterpret_cast<uint32_t*>(row_target + word_x),
                   __funnelshift_r(before, bytes, 8 * shift));
          }
        }
      }
      // What is left of whole words at either end, at most 3 pixels each.
      const int32_t head = min(static_cast<int32_t>(shift), columns);
      const int32_t tail = head + (columns - head) / 4 * 4;
      const int32_t edge = lane < head ? lane : tail + lane - head;
      if (edge < columns && (lane < head || edge >= tail)) {
        row_target[edge] = row.low_weight * low[edge] + row.high_weight * high[edge] > in.threshold;
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
  // The columns are shared out evenly, in whole segments where there is more than one block.
  const double scale = static_cast<double>(in.height) / static_cast<double>(height);
  const int64_t slots = slots_of(arguments.shared_rows, scale);
  const int64_t room = kLineBytes / (slots * static_cast<int64_t>(sizeof(acc_t)));
  const int64_t most = std::min<int64_t>(kBlockColumns, room / kSegment * kSegment);
  const int64_t blocks_x = (width - 1) / most + 1;
  const int64_t even = (width - 1) / blocks_x + 1;
  arguments.block_columns =
      static_cast<int32_t>(blocks_x == 1 ? width : (even + kSegment - 1) / kSegment * kSegment);
  arguments.blocks_x = static_cast<int32_t>((width - 1) / arguments.block_columns + 1);
  arguments.pitch = (arguments.block_columns + 3) / 4 * 4;
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
  binary_kernel<acc_t><<<blocks, kThreads, shared, c10::cuda::getCurrentCUDAStream()>>>(arguments);
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
