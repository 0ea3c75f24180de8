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
constexpr int32_t kWarps = kThreads / 32;
// Output rows of a block: 4 times larger than the grid, they lie between 6 grid rows.
constexpr int32_t kBlockRows = 16;
// Output columns of a block, at most.
constexpr int32_t kBlockColumns = 640;
// Pixels that a warp finishes at a time, one word of 4 for each lane.
constexpr int32_t kSegment = 128;
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

// Four bits to four bytes of 0 or 1, the lowest bit first.
__device__ __forceinline__ uint32_t spread_bits(uint32_t bits) {
  return (bits * 0x00204081u) & 0x01010101u;
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
  bool shared_rows;  // adjacent output rows share grid rows: the output is higher than the grid
  acc_t threshold;
  acc_t padding;
  bool crop_after;
  uint8_t* out;  // (N, H, W)
};

// Grid rows that a block interpolates, at most.
__host__ __device__ inline int32_t slots_of(bool shared_rows, double scale) {
  return shared_rows ? static_cast<int32_t>(kBlockRows * scale) + 3 : 2 * kBlockRows;
}

// A block writes kBlockRows x block_columns pixels of one mask. It interpolates the grid rows that
// these lie between along the row, once each, in shared memory; a pixel is then two loads, and the
// bits of a warp's pixels come together by ballots.
template <typename acc_t>
__global__ void __launch_bounds__(kThreads) binary_kernel(BinaryArguments<acc_t> in) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  acc_t* lines = reinterpret_cast<acc_t*>(shared_bytes);  // (slots, block_columns)
  __shared__ Tap<acc_t> taps[kBlockRows];
  const int32_t lane = threadIdx.x % 32;
  const int32_t warp = threadIdx.x / 32;
  const int32_t blocks_x = (in.width + in.block_columns - 1) / in.block_columns;
  const int32_t blocks_y = (in.height + kBlockRows - 1) / kBlockRows;
  const int64_t blocks_of_mask = static_cast<int64_t>(blocks_x) * blocks_y;
  const int64_t blocks = blocks_of_mask * in.detections;
  const acc_t scale_x = static_cast<acc_t>(in.grid_width) / static_cast<acc_t>(in.width);
  const acc_t scale_y = static_cast<acc_t>(in.grid_height) / static_cast<acc_t>(in.height);
  // Cells outside the box count as 0; pixels cropped at the output are never set.
  const bool background = !in.crop_after && acc_t(0) > in.threshold;
  const uint32_t word = background ? 0x01010101u : 0u;
  const uint4 background_vector = make_uint4(word, word, word, word);

  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int32_t n = static_cast<int32_t>(block / blocks_of_mask);
    const int32_t within = static_cast<int32_t>(block % blocks_of_mask);
    const int32_t top = within / blocks_x * kBlockRows;
    const int32_t left = within % blocks_x * in.block_columns;
    const int32_t rows = min(kBlockRows, in.height - top);
    const int32_t columns = min(in.block_columns, in.width - left);
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
      continue;
    }

    if (static_cast<int32_t>(threadIdx.x) < rows) {
      taps[threadIdx.x] =
          source_tap(top + static_cast<int32_t>(threadIdx.x), scale_y, in.grid_height);
    }
    __syncthreads();

    // Line s holds grid row first + s or, where output rows do not share, a row's two neighbours.
    const acc_t* grid = in.probabilities + static_cast<int64_t>(n) * in.grid_height * in.grid_width;
    const int32_t first = taps[ys.begin - top].low;
    const int32_t last = taps[ys.end - 1 - top].high;
    const int32_t slots = in.shared_rows ? last - first + 1 : 2 * ys.size();
    for (int32_t x = xs.begin + static_cast<int32_t>(threadIdx.x); x < xs.end; x += kThreads) {
      const Tap<acc_t> tap = source_tap(x, scale_x, in.grid_width);
      const bool low_inside = region.cell_x.contains(tap.low);
      const bool high_inside = region.cell_x.contains(tap.high);
#pragma unroll 4
      for (int32_t slot = 0; slot < slots; ++slot) {
        int32_t y = first + slot;
        if (!in.shared_rows) {
          const Tap<acc_t>& row = taps[ys.begin - top + slot / 2];
          y = slot % 2 == 0 ? row.low : row.high;
        }
        acc_t low = 0;
        acc_t high = 0;
        if (region.cell_y.contains(y)) {
          const acc_t* cells = grid + static_cast<int64_t>(y) * in.grid_width;
          low = low_inside ? cells[tap.low] : acc_t(0);
          high = high_inside ? cells[tap.high] : acc_t(0);
        }
        lines[slot * in.block_columns + (x - left)] = tap.low_weight * low + tap.high_weight * high;
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
      const acc_t* low = lines + (in.shared_rows ? row.low - first : slot) * in.block_columns;
      const acc_t* high = lines + (in.shared_rows ? row.high - first : slot + 1) * in.block_columns;
      // Segments begin where words of global memory do.
      const int32_t shift = reinterpret_cast<uintptr_t>(row_target) % sizeof(uint32_t);
      for (int32_t begin = -shift; begin < columns; begin += kSegment) {
        uint32_t bits = 0;
#pragma unroll
        for (int32_t j = 0; j < kSegment / 32; ++j) {
          const int32_t x = begin + j * 32 + lane;
          bool set = background;
          if (xs.contains(left + x)) {
            set = row.low_weight * low[x] + row.high_weight * high[x] > in.threshold;
          }
          const uint32_t ballot = __ballot_sync(0xffffffffu, set);
          // Lanes 8j to 8j + 7 write what these 32 pixels are.
          bits = lane / 8 == j ? ballot >> (4 * (lane % 8)) : bits;
        }
        const uint32_t bytes = spread_bits(bits & 0xfu);
        const int32_t x = begin + 4 * lane;
        if (x >= 0 && x + 4 <= columns) {
          __stcs(reinterpret_cast<uint32_t*>(row_target + x), bytes);
        } else {
#pragma unroll
          for (int32_t i = 0; i < 4; ++i) {
            if (x + i >= 0 && x + i < columns) {
              row_target[x + i] = static_cast<uint8_t>(bytes >> (8 * i));
            }
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
  // The columns are shared out evenly, in whole segments where there is more than one block.
  const int64_t blocks_x = (width - 1) / kBlockColumns + 1;
  const int64_t even = (width - 1) / blocks_x + 1;
  arguments.block_columns =
      static_cast<int32_t>(blocks_x == 1 ? width : (even + kSegment - 1) / kSegment * kSegment);
  arguments.shared_rows = height > in.height;
  arguments.threshold = static_cast<acc_t>(threshold);
  arguments.padding = in.padding;
  arguments.crop_after = crop_after;
  arguments.out = static_cast<uint8_t*>(masks.mutable_data_ptr());
  const int64_t blocks_of_mask =
      ((width - 1) / arguments.block_columns + 1) * ((height - 1) / kBlockRows + 1);
  const int64_t blocks = std::min<int64_t>(blocks_of_mask * in.detections, 1 << 30);
  const double scale = static_cast<double>(in.height) / static_cast<double>(height);
  const size_t shared =
      slots_of(arguments.shared_rows, scale) * arguments.block_columns * sizeof(acc_t);
  if (shared > 48 * 1024) {  // more than a block gets unasked: float64, or a smaller output
    C10_CUDA_CHECK(cudaFuncSetAttribute(binary_kernel<acc_t>,
                                        cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(shared)));
  }
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
