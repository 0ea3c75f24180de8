// Soft non-maximum suppression as CornerNet publishes it (see d2ext/layers/soft_nms.py), one block
// for each class, without waiting for the host. In a round the threads weight the remaining boxes
// and find the next one to select; where boxes are discarded, those that take their places are
// found by prefix sums instead of the published loop.
#include <ATen/core/Tensor.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cumsum.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <limits>
#include <optional>
#include <tuple>

#include "../soft_nms.h"

namespace d2ext {
namespace {

using at::Tensor;

constexpr int32_t kThreads = 256;
constexpr int32_t kWarps = kThreads / 32;
constexpr uint32_t kAll = 0xffffffffu;

// The published array of all classes, in global memory, which the first cache level holds; and room
// for a round: as many numbers as there are boxes.
struct Rows {
  PixelBox* boxes;
  float* scores;
  int64_t* indices;
  bool* keep;
  float* former;      // scores before the round
  uint32_t* dropped;  // a bit for each place of the class
  int32_t* before;    // discarded boxes before each word of `dropped`
  int32_t* sources;   // boxes that move, the last one first
};

// Orders scores, NaN above all, and of equal ones the first place; 0 is below any.
__device__ __forceinline__ uint64_t sort_key(float score, int32_t place) {
  const uint32_t bits = __float_as_uint(score == 0.0f ? 0.0f : score);
  uint32_t order = bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
  order = score == score ? order : kAll;
  return static_cast<uint64_t>(order) << 32 | (kAll - static_cast<uint32_t>(place));
}

__device__ __forceinline__ uint64_t warp_maximum(uint64_t value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const uint64_t other = __shfl_xor_sync(kAll, value, offset);
    value = other > value ? other : value;
  }
  return value;
}

// One class: a block. Places are shared out in words of 32, one for each warp in turn.
template <Method kMethod>
class Rounds {
 public:
  __device__ Rounds(const Rows& rows, int64_t begin, int32_t size, const Settings& settings)
      : boxes_(rows.boxes + begin),
        scores_(rows.scores + begin),
        indices_(rows.indices + begin),
        former_(rows.former + begin),
        dropped_(rows.dropped + begin),
        before_(rows.before + begin),
        sources_(rows.sources + begin),
        settings_(settings),
        count_(size) {}

  // The number of rows that are not stale.
  __device__ int32_t run() {
    __shared__ uint64_t partial[kWarps];
    uint64_t own = scan(0);
    for (int32_t row = 0; row < count_; ++row) {
      own = warp_maximum(own);
      if (lane_ == 0) {
        partial[warp_] = own;
      }
      __syncthreads();
      const uint64_t best = warp_maximum(partial[lane_ % kWarps]);
      if (threadIdx.x == 0) {
        swap(row, static_cast<int32_t>(kAll - static_cast<uint32_t>(best)));
      }
      __syncthreads();
      bool any = false;
      own = weigh_rest(row, any);
      if (__syncthreads_or(any)) {
        settle(row + 1);
        own = scan(row + 1);
      }
    }
    return count_;
  }

 private:
  __device__ int32_t first_word(int32_t place) const { return place / 32 + warp_; }

  __device__ uint64_t scan(int32_t begin) const {
    uint64_t best = 0;
    for (int32_t i = begin / 32 * 32 + static_cast<int32_t>(threadIdx.x); i < count_;
         i += kThreads) {
      const uint64_t own = i >= begin ? sort_key(scores_[i], i) : 0;
      best = own > best ? own : best;
    }
    return best;
  }

  __device__ void swap(int32_t a, int32_t b) {
    const PixelBox box = boxes_[a];
    boxes_[a] = boxes_[b];
    boxes_[b] = box;
    const float score = scores_[a];
    scores_[a] = scores_[b];
    scores_[b] = score;
    const int64_t index = indices_[a];
    indices_[a] = indices_[b];
    indices_[b] = index;
  }

