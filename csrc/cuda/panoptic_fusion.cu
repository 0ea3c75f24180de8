// CUDA kernels of panoptic fusion.
//
// fuse_panoptic: a thread makes one pixel. It interpolates all semantic channels and the instances
// that cover it on the fly, so that nothing of the map's size is written but the two label maps.
// prune_masks: masks as bits, all at once; then one block for each class goes through the class's
// instances by falling score. Nothing waits for the host.
#include <ATen/Dispatch.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "../panoptic_fusion.h"

namespace d2ext {
namespace {

using at::Tensor;

// ---------------------------------------------------------------- fuse_panoptic

constexpr int32_t kTileWidth = 32;
constexpr int32_t kTileHeight = 8;
constexpr int32_t kTile = kTileWidth * kTileHeight;

template <typename T>
struct FusionArguments {
  const T* score;
  const T* boxes;
  const int64_t* classes;
  const T* masks;
  int32_t channels;
  int32_t grid_height;
  int32_t grid_width;
  int32_t instances;
  int32_t cells_y;
  int32_t cells_x;
  int32_t height;
  int32_t width;
  int32_t stuff;
  bool unknown;
  int32_t* labels;
  int32_t* semantic;
};

template <typename T>
struct SharedInstance {
  WholeBox box;
  int32_t channel;  // -1: all logits are 0
  bool near;        // either view touches the tile
};

template <typename T>
__global__ void __launch_bounds__(kTile) fuse_kernel(FusionArguments<T> in) {
  __shared__ SharedInstance<T> shared[kTile];
  const int32_t left = blockIdx.x * kTileWidth;
  const int32_t top = blockIdx.y * kTileHeight;
  const int32_t x = left + static_cast<int32_t>(threadIdx.x) % kTileWidth;
  const int32_t y = top + static_cast<int32_t>(threadIdx.x) / kTileWidth;
  const bool alive = x < in.width && y < in.height;
  const Tap<T> across =
      source_tap<T>(x, static_cast<T>(in.grid_width) / static_cast<T>(in.width), in.grid_width);
  const Tap<T> down =
      source_tap<T>(y, static_cast<T>(in.grid_height) / static_cast<T>(in.height), in.grid_height);
  const int64_t plane = static_cast<int64_t>(in.grid_height) * in.grid_width;

  T best = -INFINITY;
  T thing = -INFINITY;
  int32_t label = 0;
  int32_t semantic = in.stuff;
  if (alive) {
    const T* grid = in.score;
#pragma unroll 4
    for (int32_t c = 0; c < in.stuff; ++c, grid += plane) {
      const T value = interpolate<T>(grid, in.grid_width, down, across);
      label = value > best ? c : label;
      best = value > best ? value : best;
    }
#pragma unroll 4
    for (int32_t c = in.stuff; c < in.channels; ++c, grid += plane) {
      const T value = interpolate<T>(grid, in.grid_width, down, across);
      semantic = value > thing ? c : semantic;
      thing = value > thing ? value : thing;
    }
    semantic = thing > best ? semantic : label;
  }

  T inside = -INFINITY;
  for (int32_t begin = 0; begin < in.instances; begin += kTile) {
    __syncthreads();
    const int32_t own = begin + static_cast<int32_t>(threadIdx.x);
    if (own < in.instances) {
      SharedInstance<T> instance;
      instance.box = whole_box(in.boxes + static_cast<int64_t>(own) * 4);
      const int64_t kind = in.classes[own];
      const bool valid = kind >= 0 && kind < in.channels - in.stuff;
      instance.channel = valid ? in.stuff + static_cast<int32_t>(kind) : -1;
      const int32_t right = max(instance.box.x + instance.box.width, instance.box.semantic_right);
      const int32_t bottom =
          max(instance.box.y + instance.box.height, instance.box.semantic_bottom);
      instance.near = instance.channel >= 0 && instance.box.x < left + kTileWidth && right > left &&
                      instance.box.y < top + kTileHeight && bottom > top;
      shared[threadIdx.x] = instance;
    }
    __syncthreads();
    if (!alive) {
      continue;
    }
    const int32_t count = min(kTile, in.instances - begin);
    for (int32_t i = 0; i < count; ++i) {
      // Outside of both its views an instance's logit is 0, and so is its semantic view's.
      T value = 0;
      T view = 0;
      if (shared[i].near) {
        const WholeBox box = shared[i].box;
        if (box.in_semantic(x, y)) {
          view = interpolate<T>(in.score + shared[i].channel * plane, in.grid_width, down, across);
          value = view;
        }
        if (box.in_mask(x, y)) {
          const Tap<T> mask_x = source_tap<T>(
              x - box.x, static_cast<T>(in.cells_x) / static_cast<T>(box.width), in.cells_x);
          const Tap<T> mask_y = source_tap<T>(
              y - box.y, static_cast<T>(in.cells_y) / static_cast<T>(box.height), in.cells_y);
          const T* mask = in.masks + static_cast<int64_t>(begin + i) * in.cells_y * in.cells_x;
          value += interpolate<T>(mask, in.cells_x, mask_y, mask_x);
        }
      }
      inside = view > inside ? view : inside;
      label = value > best ? in.stuff + begin + i : label;
      best = value > best ? value : best;
    }
  }
  if (alive) {
    const T rest = in.instances > 0 ? thing - inside : thing;
    const int64_t pixel = static_cast<int64_t>(y) * in.width + x;
    in.labels[pixel] = in.unknown && rest > best ? in.stuff + in.instances : label;
    in.semantic[pixel] = semantic;
  }
}

std::tuple<Tensor, Tensor> fuse_panoptic_cuda(const Tensor& score, const Tensor& boxes,
                                              const Tensor& classes, const Tensor& masks,
                                              int64_t height, int64_t width, int64_t num_stuff,
                                              bool unknown) {
  check_fusion_inputs(score, boxes, classes, masks, height, width, num_stuff);
  const c10::cuda::CUDAGuard guard(score.device());
  const auto type = at::toOpMathType(score.scalar_type());
  const Tensor held_score = score.to(type).contiguous();
  const Tensor held_boxes = boxes.to(type).contiguous();
  const Tensor held_masks = masks.to(type).contiguous();
  const Tensor held_classes = classes.contiguous();
  Tensor labels = at::empty({height, width}, score.options().dtype(at::kInt));
  Tensor semantic = at::empty({height, width}, score.options().dtype(at::kInt));
  const int64_t rows = (height + kTileHeight - 1) / kTileHeight;
  D2EXT_CHECK_VALUE(rows <= 65535, "fuse_panoptic: a map of ", height,
                    " rows is too high for a GPU");
  const dim3 blocks(static_cast<uint32_t>((width + kTileWidth - 1) / kTileWidth),
                    static_cast<uint32_t>(rows));
  AT_DISPATCH_FLOATING_TYPES(type, "fuse_panoptic_cuda", [&] {
    FusionArguments<scalar_t> in;
    in.score = held_score.const_data_ptr<scalar_t>();
    in.boxes = held_boxes.const_data_ptr<scalar_t>();
    in.classes = held_classes.const_data_ptr<int64_t>();
    in.masks = held_masks.const_data_ptr<scalar_t>();
    in.channels = static_cast<int32_t>(score.size(0));
    in.grid_height = static_cast<int32_t>(score.size(1));
    in.grid_width = static_cast<int32_t>(score.size(2));
    in.instances = static_cast<int32_t>(masks.size(0));
    in.cells_y = static_cast<int32_t>(masks.size(1));
    in.cells_x = static_cast<int32_t>(masks.size(2));
    in.height = static_cast<int32_t>(height);
    in.width = static_cast<int32_t>(width);
    in.stuff = static_cast<int32_t>(num_stuff);
    in.unknown = unknown;
    in.labels = labels.mutable_data_ptr<int32_t>();
    in.semantic = semantic.mutable_data_ptr<int32_t>();
    fuse_kernel<scalar_t><<<blocks, kTile, 0, at::cuda::getCurrentCUDAStream()>>>(in);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {labels, semantic};
}

// ---------------------------------------------------------------- prune_masks

constexpr int32_t kBits = 32;
constexpr int32_t kBitThreads = 256;
constexpr int32_t kClassThreads = 1024;

// Bit b of word w of a row is pixel 32 w + b. Words outside the box are not written.
template <typename T>
__global__ void __launch_bounds__(kBitThreads)
    bits_kernel(const T* masks, const T* boxes, int32_t instances, int32_t cells_y, int32_t cells_x,
                int32_t height, int32_t width, int32_t words, uint32_t* bits) {
  const int64_t plane = static_cast<int64_t>(height) * words;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kBitThreads + threadIdx.x;
  if (index >= plane) {
    return;
  }
  const auto y = static_cast<int32_t>(index / words);
  const int32_t first = static_cast<int32_t>(index % words) * kBits;
  for (int32_t n = blockIdx.y; n < instances; n += gridDim.y) {
    const WholeBox box = whole_box(boxes + static_cast<int64_t>(n) * 4);
    const Range columns = intersect(box.mask_columns(width), {first, first + kBits});
    if (columns.empty() || !box.mask_rows(height).contains(y)) {
      continue;
    }
    const T* mask = masks + static_cast<int64_t>(n) * cells_y * cells_x;
    const T scale_x = static_cast<T>(cells_x) / static_cast<T>(box.width);
    const Tap<T> down =
        source_tap<T>(y - box.y, static_cast<T>(cells_y) / static_cast<T>(box.height), cells_y);
    uint32_t word = 0;
    for (int32_t x = columns.begin; x < columns.end; ++x) {
      const Tap<T> across = source_tap<T>(x - box.x, scale_x, cells_x);
      const bool set = interpolate<T>(mask, cells_x, down, across) > T(0);
      word |= set ? 1u << (x - first) : 0u;
    }
    bits[n * plane + index] = word;
  }
}

// Sums two counts over the block; every thread gets them.
__device__ __forceinline__ void sum_over_block(uint64_t& area, uint64_t& both) {
  __shared__ uint64_t sums[2][kClassThreads / 32];
#pragma unroll
  for (int32_t step = 16; step > 0; step /= 2) {
    area += __shfl_down_sync(0xffffffffu, area, step);
    both += __shfl_down_sync(0xffffffffu, both, step);
  }
  if (threadIdx.x % 32 == 0) {
    sums[0][threadIdx.x / 32] = area;
    sums[1][threadIdx.x / 32] = both;
  }
  __syncthreads();
  area = 0;
  both = 0;
  for (int32_t warp = 0; warp < kClassThreads / 32; ++warp) {
    area += sums[0][warp];
    both += sums[1][warp];
  }
  __syncthreads();  // before the sums are written again
}

// Block b decides on all instances of the b-th best one's class, if that is the best of its class.
// `covered` (instances, height, words) is zero at first; the block uses plane b.
template <typename T>
__global__ void __launch_bounds__(kClassThreads)
    prune_kernel(const uint32_t* bits, const T* boxes, const int64_t* classes, const int64_t* order,
                 int32_t instances, int32_t height, int32_t width, int32_t words,
                 double overlap_fraction, uint32_t* covered, bool* keep) {
  const int64_t kind = classes[order[blockIdx.x]];
  int decided = 0;  // an earlier block has this class
  for (int32_t p = threadIdx.x; p < static_cast<int32_t>(blockIdx.x); p += kClassThreads) {
    decided |= classes[order[p]] == kind;
  }
  if (__syncthreads_or(decided)) {
    return;
  }
  const int64_t plane = static_cast<int64_t>(height) * words;
  uint32_t* own = covered + static_cast<int64_t>(blockIdx.x) * plane;
  for (int32_t p = blockIdx.x; p < instances; ++p) {
    const int64_t n = order[p];
    if (classes[n] != kind) {  // the same in every thread
      continue;
    }
    const WholeBox box = whole_box(boxes + n * 4);
    const Range columns = box.mask_columns(width);
    const Range rows = box.mask_rows(height);
    const int32_t first = columns.begin / kBits;
    const int32_t across = columns.empty() ? 0 : (columns.end - 1) / kBits - first + 1;
    const int64_t total = static_cast<int64_t>(across) * rows.size();
    uint64_t area = 0;
    uint64_t both = 0;
    for (int64_t i = threadIdx.x; i < total; i += kClassThreads) {
      const int64_t word = (rows.begin + i / across) * words + first + i % across;
      const uint32_t mask = bits[n * plane + word];
      area += __popc(mask);
      both += __popc(mask & own[word]);
    }
    sum_over_block(area, both);
    const bool stays =
        area > 0 && static_cast<double>(both) / static_cast<double>(area) <= overlap_fraction;
    if (stays) {
      for (int64_t i = threadIdx.x; i < total; i += kClassThreads) {
        const int64_t word = (rows.begin + i / across) * words + first + i % across;
        own[word] |= bits[n * plane + word];
      }
    }
    if (threadIdx.x == 0) {
      keep[p] = stays;
    }
    __syncthreads();
  }
}

std::tuple<Tensor, Tensor> prune_masks_cuda(const Tensor& masks, const Tensor& boxes,
                                            const Tensor& classes, const Tensor& scores,
                                            int64_t height, int64_t width,
                                            double overlap_fraction) {
  check_prune_inputs(masks, boxes, classes, scores, height, width);
  const c10::cuda::CUDAGuard guard(masks.device());
  const auto type = at::toOpMathType(masks.scalar_type());
  const Tensor held_masks = masks.to(type).contiguous();
  const Tensor held_boxes = boxes.to(type).contiguous();
  const Tensor held_classes = classes.contiguous();
  const Tensor order =
      std::get<1>(scores.sort(/*stable=*/true, /*dim=*/0, /*descending=*/true)).contiguous();
  Tensor keep = at::empty({masks.size(0)}, masks.options().dtype(at::kBool));
  const auto instances = static_cast<int32_t>(masks.size(0));
  if (instances == 0) {
    return {order, keep};
  }
  const int64_t words = (width + kBits - 1) / kBits;
  const auto options = masks.options().dtype(at::kInt);
  const Tensor bits = at::empty({instances, height, words}, options);
  const Tensor covered = at::zeros({instances, height, words}, options);
  const int64_t blocks = (height * words + kBitThreads - 1) / kBitThreads;
  D2EXT_CHECK_VALUE(blocks <= std::numeric_limits<int32_t>::max(), "prune_masks: a map of ", height,
                    " x ", width, " pixels is too large for a GPU");
  const auto stream = at::cuda::getCurrentCUDAStream();
  AT_DISPATCH_FLOATING_TYPES(type, "prune_masks_cuda", [&] {
    auto* words_of = reinterpret_cast<uint32_t*>(bits.mutable_data_ptr<int32_t>());
    const dim3 grid(static_cast<uint32_t>(blocks),
                    static_cast<uint32_t>(std::min(instances, 65535)));
    bits_kernel<scalar_t><<<grid, kBitThreads, 0, stream>>>(
        held_masks.const_data_ptr<scalar_t>(), held_boxes.const_data_ptr<scalar_t>(), instances,
        static_cast<int32_t>(masks.size(1)), static_cast<int32_t>(masks.size(2)),
        static_cast<int32_t>(height), static_cast<int32_t>(width), static_cast<int32_t>(words),
        words_of);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    prune_kernel<scalar_t><<<static_cast<uint32_t>(instances), kClassThreads, 0, stream>>>(
        words_of, held_boxes.const_data_ptr<scalar_t>(), held_classes.const_data_ptr<int64_t>(),
        order.const_data_ptr<int64_t>(), instances, static_cast<int32_t>(height),
        static_cast<int32_t>(width), static_cast<int32_t>(words), overlap_fraction,
        reinterpret_cast<uint32_t*>(covered.mutable_data_ptr<int32_t>()),
        keep.mutable_data_ptr<bool>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {order, keep};
}

}  // namespace

TORCH_LIBRARY_IMPL(d2ext, CUDA, m) {
  m.impl("prune_masks", prune_masks_cuda);
  m.impl("fuse_panoptic", fuse_panoptic_cuda);
}

}  // namespace d2ext