  __device__ uint64_t weigh_rest(int32_t row, bool& any) {
    const PixelBox selected = boxes_[row];
    const float area = pixel_area(selected);
    uint64_t best = 0;
    for (int32_t word = first_word(row + 1); word * 32 < count_; word += kWarps) {
      const int32_t i = word * 32 + lane_;
      bool dropped = false;
      if (i > row && i < count_) {
        const float score = scores_[i];
        const Weighed result = weigh<kMethod>(selected, area, boxes_[i], score, settings_);
        former_[i] = score;
        scores_[i] = result.score;
        dropped = result.dropped != 0;
        const uint64_t own = sort_key(result.score, i);
        best = own > best ? own : best;
      }
      const uint32_t bits = __ballot_sync(kAll, dropped);
      any |= bits != 0;
      if (lane_ == 0) {
        dropped_[word] = bits;
      }
    }
    return best;
  }

  // Discards boxes from place `begin` on. As published: the loop over the array overwrites one with
  // the array's last one, again until that is not discarded itself. So the places that become free
  // among the first ones take the boxes that stay among the last ones, from the end; what lies
  // beyond the new end is stale, with its former score. Except that if the loop ends by discarding,
  // at the new end, the box that it was overwritten with last stays there, with its new score.
  __device__ void settle(int32_t begin) {
    __shared__ int32_t total;
    if (warp_ == 0) {
      const int32_t sum = count_before(begin);
      if (lane_ == 0) {
        total = sum;
      }
    }
    __syncthreads();
    const int32_t discarded = total;
    const int32_t end = count_ - discarded;
    for (int32_t word = first_word(end); word * 32 < count_; word += kWarps) {
      const int32_t i = word * 32 + lane_;
      if (i >= end && i < count_ && !is_dropped(i)) {
        // Boxes after it that stay.
        sources_[count_ - 1 - i - (discarded - rank_of(i))] = i;
      }
    }
    __syncthreads();
    for (int32_t word = first_word(begin); word * 32 < end; word += kWarps) {
      const int32_t i = word * 32 + lane_;
      if (i >= begin && i < end && is_dropped(i)) {
        move(sources_[rank_of(i)], i);
      }
    }
    // Place `end` is discarded, and all that follow up to the first one that moves.
    const bool last = is_dropped(end);
    if (last && threadIdx.x == 0 && end + 1 < count_ && is_dropped(end + 1)) {
      move(end + 1, end);
    }
    __syncthreads();
    for (int32_t i = end + (last ? 1 : 0) + static_cast<int32_t>(threadIdx.x); i < count_;
         i += kThreads) {
      scores_[i] = former_[i];
    }
    count_ = end;
  }

  __device__ bool is_dropped(int32_t i) const { return dropped_[i / 32] >> (i % 32) & 1; }

  // Discarded boxes before place i.
  __device__ int32_t rank_of(int32_t i) const {
    return before_[i / 32] + __popc(dropped_[i / 32] & ((1u << (i % 32)) - 1));
  }

  __device__ void move(int32_t from, int32_t to) {
    boxes_[to] = boxes_[from];
    indices_[to] = indices_[from];
    scores_[to] = scores_[from];
  }

  // One warp: fills `before`; returns the number of all.
  __device__ int32_t count_before(int32_t begin) {
    int32_t total = 0;
    for (int32_t word = begin / 32; word * 32 < count_; word += 32) {
      const bool own = (word + lane_) * 32 < count_;
      const int32_t bits = own ? __popc(dropped_[word + lane_]) : 0;
      int32_t sum = bits;
#pragma unroll
      for (int offset = 1; offset < 32; offset *= 2) {
        const int32_t other = __shfl_up_sync(kAll, sum, offset);
        sum += lane_ >= offset ? other : 0;
      }
      if (own) {
        before_[word + lane_] = total + sum - bits;
      }
      total += __shfl_sync(kAll, sum, 31);
    }
    return total;
  }

  PixelBox* boxes_;
  float* scores_;
  int64_t* indices_;
  float* former_;
  uint32_t* dropped_;
  int32_t* before_;
  int32_t* sources_;
  const Settings settings_;
  int32_t count_;
  const int32_t lane_ = static_cast<int32_t>(threadIdx.x) % 32;
  const int32_t warp_ = static_cast<int32_t>(threadIdx.x) / 32;
};

template <Method kMethod>
__global__ void __launch_bounds__(kThreads)
    rounds_kernel(Rows rows, const int64_t* sizes, const int64_t* ends, int64_t count,
                  Settings settings) {
  const int64_t size = sizes[blockIdx.x];
  const int64_t begin = ends[blockIdx.x] - size;
  // Without a wait nobody can check them before.
  if (size <= 0 || begin < 0 || begin + size > count) {
    return;
  }
  const int32_t kept = Rounds<kMethod>(rows, begin, static_cast<int32_t>(size), settings).run();
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < kept; i += kThreads) {
    rows.keep[begin + i] = true;
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> soft_nms_cuda(const Tensor& boxes, const Tensor& scores,
                                                         const std::optional<Tensor>& corner_scores,
                                                         const Tensor& sizes, int64_t method,
                                                         double sigma, double iou_threshold,
                                                         double score_threshold,
                                                         double weight_exp) {
  const int64_t count = check_soft_nms(boxes, scores, corner_scores, sizes, method, sigma);
  D2EXT_CHECK_VALUE(!corner_scores.has_value(), "soft_nms: boxes are merged on the CPU only");
  D2EXT_CHECK_VALUE(count <= std::numeric_limits<int32_t>::max() - kThreads &&
                        sizes.size(0) <= std::numeric_limits<int32_t>::max(),
                    "soft_nms: too many boxes for a GPU: ", count);
  const c10::cuda::CUDAGuard guard(boxes.device());
  Tensor out_boxes = boxes.clone(at::MemoryFormat::Contiguous);
  Tensor out_scores = scores.clone(at::MemoryFormat::Contiguous);
  Tensor indices = at::arange(count, boxes.options().dtype(at::kLong));
  Tensor keep = at::zeros({count}, boxes.options().dtype(at::kBool));
  if (count == 0 || sizes.size(0) == 0) {
    return {out_boxes, out_scores, indices, keep};
  }
  const Tensor held_sizes = sizes.contiguous();
  const Tensor ends = at::cumsum(held_sizes, 0);
  const Tensor former = at::empty({count}, scores.options());
  const Tensor room = at::empty({3, count}, scores.options().dtype(at::kInt));
  auto* numbers = room.mutable_data_ptr<int32_t>();
  const Rows rows = {reinterpret_cast<PixelBox*>(out_boxes.mutable_data_ptr<float>()),
                     out_scores.mutable_data_ptr<float>(),
                     indices.mutable_data_ptr<int64_t>(),
                     keep.mutable_data_ptr<bool>(),
                     former.mutable_data_ptr<float>(),
                     reinterpret_cast<uint32_t*>(numbers),
                     numbers + count,
                     numbers + 2 * count};
  const Settings settings(method, sigma, iou_threshold, score_threshold, weight_exp);
  const auto launch = [&](auto kernel) {
    kernel<<<static_cast<uint32_t>(sizes.size(0)), kThreads, 0, at::cuda::getCurrentCUDAStream()>>>(
        rows, held_sizes.const_data_ptr<int64_t>(), ends.const_data_ptr<int64_t>(), count,
        settings);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  };
  switch (settings.method) {
    case Method::kHard:
      launch(rounds_kernel<Method::kHard>);
      break;
    case Method::kLinear:
      launch(rounds_kernel<Method::kLinear>);
      break;
    case Method::kGaussian:
      launch(rounds_kernel<Method::kGaussian>);
      break;
  }
  return {out_boxes, out_scores, indices, keep};
}

}  // namespace

TORCH_LIBRARY_IMPL(d2ext, CUDA, m) { m.impl("soft_nms", soft_nms_cuda); }

}  // namespace d2ext
